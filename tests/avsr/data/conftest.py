"""A feature store of one audio encoder, and a corpus for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from avsr.config import AugmentConfig, DataConfig, EncoderConfig
from avsr.data.features import FeatureStore
from avsr.data.manifest import Utterance, read_manifest
from avsr.data.transforms import Transforms
from avsr.models.encoders import build_encoder


class SoundStore(FeatureStore):
    """The store of one audio encoder; without a cache its features as the model makes them."""

    def sound(self, utterance: Utterance) -> Tensor:
        rows = self.load(utterance)["audio"]
        return self.encoders["audio"].run([rows])[0].half().float() if self.inside else rows

    def count(self, utterance: Utterance) -> int:
        return self.frames(utterance)["audio"]

    def forbid_encoding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def encode(waves: object) -> None:
            raise AssertionError("encoded again")

        monkeypatch.setattr(self.encoders["audio"], "run", encode)


@pytest.fixture
def store(tiny_whisper: Path, tmp_path: Path) -> Callable[..., FeatureStore]:
    def make(cache: Path | None | str = "", **options: Any) -> FeatureStore:
        encoder = {"name": str(tiny_whisper), **{k: options.pop(k) for k in ("pad_to_30s", "batch") if k in options}}
        folder = None if cache is None else str(cache or tmp_path / "cache")
        data = DataConfig(train="t", validation="v", cache=folder, **options)
        return SoundStore(
            {"audio": build_encoder(EncoderConfig(**encoder), "audio")}, data, Transforms(AugmentConfig(), None, 0)
        )

    return make


@pytest.fixture
def corpus(tmp_path: Path, make_corpus: Callable[..., Path]) -> list[Utterance]:
    return read_manifest(make_corpus(tmp_path / "corpus", seconds=[0.6, 0.25, 1.013, 0.61, 0.6, 0.333]))
