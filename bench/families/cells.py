"""The ways in which every class is called: what it is given, and what is done with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.families import inputs, media
from bench.families.inputs import Arguments, Takes
from bench.families.oracle import Sequences

NEW = 5  # tokens that generate() adds
MAIN = ("none", "ones", "left", "right", "generate")  # a class is exact if these are, and no other cell is wrong
SHORT = 7  # tokens of a window or chunk shorter than the sequence
VARIANTS = {
    "sliding_window": "window",
    "local_attention": "window",  # ModernBERT
    "window_size": "window",  # GPT-Neo
    "attention_chunk_size": "chunk",
}
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Attributes:
        name: as the table has it; "window: left" is that of a variant of the config.
        given: the arguments.
        action: what is done with the model.
        sequences: where sequences are, by the number of tokens; a stream of another length is whole.
        eager: arguments that eager attention, whose weights are the oracle, wants instead.
        observed: whether the probe is read.
        gradient: whether a gradient is compared too.
        maybe: sequences that the model may keep apart or not; its own attention tells.
        variant: the config's, or None for the class as it is.
    """

    name: str
    given: Arguments
    action: Callable[[nn.Module, Arguments], Outputs]
    sequences: dict[int, Sequences] = field(default_factory=dict)
    eager: Arguments = field(default_factory=dict)
    observed: bool = True
    gradient: bool = False
    maybe: Sequences | None = None
    variant: str | None = None


# ---- actions


def main_output(output: Any) -> Tensor | None:
    """(B, S, ...) logits or last hidden states."""
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values = output.values() if hasattr(output, "values") else output
    found = [v for v in values if isinstance(v, Tensor) and v.dim() >= 2 and v.is_floating_point()]
    return max(found, key=lambda v: v.dim() == 3, default=None)


def forward(model: nn.Module, given: Arguments) -> Outputs:
    output = main_output(model(**given))
    assert output is not None
    return {"logits": output}


def generate(model: Any, given: Arguments) -> Outputs:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        made = model.generate(**options, output_scores=True, return_dict_in_generate=True, **given)
    result = {"ids": made.sequences}
    if given.get("num_beams"):
        result["scores"] = made.sequences_scores
    else:
        result["steps"] = torch.stack(made.scores)
    return result


def in_two(model: Any, given: Arguments) -> Outputs:
    """A prompt in two forwards with a cache between."""
    given = dict(given)
    tokens, mask = given.pop("input_ids"), given.pop("attention_mask")
    first = tokens.shape[1] // 2
    with torch.no_grad():
        one = model(input_ids=tokens[:, :first], attention_mask=mask[:, :first], use_cache=True, **given)
        cache = one.past_key_values
        two = model(input_ids=tokens[:, first:], attention_mask=mask, past_key_values=cache, use_cache=True, **given)
    return {"logits": torch.cat([one.logits, two.logits], 1)}


def compiled(model: nn.Module, given: Arguments) -> Outputs:
    run: Any = torch.compile(model, backend="aot_eager")
    return forward(run, given)


# ---- cells


def cells(model: Any, form: Takes, *, compile: bool = True) -> Iterator[Cell]:
    """Those of the class as it is."""
    whole = {form.tokens: Sequences.of_mask(torch.ones(2, form.tokens))} if form.text else {}
    yield Cell("none", inputs.arguments(form), forward, whole, gradient=True)
    masked = form.accepts("attention_mask") and (form.text or form.encoder)
    for side in ("ones", "right", "left", "hole") if masked else ():
        given, sequences = inputs.padded(form, side)
        if side == "hole":  # no sequence in one piece: exact logits or a refusal
            yield Cell(side, given, forward, {}, observed=False)
        else:
            yield Cell(side, given, forward, sequences, gradient=side == "left")
    if form.text:
        yield from _positions(form)
        yield from _four_d(form)
    yield from _generation(model, form, masked=bool(masked))
    for kind in ("image", "audio"):
        yield from _media(model, form, kind)
    if compile and masked:
        given, sequences = inputs.padded(form, "left")
        yield Cell("compiled", given, compiled, sequences)
        yield Cell("compiled: hole", inputs.padded(form, "hole")[0], compiled, {}, observed=False)


def of_variant(model: Any, form: Takes, name: str) -> Iterator[Cell]:
    """Those of a window or chunk shorter than the sequence."""
    for cell in cells(model, form, compile=False):
        if cell.name in ("none", "left", "right", "generate", "in two"):
            yield replace(cell, name=f"{name}: {cell.name}", variant=name, gradient=False)


def _positions(form: Takes) -> Iterator[Cell]:
    if not form.accepts("position_ids") or form.text != "input_ids":
        return
    tokens = form.tokens
    flat, pieces = inputs.packed(tokens)
    one = {tokens: Sequences(((0, 0, tokens),))}
    base = inputs.arguments(form, rows=1)
    no_cache = {"use_cache": False} if form.accepts("use_cache") else {}
    repeated = torch.arange(tokens)[None] - (torch.arange(tokens) > tokens // 3).long()
    variants = {
        "packed": (flat, no_cache),
        "packed with cache": (flat, {}),
        "packed (3,1,S)": (flat.expand(3, 1, tokens), no_cache),
        "packed (4,1,S)": (flat.expand(4, 1, tokens), no_cache),
        "(3,1,S)": (_grid(tokens)[1:], no_cache),
        "(4,1,S)": (_grid(tokens), no_cache),
        "repeated position": (repeated, no_cache),
    }
    for name, (positions, more) in variants.items():
        maybe = pieces if name.startswith("packed") else None
        if name == "repeated position":
            maybe = Sequences(((0, 0, tokens // 3 + 1), (0, tokens // 3 + 1, tokens)))
        yield Cell(name, {**base, **more, "position_ids": positions}, forward, one, maybe=maybe)


def _grid(tokens: int) -> Tensor:
    """(4, 1, S) ids of one text with an image of 2 x 2 in it: text, time, height and width."""
    text = torch.arange(tokens)
    time = torch.where(text < 5, text, torch.where(text < 9, 5, text - 2))
    height, width = time.clone(), time.clone()
    height[5:9], width[5:9] = torch.tensor([5, 5, 6, 6]), torch.tensor([5, 6, 5, 6])
    return torch.stack([text, time, height, width])[:, None]


def _four_d(form: Takes) -> Iterator[Cell]:
    if not form.accepts("attention_mask"):
        return
    base = inputs.arguments(form, rows=1)
    for name, blocks in (("4-D causal", False), ("4-D blocks", True)):
        seen, sequences = inputs.four_d(form, blocks=blocks)
        as_float = {form.mask: inputs.additive(seen)}
        where = {form.tokens: sequences}
        yield Cell(f"{name} float", base | as_float, forward, where)
        if not blocks:  # eager adds a mask, whatever its dtype
            yield Cell(f"{name} bool", base | {form.mask: seen}, forward, where, eager=base | as_float)


def _media(model: Any, form: Takes, kind: str) -> Iterator[Cell]:
    given = media.block(model, form, kind)
    if given is None:
        return
    rows, tokens = given["input_ids"].shape
    yield Cell(kind, given, forward, {tokens: Sequences.of_mask(torch.ones(rows, tokens))}, gradient=True)
    padded = media.left_padded(given)
    yield Cell(f"{kind} left", padded, forward, {tokens: Sequences.of_mask(padded["attention_mask"])})
    if model.can_generate():
        yield Cell(f"{kind} generate", padded, generate, observed=False)


def _generation(model: Any, form: Takes, *, masked: bool) -> Iterator[Cell]:
    if not form.text or not hasattr(model, "can_generate") or not model.can_generate():
        return
    given = inputs.padded(form, "left")[0] if masked else inputs.arguments(form)
    if form.encoder:
        given = {k: v for k, v in given.items() if k not in ("decoder_input_ids", "decoder_attention_mask")}
    static = {"cache_implementation": "static", "disable_compile": True}
    for name, more in (("generate", {}), ("beams", {"num_beams": 3}), ("static cache", static)):
        yield Cell(name, given | more, generate, observed=False)
    if not form.encoder and masked and form.accepts("past_key_values"):
        yield Cell("in two", given, in_two, {form.tokens: inputs.padded(form, "left")[1][form.tokens]}, observed=False)
