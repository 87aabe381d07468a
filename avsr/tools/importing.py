"""``avsr import CKPT``: an official Llama-AVSR checkpoint as a run that can be evaluated and used."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from avsr.config import AugmentConfig, Config, LoraConfig, load_config, to_yaml
from avsr.errors import UserError
from avsr.models.build import build_model, build_store, speech_encoders
from avsr.models.encoder import SpeechEncoder
from avsr.models.formats import official
from avsr.models.formats.fairseq_file import TRAINING_ONLY
from avsr.models.llm import lora_from_reduction
from avsr.models.sources import RUN
from avsr.models.speech_llm import SpeechLLM
from avsr.runtime.folders import part_of
from avsr.runtime.locks import claim
from avsr.runtime.tensors import refuse_nonfinite, save_file
from avsr.training.checkpoint import publish

logger = logging.getLogger("avsr")
_LOOKED_AT = 64  # values of a tensor compared


def import_checkpoint(
    checkpoint: str | Path,
    recipe: str,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    reduction: int | None = None,
    alpha: float | None = None,
) -> Path:
    """Writes a run folder with the checkpoint's trained tensors under our names.

    The AV-HuBERT in the checkpoint is copied too, since its batch statistics changed in training
    (``encoders/*.safetensors``; the config names it by ``run:``, which allows moving the run). The language model and a
    Whisper or WavLM encoder are frozen and not copied; a few of their values are compared with the models that the
    config names. Whisper is set to 30 s windows and normalized waveforms, as it was trained, unless ``overrides`` say
    otherwise. The rate of average pooling leaves no trace in the weights: the recipe's must be the right one.

    Args:
        checkpoint: ``model_avg_N.pth``.
        recipe: a config as for training: task, encoders, compression, language model, manifests.
        out: the run folder to make.
        overrides: ``key=value`` of the config.
        reduction: Llama-AVSR's ``--reduction_lora R``; with ``alpha`` it replaces the config's model.lora.
        alpha: Llama-AVSR's ``--alpha``.

    Returns:
        ``out``.

    Raises:
        UserError: an unreadable checkpoint, one that does not fit the config (naming key, shapes and the likely cause),
            a folder that exists, or that another process makes.
    """
    path, out = Path(checkpoint), Path(out)
    config = load_config(recipe, overrides)
    config.run = str(out)
    with claim(out.parent, out.name, "--out"):
        return _import(path, config, out, overrides, reduction, alpha)


def _import(
    path: Path, config: Config, out: Path, overrides: Sequence[str], reduction: int | None, alpha: float | None
) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists already; name another folder")
    state = official.read_official(path)
    task = official.official_task(state, path)
    if task != config.model.task:
        raise UserError(f"{path}: its projectors are of the task {task}; the config has model.task={config.model.task}")
    if (reduction is None) != (alpha is None):
        raise UserError("--reduction and --alpha go together: the scale of LoRA is alpha / R")
    if reduction is not None and alpha is not None:
        config.model.lora = _reduced(state, reduction, alpha, path)
    _as_trained(config, overrides)
    part = part_of(out)
    shutil.rmtree(part, ignore_errors=True)
    try:
        final = _write(part, out, state, config, path)
        if out.exists():
            out.rmdir()
        os.replace(part, final)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _write(part: Path, out: Path, state: official.State, config: Config, path: Path) -> Path:
    """Writes everything into ``part``; its config already names ``out``."""
    saved = copy.deepcopy(config)  # build_model settles the precision for this machine
    for stream in config.model.streams:
        file = _export_encoder(part, stream, state, config, path)
        if file is not None:
            for each in (config, saved):
                getattr(each.model, stream).encoder.name = f"{RUN}{file.as_posix()}"
    config.run = str(part)
    config.data.cache, config.augment = None, AugmentConfig()  # nothing is read or encoded here
    store = build_store(config, torch.device("cpu"))
    model, _ = build_model(config, store, torch.device("cpu"))
    translated = official.translate(state, model, path)
    refuse_nonfinite(translated.items(), str(path))
    compared = compare_frozen(state, model, speech_encoders(store), path)
    publish(part / "checkpoints" / "best", translated, saved, {"step": 0, "imported": path.name})
    (part / "config.yaml").write_text(to_yaml(saved), encoding="utf-8")
    counts = len(translated), len(state) - len(translated), len(compared)
    logger.info("%s: %d tensors imported, %d frozen ones not copied (%d of them compared)", out, *counts)
    return out


def compare_frozen(
    state: official.State, model: SpeechLLM, encoders: dict[str, SpeechEncoder], where: Path
) -> list[str]:
    """Compares a few values of a few frozen tensors with the models that the config names.

    Returns:
        The names of the tensors compared, in the checkpoint.

    Raises:
        UserError: one differs by more than rounding to bf16.
    """
    own = {name.replace(".base_layer.", "."): p for name, p in model.decoder.named_parameters(remove_duplicate=False)}
    pairs = {f"llm.{name}": (parameter, "model.llm.name") for name, parameter in own.items() if "lora_" not in name}
    for stream, encoder in encoders.items():
        prefix = official.encoder_prefix(state, stream)
        parts = {f"{prefix}.{name}": parameter for name, parameter in _unwrapped(encoder).items()}
        matrices = [key for key in parts.keys() & state.keys() if state[key].dim() > 1]
        if official.encoder_state(state, prefix) and not matrices:
            kind = type(encoder).__name__
            raise UserError(f"{where}: {prefix} is of another kind than {kind}: model.{stream}.encoder")
        pairs |= {key: (parameter, f"model.{stream}.encoder.name") for key, parameter in parts.items()}
    # not vectors: biases of zero and norms of one are the same in many models
    common = sorted(key for key in pairs.keys() & state.keys() if state[key].dim() > 1)
    compared = []
    for key in _some(common):
        ours, named = pairs[key]
        theirs = state[key]
        enlarged = key in (official.TABLE, "llm.lm_head.weight")  # by the rows of the added tokens
        if theirs.shape[enlarged:] != ours.shape[enlarged:]:
            shapes = f"{list(theirs.shape)} in the checkpoint and {list(ours.shape)} in {named}"
            raise UserError(f"{where}: the frozen {key} is {shapes}: another model")
        if not _close(theirs, ours):
            reason = "the checkpoint was trained on another model"
            raise UserError(f"{where}: the frozen {key} is not that of {named}: {reason}")
        compared.append(key)
    return compared


def _some(keys: list[str]) -> list[str]:
    """The first, middle and last name of every part, and the embedding table."""
    chosen = set()
    for part in {key.partition(".")[0] for key in keys}:
        own = [key for key in keys if key.startswith(f"{part}.")]
        chosen |= {own[0], own[len(own) // 2], own[-1]}
    return sorted(chosen | ({official.TABLE} & set(keys)))


def _close(theirs: Tensor, ours: Tensor) -> bool:
    a = theirs.flatten()[:_LOOKED_AT].double()
    b = ours.detach().flatten()[:_LOOKED_AT].double().cpu()
    # bf16 keeps 8 bits; an average of bf16 checkpoints was rounded a few times more
    return bool(((a - b).abs() <= 0.02 * b.abs() + 0.01 * b.abs().mean()).all())


def _unwrapped(encoder: nn.Module) -> dict[str, Tensor]:
    """Parameters by their names in the pretrained model, which is one attribute of the encoder."""
    own = {name.partition(".")[2]: parameter for name, parameter in encoder.named_parameters() if "lora_" not in name}
    return {name.replace(".base_layer.", "."): parameter for name, parameter in own.items()}


def _export_encoder(part: Path, stream: str, state: official.State, config: Config, where: Path) -> Path | None:
    """Writes the AV-HuBERT of ``stream`` and returns its path below the run; None if there is none to write."""
    settings = config.model.streams[stream].encoder
    prefix = official.encoder_prefix(state, stream)
    tensors = official.encoder_state(state, prefix)
    if settings.kind != "avhubert" or not tensors:
        return None
    if "post_extract_proj.weight" not in tensors:
        raise UserError(f"{where}: {prefix} is of another kind than AV-HuBERT: model.{stream}.encoder.kind")
    lora = settings.lora
    if lora.rank and lora.alpha != official.ENCODER_SCALE * lora.rank:
        raise UserError(
            f"model.{stream}.encoder.lora.alpha: Llama-AVSR's LoRA on AV-HuBERT has a scale (alpha / rank) of "
            f"{official.ENCODER_SCALE:g}; with rank={lora.rank} expected {official.ENCODER_SCALE * lora.rank:g}, got "
            f"{lora.alpha:g}"
        )
    file = Path("encoders") / f"{prefix}.safetensors"
    if not (part / file).is_file():
        (part / file).parent.mkdir(parents=True, exist_ok=True)
        kept = {name: t.contiguous().clone() for name, t in tensors.items() if not TRAINING_ONLY.match(name)}
        refuse_nonfinite(((f"{prefix}.{name}", tensor) for name, tensor in kept.items()), str(where))
        save_file(kept, str(part / file))
    return file


def _reduced(state: official.State, reduction: int, alpha: float, where: Path) -> LoraConfig:
    if reduction < 1 or not 0 < alpha < math.inf:
        raise UserError(f"--reduction and --alpha: expected numbers above 0, got {reduction} and {alpha}")
    if official.TABLE not in state:
        raise UserError(f"{where}: {official.TABLE} is missing")
    return lora_from_reduction(state[official.TABLE].shape[1], reduction, alpha)


def _as_trained(config: Config, overrides: Sequence[str]) -> None:
    """Whisper saw 30 s windows of normalised waveforms, and WavLM normalised waveforms."""
    encoder = config.model.audio.encoder
    named = {text.partition("=")[0] for text in overrides}
    if "audio" in config.model.streams and encoder.kind in ("whisper", "wavlm"):
        if "model.audio.encoder.normalise" not in named:
            encoder.normalise = True
        if encoder.kind == "whisper" and "model.audio.encoder.pad_to_30s" not in named:
            encoder.pad_to_30s = True
