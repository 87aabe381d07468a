"""Official Llama-AVSR checkpoints (``model_avg_N.pth``): their tensors under this project's names.

Such a file holds the whole model in one flat state dict:

- ``audio_proj.{0,2,3}.*``, ``video_proj.*``, and ``audiovisual_proj.*`` for one AV-HuBERT over both (our "fused");
- ``llm.*``: a Hugging Face Llama with ``self_attn.lora_{down,up}_{Q,V}.weight`` in every layer, whose output is
  ``up(down(x)) * alpha / R`` with ``down`` of shape (round(hidden / R), hidden): R is a divisor, not a rank;
- ``llm.model.embed_tokens.weight`` with rows for <pad>, <audio>, </audio>, <video>, </video> after the tokenizer's;
- ``audio_encoder.*``, ``video_encoder.*`` or ``audiovisual_encoder.*``; AV-HuBERT may carry LoRA of the same names,
  always with a scale of 2.

The names are those of github.com/umbertocappellazzo/Llama-AVSR.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from avsr.errors import UserError
from avsr.models.formats.torch_file import load_torch_file
from avsr.models.speech_llm import SpeechLLM

State = dict[str, Tensor]
PROJECTORS = {"audio_proj": "audio", "video_proj": "video", "audiovisual_proj": "fused"}
ENCODERS = ("audio_encoder", "video_encoder", "audiovisual_encoder")
ADDED = ("<pad>", "<audio>", "</audio>", "<video>", "</video>")
ENCODER_SCALE = 2.0
TABLE = "llm.model.embed_tokens.weight"
LORA = re.compile(r"\.self_attn\.lora_(down|up)_[QV]\.weight$")
_OURS = re.compile(
    r"(llm|encoders\.(?P<stream>\w+))\..*layers\.(?P<layer>\d+)\.self_attn\.(?P<part>[qv])_proj"
    r"\.lora_(?P<side>[AB])\..*weight$"
)


def read_official(path: Path) -> State:
    """The state dict of a checkpoint, memory-mapped where the format allows; foreign classes are refused.

    A Lightning file (``epoch=N.ckpt``) is read too: its ``state_dict``, whose names begin with ``model.``.

    Raises:
        UserError: the file is missing, damaged, of another kind, or holds foreign classes.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found = load_torch_file(path)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path}: expected a state dict of Llama-AVSR, found {type(found).__name__}")
    state = {}
    for key, tensor in found.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{path}: expected names and tensors, found {key!r} of type {type(tensor).__name__}")
        state[key.removeprefix("model.")] = tensor
    known = {*PROJECTORS, *ENCODERS, "llm"}
    for key in state:
        if key.partition(".")[0] not in known:
            raise UserError(
                f"{path}: {key} is not a tensor of Llama-AVSR, whose names begin with {', '.join(sorted(known))}"
            )
    return state


def official_task(state: State, where: Path) -> str:
    """The task, in our names, that the checkpoint's projectors are for.

    Raises:
        UserError: there is no such task.
    """
    streams = {PROJECTORS[key.partition(".")[0]] for key in state if key.partition(".")[0] in PROJECTORS}
    if streams == {"audio", "video"}:
        return "audiovisual"
    if len(streams) == 1:
        return streams.pop()
    raise UserError(f"{where}: expected a projector of {', '.join(PROJECTORS)}, found {sorted(streams) or 'none'}")


def translate(state: State, model: SpeechLLM, where: Path) -> State:
    """The checkpoint's tensors under the names of ``model.own_state()``, float32.

    LoRA factors are copied unchanged: the scale alpha / R is that of ``model.config.lora`` (alpha / rank).

    Raises:
        UserError: a tensor is missing, left over or of another shape; the message names the tensor, both shapes and,
            where it can be inferred, the config key to change.
    """
    taken: set[str] = set()
    translated = {}
    for name, parameter in model.own_state().items():
        if name == "delimiters":
            translated[name] = _delimiters(state, model, where)
            continue
        key = official_name(name, state)
        if key not in state:
            raise UserError(f"{where}: {key or name} is missing from the checkpoint{_cause_missing(name)}")
        theirs, ours = tuple(state[key].shape), tuple(parameter.shape)
        if theirs != ours:
            cause = _cause_shape(name, theirs, ours, model)
            raise UserError(f"{where}: {key} is {list(theirs)} in the checkpoint and {list(ours)} by the config{cause}")
        translated[name] = state[key].float().contiguous().clone()
        taken.add(key)
    _refuse_left_over(state, taken, model, where)
    return translated


def official_name(name: str, state: Mapping[str, Tensor]) -> str:
    """Llama-AVSR's name of one of our parameters, or "" where it has none."""
    if name.startswith("projectors."):
        _, stream, rest = name.split(".", 2)
        prefix = next(theirs for theirs, ours in PROJECTORS.items() if ours == stream)
        return f"{prefix}.{rest}"
    match = _OURS.match(name)
    if match is None:
        return ""
    side = "down" if match["side"] == "A" else "up"
    layer = f"layers.{match['layer']}.self_attn.lora_{side}_{match['part'].upper()}.weight"
    if match["stream"] is None:
        return f"llm.model.{layer}"
    return f"{encoder_prefix(state, match['stream'])}.encoder.{layer}"


def encoder_prefix(state: Mapping[str, Tensor], stream: str) -> str:
    """The prefix of the encoder of ``stream``: one AV-HuBERT may serve audio and video, each with its own projector."""
    own = "audiovisual_encoder" if stream == "fused" else f"{stream}_encoder"
    return own if any(key.startswith(f"{own}.") for key in state) else "audiovisual_encoder"


def encoder_state(state: State, prefix: str) -> State:
    """The encoder's tensors under ``prefix`` without LoRA, named as in its own file."""
    start = f"{prefix}."
    return {key.removeprefix(start): t for key, t in state.items() if key.startswith(start) and not LORA.search(key)}


def _delimiters(state: State, model: SpeechLLM, where: Path) -> Tensor:
    """(n, C) float32: the rows of the checkpoint's enlarged table for <audio>, </audio>, <video>, </video>."""
    if TABLE not in state:
        raise UserError(f"{where}: {TABLE} is missing: it holds the embeddings of <audio>, </audio> etc.")
    table = state[TABLE]
    vocabulary = model.tokenizer.get_vocab()
    size = len(model.tokenizer)
    added = [token for token in ADDED if token not in vocabulary]
    place = {**vocabulary, **{token: size + index for index, token in enumerate(added)}}
    expected = (size + len(added), model.hidden)
    if tuple(table.shape) != expected:
        raise UserError(
            f"{where}: {TABLE} is {list(table.shape)} in the checkpoint and {list(expected)} for the tokenizer of "
            f"model.llm.name = {model.config.llm.name!r} with {len(added)} added tokens: another language model"
        )
    tokens = [token for name in model.streams if name != "fused" for token in (f"<{name}>", f"</{name}>")]
    return torch.stack([table[place[token]] for token in tokens]).float()


def _refuse_left_over(state: State, taken: set[str], model: SpeechLLM, where: Path) -> None:
    own = {name.replace(".base_layer.", ".") for name, _ in model.decoder.named_parameters(remove_duplicate=False)}
    own |= {name for name, _ in model.decoder.named_buffers()}
    for key in sorted(state.keys() - taken):
        cause = ""
        if key.partition(".")[0] in PROJECTORS:
            cause = "; try model.projector.layernorm=true" if ".3." in key else ""
        elif LORA.search(key) and not key.startswith("llm."):
            if not _acts(state, key):
                continue
            cause = "; its encoder has LoRA: set model.STREAM.encoder.lora.rank=64 and .alpha=128"
        elif LORA.search(key):
            cause = "; set model.lora.rank" if not model.config.lora.rank else "; another language model"
        elif not key.startswith("llm.") or key.removeprefix("llm.") in own or key.endswith("rotary_emb.inv_freq"):
            continue
        raise UserError(f"{where}: {key} {list(state[key].shape)} of the checkpoint has no place in the model{cause}")


def _acts(state: State, key: str) -> bool:
    """Whether the adapter of ``key`` adds anything: where AV-HuBERT is frozen, ``down`` is still zero."""
    pair = [re.sub(r"lora_(down|up)_", f"lora_{side}_", key) for side in ("down", "up")]
    return all(name in state and bool(state[name].any()) for name in pair)


def _cause_missing(name: str) -> str:
    if name.startswith("projectors.") and ".3." in name:
        return "; try model.projector.layernorm=false"
    match = _OURS.match(name)
    if match is None:
        return "; Llama-AVSR trains LoRA on q_proj and v_proj alone" if "lora_" in name else ""
    if match["stream"]:
        return f"; try model.{match['stream']}.encoder.lora.rank=0"
    return "; try model.lora.rank=0, or name the language model that it was trained with"


def _cause_shape(name: str, theirs: tuple[int, ...], ours: tuple[int, ...], model: SpeechLLM) -> str:
    """The end of a message: what in the config would explain the two shapes."""
    if "lora_" in name:
        side = 0 if ".lora_A." in name else 1
        if theirs[1 - side] != ours[1 - side]:
            return f": another model than {_model_key(name)} names"
        key = "model.lora" if name.startswith("llm.") else f"model.{name.split('.')[1]}.encoder.lora"
        return f": set {key}.rank={theirs[side]}" + (" (or --reduction and --alpha)" if key == "model.lora" else "")
    _, stream, layer, kind = name.split(".")
    if layer != "0":
        if kind == "weight" and layer == "2" and theirs[1] != ours[1]:
            return f": set model.projector.hidden={theirs[1]}"
        return ": another language model than model.llm.name names"
    if theirs[0] != ours[0]:
        return f": set model.projector.hidden={theirs[0]}"
    compression = model.config.streams[stream].compression
    width = ours[1] // (compression.rate if compression.kind == "stack" else 1)
    times, rest = divmod(theirs[1], width)
    if rest:
        return f": another encoder than model.{stream}.encoder names, whose features are {width} wide"
    key = f"model.{stream}.compression"
    return f": set {key}.kind=" + ("average" if times == 1 else f"stack {key}.rate={times}")


def _model_key(name: str) -> str:
    return "model.llm.name" if name.startswith("llm.") else f"model.{name.split('.')[1]}.encoder.name"
