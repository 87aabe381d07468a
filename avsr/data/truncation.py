"""Sound and video files that are shorter than their own headers say, which decoders accept.

Formats that state their size in bytes: WAV and AVI (RIFF, RF64), AIFF, AU, CAF, W64, Matroska and WebM, mp4 and mov,
wma and wmv, and MP3 with a Xing, Info or VBRI header. Ogg marks its last page. What states a duration alone is found by
time stamps (``avsr.data.container``). Nothing says how long raw streams (aac, ac3, amr, h264, MP3 without such a
header), MPEG-TS and MPEG-PS, nut, y4m and gif should be.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

from avsr.data.members import open_media

Order = Literal["little", "big"]
_ENDLESS = 0x7FFFF000  # writers that cannot seek back leave sizes near 2^31 or 2^32
_MOST_PARTS = 100_000  # fragments of an mp4
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_W64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_OGG_LAST = 4  # flag of a page
_OGG_PAGE = 65_307  # bytes of the largest page
_MP3_SLACK = 0.01  # share of the stated bytes that tools which edit tags leave wrong


def truncated(path: Path) -> str:
    """Why a file is not whole; "" if it is, or its format does not tell."""
    with open_media(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(16)
        if head.startswith(b"OggS"):
            return "" if _ogg_ends(file, size) else "its last page is missing"
        for mark, at, promised in _FORMATS:
            if head[at : at + len(mark)] == mark:
                bytes_promised = promised(file)
                return f"it has {size} of {bytes_promised} bytes" if size < bytes_promised else ""
    return ""


def _number(file: BinaryIO, at: int, count: int, order: Order = "little") -> int:
    """The unsigned number of ``count`` bytes there; 0 where the file has ended."""
    file.seek(at)
    data = file.read(count)
    return int.from_bytes(data, order) if len(data) == count else 0


def _known(size: int) -> int:
    """A 32-bit size, or 0 for one that stands for "unknown"."""
    return size if size < _ENDLESS else 0


def _riff(file: BinaryIO) -> int:
    """An AVI above 1 GB has several parts; the last byte of padding of a WAV is often missing."""
    end = 0
    for _ in range(_MOST_PARTS):
        file.seek(end + end % 2)
        if file.read(4) != b"RIFF" or not (size := _known(_number(file, end + end % 2 + 4, 4))):
            break
        end += end % 2 + 8 + size
    return end - 1


def _rf64(file: BinaryIO) -> int:
    return 8 + _number(file, 20, 8)


def _form(file: BinaryIO) -> int:
    return 8 + _known(_number(file, 4, 4, "big")) - 1


def _au(file: BinaryIO, order: Order = "big") -> int:
    return _number(file, 4, 4, order) + _known(_number(file, 8, 4, order))


def _little_au(file: BinaryIO) -> int:
    return _au(file, "little")


def _caf(file: BinaryIO) -> int:
    end = 8
    for _ in range(_MOST_PARTS):
        size = _number(file, end + 4, 8, "big")
        if not 0 < size < 2**63:  # -1 is "to the end of the file"
            break
        end += 12 + size
    return end


def _w64(file: BinaryIO) -> int:
    return _number(file, 16, 8)


def _boxes(file: BinaryIO) -> int:
    end = 0
    for _ in range(_MOST_PARTS):
        file.seek(end + 4)
        kind, size = file.read(4), _number(file, end, 4, "big")
        if size == 1:
            size = _number(file, end + 8, 8, "big")
        if not kind.isalnum() or size < 8:  # what follows the boxes is not ours; 0 is "to the end of the file"
            break
        end += size
    return end


def _matroska(file: BinaryIO) -> int:
    at = 0
    for _ in range(8):  # the header, possibly void elements, the segment
        kind, start = _element_number(file, at, keep_length=True)
        size, start = _element_number(file, start)
        if kind == 0x18538067:
            return start + size if size else 0
        at = start + size
    return 0


def _element_number(file: BinaryIO, at: int, keep_length: bool = False) -> tuple[int, int]:
    """A number of EBML and the place after it; 0 for the one that stands for "unknown"."""
    first = _number(file, at, 1)
    length = 9 - first.bit_length()
    value = _number(file, at, length, "big") if length < 9 else 0
    if not keep_length:
        value &= (1 << 7 * length) - 1
        value = 0 if value == (1 << 7 * length) - 1 else value
    return value, at + length


def _asf(file: BinaryIO) -> int:
    at, end = 30, _number(file, 16, 8)
    while at + 24 <= end:
        file.seek(at)
        kind, size = file.read(16), _number(file, at + 16, 8)
        if kind == _ASF_FILE:
            live = _number(file, at + 88, 4) & 1
            return 0 if live else _number(file, at + 40, 8)
        if size < 24:
            break
        at += size
    return 0


def _mp3(file: BinaryIO) -> int:
    """The bytes from the first frame on, as its Xing, Info or VBRI header counts them."""
    start = 0
    file.seek(0)
    tag = file.read(10)
    if tag[:3] == b"ID3" and len(tag) == 10:
        start = 10 + sum((byte & 0x7F) << 7 * place for place, byte in enumerate(reversed(tag[6:])))
    file.seek(start)
    frame = file.read(64)
    count = 0
    for name in (b"Xing", b"Info"):
        place = frame.find(name)
        if place > 0 and len(frame) >= place + 16 and frame[place + 7] & 2:
            at = place + (12 if frame[place + 7] & 1 else 8)
            count = int.from_bytes(frame[at : at + 4], "big")
    if frame[36:40] == b"VBRI":
        count = int.from_bytes(frame[46:50], "big")
    return start + round(count * (1 - _MP3_SLACK)) if count else 0


def _ogg_ends(file: BinaryIO, size: int) -> bool:
    """Whether the last page is marked as such, and whole."""
    file.seek(max(0, size - 2 * _OGG_PAGE))
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or not page[5] & _OGG_LAST:
        return False
    lengths = page[27 : 27 + page[26]]
    return len(page) >= 27 + page[26] + sum(lengths)


# what a file of the format begins with, where, and how many bytes it has to have (0 or less: not known)
_FORMATS: tuple[tuple[bytes, int, Callable[[BinaryIO], int]], ...] = (
    (_W64, 0, _w64),
    (b"RIFF", 0, _riff),
    (b"RF64", 0, _rf64),
    (b"BW64", 0, _rf64),
    (b"FORM", 0, _form),
    (b".snd", 0, _au),
    (b"dns.", 0, _little_au),
    (b"caff", 0, _caf),
    (b"\x1a\x45\xdf\xa3", 0, _matroska),
    (_ASF_HEADER, 0, _asf),
    *((kind, 4, _boxes) for kind in (b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide")),
    (b"ID3", 0, _mp3),
    *((bytes([0xFF, second]), 0, _mp3) for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2)),
)
