"""eSpeak NG through ctypes: a sentence becomes a waveform with the times of its words and phonemes.

The library's noise generators keep hidden state, so a waveform depends on everything spoken before it in the
same process. Reproducible audio needs a fresh process, a seed and a fixed order. A process that has started the
library should not fork: in the output mode that most programs use, it has a thread, and the child hangs. The mode used
here gives the same audio and starts no thread.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from avsr.errors import UserError

NATIVE_RATE = 22050  # Hz, of eSpeak NG; 22050 * 320 / 441 = 16000
INSTALL_HINT = "pip install 'flashsink[demo]'"

_SYNCHRONOUS = 2  # audio goes to the callback, on the calling thread
_OPTIONS = 0x8000 | 0x1  # return on errors instead of exit(), send phoneme events
_RATE, _VOLUME, _PITCH = 1, 2, 3  # parameters of espeak_SetParameter
_SAFE_VOLUME = 50  # at the library's own 100 a third of the voices clip
_UTF8 = 1
_END_OF_LIST, _WORD, _PHONEME = 0, 1, 7  # event types
_LONGEST_DATA_PATH = 150  # bytes; the library keeps the path in a buffer of 160


class _EventId(ctypes.Union):
    _fields_: ClassVar[Any] = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("text", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


_ARGUMENTS: dict[str, list[Any]] = {
    "espeak_Initialize": [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int],
    "espeak_SetSynthCallback": [_Callback],
    "espeak_SetVoiceByName": [ctypes.c_char_p],
    "espeak_SetParameter": [ctypes.c_int, ctypes.c_int, ctypes.c_int],
    "espeak_ng_SetRandSeed": [ctypes.c_long],
    "espeak_Synth": [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
        *(ctypes.c_void_p, ctypes.c_void_p),
    ],
}


@dataclass(frozen=True)
class Span:
    """A word or phoneme with its start and end in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Speech:
    """One spoken sentence.

    Attributes:
        waveform: float32 in [-1, 1], mono, at ``SAMPLE_RATE``.
        words: the sentence's words in order. eSpeak NG runs some short words together ("of the"); such a group is one
            span whose text has a space.
        phonemes: eSpeak NG's ASCII mnemonics; a leading ``'`` or ``,`` marks stress, ``_`` and ``_:`` are pauses. Each
            word begins and ends where a phoneme does.
    """

    waveform: np.ndarray
    words: list[Span]
    phonemes: list[Span]


def require_espeak() -> None:
    """Checks that the packages of the extra ``demo`` are installed, without loading or starting eSpeak NG.

    Raises:
        UserError: one is missing; the message has the command that installs it.
    """
    for package in ("espeakng_loader", "scipy", "soundfile", "av"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"synthetic speech needs the package {package}: run {INSTALL_HINT}")


class Espeak:
    """The library, started with one voice. Make at most one in a process, and never in one that forks."""

    def __init__(self, voice: str, rate: int, pitch: int, seed: int) -> None:
        """Starts eSpeak NG.

        Args:
            voice: eSpeak NG's voice, with an optional variant: ``gmw/en-US+f2``.
            rate: words a minute.
            pitch: 0 to 99, 50 is the voice's own.
            seed: of the noise in the voice.

        Raises:
            UserError: eSpeak NG is not installed, does not start or does not know the voice.
        """
        require_espeak()
        loader = importlib.import_module("espeakng_loader")
        try:
            self._library = ctypes.CDLL(loader.get_library_path())
            data = str(loader.get_data_path())
        except (OSError, RuntimeError) as error:
            raise UserError(f"eSpeak NG cannot be loaded ({error}): run {INSTALL_HINT} again") from error
        for name, arguments in _ARGUMENTS.items():
            getattr(self._library, name).argtypes = arguments
        self._library.espeak_SetSynthCallback.restype = None
        native_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _OPTIONS)
        if native_rate != NATIVE_RATE:
            long = len(data.encode()) > _LONGEST_DATA_PATH
            advice = "move the environment to a shorter path" if long else f"run {INSTALL_HINT} again"
            raise UserError(f"eSpeak NG does not start with its data in {data} (status {native_rate}): {advice}")
        self._chunks: list[np.ndarray] = []
        self._events: list[tuple[int, int, int, str]] = []
        self._callback = _Callback(self._receive)  # the library keeps a bare pointer: hold a reference
        self._library.espeak_SetSynthCallback(self._callback)
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"eSpeak NG has no voice {voice!r}")
        self._library.espeak_SetParameter(_RATE, rate, 0)
        self._library.espeak_SetParameter(_VOLUME, _SAFE_VOLUME, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(seed)
        self._voice = voice

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        """Called by the library with a piece of audio and a list of events; returning 0 continues."""
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events and events[index].type != _END_OF_LIST:
            event = events[index]
            if event.type in (_WORD, _PHONEME):
                # the union holds the mnemonic itself; `id.text` stops at the first NUL or after 8 bytes
                name = event.id.text.decode("utf-8", "replace") if event.type == _PHONEME else ""
                self._events.append((event.type, event.text_position, event.sample, name))
            index += 1
        return 0

    def speak(self, sentence: str, said_as: dict[str, str] | None = None) -> Speech:
        """Speaks one sentence.

        Args:
            sentence: lower-case words separated by single spaces.
            said_as: words that are spoken as something else; the returned spans have the written word.

        Raises:
            UserError: the library returned no audio or no words.
        """
        written = sentence.split(" ")
        spoken = [(said_as or {}).get(word, word) for word in written]
        self._chunks.clear()
        self._events.clear()
        text = " ".join(spoken).encode()
        status = self._library.espeak_Synth(text, len(text) + 1, 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        phoneme_events = [event for event in self._events if event[0] == _PHONEME]
        starts = _word_starts(self._events, spoken)
        if status != 0 or not self._chunks or not starts:
            raise UserError(f"eSpeak NG's voice {self._voice!r} did not speak {sentence!r} (status {status})")
        samples = np.concatenate(self._chunks)
        phonemes = _phoneme_spans(phoneme_events, len(samples))
        return Speech(_resample(samples), _word_spans(written, starts, phonemes), phonemes)


def _word_starts(events: list[tuple[int, int, int, str]], spoken: list[str]) -> list[tuple[int, int]]:
    """The (index of the word, index of its first phoneme) of each group of words that has sounds of its own.

    A word event precedes those of its phonemes, but by up to 30 ms of audio: the phonemes' times are better.
    """
    starts: list[tuple[int, int]] = []
    phoneme = 0
    for kind, position, _, _ in events:
        if kind == _PHONEME:
            phoneme += 1
            continue
        word = _word_at(spoken, position)
        if starts and starts[-1][1] == phoneme:
            continue  # the word before has no sound yet: they share a span
        if not starts or word > starts[-1][0]:
            starts.append((word, phoneme))
    return [start for start in starts if start[1] < phoneme]


def _word_at(words: list[str], position: int) -> int:
    """Index of the word at the character ``position`` (from 1) of the words joined by spaces."""
    end = 0
    for index, word in enumerate(words):
        end += len(word) + 1
        if position <= end:
            return index
    return len(words) - 1


def _phoneme_spans(events: list[tuple[int, int, int, str]], total: int) -> list[Span]:
    """A phoneme lasts until the next one starts, the last until sample ``total`` (of ``NATIVE_RATE``)."""
    edges = [min(event[2], total) for event in events] + [total]
    edges = np.maximum.accumulate(edges).tolist()
    return [
        Span(event[3], start / NATIVE_RATE, end / NATIVE_RATE)
        for event, start, end in zip(events, edges, edges[1:], strict=False)
    ]


def _word_spans(written: list[str], starts: list[tuple[int, int]], phonemes: list[Span]) -> list[Span]:
    """Spans of the words from the (index of the word, index of its first phoneme) of each group of words.

    A word lasts until the next one starts or, if that is earlier, until the pause after it starts. The first span
    also has the words before it (if any), so the spans always make up the whole sentence.
    """
    spans = []
    for i, (index, first) in enumerate(starts):
        next_index, next_first = starts[i + 1] if i + 1 < len(starts) else (len(written), len(phonemes))
        sounds = [phoneme for phoneme in phonemes[first:next_first] if not phoneme.text.startswith("_")]
        own = sounds or phonemes[first:next_first]
        text = " ".join(written[0 if i == 0 else index : next_index])
        spans.append(Span(text, own[0].start, own[-1].end))
    return spans


def _resample(samples: np.ndarray) -> np.ndarray:
    """int16 at ``NATIVE_RATE`` to float32 at ``SAMPLE_RATE``."""
    signal = importlib.import_module("scipy.signal")  # slow to import, and only workers need it
    wave = signal.resample_poly(samples.astype(np.float64) / 32768.0, 320, 441)
    return np.clip(wave, -1.0, 1.0).astype(np.float32)
