"""The options of ``avsr synth`` and their checks."""

from __future__ import annotations

from dataclasses import dataclass, fields

from avsr.errors import UserError
from avsr.tools.corpora.options import check_ranges, read_options
from avsr.tools.corpora.synth.sentences import GRID_SIZE
from avsr.tools.corpora.synth.voices import TRAINING_VOICES, UNSEEN_VOICES


@dataclass
class SynthOptions:
    """What to make. Counts are utterances.

    Attributes:
        grid: training utterances of the command grammar; 0 leaves that set out.
        open: training utterances with open vocabulary; 0 leaves that set out.
        validation: utterances in each validation set.
        test: utterances in each test set.
        voices: training voices; they also speak the validation set and the test of unseen sentences.
        unseen_voices: voices of the test of unseen voices.
        video: 1 draws a mouth for every utterance, 0 makes sound only.
        seed: of the sentences and of the voices' noise.
        workers: processes; 0 means one per CPU. They do not change the corpus.
    """

    grid: int = 1000
    open: int = 1000
    validation: int = 100
    test: int = 120
    voices: int = 8
    unseen_voices: int = 4
    video: int = 1
    seed: int = 0
    workers: int = 0


_RANGES: dict[str, tuple[int, int]] = {
    "grid": (0, GRID_SIZE),
    "open": (0, 1_000_000),
    "validation": (1, 10_000),
    "test": (1, 10_000),
    "voices": (1, len(TRAINING_VOICES)),
    "unseen_voices": (1, len(UNSEEN_VOICES)),
    "video": (0, 1),
    "seed": (0, 2**31 - 1),
    "workers": (0, 1024),
}


def parse_options(overrides: list[str]) -> SynthOptions:
    """Reads ``key=value`` strings.

    Raises:
        UserError: unknown key, a value that is no whole number, or one out of range.
    """
    options = SynthOptions()
    read_options(options, overrides, [field.name for field in fields(SynthOptions)], "synth")
    check_options(options)
    return options


def check_options(options: SynthOptions) -> None:
    """Raises a ``UserError`` that names the option, its value and its range if one is out of range."""
    check_ranges(options, _RANGES)
    if options.grid == 0 and options.open == 0:
        raise UserError("options grid and open are both 0: there is nothing to make")
    needed = options.grid + options.validation + 2 * options.test
    if options.grid and needed > GRID_SIZE:
        counts = f"{options.grid} training, {options.validation} validation and 2 x {options.test} test utterances"
        most = GRID_SIZE - options.validation - 2 * options.test
        room = f"{needed} different sentences, but the grammar has {GRID_SIZE}: at most grid={most}"
        raise UserError(f"option grid: {counts} need {room}")
