"""Outputs, statistics and gradients of an attached model beside those of the plain one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.families import oracle
from bench.families.cells import Cell, Outputs
from bench.families.oracle import Record, Sequences

TOLERANCE = 1e-4  # of the largest |logit| (received, |h|, gradient) of the cell; of the loss itself
NOISE = 1e-3  # of the largest logit; eager and plain that are farther apart are not the same model
GRADIENT = 1e-3  # float32 sums over all tokens, in another order


@dataclass
class Truth:
    """What the class does without flashsink in one cell."""

    plain: Outputs
    eager: Outputs | None
    record: Record  # of the eager run
    beside: Record  # of the plain one: they differ in what rows that see nothing give
    noise: float  # how far the two are apart, of the largest logit


@dataclass
class Reading:
    """What an attached forward left in the probe; an error instead of a part that it refused."""

    received: list[Tensor] | None = None
    loss: Tensor | None = None
    largest: Tensor | None = None
    errors: list[Exception] = field(default_factory=list)


@dataclass
class Attached:
    """How a class was attached."""

    probe: Any
    options: dict[str, Any]
    kind: str | None = None  # of attention modules that the probe observes


# ---- the probe


def read(attached: Attached) -> Reading:
    """What the probe says now."""
    reading, probe = Reading(), attached.probe
    wanted = [name for name in ("sinks_by_layer", "decorrelation_loss", "activations") if hasattr(type(probe), name)]
    if attached.options.get("decorrelation") is False:
        wanted.remove("decorrelation_loss")
    for name in wanted:
        try:
            value = getattr(probe, name)
            if name == "sinks_by_layer":  # of the layers that have softmax attention
                reading.received = [sinks.received.detach().clone() for sinks in value.values()]
            elif name == "decorrelation_loss":
                reading.loss = value
            else:
                reading.largest = value.max_abs.detach().clone()
        except Exception as error:
            if "the first token is no BOS" not in str(error):  # an encoder has none to decorrelate from
                reading.errors.append(error)
    return reading


def sequences_of(cell: Cell, truth: Truth, attached: Attached, reading: Reading) -> dict[int, Sequences]:
    """Where the sequences are, as the model's own attention keeps them apart."""
    if attached.kind is None and reading.received:
        attached.kind = _match(cell, truth, reading.received)
    where = dict(cell.sequences)
    if cell.maybe is not None:
        _, cut, end = cell.maybe.pieces[-1]
        weights = [a for stack in truth.record.attention.values() for a in stack.attention if a.shape[-2] == end]
        if weights and all(not bool(a[:, :, cut:, :cut].any()) for a in weights):
            where[end] = cell.maybe
    for others in truth.record.attention.values():  # of audio, whose padding the model counts in its own frames
        first = others.attention[0].detach()
        if first.shape[2] == first.shape[3]:
            where.setdefault(first.shape[2], _inferred(first))
    return where


def _match(cell: Cell, truth: Truth, received: list[Tensor]) -> str | None:
    """The kind of attention modules whose weights the probe's sums are of, by shape, then by value."""
    errors = {}
    for kind, stack in truth.record.attention.items():
        if [tuple(a.shape[i] for i in (0, 1, 3)) for a in stack.attention] == [tuple(r.shape) for r in received]:
            pairs = zip(stack.attention, received, strict=True)
            where = cell.sequences
            errors[kind] = max(float((_received(a, where)[0] - r).abs().max()) for a, r in pairs)
    return min(errors, key=lambda kind: errors[kind]) if errors else None


def _received(attention: Tensor, where: dict[int, Sequences]) -> tuple[Tensor, Sequences]:
    attention = attention.detach()
    sequences = where.get(attention.shape[2]) or _inferred(attention)
    return oracle.received(attention, sequences), sequences


def _inferred(attention: Tensor) -> Sequences:
    """An encoder's padding gets no attention at all, but from rows that see nothing, where eager gives all the same."""
    blind = attention.amax(-1) - attention.amin(-1) < 1e-7
    attention = attention if bool(blind.all()) else attention.masked_fill(blind[..., None], 0)
    return Sequences.of_mask(attention.sum((1, 2)) > 0)


def statistics(
    cell: Cell, reading: Reading, truth: Truth, attached: Attached, where: dict[int, Sequences]
) -> tuple[str, set[str]]:
    """(what is wrong with the probe's numbers or "", what has no oracle)."""
    if truth.eager is None or outputs_differ(truth.eager, truth.plain, cell, where):
        return "", {"statistics, since eager attention does something else"}
    unchecked: set[str] = set()
    stack, sequences = truth.record.attention.get(attached.kind or ""), None
    if reading.received is not None:
        if stack is None or len(stack.attention) != len(reading.received):
            unchecked.add("received")
        else:
            for layer, (attention, mine) in enumerate(zip(stack.attention, reading.received, strict=True)):
                wanted, sequences = _received(attention, where)
                if mine.shape != wanted.shape:
                    return f"received of layer {layer}: {tuple(mine.shape)}, expected {tuple(wanted.shape)}", unchecked
                keep = sequences.valid(wanted.shape[0], wanted.shape[2])[:, None].expand_as(wanted)
                error = _error(mine[keep], wanted[keep])
                if error > TOLERANCE + 10 * truth.noise:
                    return f"received of layer {layer}: off by {error:.1e}", unchecked
    layers = _layers(truth, attached, reading)
    if layers is None:
        nothing = reading.loss is None and reading.largest is None
        return "", unchecked if nothing else unchecked | {"loss", "activations"}
    tokens = layers[0][0].shape[1]
    sequences = where.get(tokens) or sequences or Sequences.of_mask(torch.ones(layers[0][0].shape[:2]))
    layers += _layers(replace(truth, record=truth.beside), attached, reading) or []
    return _of_layers(reading, layers, sequences), unchecked


def _layers(truth: Truth, attached: Attached, reading: Reading) -> list[list[Tensor]] | None:
    """[the layers' outputs, and what the next layers and the norm read if a model adds something in between]."""
    largest = reading.largest
    found: list[list[Tensor]] = []
    for name, stack in truth.record.layers.items():
        mine = attached.kind is None or oracle.list_of_attention(attached.kind) == name
        outputs = stack.outputs
        if mine and largest is not None and largest.shape == (len(outputs), *outputs[0].shape[:2]):
            found += [outputs, [*stack.inputs[1:], outputs[-1]]]
    return found or None


def _of_layers(reading: Reading, layers: list[list[Tensor]], sequences: Sequences) -> str:
    keep = sequences.valid(*layers[0][0].shape[:2])
    if reading.largest is not None:
        error = min(_error(reading.largest[:, keep], torch.stack(s).abs().amax(-1)[:, keep]) for s in layers)
        if error > TOLERANCE:
            return f"activations: off by {error:.1e}"
    if reading.loss is not None:
        wanted = [oracle.decorrelation([s.detach() for s in states[:-1]], sequences) for states in layers]
        error = min(abs(float(reading.loss) - float(w)) for w in wanted)
        if not error <= TOLERANCE:
            return f"decorrelation_loss: {float(reading.loss):.5f}, expected {float(wanted[0]):.5f}"
    return ""


# ---- outputs and gradients


def differences(outputs: Outputs, truth: Truth, cell: Cell, where: dict[int, Sequences]) -> str:
    """What is wrong with the outputs, beside plain and beside eager attention, or ""."""
    notes = []
    for wanted in (truth.plain, truth.eager):
        if wanted is None:
            continue
        note = outputs_differ(outputs, wanted, cell, where)
        if not note:
            return ""
        notes.append(note)
    return notes[0]


def outputs_differ(outputs: Outputs, wanted: Outputs, cell: Cell, where: dict[int, Sequences]) -> str:
    """What is wrong with ``outputs``, or ""."""
    for name, right in wanted.items():
        mine = outputs[name]
        if name == "ids":
            continue
        if mine.shape != right.shape:
            return f"{name}: {tuple(mine.shape)}, expected {tuple(right.shape)}"
        if name == "steps":
            return _steps(mine, right, outputs["ids"], wanted["ids"])
        keep = valid(right, cell, where) if name == "logits" else torch.ones_like(right, dtype=torch.bool)
        error = _error(mine[keep], right[keep])
        if error > TOLERANCE:
            return f"{name}: off by {error:.1e}"
    if "scores" in wanted and not torch.equal(outputs["ids"], wanted["ids"]):
        return "ids: other tokens"
    return ""


def _steps(mine: Tensor, right: Tensor, ids: Tensor, wanted: Tensor) -> str:
    """Scores (steps, B, V) and ids of a greedy generation; after two tokens tie, the rest is chance."""
    for row in range(right.shape[1]):
        for step in range(right.shape[0]):
            finite = right[step, row].isfinite()
            error = _error(mine[step, row][finite], right[step, row][finite])
            if error > TOLERANCE:
                return f"scores of step {step}: off by {error:.1e}"
            place = step - right.shape[0]
            if ids[row, place] != wanted[row, place]:
                best = right[step, row].topk(2).values
                if float(best[0] - best[1]) > 2 * TOLERANCE * float(right[step, row][finite].abs().max()):
                    return f"ids of step {step}: other tokens"
                break
    return ""


def valid(logits: Tensor, cell: Cell, where: dict[int, Sequences] | None = None) -> Tensor:
    """Which values of (B, S, ...) are of valid tokens, bool in the same shape."""
    known = where if where is not None else cell.sequences
    sequences = known.get(logits.shape[1]) if logits.dim() >= 3 else None
    if cell.keep is not None and cell.keep.shape == logits.shape[:2]:
        keep = cell.keep
    elif sequences is None:
        return torch.ones_like(logits, dtype=torch.bool)
    else:
        keep = sequences.valid(*logits.shape[:2])
    return keep.reshape(*keep.shape, *[1] * (logits.dim() - 2)).expand_as(logits)


def noise(eager: Outputs | None, plain: Outputs, cell: Cell) -> float:
    """How far rounding alone takes the two apart."""
    if eager is None or "logits" not in plain or eager["logits"].shape != plain["logits"].shape:
        return 0.0
    keep = valid(plain["logits"], cell)
    found = _error(eager["logits"][keep].detach(), plain["logits"][keep].detach())
    return found if found < NOISE else 0.0


def _error(mine: Tensor, right: Tensor) -> float:
    """The largest difference, of the largest value; infinite where one is not a number."""
    if right.numel() == 0:
        return 0.0
    error = (mine.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1e-6)
    return float(error) if bool(error.isfinite()) else float("inf")


def gradients(
    model: Any,
    outputs: Outputs,
    reading: Reading,
    truth: Truth,
    attached: Attached,
    cell: Cell,
    where: dict[int, Sequences],
) -> str:
    """What is wrong with the gradient of logits and loss with respect to the embedding, or ""."""
    weight = _weight(model)
    if truth.eager is None or weight is None or not outputs["logits"].requires_grad:
        return ""
    keep = valid(truth.eager["logits"], cell, where)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(truth.eager["logits"].shape, generator=generator) * keep / keep.sum()
    layers = _layers(truth, attached, reading)
    counted = reading.loss is not None and layers is not None
    total = (outputs["logits"].masked_fill(~keep, 0) * direction).sum()
    if reading.loss is not None and counted:
        total = total + reading.loss
    got = torch.autograd.grad(total, weight, allow_unused=True, materialize_grads=True)[0]
    errors = []
    # they differ where rows that see nothing are read later, by recurrent layers
    for right, record in ((truth.eager, truth.record), (truth.plain, truth.beside)):
        if not right["logits"].requires_grad:
            continue
        for states in _layers(replace(truth, record=record), attached, reading) or [[]]:
            total = (right["logits"].masked_fill(~keep, 0) * direction).sum()
            if counted and states:
                tokens = states[0].shape[1]
                sequences = where.get(tokens) or Sequences.of_mask(torch.ones(states[0].shape[:2]))
                total = total + oracle.decorrelation(states[:-1], sequences)
            wanted = torch.autograd.grad(total, weight, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            errors.append(_error(got, wanted))
    if not errors:
        return ""
    return f"gradient: off by {min(errors):.1e}" if min(errors) > GRADIENT + 10 * truth.noise else ""


def _weight(model: Any) -> Tensor | None:
    """The embedding's, else the first matrix."""
    try:
        weight = model.get_input_embeddings().weight
    except Exception:
        weight = next((p for p in model.parameters() if p.dim() > 1 and p.requires_grad), None)
    return weight if isinstance(weight, Tensor) and weight.requires_grad else None
