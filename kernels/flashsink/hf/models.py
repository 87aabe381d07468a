"""Where a Hugging Face model keeps its decoder, layers, attention modules and norms.

Most models need nothing: their layers are the ``ModuleList`` of the language decoder whose members have attention. A
family that hides them otherwise is one entry here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_ATTENTION = re.compile(r"Attention|Attn")
_CROSS = re.compile(r"(^|\.)(encoder_attn|cross_?att\w*|EncDecAttention|encoder_decoder_attention)", re.IGNORECASE)
_NORM = re.compile(r"Norm")
# not the language decoder of a composite model
_TOWERS = re.compile(
    r"(^|\.)(vis\w*|img\w*|image\w*|audio\w*|speech\w*|acoustic\w*|talker|code_predictor|code2wav|token2wav|codec\w*"
    r"|\w*tower|\w*projector|qformer|depth_decoder|mtp\w*|dit|\w+_encoder|embed_tokens_extend)(\.|$)"
)
_ENCODERS = re.compile(r"(^|\.)encoder(\.|$)")
PROBE = "_flashsink_probe"  # the attribute of an attached decoder; a copy of the model has one of its own
_INSIDE = ("thinker",)  # the part of a composite model that is one with a language decoder


@dataclass(frozen=True)
class Found:
    """What :func:`find` found.

    Attributes:
        decoder: whose forward is observed, a ``PreTrainedModel``.
        layers: L modules.
        attentions: of every layer the modules that may call attention, cross-attention left out.
        readers: of every layer the norm that may read its output, or None: the next layer's first, at the end the
            decoder's last.
    """

    decoder: Any
    layers: list[nn.Module]
    attentions: list[list[nn.Module]]
    readers: list[nn.Module | None]

    @property
    def configs(self) -> list[Any]:
        """The configs by which the decoder and its layers choose attention."""
        found: list[Any] = []
        for module in [self.decoder, *(inner for layer in self.layers for inner in layer.modules())]:
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation") and not any(config is own for own in found):
                found.append(config)
        return found


def find(model: nn.Module, module: str | None = None) -> Found:
    """The language decoder inside ``model``, whatever wraps it; or what the submodule named ``module`` has.

    Raises:
        ValueError: there are no such layers, or they cannot be told from others.
    """
    name = type(model).__name__
    if module is not None:
        try:
            root = model.get_submodule(module)
        except AttributeError:
            raise ValueError(f"module: {name} has no submodule {module!r}") from None
        lists = list(_layer_lists(root))
    else:
        root = _language_part(model)
        lists = list(_layer_lists(root))
        if len(lists) > 1:
            lists = [own for own in lists if not _TOWERS.search(own[0])] or lists
            lists = lists if len(lists) == 1 else [own for own in lists if not _ENCODERS.search(own[0])] or lists
    if len(lists) != 1:
        names = ", ".join(own for own, _, _ in lists)
        raise ValueError(
            f"model: expected one stack of layers with attention in {name}, found {len(lists)}"
            + (f" ({names}); name the one to observe with module=" if lists else "")
        )
    owner_name, owner, layers = lists[0]
    return Found(_pretrained(model, root, owner_name), layers, _attentions(layers), _readers(owner, layers))


def _language_part(model: nn.Module) -> nn.Module:
    part: Any = next((own for own in model.modules() if hasattr(own, "get_decoder") and hasattr(own, "config")), model)
    while True:
        inner = next((getattr(part, own) for own in _INSIDE if hasattr(part, own)), None)
        if inner is None and hasattr(part, "get_decoder"):
            try:
                inner = part.get_decoder()
            except (AttributeError, NotImplementedError, ValueError):
                inner = None
        if not isinstance(inner, nn.Module) or inner is part or not list(_layer_lists(inner)):
            return part
        part = inner


def _layer_lists(root: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """(name, owner, layers) of every outermost ModuleList of which a member has attention."""
    found: list[str] = []
    for name, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        layers = [layer for layer in module if isinstance(layer, nn.Module)]
        if not any(_has_attention(layer) for layer in layers):
            continue
        found.append(name)
        yield name, root.get_submodule(name.rpartition(".")[0]), layers


def _has_attention(layer: nn.Module) -> bool:
    return any(_ATTENTION.search(type(own).__name__) for own in layer.modules() if own is not layer)


def _pretrained(model: nn.Module, root: nn.Module, owner: str) -> nn.Module:
    """The innermost module around the layers that has a config and takes their inputs."""
    parts = owner.split(".")[:-1]
    for end in range(len(parts), -1, -1):
        own = root.get_submodule(".".join(parts[:end]))
        if hasattr(own, "set_attn_implementation"):
            return own
    inside = [own for own in model.modules() if hasattr(own, "set_attn_implementation")]
    around = [own for own in inside if any(part is root for part in own.modules())]
    if not around:
        raise ValueError(f"model: expected a transformers model, got {type(model).__name__}")
    return around[-1]


def _attentions(layers: list[nn.Module]) -> list[list[nn.Module]]:
    return [
        [
            own
            for name, own in layer.named_modules()
            if _ATTENTION.search(type(own).__name__) and not _CROSS.search(name)
        ]
        for layer in layers
    ]


def _readers(owner: nn.Module, layers: list[nn.Module]) -> list[nn.Module | None]:
    firsts = [next(iter(_norms(layer)), None) for layer in layers[1:]]
    last = [own for own in _norms(owner) if not any(own is layer for layer in layers)]
    return [*firsts, last[-1] if last else None]


def _norms(module: nn.Module) -> list[nn.Module]:
    return [own for own in module.children() if _NORM.search(type(own).__name__)]
