"""Tiny models of every class, and why a class is left out."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench.families import shrink

if TYPE_CHECKING:
    from bench.families.inputs import Takes

MAPPINGS = {
    "causal": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "multimodal": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",),
    "auto": ("MODEL_MAPPING",),
}
# of AutoModel: architectures that have no class above, and those with an encoder's class too
_ENCODERS = ("MODEL_FOR_MASKED_LM_MAPPING", "MODEL_FOR_TEXT_ENCODING_MAPPING")
LARGEST = 40_000_000  # parameters


class LeftOut(Exception):
    """Why a class is not in the denominator."""


class NoInput(LeftOut):
    """It takes something else than the sweep has."""


@dataclass(frozen=True)
class Entry:
    """A class to try: of which group of mappings, its name, the config that the mapping names."""

    group: str
    name: str
    config: str


def entries() -> list[Entry]:
    """Every class once, under the first group that has it."""
    from transformers.models.auto import configuration_auto, modeling_auto

    configs = configuration_auto.CONFIG_MAPPING_NAMES
    found: dict[str, Entry] = {}
    covered: set[str] = set()

    def names(mapping: str) -> Iterator[tuple[str, str]]:
        for kind, classes in getattr(modeling_auto, f"{mapping}_NAMES").items():
            for name in [classes] if isinstance(classes, str) else classes:
                if kind in configs:
                    yield kind, name

    encoders = {kind for mapping in _ENCODERS for kind, _ in names(mapping)}
    for group, mappings in MAPPINGS.items():
        for kind, name in (pair for mapping in mappings for pair in names(mapping)):
            if group == "auto" and kind in covered - encoders:
                continue
            # image and text models are in the mapping of causal ones too
            if name not in found or (group == "multimodal" and not name.endswith("ForCausalLM")):
                found[name] = Entry(group, name, configs[kind])
        if group != "auto":
            covered |= {kind for mapping in mappings for kind, _ in names(mapping)}
    return list(found.values())


def build(entry: Entry, form: Callable[[nn.Module], Takes]) -> tuple[nn.Module, Takes]:
    """(a model with random weights in eval mode, how it is called, which ``form`` finds), if possible one that runs
    with eager attention too.

    Raises:
        LeftOut: no shrunk config makes one that runs.
    """
    import transformers

    model_class = getattr(transformers, entry.name)
    errors: list[str] = []
    reasons: list[str] = []
    second: tuple[nn.Module, Takes] | None = None
    for config in _configs(entry, model_class, errors):
        try:
            model = from_config(model_class, config)
            found = form(model)
        except NoInput:
            raise
        except LeftOut as reason:
            reasons.append(str(reason))
        except Exception as error:
            errors.append(line(error))
        else:
            if found.eager:
                return model, found
            second = second or (model, found)
    if second:
        return second
    raise LeftOut(reasons[0] if reasons else "does not build: " + (errors[0] if errors else "no config"))


def from_config(model_class: Any, config: Any) -> nn.Module:
    with quiet():
        with torch.device("meta"):
            size = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        if size > LARGEST:
            raise LeftOut(f"too large: {size / 1e6:.0f} M parameters")
        torch.manual_seed(0)
        model = model_class(copy.deepcopy(config))
    randomise(model)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = generation.forced_eos_token_id = None  # every row generates as many tokens
        generation.pad_token_id = 0
    return model.eval()


def _configs(entry: Entry, model_class: Any, errors: list[str]) -> Iterator[Any]:
    import transformers

    own = getattr(model_class, "config_class", None)
    for config_class in dict.fromkeys(c for c in (getattr(transformers, entry.config), own) if c is not None):
        try:
            with quiet():
                config = config_class()
            starts = [(config_class, config)]
            text = config.get_text_config()
            if text is not config:
                starts.append((type(text), type(text)()))
        except Exception as error:
            errors.append(line(error))
            continue
        for chosen, start in starts:
            for given in shrink.tiny(start):
                try:
                    with quiet():
                        config = chosen(**given)
                except Exception as error:
                    errors.append(line(error))
                    continue
                if entry.group in ("causal", "seq2seq") and getattr(config, "is_decoder", None) is False:
                    config.is_decoder = not getattr(config, "is_encoder_decoder", False)
                yield config


def randomise(model: nn.Module) -> None:
    """Weights that give uneven attention, scores of a size near one, and norms that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            convolves = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            turned = type(module).__name__ == "Conv1D"  # of GPT-2: (in, out)
            for weight in module.parameters(recurse=False):
                if not weight.is_floating_point() or weight.is_meta:
                    continue
                noise = torch.randn(weight.shape, generator=generator).to(weight.dtype)
                if weight.dim() < 2:
                    weight.add_(noise * 0.1)
                else:
                    fan = weight[0].numel() if convolves else weight.shape[-2 if turned else -1]
                    weight.copy_(noise * 1.2 / max(fan, 16) ** 0.5)


def variant(model: Any, option: str, value: int) -> nn.Module | None:
    """The same architecture with a window or a chunk of ``value`` tokens, or None where it has no such option."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    if not hasattr(text, option):
        return None
    setattr(text, option, value)
    if getattr(text, "use_sliding_window", None) is False:
        text.use_sliding_window = True
    if getattr(text, "max_window_layers", None) is not None:
        text.max_window_layers = 2
    kinds = getattr(text, "layer_types", None)
    if kinds and option == "sliding_window" and "sliding_attention" not in kinds and set(kinds) == {"full_attention"}:
        text.layer_types = ["sliding_attention" if i % 2 == 0 else kind for i, kind in enumerate(kinds)]
    return from_config(type(model), config)


@contextlib.contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Eager attention everywhere; also in the classes that ``set_attn_implementation`` leaves alone but that look at
    their config."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:140]}"
