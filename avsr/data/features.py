"""What the model receives for an utterance: features of frozen encoders from a cache, or the inputs of its encoders.

With ``data.cache``, a frozen encoder runs once for every clip and version. A cache file is a float16 array (T, D); its
folder is named after the encoder, the file itself after the clip's files (path, size, modification time) and the
version. One that is damaged is computed again. Without a cache, and for an encoder that is trained (LoRA), the store
returns encoder inputs and the model runs the encoder.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from avsr.config import DataConfig
from avsr.data.clip import Clip, load_clip
from avsr.data.manifest import Utterance
from avsr.data.measured import Measured, lasting, refuse_other_content, refuse_other_length
from avsr.data.members import stamp
from avsr.data.rates import SAMPLE_RATE
from avsr.data.transforms import PLAIN, Transforms, Version
from avsr.errors import ClipError, UserError, at
from avsr.runtime.folders import write_flushed
from avsr.runtime.progress import ProgressBar

logger = logging.getLogger("avsr")
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
        self._warned = False  # of a damaged file
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
            held = None if path is None else self._read_cached(path, name)
            if held is not None:
                out[name] = torch.from_numpy(held).float()
                continue
            try:
                clip = clip or self._transforms(self._checked(utterance), utterance, version)
                inputs = self.encoders[name].prepare(clip)
            except UserError as error:
                raise ClipError(str(error)) from None
            if path is None:
                out[name] = inputs
                continue
            if get_worker_info() is not None and torch.cuda.is_available():  # a forked process cannot use the device
                raise ClipError(
                    f"{at(utterance.where)}{path} is damaged or gone, and a loader process cannot encode: the next "
                    "start (resume=true) does, or set data.workers=0"
                )
            features = self.encoders[name].run([inputs])[0].half().cpu()
            _save(path, features, utterance)
            out[name] = features.float()
        return out

    def frames(self, utterance: Utterance, version: Version = PLAIN) -> dict[str, int]:
        """Encoder frames by stream, of an utterance that was prepared or loaded in this version.

        Raises:
            ClipError: its cache file is damaged, and the clip cannot be used any more.
        """
        out = {}
        for name in self.active:
            if name in self.inside:
                out[name] = self.encoders[name].frames(*self.measured[utterance.id])
            else:
                held = self._read_cached(self._path(name, utterance, version), name, shape_alone=True)
                out[name] = len(self.load(utterance, version, [name])[name] if held is None else held)
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
                try:
                    _save(self._path(name, by_id[key], version), features.half().cpu(), by_id[key])
                except ClipError as error:
                    bad[key] = str(error)

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

    def _read_cached(self, path: Path, name: str, *, shape_alone: bool = False) -> np.ndarray[Any, Any] | None:
        """The (T, D) float16 features in a file of the stream ``name``; None if there is none or it is damaged, which
        is said once for all files. ``shape_alone``: the values are not looked at."""
        try:
            held: np.ndarray[Any, Any] = np.load(path, allow_pickle=False, mmap_mode="r" if shape_alone else None)
            problem = _damage(held, self.encoders[name].width, shape_alone)
        except FileNotFoundError:
            return None
        except Exception as error:  # numpy raises what it likes for a damaged header
            problem = str(error) or type(error).__name__
        if not problem:
            return held
        if not self._warned:
            logger.warning("data.cache: %s is damaged (%s); it and others like it are computed again", path, problem)
            self._warned = True
        return None

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
        return f"{path} {stamp(path)}"
    except (OSError, UserError):  # of a container that is damaged
        return f"{path} missing"


def _damage(held: np.ndarray[Any, Any], width: int, shape_alone: bool) -> str:
    """What is wrong with the features of a cache file, or ""."""
    if held.dtype != np.float16 or held.ndim != 2 or held.shape[1] != width or not len(held):
        return f"{held.dtype} {held.shape}, expected float16 (frames, {width})"
    if shape_alone:
        return ""
    if not np.isfinite(held).all():
        return "its values are not finite"
    return "" if held.any() else "all its values are zero"


def _save(path: Path, features: Tensor, utterance: Utterance) -> None:
    if not bool(features.isfinite().all()):
        clip = utterance.audio or utterance.video
        raise ClipError(f"{at(utterance.where)}{clip}: the encoder's features of it are not finite in float16")
    content = io.BytesIO()
    try:
        path.parent.mkdir(exist_ok=True)
        np.save(content, features.numpy(), allow_pickle=False)
        write_flushed(path, content.getvalue())
    except OSError as error:
        raise UserError(f"data.cache: cannot write features to {path.parent}: {error}") from error
