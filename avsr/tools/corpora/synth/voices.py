"""The hand-picked voices: male and female, eight accents, no robots, whispers or fast variants.

The order matters: a corpus takes the first of ``TRAINING_VOICES`` and the first of ``UNSEEN_VOICES``, so both start
with a mix of sexes and accents. The unseen voices are the last quarter of the table, and no variant (the part after
``+``, which sets the vocal tract) is in both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Voice:
    """One speaker.

    Attributes:
        name: of the speaker, safe in a file name.
        voice: eSpeak NG's accent and variant.
        rate: words a minute.
        pitch: 0 to 99, 50 is the variant's own.
    """

    name: str
    voice: str
    rate: int
    pitch: int


VOICES: tuple[Voice, ...] = (
    # training: 15 female and 15 male
    Voice("us_f2", "gmw/en-US+f2", 165, 50),
    Voice("us_m3", "gmw/en-US+m3", 170, 45),
    Voice("gb_f4", "gmw/en+f4", 160, 52),
    Voice("gb_m7", "gmw/en+m7", 155, 50),
    Voice("rp_f1", "gmw/en-GB-x-rp+f1", 170, 55),
    Voice("sc_m4", "gmw/en-GB-scotland+m4", 165, 42),
    Voice("us_annie", "gmw/en-US+Annie", 158, 45),
    Voice("us_andy", "gmw/en-US+Andy", 175, 50),
    Voice("ny_f3", "gmw/en-US-nyc+f3", 168, 50),
    Voice("wm_m6", "gmw/en-GB-x-gbcwmd+m6", 160, 55),
    Voice("la_f4", "gmw/en-GB-x-gbclan+f4", 172, 46),
    Voice("ca_m1", "gmw/en-029+m1", 162, 50),
    Voice("gb_aunty", "gmw/en+aunty", 155, 50),
    Voice("us_lee", "gmw/en-US+Lee", 165, 58),
    Voice("ca_f2", "gmw/en-029+f2", 165, 56),
    Voice("rp_mario", "gmw/en-GB-x-rp+Mario", 158, 48),
    Voice("us_f1", "gmw/en-US+f1", 175, 44),
    Voice("ny_robert", "gmw/en-US-nyc+robert", 170, 52),
    Voice("sc_f3", "gmw/en-GB-scotland+f3", 160, 42),
    Voice("gb_quincy", "gmw/en+quincy", 165, 54),
    Voice("wm_f2", "gmw/en-GB-x-gbcwmd+f2", 158, 45),
    Voice("us_m7", "gmw/en-US+m7", 150, 40),
    Voice("rp_annie", "gmw/en-GB-x-rp+Annie", 165, 50),
    Voice("la_m3", "gmw/en-GB-x-gbclan+m3", 168, 55),
    Voice("us_aunty", "gmw/en-US+aunty", 165, 58),
    Voice("gb_andy", "gmw/en+Andy", 170, 44),
    Voice("ny_f4", "gmw/en-US-nyc+f4", 162, 58),
    Voice("us_m2", "gmw/en-US+m2", 160, 52),
    Voice("gb_f1", "gmw/en+f1", 178, 48),
    Voice("sc_m6", "gmw/en-GB-scotland+m6", 172, 60),
    # unseen: 5 female and 5 male
    Voice("us_f5", "gmw/en-US+f5", 165, 50),
    Voice("gb_m5", "gmw/en+m5", 162, 50),
    Voice("rp_linda", "gmw/en-GB-x-rp+linda", 160, 46),
    Voice("us_michael", "gmw/en-US+Michael", 168, 52),
    Voice("sc_belinda", "gmw/en-GB-scotland+belinda", 168, 50),
    Voice("ny_boris", "gmw/en-US-nyc+boris", 165, 46),
    Voice("us_grandma", "gmw/en-US+grandma", 155, 50),
    Voice("wm_max", "gmw/en-GB-x-gbcwmd+max", 172, 54),
    Voice("ca_alicia", "gmw/en-029+Alicia", 165, 48),
    Voice("la_norbert", "gmw/en-GB-x-gbclan+norbert", 158, 50),
)

UNSEEN_VOICES: tuple[Voice, ...] = VOICES[-(len(VOICES) // 4) :]
TRAINING_VOICES: tuple[Voice, ...] = VOICES[: -len(UNSEEN_VOICES)]
