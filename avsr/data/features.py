"""What the model receives for an utterance: features of frozen encoders from a cache, or the inputs of its encoders.

With ``data.cache``, a frozen encoder runs once for every clip and version. A cache file is a float16 array (T, D); its
folder is named after the encoder, the file itself after the clip's files (path, size, modification time) and the
version. Without a cache, and for an encoder that is trained (LoRA), the store returns encoder inputs and the model runs
the encoder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from avsr.config import DataConfig
from avsr.data.clip import Clip, load_clip
from avsr.data.manifest import Utterance
from avsr.data.measured import Measured, lasting, refuse_other_content, refuse_other_length
from avsr.data.rates import SAMPLE_RATE
from avsr.data.transforms import PLAIN, Transforms, Version
from avsr.errors import ClipError, UserError, at
from avsr.runtime.folders import part_of
from avsr.runtime.progress import ProgressBar

_GROUP = 64  # clips read before they are sorted by length and encoded


class Encoder(Protocol):
    """What a store needs from a stream's encoder; ``avsr.models.encoder`` documents the members."""

    width: int
    frames_per_second: int
    max_seconds: float
    needs: frozenset[str]
    identity: str

    def frames(self, samples: int, video_frames: int) -> int: ...

    def prepare(self, clip: Clip) -> Tensor: ...

    def run(self, inputs: list[Tensor]) -> list[Tensor]: ...


class FeatureStore:
    """Features or encoder inputs of utterances, by stream.

    Args:
        encoders: by stream.
        data: cache and limits.
        transforms: makes the versions.
        trained: streams whose encoders are trained, and therefore never cached.
        active: streams to read; default all.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        data: DataConfig,
        transforms: Transforms,
        trained: Iterable[str] = (),
        active: Sequence[str] | None = None,
    ) -> None:
        self.encoders = dict(encoders)
        self.active = list(encoders if active is None else active)
        self.inside = set(encoders if data.cache is None else trained)  # streams that the model encodes itself
        self._data = data
        self._transforms = transforms
        self.measured: dict[str, Measured] = {}  # of every clip read, by id
        self._folders: dict[str, Path] = {}
        for name in self.active:
            if name not in self.inside:
                digest = hashlib.sha256(self.encoders[name].identity.encode()).hexdigest()[:16]
                self._folders[name] = Path(str(data.cache)) / digest
                try:
                    self._folders[name].mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"data.cache: cannot write to {data.cache}: {error}") from error

    @property
    def widths(self) -> dict[str, int]:
        return {name: encoder.width for name, encoder in self.encoders.items()}

    def prepare(
        self, utterances: Sequence[Utterance], *, title: str, versions: Sequence[Version] = (PLAIN,), shown: bool = True
    ) -> dict[str, str]:
        """Reads every clip that the cache lacks and encodes it for the cache.

        Returns:
            By id, why an utterance cannot be used.
        """
        if not self._data.verify and not self._folders:
            self.measured.update((u.id, lasting(u.duration)) for u in utterances)
            return {}
        for u in utterances:  # another manifest may use the same ids
            self.measured.pop(u.id, None)
        todo = [u for u in utterances if self.inside or any(self._missing(u, version) for version in versions)]
        bad: dict[str, str] = {}
        if not todo:
            return bad
        with ProgressBar(title, len(todo), shown=shown) as bar:
            for first in range(0, len(todo), _GROUP):
                group = todo[first : first + _GROUP]
                clips = {}
                for utterance in group:
                    try:
                        clips[utterance.id] = self._checked(utterance)
                    except UserError as error:
                        bad[utterance.id] = str(error)
                for version in versions:
                    self._fill([u for u in group if u.id in clips and u.id not in bad], clips, version, bad)
                bar.advance(len(group), f"{len(bad)} unusable" if bad else "")
        return bad

    def load(
        self, utterance: Utterance, version: Version = PLAIN, streams: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """(T, D) float32 features by stream, or (T, K) inputs for the streams of ``inside``.

        Raises:
            ClipError: the clip cannot be used.
            UserError: the cache cannot be used.
        """
        clip: Clip | None = None
        out: dict[str, Tensor] = {}
        for name in self.active if streams is None else streams:
            path = None if name in self.inside else self._path(name, utterance, version)
            if path is not None and path.is_file():
                out[name] = torch.from_numpy(_read_cached(path)).float()
                continue
            try:
                clip = clip or self._transforms(self._checked(utterance), utterance, version)
                inputs = self.encoders[name].prepare(clip)
            except UserError as error:
                raise ClipError(str(error)) from None
            if path is None:
                out[name] = inputs
                continue
            features = self.encoders[name].run([inputs])[0].half().cpu()
            _save(path, features)
            out[name] = features.float()
        return out

    def frames(self, utterance: Utterance, version: Version = PLAIN) -> dict[str, int]:
        """Encoder frames by stream, of an utterance that was prepared or loaded in this version."""
        out = {}
        for name in self.active:
            if name in self.inside:
                out[name] = self.encoders[name].frames(*self.measured[utterance.id])
            else:
                out[name] = int(_read_cached(self._path(name, utterance, version), mmap_mode="r").shape[0])
        return out

    def seconds(self, utterance: Utterance) -> float:
        """Length in seconds of an utterance that was loaded."""
        if utterance.id not in self.measured:
            self.measure(utterance, self.frames(utterance))
        return self.measured[utterance.id].seconds

    def measure(self, utterance: Utterance, frames: Mapping[str, int]) -> None:
        """Measures an utterance by its ``frames`` if all of its features were in the cache.

        Raises:
            UserError: it has another length than its line declares.
        """
        if utterance.id in self.measured:
            return
        seconds = max(count / self.encoders[name].frames_per_second for name, count in frames.items())
        refuse_other_length(utterance, seconds, self._data.max_mismatch)
        self.measured[utterance.id] = Measured(round(seconds * SAMPLE_RATE), 0)

    def _fill(
        self, utterances: Sequence[Utterance], clips: Mapping[str, Clip], version: Version, bad: dict[str, str]
    ) -> None:
        """Encodes what the cache lacks of a version; an utterance whose version cannot be made is added to ``bad``."""
        inputs: dict[str, dict[str, Tensor]] = {name: {} for name in self._folders}
        for utterance in utterances:
            lacking = [name for name in self._folders if not self._path(name, utterance, version).is_file()]
            try:
                clip = self._transforms(clips[utterance.id], utterance, version) if lacking else Clip()
                for name in lacking:
                    inputs[name][utterance.id] = self.encoders[name].prepare(clip)
            except UserError as error:
                bad[utterance.id] = f"{at(utterance.where)}{error}"
        by_id = {utterance.id: utterance for utterance in utterances}
        for name, rows in inputs.items():
            for key, features in zip(rows, self.encoders[name].run(list(rows.values())), strict=True):
                _save(self._path(name, by_id[key], version), features.half().cpu())

    def _missing(self, utterance: Utterance, version: Version) -> bool:
        return any(not self._path(name, utterance, version).is_file() for name in self._folders)

    def _checked(self, utterance: Utterance) -> Clip:
        """The unchanged clip, within the limits and as its line declares it; records what was measured."""
        encoders = [self.encoders[name] for name in self.active]
        needs = frozenset[str]().union(*(encoder.needs for encoder in encoders))
        clip = load_clip(utterance, needs, self._data.max_mismatch)
        refuse_other_length(utterance, clip.seconds, self._data.max_mismatch)
        most = min([self._data.max_seconds, *(encoder.max_seconds for encoder in encoders)])
        if not self._data.min_seconds <= clip.seconds <= most:
            raise UserError(
                f"{at(utterance.where)}{utterance.audio or utterance.video} lasts {clip.seconds:.2f} s, allowed are "
                f"{self._data.min_seconds:g} to {most:g} s "
                "(data.min_seconds, data.max_seconds, and the encoder's positions)"
            )
        refuse_other_content(utterance)
        self.measured[utterance.id] = clip.measured
        return clip

    def _path(self, name: str, utterance: Utterance, version: Version) -> Path:
        state = "+".join(_stamp(path) for path in (utterance.audio, utterance.video) if path is not None)
        if utterance.cut is not None:
            state += f" {utterance.cut}"
        identity = self._transforms.identity(version, self.encoders[name].needs)
        if identity:
            state += f" {utterance.id} {utterance.speaker} {identity}"
        key = hashlib.sha256(f"{state} {self.active}".encode()).hexdigest()
        return self._folders[name] / key[:2] / f"{key[2:34]}.npy"


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
        return f"{path} {stat.st_size} {stat.st_mtime_ns}"
    except OSError:
        return f"{path} missing"


def _read_cached(path: Path, **options: Any) -> np.ndarray[Any, Any]:
    try:
        array: np.ndarray[Any, Any] = np.load(path, allow_pickle=False, **options)
        return array
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"data.cache: {path} is damaged; delete it: {error}") from error


def _save(path: Path, features: Tensor) -> None:
    part = part_of(path)
    try:
        path.parent.mkdir(exist_ok=True)
        with part.open("wb") as file:
            np.save(file, features.numpy(), allow_pickle=False)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"data.cache: cannot write features to {path.parent}: {error}") from error
