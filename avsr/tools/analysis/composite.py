"""Subjects that hear or see: a speech or vision language model over one file, in its processor's own chat template."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.utils.logging import disable_progress_bar

from avsr.data.audio import load_audio
from avsr.data.rates import SAMPLE_RATE
from avsr.errors import UserError
from avsr.models.rows import Assembled
from avsr.models.sources import locate
from avsr.runtime.tensors import refuse_nonfinite
from avsr.tools.analysis.groups import BOS
from avsr.tools.analysis.subject import Subject
from flashsink.hf import models

AUDIO, IMAGE = "audio", "image"
ASKED = {AUDIO: "Transcribe the audio.", IMAGE: "Describe the image."}
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others start programs
MAX_PIXELS = 1 << 25  # models see a picture in far fewer
_LETTERS = {AUDIO: "a", IMAGE: "i"}  # of their tokens' names
_LEFT = {"inputs_embeds", "input_ids", "past_key_values", "use_cache", "labels"}  # not of the decoder's other inputs


@dataclass(frozen=True)
class Media:
    """A file that a model reads; ``kind`` is AUDIO or IMAGE."""

    kind: str
    file: str

    def load(self) -> Any:
        """(samples,) float32 at 16 kHz as an array, or a picture.

        Raises:
            UserError: it cannot be read.
        """
        if self.kind == AUDIO:
            return load_audio(Path(self.file), where="--audio").numpy()
        from PIL import Image

        try:
            with Image.open(self.file, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise UserError(f"--image {self.file}: {picture.width} x {picture.height} pixels are too many")
                return picture.convert("RGB")
        except (OSError, ValueError, SyntaxError, EOFError, OverflowError, struct.error, MemoryError) as error:
            raise UserError(f"--image {self.file}: not a readable picture: {error}") from error
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UserError(f"--image {self.file}: {error}") from error


class _Reached(Exception):
    """The decoder was called; nothing more is needed."""


def load_media_subject(name: str, media: Media, device: torch.device) -> Subject:
    """A composite model over the prompt that asks about one file.

    The row is what its language decoder reads: the prompt's tokens, those of the file from the model's own tower. Text
    is what follows the file: the question, and the template's end.

    Args:
        name: hub id or folder.
        media: the file.
        device: to run on, in float32 on a CPU and in bfloat16 elsewhere.

    Raises:
        UserError: the model or its processor is missing, does not read such files, or cannot be observed.
    """
    content, source = media.load(), str(locate(name))
    processor, model = _open(name, source, device)
    inputs = _prompt(name, processor, media, content).to(device)
    ids = inputs["input_ids"]
    token = _placeholder(processor, model.config, media.kind)
    places = (ids[0] == token).nonzero().flatten().tolist() if token is not None else []
    if not places:
        raise UserError(f"{name}: its prompt has no tokens of --{media.kind} {media.file}")
    decoder, given = _decoder_inputs(name, model, inputs)
    embeddings, mask = given.pop("inputs_embeds"), given.get("attention_mask")
    if embeddings.shape[1] != ids.shape[1]:
        raise UserError(f"{name}: its prompt has {ids.shape[1]} tokens, its decoder reads {embeddings.shape[1]}")
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # else one of the model's own, which it gets again
        mask = torch.ones_like(ids)
    else:
        del given["attention_mask"]
    names, span = _names(processor, ids[0].tolist(), places, media.kind)
    rows = Assembled(embeddings, mask.long(), torch.tensor([span], device=device), [names])

    def batches() -> Iterator[Assembled]:
        yield rows

    opener = names[places[0] - 1] if places[0] > 1 and names[places[0] - 1].startswith("<") else ""
    return Subject(decoder, 1, batches, opener or f"{_LETTERS[media.kind]}0", inputs=given)


def _open(name: str, source: str, device: torch.device) -> tuple[Any, Any]:
    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the libraries behind them raise what they like
        raise UserError(f"{name}: no model with a processor that transformers knows: {_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise UserError(f"{name}: it reads text alone, its processor is {type(processor).__name__}")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        model = AutoModelForMultimodalLM.from_pretrained(source, config=config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # the same
        raise UserError(f"{name}: cannot be loaded: {_line(error)}") from error
    refuse_nonfinite(model.named_parameters(), name)
    return processor, model.to(device).eval().requires_grad_(False)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _prompt(name: str, processor: Any, media: Media, content: Any) -> Any:
    """What the processor makes of one turn of a user: the file, and the question."""
    own = {media.kind: content} if "Voxtral" not in type(processor).__name__ else {"path": media.file}
    turn = [{"type": media.kind, **own}, {"type": "text", "text": ASKED[media.kind]}]
    options = {"return_dict": True, "return_tensors": "pt", "tokenize": True, "add_generation_prompt": True}
    rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", SAMPLE_RATE)
    if media.kind == AUDIO and rate != SAMPLE_RATE:
        raise UserError(f"{name}: its audio has {rate} Hz, expected {SAMPLE_RATE}")
    try:
        return processor.apply_chat_template([{"role": "user", "content": turn}], **options)
    except Exception as error:  # templates raise what they like
        raise UserError(
            f"{name}: its processor makes no prompt of --{media.kind} {media.file}: {_line(error)}"
        ) from error


def _placeholder(processor: Any, config: Any, kind: str) -> int | None:
    """The id of the tokens that stand for the file."""
    names = (f"{kind}_token_id", f"{kind}_token_index")
    parts = [processor, config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((own for own in found if isinstance(own, int)), None)


def _decoder_inputs(name: str, model: Any, inputs: Any) -> tuple[Any, dict[str, Any]]:
    """The language decoder, and the keyword arguments of its first call but those that say how to run."""
    try:
        decoder = models.find(model).decoder
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    held: dict[str, Any] = {}

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        held.update(kwargs)
        raise _Reached

    handle = decoder.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    except _Reached:
        pass
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{name}: cannot read its own prompt: {_line(error)}") from error
    finally:
        handle.remove()
    if not isinstance(held.get("inputs_embeds"), Tensor):
        raise UserError(f"{name}: its decoder {type(decoder).__name__} reads no embeddings")
    left = {key: value for key, value in held.items() if key not in _LEFT and value is not None}
    return decoder, left | {"inputs_embeds": held["inputs_embeds"]}


def _names(processor: Any, ids: list[int], places: list[int], kind: str) -> tuple[list[str], int]:
    """A name for every token, and where the text begins: after the file and the special tokens that close it."""
    tokenizer = processor.tokenizer
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    numbers = {place: number for number, place in enumerate(places)}
    names = [BOS]
    for place, index in enumerate(ids[1:], 1):
        text = tokenizer.decode([index])
        if place in numbers:
            text = f"{_LETTERS[kind]}{numbers[place]}"
        elif index in special:
            text = text if text.startswith("<") else f"<{text.strip('[]')}>"
        elif text.startswith("<"):  # a delimiter by its looks alone
            text = f" {text}"
        names.append(text)
    span = places[-1] + 1
    while span < len(ids) - 1 and ids[span] in special:
        span += 1
    return names, span
