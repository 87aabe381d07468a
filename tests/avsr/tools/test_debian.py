"""``avsr prepare debian-speech``: the readers against files that were written by hand, the words, and the split."""

from __future__ import annotations

import re
import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avsr.errors import UserError
from avsr.tools.corpora.debian.asterisk import read_asterisk
from avsr.tools.corpora.debian.drascula import read_drascula
from avsr.tools.corpora.debian.queen import read_queen
from avsr.tools.corpora.debian.sound import LONGEST, SHORTEST, Unusable, decode
from avsr.tools.corpora.debian.split import SPLITS, UNSEEN, Clip, split
from avsr.tools.corpora.debian.spoken import Spoken
from avsr.tools.corpora.debian.text import spoken_words

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("tiny_debs.py"))))

# Readers


def test_the_queens_texts_and_roles() -> None:
    found = {(clip.id, clip.role, clip.text): clip.sound for clip in read_queen(tiny.container(tiny.QUEEN_FILES))}
    assert list(found) == [
        ("queen_020010j1", "joe", "Hello, Bud."),
        ("queen_020011j1", "joe", "I paid 1,000 dollars!"),
        ("queen_020001p1", "bud", "Well..."),
        ("queen_020001p2", "bud", "It's a café!"),
        ("queen_030001j1", "joe", "Hello, Bud!"),
        ("queen_030001p1", "sec", "Nobody else says so."),
        ("queen_joe00421", "joe", "It's a door."),
    ]
    for (name, _, _), sound in found.items():
        assert sound == tiny.QUEEN_FILES[f"{name.removeprefix('queen_').upper()}.SB"]


def test_a_line_of_two_files_is_one_clip() -> None:
    files = {**tiny.QUEEN_FILES, "BUD3.DOG": tiny.QUEEN_FILES["BUD1.DOG"]}
    assert list(read_queen(tiny.container(files))) == list(read_queen(tiny.container(tiny.QUEEN_FILES)))


def test_draculas_texts_and_roles() -> None:
    lines = [*tiny.DRASCULA_LINES, *([["SO WHAT"]] * 7), ["DER LETZTE", "CAF\u00c9"]]
    files = {f"{name}.ALS": sound for name, sound in {**tiny.DRASCULA_SOUNDS, "VB1": b"last"}.items()}
    found = read_drascula({**files, "drascula.dat": tiny.texts_of_drascula(lines)})
    assert [(clip.id, clip.role, clip.text, clip.sound) for clip in found] == [
        ("drascula_hero_001", "hero", "THAT'S THE SECOND BIGGEST DOOR", files["1.ALS"]),
        ("drascula_hero_002", "hero", "NOT REALLY", files["2.ALS"]),
        ("drascula_hero_003", "hero", "HELLO BUD", files["3.ALS"]),
        ("drascula_d_000", "d", "I AM THE COUNT", files["D0.ALS"]),
        ("drascula_vb_001", "vb", "CAFÉ", b"last"),
    ]


def test_asterisks_list() -> None:
    listed = "; voices: 1\n\n  hello : Hi\nhello: Hello: you.\ndigits/1:one\n1: two\nUP/A_b: x\nnone: no sound\n: x\n"
    sounds = {name: name.encode() for name in ("hello", "digits/1", "UP/A_b", "voices")}
    found = [(clip.id, clip.role, clip.text, clip.sound, clip.kind) for clip in read_asterisk(listed, sounds)]
    assert found == [
        ("asterisk_hello", "allison", "Hello: you.", b"hello", "g722"),
        ("asterisk_digits_1", "allison", "one", b"digits/1", "g722"),
        ("asterisk_up_a_b", "allison", "x", b"UP/A_b", "g722"),
    ]
    with pytest.raises(UserError, match="do not belong together"):
        list(read_asterisk(listed, {"other": b""}))


def replaced(name: str, content: bytes) -> bytes:
    data: bytes = tiny.container({**tiny.QUEEN_FILES, name: content})
    return data


def texts(block: bytes) -> bytes:
    """A ``drascula.dat`` with this block as the English one of the hero."""
    whole: bytes = tiny.texts_of_drascula([["", "THAT'S THE SECOND BIGGEST DOOR"]] * 10, before=b"")
    (length,) = struct.unpack_from(">H", whole, 2)
    return whole[:2] + struct.pack(">H", len(block)) + block + whole[4 + length :]


BIGGEST = b"\0\0\0\4\0\0\0\x21THAT'S THE SECOND BIGGEST DOOR"
QUEEN = tiny.container(tiny.QUEEN_FILES)
DAMAGED: list[tuple[str, Callable[[bytes], object], bytes]] = [
    ("no table of sounds", read_queen, b""),
    ("no table of sounds", read_queen, b"020001P2.SB\0" + bytes(30)),
    ("truncated", read_queen, QUEEN[:-1]),
    ("damaged", read_queen, QUEEN[:45]),
    ("entries overlap", read_queen, QUEEN[:43] + struct.pack(">II", 0, len(QUEEN)) + QUEEN[51:]),
    ("damaged.*ascii", read_queen, QUEEN.replace(b"990001P1.SB", b"99\xff001P1.SB")),
    ("damaged.*QUEEN2", read_queen, QUEEN.replace(b"QUEEN2.JAS", b"QUEEN9.JAS")),
    ("damaged.*more than 1048576 bytes", read_queen, replaced("QUEEN2.JAS", b"\r\n" * 600_000)),
    ("damaged", read_queen, replaced("BUD1.DOG", b"")),
    ("damaged", read_queen, replaced("BUD1.DOG", tiny.QUEEN_FILES["BUD1.DOG"][:60])),
    ("another version", lambda data: read_drascula({"drascula.dat": data}), b"nothing"),
    ("damaged.*overlap", lambda data: read_drascula({"drascula.dat": data}), texts(b"\0\0\0\0" + BIGGEST[4:])),
    ("damaged", lambda data: read_drascula({"drascula.dat": data}), texts(BIGGEST)),
    ("no drascula.dat", lambda data: read_drascula({"1.ALS": data}), b""),
]


@pytest.mark.parametrize(("message", "read", "data"), DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_are_named(message: str, read: Callable[[bytes], list[Spoken]], data: bytes) -> None:
    with pytest.raises(UserError, match=f"(?i)(queen.1c|drascula.dat|{message})") as caught:
        list(read(data))
    assert caught.match(f"(?i){message}")


# Sounds


@pytest.mark.parametrize(
    ("kind", "pitch", "make"),
    [("mp3", 500, tiny.mp3), ("g722", 1000, tiny.g722), ("u8", 700, tiny.als), ("u8", 3000, tiny.als)],
)
def test_a_decoded_sound_has_its_pitch_length_and_loudness(
    kind: str, pitch: int, make: Callable[[float, float], bytes]
) -> None:
    wave = decode(Spoken("x", "r", "t", make(pitch, 1.2), kind))
    assert wave.dtype == np.float32 and 1.2 <= len(wave) / 16_000 < 1.4  # MP3 has whole frames
    middle = wave[4000:16_000]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 2**17))
    assert spectrum.argmax() * 16_000 / 2**17 == pytest.approx(pitch, abs=1)
    assert float(np.sqrt((middle**2).mean())) == pytest.approx(0.5 / 2**0.5, rel=0.06)  # LAME: 0.95


@pytest.mark.parametrize(
    ("kind", "sound", "reason"),
    [
        ("mp3", b"", "damaged"),
        ("mp3", b"no sound" * 100, "damaged"),
        ("g722", b"", "damaged"),
        ("u8", b"", "length"),
        ("u8", b"\x80" * 11_025, "silent"),
        ("u8", tiny.als(500, SHORTEST - 0.01), "length"),
        ("u8", tiny.als(500, LONGEST + 0.01), "length"),
        ("g722", tiny.g722(500, SHORTEST - 0.02), "length"),
        ("g722", tiny.g722(500, LONGEST + 0.02), "length"),
        ("mp3", tiny.mp3(500, LONGEST + 0.1), "length"),
        ("mp3", tiny.mp3(500, 1.0) + tiny.encode(tiny.tone(500, 1.0, 22_050), "libmp3lame", "mp3", 22_050), "damaged"),
    ],
    ids=range(11),
)
def test_what_cannot_be_used_is_refused_with_its_kind(kind: str, sound: bytes, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        decode(Spoken("x", "r", "t", sound, kind))
    assert caught.value.kind == reason


def test_hours_of_sound_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """64,000 bits a second: 4.7 hours; only what shows that it is too long is kept."""
    seen = []
    real = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda parts: seen.append(sum(map(len, parts))) or real(parts))
    with pytest.raises(Unusable, match="more than 30 s"):
        decode(Spoken("x", "r", "t", bytes(2**27), "g722"))
    with pytest.raises(Unusable, match="more than 30 s"):
        decode(Spoken("x", "r", "t", bytes(2**27), "u8"))
    assert seen and max(seen) < 16_000 * 31


# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, Bud.", "hello bud"),
        ("It's Joe's -- the 'king' o' rock'n'roll!", "it's joe's the king o rock'n'roll"),
        ("caf\u00e9 na\u00efve \u2019tis don\u2019t", "cafe naive tis don't"),
        ("(sigh) Well <gulp> that's [tone] it", "well that's it"),
        ("[this is a simple beep tone]", ""),
        ("...?!", ""),
        ("0 7 10 19", "zero seven ten nineteen"),
        ("20 21 42, 99.", "twenty twenty one forty two ninety nine"),
        ("at 9 a.m. or 5 P.M.", "at nine a m or five p m"),
        ("the U.S.A. won", "the u s a won"),
        ("press # or * now", "press pound or star now"),
        ("either/or twenty-one", "either or twenty one"),
        ("line one\nline two", "line one line two"),
        ("100 times", None),
        ("1,000", None),
        ("007", None),
        ("1st", None),
        ("3.5", None),
        ("$5", None),
        ("50%", None),
        ("caf\u0398", None),
        ("you & me", None),
        ("", ""),
    ],
)
def test_words(text: str, words: str | None) -> None:
    assert spoken_words(text) == words


@settings(deadline=None)
@given(st.text(max_size=60))
def test_words_are_letters_with_single_spaces_and_stay_as_they_are(text: str) -> None:
    words = spoken_words(text)
    if words:
        assert set(words) <= set("abcdefghijklmnopqrstuvwxyz' ") and " ".join(words.split()) == words
        assert not any(word.startswith("'") or word.endswith("'") for word in words.split())
        assert spoken_words(words) == words


@settings(deadline=None)
@given(st.integers(0, 99))
def test_numbers_add_up(number: int) -> None:
    ones = re.findall(
        r"\w+",
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
        seventeen eighteen nineteen""",
    )
    tens = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
    values = {**{word: n for n, word in enumerate(ones)}, **{word: 10 * n for n, word in enumerate(tens, 2)}}
    words = spoken_words(f"it is {number}!")
    assert words is not None and sum(values[word] for word in words.split()[2:]) == number


# The split

SPEAKERS = ["queen_joe", "queen_bud", *UNSEEN, "drascula_hero", "drascula_d", "asterisk_allison"]
CLIPS = st.lists(st.tuples(st.sampled_from(SPEAKERS), st.sampled_from([f"text {n}" for n in range(40)])), max_size=60)


def made(drawn: list[tuple[str, str]]) -> list[Clip]:
    clips = []
    for number, (speaker, words) in enumerate(drawn):
        corpus, _, role = speaker.partition("_")
        clips.append(Clip(Spoken(f"{corpus}_{number}", role, words, b"", "u8"), words))
    return clips


@settings(max_examples=100, deadline=None)
@given(CLIPS)
def test_the_splits_promises(drawn: list[tuple[str, str]]) -> None:
    clips = made(drawn)
    places = split(clips)
    texts: dict[str, set[str]] = {name: set() for name in SPLITS}
    speakers: dict[str, set[str]] = {name: set() for name in SPLITS}
    for clip in clips:
        place = places.get(clip.spoken.id)
        if place is None:
            assert clip.corpus == "drascula"
        else:
            texts[place].add(clip.words)
            speakers[place].add(clip.speaker)
    tests = texts["test_texts"] | texts["test_roles"] | texts["test_prompts"]
    assert not texts["train"] & (tests | texts["validation"]) and not texts["validation"] & tests
    assert speakers["test_roles"] <= set(UNSEEN) and speakers["test_prompts"] <= {"asterisk_allison"}
    others = speakers["train"] | speakers["validation"] | speakers["test_texts"]
    assert not others & {*UNSEEN, "asterisk_allison"}
    assert not {s for name in SPLITS[1:] for s in speakers[name] if s.startswith("drascula")}


@settings(max_examples=100, deadline=None)
@given(CLIPS, st.sets(st.integers(0, 59)))
def test_the_place_of_a_clip_does_not_depend_on_others(drawn: list[tuple[str, str]], left_out: set[int]) -> None:
    """But on whether an unseen role or a prompt says its text."""
    clips = made(drawn)
    apart = (*UNSEEN, "asterisk_allison")
    gone = {clip.spoken.id for n, clip in enumerate(clips) if n in left_out and clip.speaker not in apart}
    fewer = split(clip for clip in reversed(clips) if clip.spoken.id not in gone)
    assert fewer == {name: place for name, place in split(clips).items() if name not in gone}


def test_the_shares_of_the_split() -> None:
    clips = made([("queen_joe", f"some text {n}") for n in range(20_000)])
    counts = np.unique(list(split(clips).values()), return_counts=True)
    shares = dict(zip(*(part.tolist() for part in counts), strict=True))
    assert shares["test_texts"] / 20_000 == pytest.approx(0.14, abs=0.01)
    assert shares["validation"] / 20_000 == pytest.approx(0.05, abs=0.006)
