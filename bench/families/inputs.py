"""What a class takes: tokens, audio, images; and masks and positions over its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.families.build import LeftOut, NoInput, eager, line, quiet
from bench.families.oracle import Sequences

TOKENS, ENCODER_TOKENS, FRAMES, SAMPLES = 23, 19, 60, 4800
BOS, LOWEST, HIGHEST = 1, 3, 280  # ordinary tokens are in between
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Takes:
    """How a class is called.

    Attributes:
        text: the argument that carries the tokens which the cells mask: input_ids, decoder_input_ids or "".
        others: arguments for the rest, of two rows; what is masked with the text is not among them.
        encoder: the argument of an encoder beside a decoder, or "".
        names: what ``forward`` accepts; empty if it accepts anything.
        extra: whether ``forward`` accepts further keywords.
        tokens: S.
        eager: whether eager attention runs too.
    """

    text: str
    others: Arguments = field(default_factory=dict)
    encoder: str = ""
    names: frozenset[str] = frozenset()
    extra: bool = False
    tokens: int = TOKENS
    eager: bool = True

    def accepts(self, name: str) -> bool:
        return self.extra or name in self.names

    @property
    def mask(self) -> str:
        return "decoder_attention_mask" if self.text == "decoder_input_ids" else "attention_mask"


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """(B, S) ordinary tokens after a BOS."""
    made = torch.randint(LOWEST, HIGHEST, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    made[:, 0] = BOS
    return made


def takes(model: Any) -> Takes:
    """The first way of calling ``model`` that works.

    Raises:
        build.LeftOut: none does; with the error of the likeliest.
    """
    reasons = []
    for candidate in _candidates(model):
        reason = failure(model, arguments(candidate))
        if not reason:
            with eager(model):
                return replace(candidate, eager=not failure(model, arguments(candidate)))
        reasons.append(reason)
    if not reasons:
        raise NoInput("takes neither tokens nor audio")
    raise LeftOut(f"does not run: {reasons[0]}")


def arguments(form: Takes, rows: int = 2) -> Arguments:
    """A call of ``form`` without a mask."""
    made = {name: value[:rows] if isinstance(value, Tensor) else value for name, value in form.others.items()}
    if form.text:
        made[form.text] = ids(rows, form.tokens)
    return made


def failure(model: nn.Module, given: Arguments) -> str:
    """Why ``model`` does not run, or ""."""
    from bench.families.cells import main_output

    try:
        with torch.no_grad(), quiet():
            output = main_output(model(**given))
    except Exception as error:
        return line(error)
    if output is None:
        return "no output of three dimensions"
    return "" if bool(torch.isfinite(output).all()) else "its output is not finite"


def _candidates(model: Any) -> Iterator[Takes]:
    parameters = inspect.signature(model.forward).parameters
    names = frozenset(parameters)
    extra = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    base = Takes("input_ids", names=names, extra=extra)
    config = model.config
    sounds = {name: shapes for name, shapes in audio(config).items() if name in names}
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", True):
        decoder = replace(base, text="decoder_input_ids")
        for name in sounds:
            for value in sounds[name]:
                yield replace(decoder, others={name: value}, encoder=name)
        if "input_ids" in names:
            yield replace(decoder, others={"input_ids": ids(2, ENCODER_TOKENS, 1)}, encoder="input_ids")
        if "pixel_values" in names:
            for value in images(config):
                yield replace(decoder, others={"pixel_values": value}, encoder="pixel_values")
    if "input_ids" in names:
        for tokens in (TOKENS, 64):
            yield replace(base, tokens=tokens)
        if "pixel_values" in names:
            for value in images(config):
                yield replace(base, others={"pixel_values": value})
        for name in sounds:
            for value in sounds[name]:
                yield replace(base, others={name: value})
        if "bbox" in names:
            yield replace(base, others={"bbox": torch.zeros(2, TOKENS, 4, dtype=torch.long)})
    for name in sounds:
        for value in sounds[name]:
            yield replace(base, text="", others={name: value}, encoder=name)


def audio(config: Any) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    parts = [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]
    sizes: list[int] = []
    for part in parts:
        for name in (
            "num_mel_bins",
            "feature_size",
            "input_feat_per_channel",
            "mel_bins",
            "input_dim",
            "feature_projection_input_dim",
        ):
            value = getattr(part, name, None)
            if isinstance(value, int) and 8 <= value <= 256:
                sizes.append(value)
    features: list[Tensor] = []
    for frames in (FRAMES, 100):
        for size in dict.fromkeys([*sizes, 80, 128]):
            noise = torch.randn(2, frames, size, generator=generator)
            features += [noise.mT.contiguous(), noise]
    values = [torch.randn(2, SAMPLES, generator=generator)]
    return {"input_features": features, "input_values": [*values, values[0][:, None], *features]}


def images(config: Any) -> list[Tensor]:
    """(B, 3, H, W) pixels of the size that the vision part says."""
    sizes = []
    for part in [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]:
        size = getattr(part, "image_size", None)
        size = size[0] if isinstance(size, (list, tuple)) else size
        if isinstance(size, int) and 8 <= size <= 256:
            sizes.append(size)
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, 3, size, size, generator=generator) for size in dict.fromkeys([*sizes, 28, 56])]


# ---- masks and positions


def padding(side: str, tokens: int) -> Tensor:
    """(2, S): the first row whole, the second short by a quarter at ``side``; "none" leaves it whole."""
    mask = torch.ones(2, tokens, dtype=torch.long)
    short = tokens // 4 + 1
    if side == "right":
        mask[1, tokens - short :] = 0
    elif side == "left":
        mask[1, :short] = 0
    elif side == "hole":
        mask[1, tokens // 3 : tokens // 2] = 0
    return mask


def padded(form: Takes, side: str) -> tuple[Arguments, dict[int, Sequences]]:
    """(arguments, the sequences by number of tokens), the encoder's text padded likewise."""
    made = arguments(form)
    sequences = {}
    if form.text:
        mask = padding(side, form.tokens)
        made[form.text], made[form.mask] = _with_bos(made[form.text], mask), mask
        sequences[form.tokens] = Sequences.of_mask(mask)
    if form.encoder == "input_ids":
        mask = padding(side, ENCODER_TOKENS)
        made["input_ids"], made["attention_mask"] = _with_bos(made["input_ids"], mask), mask
        sequences[ENCODER_TOKENS] = Sequences.of_mask(mask)
    elif form.encoder and not form.text:
        size = max(made[form.encoder].shape[1:])
        made["attention_mask"] = padding(side, size)
    return made, sequences


def _with_bos(tokens: Tensor, mask: Tensor) -> Tensor:
    tokens = tokens.masked_fill(mask == 0, 0)
    tokens[torch.arange(len(tokens)), mask.argmax(1)] = BOS
    return tokens


def packed(tokens: int, first: int = 10) -> tuple[Tensor, Sequences]:
    """((1, S) position ids of two sequences, where they are)."""
    positions = torch.cat([torch.arange(first), torch.arange(tokens - first)])[None]
    return positions, Sequences(((0, 0, first), (0, first, tokens)))


def four_d(form: Takes, *, blocks: bool) -> tuple[Tensor, Sequences]:
    """((1, 1, S, S) bool, the sequences): causal, or causal within two blocks."""
    seen = torch.ones(form.tokens, form.tokens).tril().bool()
    positions, sequences = packed(form.tokens)
    if not blocks:
        return seen[None, None], Sequences(((0, 0, form.tokens),))
    block = (positions[0].diff(prepend=positions[0, :1]) < 0).cumsum(0)
    return (seen & (block[:, None] == block[None, :]))[None, None], sequences


def additive(seen: Tensor) -> Tensor:
    """The float mask that a bool one says."""
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
