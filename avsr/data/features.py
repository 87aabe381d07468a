"""Encoder features on disk: frozen encoders run once an utterance.

A file of the cache is a float16 array (T, D) named after the sound file's path, size and time of change, in a
folder named after the encoder. Features are rounded to float16 whether they come from the cache or not, so both
give the same numbers.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avsr.config import DataConfig, EncoderConfig
from avsr.data.audio import SAMPLE_RATE, load_audio
from avsr.data.manifest import Utterance
from avsr.errors import UserError
from avsr.models.whisper import AudioEncoder
from avsr.progress import ProgressBar

_GROUP = 64  # clips read before they are sorted by length and encoded


class FeatureStore:
    """Features of utterances, from the cache or the encoder."""

    def __init__(self, encoder: EncoderConfig, data: DataConfig, device: torch.device | str = "cpu") -> None:
        self._encoder = AudioEncoder(encoder, device)
        self.width = self._encoder.width
        self._limits = (data.min_seconds, data.max_seconds)
        self._folder: Path | None = None
        self._frames: dict[str, int] = {}
        if data.cache is not None:
            name = hashlib.sha256(self._encoder.identity.encode()).hexdigest()[:16]
            self._folder = Path(data.cache) / name
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"data.cache: cannot write to {data.cache}: {error}") from error

    def prepare(self, utterances: Sequence[Utterance], *, title: str, shown: bool = True) -> dict[str, str]:
        """Reads every sound file that the cache lacks and, with a cache, encodes it.

        Returns:
            The reason of every utterance that cannot be used, by id.
        """
        todo = [u for u in utterances if self._folder is None or not self._path(u).is_file()]
        bad: dict[str, str] = {}
        if not todo:
            return bad
        with ProgressBar(title, len(todo), shown=shown) as bar:
            for first in range(0, len(todo), _GROUP):
                group = todo[first : first + _GROUP]
                waves = self._read(group, lambda u, reason: bad.update({u.id: reason}))
                if self._folder is not None and waves:
                    for utterance, features in zip(
                        [u for u, _ in waves], self._encoder.encode([w for _, w in waves]), strict=True
                    ):
                        self._save(self._path(utterance), features)
                bar.advance(len(group), f"{len(bad)} unusable" if bad else "")
        return bad

    def load(self, utterance: Utterance) -> Tensor:
        """(T, D) float32.

        Raises:
            UserError: the sound file cannot be used.
        """
        if self._folder is None:
            wave = self._checked(utterance)
            return self._encoder.encode([wave])[0].half().float().cpu()
        path = self._path(utterance)
        if not path.is_file():
            self._save(path, self._encoder.encode([self._checked(utterance)])[0])
        return torch.from_numpy(self._read_cached(path)).float()

    def frames(self, utterance: Utterance) -> int:
        """Encoder frames of a prepared utterance."""
        if self._folder is None:
            return self._frames[utterance.id]
        return int(self._read_cached(self._path(utterance), mmap_mode="r").shape[0])

    def _read_cached(self, path: Path, **options: Any) -> np.ndarray[Any, Any]:
        try:
            array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False, **options)
            return array
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"data.cache: {path} is damaged; delete it: {error}") from error

    def _read(
        self, group: Sequence[Utterance], refuse: Callable[[Utterance, str], None]
    ) -> list[tuple[Utterance, Tensor]]:
        waves = []
        for utterance in group:
            try:
                wave = self._checked(utterance)
                waves.append((utterance, wave))
                self._frames[utterance.id] = -(-len(wave) // 320)
            except UserError as error:
                refuse(utterance, str(error))
        return waves

    def _checked(self, utterance: Utterance) -> Tensor:
        wave = load_audio(utterance.audio, where=utterance.where)
        seconds = len(wave) / SAMPLE_RATE
        least, most = self._limits
        most = min(most, self._encoder.max_frames * 320 / SAMPLE_RATE)
        if not least <= seconds <= most:
            place = f"{utterance.where}: " if utterance.where else ""
            raise UserError(
                f"{place}{utterance.audio} lasts {seconds:.2f} s, allowed are {least:g} to {most:g} s "
                "(data.min_seconds, data.max_seconds, and the encoder's positions)"
            )
        return wave

    def _path(self, utterance: Utterance) -> Path:
        assert self._folder is not None
        try:
            stat = utterance.audio.stat()
            state = f"{stat.st_size} {stat.st_mtime_ns}"
        except OSError:
            state = "missing"
        key = hashlib.sha256(f"{utterance.audio} {state}".encode()).hexdigest()
        return self._folder / key[:2] / f"{key[2:34]}.npy"

    def _save(self, path: Path, features: Tensor) -> None:
        part = path.with_name(f"{path.stem}.part{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            with part.open("wb") as file:
                np.save(file, features.half().cpu().numpy(), allow_pickle=False)
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"data.cache: cannot write features to {path.parent}: {error}") from error
