"""The verdict of a cell and of a class."""

from __future__ import annotations

import copy
import dataclasses
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.families import build, cells, inputs, oracle
from bench.families.cells import Cell, Outputs
from bench.families.inputs import Takes
from bench.families.oracle import Record, Sequences

TOLERANCE = 1e-4  # of the largest |logit| (received, |h|, gradient) of the cell; of the loss itself
_SMALL = re.compile(r"off by [0-9.]+e-0[3-9]$")
NOISE = 1e-3  # of the largest logit; eager and plain that are farther apart are not the same model
GRADIENT = 1e-3
EXACT, REFUSED, WRONG, CRASH, NONE = "exact", "refused", "wrong", "crash", "n/a"
# an argument, option or reading of flashsink's, then what was expected
_NAMED = re.compile(r"^[A-Za-z_][\w.\[\]]*(\([^)]*\))?: \S")


@dataclass(frozen=True)
class Verdict:
    kind: str
    note: str = ""


@dataclass
class Truth:
    """What the class does without flashsink in one cell."""

    plain: Outputs
    eager: Outputs | None
    record: Record  # of the eager run
    beside: Record  # of the plain one: they differ in what rows that see nothing give
    noise: float = 0.0  # how far the two are apart, of the largest logit


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


@dataclass
class Result:
    """Of one class."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    fused: str = ""
    observed: str = ""
    unchecked: set[str] = field(default_factory=set)


def judge(
    entry: build.Entry,
    attach: Callable[..., Any] | None = None,
    *,
    only: str = "",
    compile: bool = True,
    phase: Callable[[str], Any] = lambda name: None,
) -> Result:
    """All cells of a class whose name has the pattern ``only`` in it; ``attach`` takes the place of
    :func:`flashsink.attach`, ``phase`` hears whether the model is "plain" or "attached".

    Raises:
        build.LeftOut: the class is not in the denominator.
    """
    if attach is None:
        import flashsink

        attach = flashsink.attach
    model, form = build.build(entry, inputs.takes)
    if not has_softmax(model, form):
        raise build.LeftOut("no softmax attention")
    result = Result()
    chosen = [cell for cell in cells.cells(model, form, compile=compile) if re.search(only, cell.name)]
    _judge_model(model, chosen, attach, result, phase)
    _in_float64(model, chosen, attach, result)
    for option, name in (("sliding_window", "window"), ("attention_chunk_size", "chunk")):
        try:
            other = build.variant(model, option, cells.SHORT)
        except Exception:
            continue
        if other is not None and form.text:
            chosen = [cell for cell in cells.of_variant(other, form, name) if re.search(only, cell.name)]
            _judge_model(other, chosen, attach, result, phase)
    return result


def _in_float64(model: Any, chosen: list[Cell], attach: Callable[..., Any], result: Result) -> None:
    """Judges small differences again where rounding is smaller too: what it makes of them is not a difference."""
    small = [cell for cell in chosen if result.verdicts[cell.name].kind == WRONG]
    if not small or not all(_SMALL.search(result.verdicts[cell.name].note) for cell in small):
        return
    again = Result()
    try:
        wide = [dataclasses.replace(cell, given=_double(cell.given), eager=_double(cell.eager)) for cell in small]
        _judge_model(copy.deepcopy(model).double(), wide, attach, again, lambda name: None)
    except Exception:
        return  # a class that knows float32 only
    for cell in small:
        if again.verdicts[cell.name].kind == EXACT:
            result.verdicts[cell.name] = Verdict(EXACT, "in float64")


def _double(arguments: dict[str, Any]) -> dict[str, Any]:
    wide = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
    return {key: value.double() if wide(value) else value for key, value in arguments.items()}


def has_softmax(model: nn.Module, form: Takes) -> bool:
    build.implementation(model, "eager" if form.eager else build.default(model))
    try:
        with torch.no_grad(), oracle.Softmaxes() as softmaxes:
            model(**inputs.arguments(form))
    finally:
        build.implementation(model, build.default(model))
    return softmaxes.count > 0


def implementations(model: nn.Module) -> dict[str, Any]:
    return {
        name: module.config._attn_implementation
        for name, module in model.named_modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }


def _judge_model(
    model: Any, chosen: list[Cell], attach: Callable[..., Any], result: Result, phase: Callable[[str], Any]
) -> None:
    truths: dict[str, Truth] = {}
    for cell in chosen:
        truth = _truth(model, cell)
        if isinstance(truth, Verdict):
            result.verdicts[cell.name] = truth
        else:
            truths[cell.name] = truth
    tested = [cell for cell in chosen if cell.name in truths]
    if not tested:
        return
    before = implementations(model)
    phase("attached")
    try:
        attached = _attach(model, attach)
    except Exception as error:
        verdict = of_error(error)
        result.verdicts |= {cell.name: verdict for cell in tested}
        return
    result.fused = result.fused or str(len(getattr(attached.probe, "_norms", ())))
    torch._dynamo.reset()
    for cell in tested:
        result.verdicts[cell.name] = _judge_cell(model, cell, truths[cell.name], attached, result)
    attached.probe.detach()
    phase("plain")
    torch._dynamo.reset()
    _forgive_the_compiler(model, tested, truths, result)
    result.observed = result.observed or attached.kind or ""
    suffix = "" if ": " not in tested[0].name or tested[0].name.startswith("compiled") else tested[0].name.split(":")[0]
    result.verdicts[f"{suffix}: detach".lstrip(": ")] = _after(model, tested[0], truths[tested[0].name], before)


def _attach(model: nn.Module, attach: Callable[..., Any]) -> Attached:
    try:
        # whose eager maps are those before the learned sink takes its share
        options = {"learned_sinks": False} if re.match("Granite(Moe)?SWA", type(model).__name__) else {}
        return Attached(attach(model, **options), options)
    except ValueError as error:
        if "decorrelation=False" not in str(error):
            raise
        return Attached(attach(model, decorrelation=False), {"decorrelation": False})


def _truth(model: Any, cell: Cell) -> Truth | Verdict:
    action = cells.forward if cell.action is cells.compiled else cell.action  # the same, however it is run
    try:
        with build.quiet(), oracle.recording(model) as beside:
            plain = action(model, cell.given)
    except Exception as error:
        return Verdict(NONE, f"transformers: {build.line(error)}")
    if not all(bool(torch.isfinite(value).all()) for key, value in plain.items() if key == "logits"):
        plain_valid = _valid(plain["logits"], cell, None)
        if not bool(torch.isfinite(plain["logits"][plain_valid]).all()):
            return Verdict(NONE, "transformers: not finite")
    eager, record = None, Record()
    build.implementation(model, "eager")
    try:
        with build.quiet(), oracle.recording(model) as record:
            eager = action(model, cell.given | cell.eager)
    except Exception:
        record = Record()
    finally:
        build.implementation(model, build.default(model))
    noise = 0.0
    if eager is not None and "logits" in eager and eager["logits"].shape == plain["logits"].shape:
        keep = _valid(plain["logits"], cell, cell.sequences)
        noise = _error(eager["logits"][keep].detach(), plain["logits"][keep].detach())
    return Truth(plain, eager, record, beside, noise if noise < NOISE else 0.0)


def _judge_cell(model: Any, cell: Cell, truth: Truth, attached: Attached, result: Result) -> Verdict:
    try:
        with build.quiet():
            outputs = cell.action(model, cell.given)
    except Exception as error:
        return of_error(error)
    marked = any(bool(value.isnan().any()) for value in outputs.values() if value.is_floating_point())
    reading = _read(attached) if cell.observed or marked else Reading()
    where = _sequences(cell, truth, attached, reading)
    wrong = _differences(outputs, truth, cell, where)
    for refusal in reading.errors:
        verdict = of_error(refusal)
        if verdict.kind == CRASH or not wrong or marked:
            return verdict
    if not wrong and cell.observed:
        wrong = _statistics(reading, truth, attached, where, result)
    if not wrong and cell.gradient:
        wrong = _gradients(model, outputs, reading, truth, attached, cell, where)
    return Verdict(WRONG, wrong) if wrong else Verdict(EXACT)


def _forgive_the_compiler(model: nn.Module, tested: list[Cell], truths: dict[str, Truth], result: Result) -> None:
    """Compiled cells that transformers alone does not pass either are none of flashsink's."""
    for cell in tested:
        if cell.action is cells.compiled and result.verdicts[cell.name].kind in (WRONG, CRASH):
            try:
                with build.quiet():
                    outputs = cell.action(model, cell.given)
                note = _compare(outputs, truths[cell.name].plain, cell, cell.sequences)
            except Exception as error:
                note = build.line(error)
            if note:
                result.verdicts[cell.name] = Verdict(NONE, f"transformers compiled: {note}")
    torch._dynamo.reset()


def of_error(error: Exception) -> Verdict:
    """Refused where flashsink raised a ValueError or RuntimeError that names what it is about."""
    import flashsink

    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and Path(flashsink.__file__).parent in Path(frames[-1].filename).parents
    text = build.line(error)
    if ours and isinstance(error, (ValueError, RuntimeError)) and _NAMED.match(str(error)):
        return Verdict(REFUSED, text.split(": ", 1)[1])
    return Verdict(CRASH, text)


# ---- the probe


def _read(attached: Attached) -> Reading:
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


def _sequences(cell: Cell, truth: Truth, attached: Attached, reading: Reading) -> dict[int, Sequences]:
    """Where the sequences are, as the model's own attention keeps them apart."""
    if attached.kind is None and reading.received:
        attached.kind = _match(cell, truth, reading.received)
    where = dict(cell.sequences)
    if cell.maybe is not None:
        _, cut, end = cell.maybe.pieces[-1]
        weights = [a for stack in truth.record.attention.values() for a in stack.attention if a.shape[-2] == end]
        if weights and all(not bool(a[:, :, cut:, :cut].any()) for a in weights):
            where[end] = cell.maybe
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


def _statistics(reading: Reading, truth: Truth, attached: Attached, where: dict[int, Sequences], result: Result) -> str:
    """What is wrong with the probe's numbers, or ""."""
    stack = truth.record.attention.get(attached.kind or "")
    sequences = None
    if reading.received is not None:
        if stack is None or len(stack.attention) != len(reading.received):
            result.unchecked.add("received")
        else:
            for layer, (attention, mine) in enumerate(zip(stack.attention, reading.received, strict=True)):
                wanted, sequences = _received(attention, where)
                if mine.shape != wanted.shape:
                    return f"received of layer {layer}: {tuple(mine.shape)}, expected {tuple(wanted.shape)}"
                keep = sequences.valid(wanted.shape[0], wanted.shape[2])[:, None].expand_as(wanted)
                error = _error(mine[keep], wanted[keep])
                if error > TOLERANCE + 10 * truth.noise:
                    return f"received of layer {layer}: off by {error:.1e}"
    layers = _layers(truth, attached, reading)
    if layers is None:
        result.unchecked |= {"loss", "activations"}
        return ""
    tokens = layers[0][0].shape[1]
    sequences = where.get(tokens) or sequences
    if sequences is None:
        sequences = Sequences.of_mask(torch.ones(layers[0][0].shape[:2]))
    layers += _layers(dataclasses.replace(truth, record=truth.beside), attached, reading) or []
    return _of_layers(reading, layers, sequences)


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


def _differences(outputs: Outputs, truth: Truth, cell: Cell, where: dict[int, Sequences]) -> str:
    """What is wrong with the outputs, beside plain and beside eager attention, or ""."""
    notes = []
    for wanted in (truth.plain, truth.eager):
        if wanted is None:
            continue
        note = _compare(outputs, wanted, cell, where)
        if not note:
            return ""
        notes.append(note)
    return notes[0]


def _compare(outputs: Outputs, wanted: Outputs, cell: Cell, where: dict[int, Sequences]) -> str:
    for name, right in wanted.items():
        mine = outputs[name]
        if name == "ids":
            continue
        if mine.shape != right.shape:
            return f"{name}: {tuple(mine.shape)}, expected {tuple(right.shape)}"
        if name == "steps":
            return _steps(mine, right, outputs["ids"], wanted["ids"])
        keep = _valid(right, cell, where) if name == "logits" else torch.ones_like(right, dtype=torch.bool)
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


def _valid(logits: Tensor, cell: Cell, where: dict[int, Sequences] | None) -> Tensor:
    known = where if where is not None else cell.sequences
    sequences = known.get(logits.shape[1]) if logits.dim() >= 3 else None
    if cell.name.endswith("hole"):
        keep = inputs.padding("hole", logits.shape[1]).bool()
    elif sequences is None:
        return torch.ones_like(logits, dtype=torch.bool)
    else:
        keep = sequences.valid(*logits.shape[:2])
    return keep.reshape(*keep.shape, *[1] * (logits.dim() - 2)).expand_as(logits)


def _error(mine: Tensor, right: Tensor) -> float:
    """The largest difference, of the largest value; infinite where one is not a number."""
    if right.numel() == 0:
        return 0.0
    error = (mine.double() - right.double()).abs().max() / right.double().abs().max().clamp(min=1e-6)
    return float(error) if bool(error.isfinite()) else float("inf")


def _gradients(
    model: Any,
    outputs: Outputs,
    reading: Reading,
    truth: Truth,
    attached: Attached,
    cell: Cell,
    where: dict[int, Sequences],
) -> str:
    weight = _weight(model)
    if truth.eager is None or weight is None or not outputs["logits"].requires_grad:
        return ""
    keep = _valid(truth.eager["logits"], cell, where)
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(truth.eager["logits"].shape, generator=generator) * keep / keep.sum()
    layers = _layers(truth, attached, reading)
    counted = reading.loss is not None and layers is not None
    total = (outputs["logits"].masked_fill(~keep, 0) * direction).sum() + (reading.loss if counted else 0)
    got = torch.autograd.grad(total, weight, allow_unused=True, materialize_grads=True)[0]
    errors = []
    # they differ where rows that see nothing are read later, by recurrent layers
    for right, record in ((truth.eager, truth.record), (truth.plain, truth.beside)):
        if not right["logits"].requires_grad:
            continue
        for states in _layers(dataclasses.replace(truth, record=record), attached, reading) or [[]]:
            total = (right["logits"].masked_fill(~keep, 0) * direction).sum()
            if counted and states:
                tokens = states[0].shape[1]
                sequences = where.get(tokens) or Sequences.of_mask(torch.ones(states[0].shape[:2]))
                total = total + oracle.decorrelation(states[:-1], sequences)
            wanted = torch.autograd.grad(total, weight, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            errors.append(_error(got, wanted))
    return f"gradient: off by {min(errors):.1e}" if min(errors) > GRADIENT + 10 * truth.noise else ""


def _weight(model: Any) -> Tensor | None:
    """The embedding's, else the first matrix."""
    try:
        weight = model.get_input_embeddings().weight
    except Exception:
        weight = next((p for p in model.parameters() if p.dim() > 1 and p.requires_grad), None)
    return weight if isinstance(weight, Tensor) and weight.requires_grad else None


def _after(model: Any, cell: Cell, truth: Truth, before: dict[str, Any]) -> Verdict:
    """Whether detaching left the model as it was."""
    after = implementations(model)
    if after != before:
        name = next(name for name in before if before[name] != after.get(name))
        return Verdict(WRONG, f"_attn_implementation of {name or 'the model'}: {before[name]} became {after.get(name)}")
    with build.quiet():
        outputs = cell.action(model, cell.given)
    same = all(torch.equal(outputs[name].nan_to_num(), value.nan_to_num()) for name, value in truth.plain.items())
    return Verdict(EXACT) if same else Verdict(WRONG, "logits: not the same bits as before")
