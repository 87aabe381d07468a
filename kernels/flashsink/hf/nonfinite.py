"""Where inf or NaN first appears in a forward: ``attach(..., nonfinite=True)``.

The outputs of a layer's submodules are checked on their device as they come, and what goes into a submodule where that
is no output: there the code around it made it. Of every token only the first finding is kept, as two integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashsink.checks import check_values
from flashsink.types import Layout

_KINDS = (0.0, torch.inf, -torch.inf, torch.nan)  # of a value; the first is any finite one
INPUT, RESIDUAL = "input", "residual"


class Finiteness:
    """What one forward showed.

    Attributes:
        steps: (layer, block) of every check, in order.
        found: by device ``step`` and ``code`` (B, S) int64: the first check in which a token was not finite, and 4 x
            feature + the index of its value in ``_KINDS``; -1 and 0 where all was.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[int, str]] = []
        self.found: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.known: list[Tensor] = []  # tensors of the layer that is running which have been checked

    def check(self, layer: int, block: str, x: Any) -> None:
        """``x``: anything that a module takes or gives; looked at where it is (B, S, ...) of the layers' B and S."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            return
        if any(x is other for other in self.known):
            return
        self.known.append(x)
        shape = next((own[0].shape for own in self.found.values()), x.shape[:2])
        if x.shape[:2] != shape and x.shape[0] == shape.numel():  # rows and tokens in one, as mixtures of experts do
            x = x.unflatten(0, shape)
        if x.shape[:2] != shape or x.dim() < 3 or x.shape[2:].numel() == 0:
            return
        x = x.detach().flatten(2)
        self.steps.append((layer, block))
        if check_values(x.device) and x.device in self.found and bool(torch.stack(torch.aminmax(x)).isfinite().all()):
            return  # on the CPU a look stops nothing, and costs a tenth of the rest
        feature = (~x.isfinite()).to(torch.uint8).argmax(dim=2)  # 0 where all are finite: then so is that one
        value = x.gather(2, feature[..., None])[..., 0]
        kind = value.isposinf() * 1 + value.isneginf() * 2 + value.isnan() * 3
        step = torch.where(kind > 0, len(self.steps) - 1, -1)
        code = torch.where(kind > 0, 4 * feature + kind, 0)
        if x.device in self.found:
            before, known = self.found[x.device]
            step, code = torch.where(before < 0, step, before), torch.where(before < 0, code, known)
        self.found[x.device] = step, code

    def first(self, layout: Layout) -> tuple[int, str, tuple[int, int], int, float] | None:
        """What :attr:`flashsink.Probe.first_nonfinite` gives."""
        valid, best = layout.valid().cpu(), None
        for step, code in ((step.cpu(), code.cpu()) for step, code in self.found.values()):
            places = (valid & (step >= 0)).nonzero()  # by row and token
            if len(places) == 0:
                continue
            row, token = places[int(step[places[:, 0], places[:, 1]].argmin())].tolist()
            mine = int(step[row, token]), row, token, int(code[row, token])
            best = mine if best is None else min(best, mine)
        if best is None:
            return None
        order, row, token, own = best
        return *self.steps[order], (row, token), own // 4, _KINDS[own % 4]


class FinitenessObserver:
    """Checks what the layers' submodules take and give in every full forward."""

    def __init__(self, forwards: Any, settle: Callable[[Any, Tensor, None], None]) -> None:
        self._forwards, self._settle = forwards, settle
        self._last = -1

    def install(self, layers: list[nn.Module]) -> list[Callable[[], None]]:
        """Returns the functions that undo it."""
        undo: list[Callable[[], None]] = []
        self._last = len(layers) - 1
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                before = functools.partial(self._before, index, name)
                undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                undo.append(module.register_forward_hook(functools.partial(self._after, index, name)).remove)
        return undo

    def _before(self, layer: int, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record = self._forwards.live
        if record is None:
            return
        states = args[0] if args else kwargs.get("hidden_states")
        around = name.rpartition(".")[0] or RESIDUAL
        record.finiteness.check(layer, around if name else INPUT, states)

    def _after(self, layer: int, name: str, module: nn.Module, args: Any, output: Any) -> None:
        record = self._forwards.live
        if record is not None:
            states = output[0] if isinstance(output, tuple | list) and output else output
            record.finiteness.check(layer, name or RESIDUAL, states)
            if not name and isinstance(states, Tensor):
                self._settle(record, states, None)
                record.finiteness.known = [states] if layer < self._last else []
