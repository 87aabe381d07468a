"""What the model receives for an utterance: features of frozen encoders from a cache, or the inputs of its encoders.

With ``data.cache``, a frozen encoder runs once for every clip and version. Every encoder has a folder of the cache
(``avsr.data.feature_cache``), in which a clip's key is made of its files (path, size, modification time) and the
version. What is damaged is computed again. Without a cache, and for an encoder that is trained (LoRA), the store
returns encoder inputs and the model runs the encoder.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from avsr.config import DataConfig
from avsr.data.clip import Clip, load_clip
from avsr.data.complete import Complete
from avsr.data.feature_cache import DIGITS, FeatureCache
from avsr.data.feature_index import Array
from avsr.data.manifest import Utterance
from avsr.data.measured import Measured, lasting, refuse_other_content, refuse_other_length
from avsr.data.members import stamp
from avsr.data.rates import SAMPLE_RATE
from avsr.data.stopwatch import stage
from avsr.data.transforms import PLAIN, Transforms, Version
from avsr.errors import ClipError, UserError, at
from avsr.runtime.progress import ProgressBar

logger = logging.getLogger("avsr")
_GROUP = 64  # clips read before they are sorted by length and encoded
_LOOKUP = 4096  # clips whose keys are held at once


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

    Attributes:
        inside: streams that the model encodes itself.
        measured: of every clip read, by id.
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
        self.inside = set(encoders if data.cache is None else trained)
        self._data = data
        self._transforms = transforms
        self.measured: dict[str, Measured] = {}
        self._caches: dict[str, FeatureCache] = {}
        self._warned = False  # of a damaged file
        for name in self.active:
            if name not in self.inside:
                digest = hashlib.sha256(self.encoders[name].identity.encode()).hexdigest()[:16]
                folder = Path(str(data.cache)) / digest
                self._caches[name] = FeatureCache(folder, self.encoders[name].width, self._say_damaged)

    @property
    def widths(self) -> dict[str, int]:
        return {name: encoder.width for name, encoder in self.encoders.items()}

    @property
    def keeps(self) -> bool:
        """Whether features of a stream are in a cache."""
        return bool(self._caches)

    @property
    def needs(self) -> frozenset[str]:
        """The signals that the active streams are made of, "audio" and "video"."""
        return frozenset[str]().union(*(self.encoders[name].needs for name in self.active))

    @property
    def max_mismatch(self) -> float:
        return self._data.max_mismatch

    @property
    def limits(self) -> tuple[float, float]:
        """Seconds of the shortest and the longest clip that is permitted."""
        most = min([self._data.max_seconds, *(self.encoders[name].max_seconds for name in self.active)])
        return self._data.min_seconds, most

    @property
    def reads_before(self) -> bool:
        """Whether :meth:`prepare` reads clips or features; it does not where durations are trusted."""
        return self._data.verify or bool(self._caches)

    def refresh(self) -> None:
        """Learns what the cache holds by now: before :meth:`prepare`, what others have added since the last time; after
        it, what the other ranks have. Every rank must call it at the same time. When nothing is new it lists one folder
        for every stream, on rank 0, and at the first time reads one file.

        Raises:
            UserError: the cache cannot be read.
        """
        for cache in self._caches.values():
            cache.refresh()

    def complete(self, content: str, versions: Sequence[Version]) -> Complete:
        """Which rows of a manifest the cache holds in ``versions``, as it is known since the last :meth:`refresh`;
        ``content`` names the manifest and the state of its files."""
        made = [
            f"{self.encoders[name].identity} {self._transforms.identity(version, self.encoders[name].needs)}"
            for name in self._caches
            for version in versions
        ]
        names = {name: cache.names for name, cache in self._caches.items()}
        return Complete(Path(str(self._data.cache)), f"{content} {self.active} {made}", names)

    def prepare(
        self, utterances: Sequence[Utterance], *, title: str, versions: Sequence[Version] = (PLAIN,), shown: bool = True
    ) -> dict[str, str]:
        """Reads every clip that the cache lacks and encodes it for the cache. Of clips that it has, no file is opened.

        Returns:
            By id, why an utterance cannot be used.

        Raises:
            UserError: the cache cannot be used.
        """
        if not self.reads_before:
            self.measured.update((u.id, lasting(u.duration)) for u in utterances)
            return {}
        for u in utterances:  # another manifest may use the same ids
            self.measured.pop(u.id, None)
        todo = utterances if self.inside else self._lacking(utterances, versions)
        bad: dict[str, str] = {}
        if not todo:
            return bad
        try:
            with ProgressBar(title, len(todo), shown=shown) as bar:
                for first in range(0, len(todo), _GROUP):
                    group = list(todo[first : first + _GROUP])
                    clips = {}
                    for utterance in group:
                        try:
                            clips[utterance.id] = self._checked(utterance)
                        except UserError as error:
                            bad[utterance.id] = str(error)
                    for version in versions:
                        self._fill([u for u in group if u.id in clips and u.id not in bad], clips, version, bad)
                    bar.advance(len(group), f"{len(bad)} unusable" if bad else "")
        finally:  # also when it is stopped
            for cache in self._caches.values():
                cache.flush()
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
            cache = None if name in self.inside else self._caches[name]
            with stage("cache"):
                key = "" if cache is None else self._key(name, utterance, version)
                held = None if cache is None else cache.read(key)
            if held is not None:
                out[name] = torch.from_numpy(held).float()
                continue
            try:
                if clip is None:
                    with stage("decode"):
                        clip = self._checked(utterance)
                    with stage("augment"):
                        clip = self._transforms(clip, utterance, version)
                with stage("encoder input"):
                    inputs = self.encoders[name].prepare(clip)
            except UserError as error:
                raise ClipError(str(error)) from None
            if cache is None:
                out[name] = inputs
                continue
            if get_worker_info() is not None and torch.cuda.is_available():  # a forked process cannot use the device
                raise ClipError(
                    f"{at(utterance.where)}{cache.where(key)} is damaged or gone, and a loader process cannot encode: "
                    "the next start (resume=true) does, or set data.workers=0"
                )
            features = self.encoders[name].run([inputs])[0].half().cpu()
            key = self._key(name, replace(utterance, stamps=(None, None)), version)  # the file may have changed
            cache.keep(key, _finite(features, utterance))
            out[name] = features.float()
        return out

    def frames(self, utterance: Utterance, version: Version = PLAIN) -> dict[str, int]:
        """Encoder frames by stream, of an utterance that was prepared or loaded in this version.

        Raises:
            ClipError: its features are damaged, and the clip cannot be used any more.
        """
        out = {}
        for name in self.active:
            if name in self.inside:
                out[name] = self.encoders[name].frames(*self.measured[utterance.id])
            else:
                held = self._caches[name].frames(self._key(name, utterance, version))
                out[name] = held or len(self.load(utterance, version, [name])[name])
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
        # of the files as they are now, whatever an index knows of them
        fresh = [replace(u, stamps=(None, None)) for u in utterances]
        keys = {name: {u.id: self._key(name, u, version) for u in fresh} for name in self._caches}
        lacking = {
            name: {id for id, there in zip(keys[name], cache.find(list(keys[name].values())), strict=True) if not there}
            for name, cache in self._caches.items()
        }
        inputs: dict[str, dict[str, Tensor]] = {name: {} for name in self._caches}
        for utterance in utterances:
            streams = [name for name in self._caches if utterance.id in lacking[name]]
            try:
                clip = self._transforms(clips[utterance.id], utterance, version) if streams else Clip()
                for name in streams:
                    inputs[name][utterance.id] = self.encoders[name].prepare(clip)
            except UserError as error:
                bad[utterance.id] = f"{at(utterance.where)}{error}"
        by_id = {utterance.id: utterance for utterance in utterances}
        for name, rows in inputs.items():
            for id, features in zip(rows, self.encoders[name].run(list(rows.values())), strict=True):
                try:
                    self._caches[name].add(keys[name][id], _finite(features.half().cpu(), by_id[id]))
                except ClipError as error:
                    bad[id] = str(error)

    def _lacking(self, utterances: Sequence[Utterance], versions: Sequence[Version]) -> list[Utterance]:
        """The utterances of which the cache lacks something."""
        lacking = []
        for first in range(0, len(utterances), _LOOKUP):
            part = list(utterances[first : first + _LOOKUP])
            there = [
                cache.find([self._key(name, u, version) for u in part])
                for name, cache in self._caches.items()
                for version in versions
            ]
            lacking += [u for u, *found in zip(part, *there, strict=True) if not all(found)]
        return lacking

    def refuse_length(self, utterance: Utterance, seconds: float) -> None:
        """Raises a ``UserError`` if a clip of so many seconds is not as its line declares it, or not permitted."""
        refuse_other_length(utterance, seconds, self._data.max_mismatch)
        least, most = self.limits
        if not least <= seconds <= most:
            raise UserError(
                f"{at(utterance.where)}{utterance.audio or utterance.video} lasts {seconds:.2f} s, allowed are "
                f"{least:g} to {most:g} s (data.min_seconds, data.max_seconds, and the encoder's positions)"
            )

    def _checked(self, utterance: Utterance) -> Clip:
        """The unchanged clip, within the limits and as its line declares it; records what was measured."""
        clip = load_clip(utterance, self.needs, self._data.max_mismatch)
        self.refuse_length(utterance, clip.seconds)
        refuse_other_content(utterance, self.needs)
        self.measured[utterance.id] = clip.measured
        return clip

    def _say_damaged(self, path: Path, problem: str) -> None:
        """Once for all files."""
        if not self._warned:
            logger.warning("data.cache: %s is damaged (%s); it and others like it are computed again", path, problem)
            self._warned = True

    def _key(self, name: str, utterance: Utterance, version: Version) -> str:
        files = zip((utterance.audio, utterance.video), utterance.stamps, strict=True)
        state = "+".join(_stamp(path, known) for path, known in files if path is not None)
        if utterance.cut is not None:
            state += f" {utterance.cut}"
        identity = self._transforms.identity(version, self.encoders[name].needs)
        if identity:
            state += f" {utterance.id} {utterance.speaker} {identity}"
        return hashlib.sha256(f"{state} {self.active}".encode()).hexdigest()[:DIGITS]


def _stamp(path: Path, known: str | None) -> str:
    try:
        return f"{path} {known or stamp(path)}"
    except (OSError, UserError):  # of a container that is damaged
        return f"{path} missing"


def _finite(features: Tensor, utterance: Utterance) -> Array:
    """Raises a ``ClipError`` for features (T, D) that float16 does not hold."""
    if not bool(features.isfinite().all()):
        clip = utterance.audio or utterance.video
        raise ClipError(f"{at(utterance.where)}{clip}: the encoder's features of it are not finite in float16")
    return features.numpy()
