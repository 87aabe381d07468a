"""Every training of the study. PLAN.md says what each is for; tables pick them by name."""

from __future__ import annotations

from dataclasses import replace

from bench.study.arms import HIGH, INFERENCE, LOW, SEEDS, START, STEPS, Arm
from bench.study.penalty import Penalty

# PLAN.md: chosen on the validation split of seed 1, by its rule
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
    """Delimiters that start and stay otherwise; the first of all is the main table's "off"."""
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
# by name, the arm that begins in the same way
FROZEN = {
    origin(init, trained, later).name: origin(init, False, later).name
    for init in INITS
    for trained in (False, True)
    for later in (False, True)
}
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
    """Base first, in the order in which it is run; an arm that stands twice counts where it stands first."""
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
        # PLAN.md: what removes a sink is asked where "off" ends with one
        *_seeds([*RIVALS, *PEERS, *BEYOND], (SWEEP_SEED,)),
        *_seeds(emerging, SEEDS, full=True),
        *_seeds([*ORIGINS, *CONTROLS, *PEERS, *BEYOND], SEEDS, full=True),
    ]
    found: dict[str, Arm] = {}
    for arm in arms:
        found.setdefault(arm.key, arm)
    return found


ARMS = _grid()
# before training: five draws of every start; trained or frozen does not matter there, and "mean" is no draw
STARTS = [
    START + replace(arm, seed=seed).key
    for arm in ORIGINS
    if "trained" not in arm.name
    for seed in (SEEDS if "mean" not in arm.name else SEEDS[:1])
]
# on the models of off; the first seed of a rate is where ACT's heads are searched
INFERENCES = [INFERENCE + Arm("off", rate, seed).key for rate in (HIGH, LOW) for seed in SEEDS]
