"""Host stops, operators and collectives of a training step, counted on a CPU: ``python -m bench.step_counts RECIPE
[key=value ...]``.

A training of two ranks, of which the other does nothing (torch's "fake" process group), runs a few steps. Tensors made
without a device, and whatever is computed from them alone, count as the host's, all others as the device's. A *stop* is
what waits for a CUDA stream: a value of a device tensor read on the host, a copy from the host that is not
``non_blocking``, an index by a mask. *Operators* are ATen calls on the device's tensors that are no views: an upper
bound of launches where a GPU has fused kernels (an optimizer's loop over its parameters here is one launch there).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from avsr.config import Config, load_config
from avsr.data.dataset import SpeechDataset
from avsr.training import run
from avsr.training.stages import Stages
from flashsink import checks
from flashsink.hf import attention, layouts, masks, nonfinite

KINDS = ("stops", "operators", "collectives")
OUTSIDE = "loop"  # what no stage contains
_READS = {"item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__array__"}
_SHAPED_BY_VALUES = {"nonzero", "masked_select", "unique", "unique_consecutive", "bincount", "equal", "allclose"}
_FROM_LISTS = {"tensor", "as_tensor", "new_tensor", "from_numpy", "asarray"}
_NO_LAUNCH = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh", "_unsafe_view"}
_NO_LAUNCH |= {"detach", "alias", "_local_scalar_dense", "set_", "resize_", "is_nonzero"}
_OF_CPU = ("flashsink/cpu/", "kernels/flashsink/cpu/")  # kernels that a GPU does not run
_COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter")
_COLLECTIVES += ("reduce_scatter_tensor", "all_to_all_single", "barrier", "all_gather_object", "broadcast_object_list")


class StepCounts:
    """Counts by (kind, stage) while :meth:`counting`; ``where`` holds every stop's line of code."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.where: Counter[tuple[str, str]] = Counter()
        self.stage = OUTSIDE
        self.on_host = False  # the call that is running concerns tensors of the host alone
        self._inside = False  # a collective that is made of others
        self._loading = False

    def add(self, kind: str) -> None:
        if self._loading:
            return
        if kind == "stops":
            place = _caller()
            if place.startswith(_OF_CPU):
                return
            self.where[self.stage, place] += 1
        self.counts[kind, self.stage] += 1

    def reset(self) -> None:
        self.counts.clear()
        self.where.clear()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """What is read by :class:`SpeechDataset` inside is the host's, and not counted."""
        with ExitStack() as held:
            held.enter_context(mock.patch.object(SpeechDataset, "__getitem__", self._uncounted()))
            for module in (checks, attention, layouts, masks, nonfinite):  # on a GPU no value is checked on the host
                held.enter_context(mock.patch.object(module, "check_values", lambda *_: False))
            for name in _COLLECTIVES:
                held.enter_context(mock.patch.object(dist, name, self._counted(getattr(dist, name))))
            held.enter_context(_Operators(self))
            held.enter_context(_Places(self))
            yield

    def _uncounted(self) -> Callable[..., Any]:
        read = SpeechDataset.__getitem__

        def call(data: SpeechDataset, key: Any) -> Any:
            self._loading = True
            found = read(data, key)
            self._loading = False
            for features in getattr(found, "features", {}).values():
                features._on_host = True
            return found

        return call

    def _counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._inside:
                self.add("collectives")
            before, self._inside = self._inside, True
            try:
                return collective(*args, **kwargs)
            finally:
                self._inside = before

        return call


class _Operators(TorchDispatchMode):
    def __init__(self, found: StepCounts) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self._found.on_host and not func.is_view and name not in _NO_LAUNCH:
            self._found.add("operators")
        return func(*args, **(kwargs or {}))


class _Places(TorchFunctionMode):
    """Follows which tensors are the host's, by an attribute, and finds what stops for the others."""

    def __init__(self, found: StepCounts) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moves = kwargs.get("device") is not None or name == "cuda" or (name == "to" and _names_device(args[1:]))
        host = all(_is_host(x) for x in given) and not moves
        if self._stops(name, args, kwargs, given, moves):
            self._found.add("stops")
        before = self._found.on_host
        self._found.on_host = host and (bool(given) or name in _FROM_LISTS or not moves)
        try:
            out = func(*args, **kwargs)
            if moves and any(out is x for x in given) and all(_is_host(x) for x in given):
                out = torch.ops.aten.alias(out)  # on a CPU nothing was moved
        finally:
            self._found.on_host = before
        if host:
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and not x.requires_grad:
                    x._on_host = True  # type: ignore[attr-defined]
        return out

    def _stops(self, name: str, args: Any, kwargs: Any, given: list[Tensor], moves: bool) -> bool:
        ours = [x for x in given if not _is_host(x)]
        if name in _READS or name in _SHAPED_BY_VALUES:
            return bool(ours)
        if name == "repeat_interleave":
            return len(ours) > 1 and kwargs.get("output_size") is None
        if name in ("__getitem__", "__setitem__"):
            keys = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            return not _is_host(args[0]) and any(x.dtype == torch.bool or _is_host(x) for x in keys)
        if name in _FROM_LISTS:
            return moves or name == "new_tensor" and bool(ours)
        return bool(given) and not ours and moves and not kwargs.get("non_blocking")


def _is_host(tensor: Tensor) -> bool:
    return getattr(tensor, "_on_host", False)


def _names_device(args: Iterable[Any]) -> bool:
    """Whether positional arguments of ``Tensor.to`` name a device, or a tensor on it."""
    return any(isinstance(x, torch.device | str) or isinstance(x, Tensor) and not _is_host(x) for x in args)


def _caller() -> str:
    """The innermost line outside torch's own files and this one."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and not name.endswith(("step_counts.py", "contextlib.py")):
            break
        frame = frame.f_back
    path = frame.f_code.co_filename
    _, installed, inside = path.partition("/site-packages/")
    return f"{inside if installed else '/'.join(path.split('/')[-3:])}:{frame.f_lineno}"


def count(config: Config, first: int = 3, last: int = 7) -> StepCounts:
    """What the steps from ``first`` to before ``last`` do, in all. Nothing is validated or saved in them.

    Begins the process group, if there is none, and changes ``config``.
    """
    config.training.steps, config.training.validate_every, config.training.save_every = last, last + 1, 0
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    found = StepCounts()
    enter = Stages.enter

    @contextmanager
    def entered(self: Stages, name: str, step: int) -> Iterator[None]:
        if name == "forward" and step == first and not found.counts["started", ""]:
            found.reset()
            found.counts["started", ""] = 1
        if name == "forward" and step == last:
            raise _Enough
        before, found.stage = found.stage, name
        with enter(self, name, step):
            yield
        found.stage = before

    loop = run.make_trainer(config)
    with mock.patch.object(Stages, "enter", entered), found.counting(), suppress(_Enough):
        loop.fit()
    del found.counts["started", ""]
    loop.model.detach()
    return found


class _Enough(BaseException):
    """Ends the training."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.step_counts")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    first, last = 3, 7
    found = count(load_config(arguments.recipe, arguments.overrides), first, last)
    stages = sorted({stage for _, stage in found.counts})
    print(f"{'a step':12s}" + "".join(f"{stage:>12s}" for stage in stages) + f"{'all':>12s}")
    for kind in KINDS:
        numbers = [found.counts[kind, stage] / (last - first) for stage in stages]
        print(f"{kind:12s}" + "".join(f"{number:12.4g}" for number in [*numbers, sum(numbers)]))
    for (stage, place), number in sorted(found.where.items()):
        print(f"{number / (last - first):6.3g} stops in {stage}: {place}")


if __name__ == "__main__":
    main()
