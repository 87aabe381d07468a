"""Step time and memory of LoRA training by arithmetic: ranks, nodes, lengths, model size, ZeRO stage.

A step takes as long as its slowest rank computes, plus the communication that does not overlap with computation.
Memory is that of ``avsr plan`` (:mod:`avsr.tools.estimate.memory`), model FLOPs those of ``avsr profile``
(:mod:`avsr.tools.estimate.flops`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from avsr.data.batches import make_batches
from avsr.tools.estimate.flops import Rows, step_flops
from avsr.tools.estimate.memory import Load, Sizes, Way, memory
from bench.workloads.shapes import MODELS, utterances

RANKS = {"llama-3.2-1b": 64, "llama-3.2-3b": 96, "llama-3.1-8b": 128}  # LoRA's: hidden / 32
FEATURES, PROJECTOR = 1024, 2048  # width of Whisper-medium's features, hidden size of the projector
MODULES = 9  # per layer, fetched one by one by ZeRO-3: seven matrices and the adapters of two
SAMPLES = 48  # steps over which the imbalance is averaged


@dataclass(frozen=True)
class Link:
    """Bytes per second into one device, and the latency of a message in seconds."""

    rate: float
    delay: float


@dataclass(frozen=True)
class Cluster:
    """``flops``: FLOP/s that a step of one device reaches by itself, not those of the data sheet."""

    name: str
    flops: float
    memory: float  # bytes
    per_node: int
    inside: Link
    between: Link
    fixed: float = 0.0  # seconds of a step, independent of its batch
    hidden: float = 0.8  # share of the computing time with which ZeRO-3's gathering can overlap


@dataclass(frozen=True)
class Step:
    """Seconds of one step, by part."""

    compute: float  # of the mean rank
    waiting: float  # of the mean rank, for the slowest
    communication: float  # without overlap
    fixed: float

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting + self.communication + self.fixed


def llama(name: str) -> Sizes:
    """A model of :mod:`bench.workloads.shapes` with adapters on q and v and an audio projector."""
    m, rank = MODELS[name], RANKS[name]
    wide, group = m.heads * m.dim, m.kv_heads * m.dim
    layer = m.hidden * (2 * wide + 2 * group + 3 * m.intermediate + 2)
    tied = not name.startswith("llama-3.1")
    ends = m.hidden * m.vocabulary * (1 if tied else 2) + m.hidden
    adapters = m.layers * rank * (2 * m.hidden + wide + group)
    projector = FEATURES * PROJECTOR + PROJECTOR + PROJECTOR * m.hidden + 3 * m.hidden
    shape = (m.layers, m.hidden, m.heads, m.kv_heads, m.dim, m.intermediate, m.vocabulary)
    return Sizes(*shape, m.layers * layer + ends, adapters, tied, rank=rank, projectors=projector)


@lru_cache(maxsize=64)
def batches(tokens: int, ranks: int, longest: int = 400) -> list[list[list[int]]]:
    """Lengths of utterances by step and rank, for batches of at most ``tokens`` (padding counted, as in training); an
    utterance has 48 to ``longest`` tokens."""
    lengths = utterances(SAMPLES * tokens * ranks, low=min(48, longest), high=longest)
    made = make_batches(lengths, tokens, len(lengths), random.Random(0))
    steps = min(len(made) // ranks, SAMPLES)
    return [[[lengths[i] for i in made[n * ranks + rank]] for rank in range(ranks)] for n in range(steps)]


def rows(lengths: Sequence[int]) -> Rows:
    """A fifth of an utterance is text."""
    text = sum(max(4, n // 5) for n in lengths)
    return Rows(lengths, sum(lengths) - text, text)


def load(lengths: Sequence[int], packed: bool = True) -> Load:
    tokens = sum(lengths) if packed else len(lengths) * max(lengths)
    return Load(tokens, rows(lengths).labels)


def all_gather(size: float, ranks: int, cluster: Cluster, messages: int = 1) -> float:
    """Seconds until every rank has all of ``size`` bytes, of which each held an equal share: simultaneous rings within
    a node and between nodes; a node's devices share what comes from other nodes."""
    if ranks == 1:
        return 0.0
    here = min(ranks, cluster.per_node)
    nodes = -(-ranks // cluster.per_node)
    inside = size * (here - 1) / here / cluster.inside.rate
    between = size * (nodes - 1) / nodes / (here * cluster.between.rate)
    delay = (here - 1) * cluster.inside.delay + (nodes - 1) * cluster.between.delay
    return max(inside, between) + messages * delay


def communication(sizes: Sizes, way: Way, cluster: Cluster) -> tuple[float, float]:
    """Seconds of a step: (at its end, without overlap; spread over it)."""
    trained = float(sizes.trained * way.element)
    if way.stage < 3:  # reduce-scatter and all-gather, or an all-reduce, which is both
        return 2 * all_gather(trained, way.ranks, cluster), 0.0
    passes = 2 if way.checkpointing == "false" else 3
    weights = float(sizes.frozen * way.element)
    gathered = passes * all_gather(weights, way.ranks, cluster, sizes.layers * MODULES)
    return all_gather(trained, way.ranks, cluster), gathered


def step(sizes: Sizes, way: Way, cluster: Cluster, tokens: int, longest: int = 400) -> Step:
    """A step of packed batches of at most ``tokens`` per rank."""
    slowest = mean = 0.0
    drawn = batches(tokens, way.ranks, longest)
    for ranks in drawn:
        work = [step_flops(sizes, rows(lengths)) for lengths in ranks]
        slowest += max(work) / len(drawn)
        mean += sum(work) / len(work) / len(drawn)
    again = 1.5 if way.checkpointing == "true" else 1.0  # with frozen weights the forward is half of the work
    compute, waiting = again * mean / cluster.flops, again * (slowest - mean) / cluster.flops
    end, spread = communication(sizes, way, cluster)
    exposed = end + max(0.0, spread - cluster.hidden * compute)
    return Step(compute, waiting, exposed, cluster.fixed)


def needed(sizes: Sizes, way: Way, tokens: int) -> float:
    """Bytes of a rank for a packed batch of ``tokens``, a fifth of them labels."""
    return sum(memory(sizes, Load(tokens, tokens // 5), way).values())
