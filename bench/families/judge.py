"""The verdict of a cell and of a class."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.families import build, cells, compare, inputs, oracle
from bench.families.cells import Cell
from bench.families.compare import Attached, Truth
from bench.families.inputs import Takes
from bench.families.oracle import Record

EXACT, REFUSED, WRONG, CRASH, NONE = "exact", "refused", "wrong", "crash", "n/a"
_SMALL = re.compile(r"off by [0-9.]+e-0[3-9]$")
# an argument, option or reading of flashsink's, then what was expected
_NAMED = re.compile(r"^[A-Za-z_][\w.\[\]]*(\([^)]*\))?: \S")


@dataclass(frozen=True)
class Verdict:
    kind: str
    note: str = ""


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
    for option, name in cells.VARIANTS.items():
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
        wide = [replace(cell, given=_double(cell.given), eager=_double(cell.eager)) for cell in small]
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
    with torch.no_grad(), oracle.Softmaxes() as softmaxes, build.eager(model) if form.eager else nullcontext():
        model(**inputs.arguments(form))
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
    torch._dynamo.reset()
    for cell in tested:
        result.verdicts[cell.name] = _judge_cell(model, cell, truths[cell.name], attached, result)
    result.observed = result.observed or attached.kind or ""
    result.fused = result.fused or _fused(attached.probe)
    detach = "detach" if chosen[0].variant is None else f"{chosen[0].variant}: detach"
    result.verdicts[detach] = _detach(model, attached, tested[0], truths[tested[0].name], before)
    phase("plain")
    torch._dynamo.reset()
    _forgive_the_compiler(model, tested, truths, result)


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
            plain = _seeded(action, model, cell.given)
    except Exception as error:
        return Verdict(NONE, f"transformers: {build.line(error)}")
    if not all(bool(torch.isfinite(value).all()) for key, value in plain.items() if key == "logits"):
        plain_valid = compare.valid(plain["logits"], cell)
        if not bool(torch.isfinite(plain["logits"][plain_valid]).all()):
            return Verdict(NONE, "transformers: not finite")
    eager, record = None, Record()
    try:
        with build.quiet(), build.eager(model), oracle.recording(model) as record:
            eager = _seeded(action, model, cell.given | cell.eager)
    except Exception:
        record = Record()
    return Truth(plain, eager, record, beside, compare.noise(eager, plain, cell))


def _seeded(action: Callable[..., Any], model: Any, given: dict[str, Any]) -> Any:
    torch.manual_seed(7)  # some models draw numbers in every forward
    return action(model, given)


def _judge_cell(model: Any, cell: Cell, truth: Truth, attached: Attached, result: Result) -> Verdict:
    try:
        with build.quiet():
            outputs = _seeded(cell.action, model, cell.given)
    except Exception as error:
        return of_error(error)
    marked = any(bool(value.isnan().any()) for value in outputs.values() if value.is_floating_point())
    reading = compare.read(attached) if cell.observed or marked else compare.Reading()
    where = compare.sequences_of(cell, truth, attached, reading)
    wrong = compare.differences(outputs, truth, cell, where)
    for refusal in reading.errors:
        verdict = of_error(refusal)
        if verdict.kind == CRASH or not wrong or marked:
            return verdict
    if not wrong and cell.observed:
        wrong, unchecked = compare.statistics(cell, reading, truth, attached, where)
        result.unchecked |= unchecked
    if not wrong and cell.gradient:
        wrong = compare.gradients(model, outputs, reading, truth, attached, cell, where)
    return Verdict(WRONG, wrong) if wrong else Verdict(EXACT)


def _forgive_the_compiler(model: nn.Module, tested: list[Cell], truths: dict[str, Truth], result: Result) -> None:
    """Compiled cells that transformers alone does not pass either are none of flashsink's."""
    for cell in tested:
        if cell.action is cells.compiled and result.verdicts[cell.name].kind in (WRONG, CRASH):
            try:
                with build.quiet():
                    outputs = _seeded(cell.action, model, cell.given)
                note = compare.outputs_differ(outputs, truths[cell.name].plain, cell, cell.sequences)
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


def _detach(model: Any, attached: Attached, cell: Cell, truth: Truth, before: dict[str, Any]) -> Verdict:
    """Whether detaching leaves the model as it was."""
    try:
        attached.probe.detach()
        after = implementations(model)
        with build.quiet():
            outputs = _seeded(cell.action, model, cell.given)
    except Exception as error:
        return Verdict(CRASH, build.line(error))
    if after != before:
        name = next(name for name in before if before[name] != after.get(name))
        return Verdict(WRONG, f"_attn_implementation of {name or 'the model'}: {before[name]} became {after.get(name)}")
    same = all(torch.equal(outputs[name].nan_to_num(), value.nan_to_num()) for name, value in truth.plain.items())
    return Verdict(EXACT) if same else Verdict(WRONG, "logits: not the same bits as before")


def _fused(probe: Any) -> str:
    """How many layers' outputs were observed in the norms that read them."""
    try:
        return str(len(probe.fused))
    except Exception:
        return ""
