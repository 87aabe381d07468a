"""The grid of the settled study: its trainings in the order in which they run. PLAN.md says what each is for."""

from __future__ import annotations

from dataclasses import replace

from bench.study import human
from bench.study.grid import INFERENCE, LOW, MARGIN, MARGIN_WEIGHT, NO_LAYERNORM, PAPER, SEEDS, Arm
from bench.study.penalty import Penalty

STEPS = 800  # by the pilot, see PLAN.md
RECIPE = (
    *human.OVERRIDES,
    "training.warmup=40",
    "training.decay=0.2",
    "training.packed=true",
    "training.validate_every=200",
    "training.save_every=200",
    "training.gradient_norms_every=200",
    "decode.base_tokens=6",
    "decode.tokens_per_second=8",  # the fastest reference has 7
)
SWEEP_SEED = 6
PAPER_SWEEP = (3.0, 10.0, 30.0, 100.0)

OFF = Arm("off", settled=True)
MARGIN_FORM = Arm(f"margin-{MARGIN_WEIGHT:g}", weight=MARGIN_WEIGHT, margin=MARGIN, settled=True)
NORM = Arm(f"norm-{PAPER:g}", weight=PAPER, penalty=Penalty(kind="norm"), settled=True)
ANCHORED = Arm(f"anchored-{MARGIN_WEIGHT:g}", weight=MARGIN_WEIGHT, margin=MARGIN, anchor="base", settled=True)
ANCHORED_WHOLE = Arm(f"anchored-whole-{PAPER:g}", weight=PAPER, anchor="base", settled=True)


def paper(weight: float) -> Arm:
    return Arm(f"paper-{weight:g}", weight=weight, settled=True)


CORE = [OFF, paper(PAPER), MARGIN_FORM, NORM, ANCHORED]
SWEEP = [OFF, *map(paper, PAPER_SWEEP), ANCHORED, ANCHORED_WHOLE]
# is it settled?
DOUBLED = [replace(arm, name=f"{arm.name}-2n", steps=2 * STEPS) for arm in CORE[:2]]
# other rates, the one of the secondary comparisons first
FEWER_SEEDS = SEEDS[:3]
RATES = (LOW, 64, 16, 4)
AT_RATES = [replace(arm, rate=rate) for rate in RATES for arm in (*CORE[:2], *([ANCHORED] if rate == LOW else []))]
# is a gain the repair of a fragile baseline?
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


def fragile(arm: Arm, rate: float, layernorm: bool) -> Arm:
    """``arm`` of the core with another learning rate and with or without LayerNorm in the projector."""
    if rate == LEARNING_RATES[1] and layernorm:
        return arm
    changed = (f"training.learning_rate={rate}", *(() if layernorm else (NO_LAYERNORM,)))
    return replace(arm, name=f"{arm.name}-lr{rate:g}{'' if layernorm else '-plain'}", overrides=changed)


FRAGILE = [fragile(arm, rate, norm) for norm in (True, False) for rate in LEARNING_RATES for arm in CORE[:2]]
ARMS = {
    arm.key: arm
    for arm in [
        *(replace(arm, seed=SWEEP_SEED) for arm in SWEEP),
        *(replace(arm, seed=seed) for seed in SEEDS for arm in CORE),
        *DOUBLED,
        *(replace(arm, seed=seed) for arm in AT_RATES for seed in FEWER_SEEDS),
        *FRAGILE,
    ]
}
# ACT on the models of off
INFERENCES = [INFERENCE + replace(OFF, seed=seed).key for seed in SEEDS]
