"""Which layers LoRA adapts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from avsr.errors import UserError

ALL_LINEAR = "all-linear"


def adapted_layers(
    module: nn.Module, targets: Sequence[str], key: str, owner: str, unused: Collection[str] = ()
) -> list[str]:
    """The full names of the linear layers of ``module`` that ``targets`` mean.

    Args:
        module: the model.
        targets: names or last parts of names (``q_proj``, ``layers.0.self_attn.q_proj``); ``all-linear`` means all.
        key: the config key, for messages.
        owner: what ``module`` is, for messages.
        unused: names of modules whose layers are never called, so that an adapter would change nothing.

    Raises:
        UserError: there are no targets, or one means no linear layer; the message lists those that exist.
    """
    linear = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and not any(f"{name}.".startswith(f"{other}.") for other in unused)
    ]
    known = (
        f"it has {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in linear))}; {ALL_LINEAR} means them all"
    )
    if not targets:
        raise UserError(f"{key}: names no layer of the {owner}; {known}. A rank of 0 disables LoRA")
    found: set[str] = set()
    for target in targets:
        ours = {n for n in linear if target == ALL_LINEAR or n == target or n.endswith(f".{target}")}
        if not ours:
            raise UserError(f"{key}: the {owner} has no linear layer {target!r} to adapt; {known}")
        found |= ours
    return [name for name in linear if name in found]
