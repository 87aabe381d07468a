"""Small packages in the formats of the real ones, written from their description: ``ar``, ``queen.1c``,
``drascula.dat`` with ``.ALS``, a list of prompts with G.722. Every clip is a tone of a pitch of its own."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import struct
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GAME_RATE, PHONE_RATE = 11_025, 16_000
SOUNDS, TEXTS = "asterisk-core-sounds-en-g722", "asterisk-core-sounds-en"
QUEEN, DRASCULA = "flight-of-the-amazon-queen", "drascula"
FILES = {
    SOUNDS: f"{SOUNDS}_1.6.1-1_all.deb",
    TEXTS: f"{TEXTS}_1.6.1-1_all.deb",
    QUEEN: f"{QUEEN}_1.0.0-9_all.deb",
    DRASCULA: f"{DRASCULA}_1.0+ds4-2_all.deb",
}


def tone(pitch: float, seconds: float, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encode(wave: np.ndarray, codec: str, kind: str, rate: int) -> bytes:
    """A file of ``kind`` by FFmpeg."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        whole = codec == "g722"
        samples = (wave * 32767).astype(np.int16) if whole else wave
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16" if whole else "fltp", layout="mono")
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def mp3(pitch: float, seconds: float = 0.6) -> bytes:
    return encode(tone(pitch, seconds, GAME_RATE), "libmp3lame", "mp3", GAME_RATE)


def g722(pitch: float, seconds: float = 0.6) -> bytes:
    return encode(tone(pitch, seconds, PHONE_RATE), "g722", "g722", PHONE_RATE)


def als(pitch: float, seconds: float = 0.6) -> bytes:
    return (128 + 127 * tone(pitch, seconds, GAME_RATE)).round().astype(np.uint8).tobytes()


def dialogue(talk: int, hero: Sequence[tuple[int, str]], person: Sequence[tuple[int, str]], levels: int = 1) -> bytes:
    """A ``.DOG`` file: the hero's strings follow the levels, the person's have their offset at byte 22."""

    def strings(at: int, texts: Sequence[tuple[int, str]]) -> bytes:
        data = b""
        for number, text in texts:
            letters = text.encode("cp850")
            data += b"??" + struct.pack(">HB", number, len(letters)) + letters
            if letters:
                data += b"#" * (-(at + len(data)) % 4)
        return data

    start = 32 + 96 * abs(levels)
    own = strings(start, hero)
    other = start + len(own)
    head = struct.pack(">5h", levels, 7, talk, len(hero), len(person)).ljust(22, b"?") + struct.pack(">H", other)
    return b"." * 20 + head.ljust(start, b"?") + own + strings(other, person)


def container(files: Mapping[str, bytes]) -> bytes:
    """A ``queen.1c``; its first entry must be ``020001P2.SB``."""
    table = 30 + 21 * len(files)
    entries, data = b"", b""
    for name, content in files.items():
        entries += name.encode().ljust(12, b"\0") + struct.pack(">BII", 1, table + len(data), len(content))
        data += content
    return b"QTBL".ljust(28, b"-") + struct.pack(">H", len(files)) + entries + data


def texts_of_drascula(roles: Iterable[Sequence[str]], languages: int = 6, before: bytes = b"other tables") -> bytes:
    """A ``drascula.dat``; the first role's line 0 is empty and its line 1 "THAT'S THE SECOND BIGGEST...", as there."""

    def block(lines: Sequence[str]) -> bytes:
        data = b"\0\0"
        for line in lines:
            text = line.encode("cp850") + b"\0"
            text += b"\0" * (not line)
            data += struct.pack(">H", len(text) + 2) + text
        return data

    data = before
    for lines in roles:
        data += struct.pack(">H", len(lines))
        for language in range(languages):
            content = block(lines if language == 0 else ["NADA"] * len(lines))
            data += struct.pack(">H", len(content)) + content
    return data


def deb(path: Path, files: Mapping[str, bytes], more: Iterable[tuple[tarfile.TarInfo, bytes]] = ()) -> str:
    """Writes a package with ``files`` below ``./usr/share`` and returns its SHA-256."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"./usr/share/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info, content in more:
            archive.addfile(info, io.BytesIO(content))
    return pack(path, {"data.tar.xz": lzma.compress(packed.getvalue(), preset=0)})


def pack(path: Path, members: Mapping[str, bytes]) -> str:
    """Writes an ``ar`` archive with ``members`` after the usual two and returns its SHA-256."""
    data = b"!<arch>\n"
    for name, content in {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", **members}.items():
        data += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content
        data += b"\n" * (len(content) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def licence(package: str) -> dict[str, bytes]:
    return {f"doc/{package}/copyright": f"the licence of {package}".encode()}


QUEEN_FILES = {
    "020001P2.SB": mp3(520),
    "020001P1.SB": mp3(510),
    "020010J1.SB": mp3(530),
    "020011J1.SB": mp3(540),
    "030001P1.SB": mp3(550),
    "030001J1.SB": mp3(560),
    "JOE00421.SB": mp3(570),
    "990001P1.SB": mp3(580),  # no text
    "BUD1.DOG": dialogue(
        2,
        [(0x10, "Hello, Bud."), (0x11, "I paid 1,000 dollars!"), (0x12, "")],
        [(1, "Well...*P1It's a caf\u00e9!"), (5, "It was cut.")],
        levels=-2,
    ),
    "SEC2.DOG": dialogue(3, [(1, "Hello, Bud!")], [(1, "Nobody else says so.")]),
    "QUEEN2.JAS": b"first line\r\nIt's a door.\r\nthird line",
}
DRASCULA_LINES = [["", "THAT'S THE SECOND BIGGEST DOOR", "NOT REALLY", "HELLO BUD"], ["I AM THE COUNT"]]
DRASCULA_SOUNDS = {"1": als(610), "2": als(620), "3": als(630), "D0": als(640), "D9": als(650)}
PROMPTS = {
    "activated": ("Activated.", g722(710)),
    "digits/1": ("one", g722(720)),
    "beep": ("[this is a simple beep tone]", g722(730)),
    "silence/1": ("[1 second of silence]", g722(740)),
    "vm-h323": ("press # for an H.323 call", g722(750, 0.9)),
}


def write_debs(folder: Path) -> dict[str, str]:
    """All four packages; returns their SHA-256 by the packages' names."""
    listed = "; comment: none\n\n" + "".join(f"{name}: {text}\n" for name, (text, _) in PROMPTS.items())
    sounds = {f"asterisk/sounds/en_US_f_Allison/{name}.g722": sound for name, (_, sound) in PROMPTS.items()}
    roles = [*DRASCULA_LINES, *([["SO WHAT"]] * 8)]
    data = {f"scummvm/drascula/en/{name}.ALS": sound for name, sound in DRASCULA_SOUNDS.items()}
    data["scummvm/drascula/en/drascula.dat"] = texts_of_drascula(roles)
    contents = {
        SOUNDS: sounds,
        TEXTS: {f"doc/{TEXTS}/core-sounds-en.txt.gz": gzip.compress(listed.encode(), mtime=0)},
        QUEEN: {f"scummvm/{QUEEN}/queen.1c": container(QUEEN_FILES)},
        DRASCULA: data,
    }
    return {name: deb(folder / FILES[name], {**files, **licence(name)}) for name, files in contents.items()}
