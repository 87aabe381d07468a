"""The grid of the short study: its trainings, by name. PLAN.md says what each is for; the tables pick them by name.

Those of the settled study are in :mod:`bench.study.settled`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.study.penalty import Penalty

HIGH, LOW = 32, 8  # encoder frames per token: 1.6 and 6.3 tokens per second
SEEDS = (1, 2, 3, 4, 5)
# prefixes of the keys: untrained arms, arms changed at inference, and the settled study's
START, INFERENCE, SETTLED = "start ", "inference ", "settled "
NO_LAYERNORM = "model.projector.layernorm=false"


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        name: what is changed; with rate and seed, the key.
        rate: frames per token.
        seed: of the delimiters, LoRA and the order of the data.
        weight: lambda.
        margin: of the product's loss.
        anchor: of the product's loss.
        penalty: a loss in place of the product's, weighted by lambda.
        overrides: of the config.
        faithful: with the reference's habits (bench.study.faithful).
        sink_logits: one learnable sink logit per head.
        cold: the projector starts at random, as in the demo.
        steps: optimizer steps; 0 = those of the rate.
        full: only in ``python -m bench.study full``.
        settled: part of the settled study.
    """

    name: str
    rate: int = HIGH
    seed: int = 1
    weight: float = 0.0
    margin: float = 0.0
    anchor: str = "bos"
    penalty: Penalty | None = None
    overrides: tuple[str, ...] = ()
    faithful: bool = False
    sink_logits: bool = False
    cold: bool = False
    steps: int = 0
    full: bool = False
    settled: bool = False

    @property
    def layernorm(self) -> bool:
        """Whether its projector ends with one."""
        return NO_LAYERNORM not in self.overrides

    @property
    def key(self) -> str:
        return f"{SETTLED if self.settled else ''}{self.name}-r{self.rate}-s{self.seed}"


STEPS = {HIGH: 200, LOW: 120}


def arm_key(key: str) -> str:
    """The key of a row's arm."""
    return key.removeprefix(START).removeprefix(INFERENCE)


# chosen by the rule of PLAN.md on the validation split
SWEEP_SEED = 2  # the first whose "off" ends with a massive mark
PAPER, MARGIN_WEIGHT = 100.0, 200.0
MARGIN = 0.5
EARLY = (9, 11)  # the layers before the MLP of layer 12, which makes SmolLM2's massive activations

PAPER_SWEEP = (1.0, 10.0, 30.0, 100.0, 1000.0, 10000.0)
MARGIN_SWEEP = (10.0, 50.0, 200.0)
INITS = ("normal:0.02", "table", "mean")


def paper(weight: float) -> Arm:
    return Arm(f"paper-{weight:g}", weight=weight)


def margin(weight: float) -> Arm:
    return Arm(f"margin-{weight:g}", weight=weight, margin=MARGIN)


def origin(init: str, trained: bool, later: bool) -> Arm:
    """An arm with other delimiter tokens; the default one is the main table's "off"."""
    if init == INITS[0] and not trained and not later:
        return Arm("off")
    name = f"marks-{init.partition(':')[0]}-{'trained' if trained else 'frozen'}-{'later' if later else 'first'}"
    settings = (
        f"model.delimiters.init={init}",
        f"model.delimiters.train={str(trained).lower()}",
        f"model.prompts.first={str(later).lower()}",
    )
    return Arm(name, overrides=settings)


def penalised(name: str, penalty: Penalty, weight: float = PAPER) -> Arm:
    return Arm(f"{name}-{weight:g}", weight=weight, penalty=penalty)


ORIGINS = [origin(init, trained, later) for init in INITS for trained in (False, True) for later in (False, True)]
_STARTS = [origin(init, False, later) for init in INITS for _ in (False, True) for later in (False, True)]
# by name, the arm with the same start
FROZEN = {arm.name: start.name for arm, start in zip(ORIGINS, _STARTS, strict=True)}
MAIN = [Arm("off"), paper(PAPER), margin(MARGIN_WEIGHT)]
RIVALS = [
    penalised("content", Penalty(anchor="content")),
    penalised("norm", Penalty(kind="norm")),
    penalised("stop-gradient", Penalty(detach=True)),
]
CONTROLS = [
    *RIVALS,
    Arm("off-clip-1", overrides=("training.clip=1.0",)),
    Arm("off-cold", cold=True),
    Arm("off-long", steps=2 * STEPS[HIGH]),
    replace(paper(PAPER), name=f"paper-long-{PAPER:g}", steps=2 * STEPS[HIGH]),
    Arm("off-half-rate", overrides=("training.learning_rate=5.0e-4",)),
    Arm("faithful-off", faithful=True),
    replace(paper(PAPER), name=f"faithful-paper-{PAPER:g}", faithful=True),
]
BEYOND = [
    penalised("paper-warm-up", Penalty(warmup=100)),
    penalised("paper-early-layers", Penalty(layers=EARLY)),
    penalised("paper-marks", Penalty(tokens="marks")),
    penalised("margin-early-layers", Penalty(margin=MARGIN, layers=EARLY), MARGIN_WEIGHT),
]
PEERS = [
    Arm("sink-logits", sink_logits=True),
    Arm("no-marks", overrides=("model.delimiters.init=none",)),
]


def _seeds(arms: list[Arm], seeds: tuple[int, ...], *, full: bool = False) -> list[Arm]:
    return [replace(arm, seed=seed, full=full) for seed in seeds for arm in arms]


def _grid() -> dict[str, Arm]:
    """The base grid first, in running order; a repeated arm counts where it comes first."""
    low = [replace(arm, rate=LOW) for arm in MAIN]
    emerging = [arm for arm in ORIGINS if "marks-table" in arm.name]
    arms = [
        *_seeds(MAIN[:1], SEEDS),
        *(replace(paper(weight), seed=SWEEP_SEED) for weight in PAPER_SWEEP),
        *(replace(margin(weight), seed=SWEEP_SEED) for weight in MARGIN_SWEEP),
        *_seeds(MAIN, SEEDS),
        *ORIGINS,
        *_seeds(low, SEEDS),
        *CONTROLS,
        # PLAN.md: whether something removes a sink can only be seen where "off" ends with one
        *_seeds([*RIVALS, *PEERS, *BEYOND], (SWEEP_SEED,)),
        *_seeds(emerging, SEEDS, full=True),
        *_seeds([*ORIGINS, *CONTROLS, *PEERS, *BEYOND], SEEDS, full=True),
    ]
    found: dict[str, Arm] = {}
    for arm in arms:
        found.setdefault(arm.key, arm)
    return found


ARMS = _grid()
# before training: five draws of every start (only one of "mean", which is not random); trained or frozen is the same
STARTS = [
    START + replace(arm, seed=seed).key
    for arm in ORIGINS
    if "trained" not in arm.name
    for seed in (SEEDS if "mean" not in arm.name else SEEDS[:1])
]
# on the models of off; ACT's heads are searched on the first seed of a rate
INFERENCES = [INFERENCE + Arm("off", rate, seed).key for rate in (HIGH, LOW) for seed in SEEDS]
