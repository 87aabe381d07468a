"""Measures a model over utterances with their reference texts and averages by token group and layer.

Groups of positions: BOS, every delimiter and every prompt token by name, all speech tokens, all text tokens.
"Intermediate" is the delimiter that opens the first stream, without delimiters the first prompt token. Layers count
from 1; L is their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from avsr.config import Config
from avsr.data.batches import Batch, collate, make_batches
from avsr.data.dataset import SpeechDataset
from avsr.models.speech_llm import Assembled, SpeechLLM
from avsr.progress import ProgressBar

EPS = 0.3  # a key is a sink when its mean received attention exceeds this (Gu et al.)
MIN_QUERIES = 8  # keys that fewer queries see are not counted
MASSIVE_RATIO, MASSIVE_SIZE = 1000.0, 100.0  # Sun et al.
SPEECH, TEXT = "speech", "text"


@dataclass
class _Sums:
    """Running sums over tokens of one group, per layer (L,) float64."""

    layers: int
    tokens: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, key: str, value: Tensor) -> None:
        """``value`` is (tokens, L)."""
        total = value.double().sum(dim=0).cpu()
        self.values[key] = self.values[key] + total if key in self.values else total

    def means(self) -> dict[str, list[float]]:
        return {key: (total / max(self.tokens, 1)).tolist() for key, total in self.values.items()}


@torch.no_grad()
def collect(model: SpeechLLM, dataset: SpeechDataset, config: Config) -> dict[str, Any]:
    """All statistics of ``model`` over ``dataset``; plain numbers, ready for JSON."""
    model.eval()
    layers = len(model.decoder.model.layers)
    groups: dict[str, _Sums] = {}
    largest: dict[int, tuple[float, str, int, float]] = {}
    decorrelation, span_tokens, massive = 0.0, 0, 0.0
    with ProgressBar("analyse", len(dataset)) as bar:
        for batch in _batches(dataset, config):
            observed = _observe(model, batch)
            for b, names in enumerate(observed.rows.names):
                _add_row(groups, layers, observed, b, names)
                _keep_largest(largest, observed, b, names)
            decorrelation += observed.decorrelation * observed.count
            massive += observed.massive
            span_tokens += observed.count
            bar.advance(len(batch.utterances))
    opener = _opener(model, groups)
    table: dict[str, Any] = {name: {"tokens": sums.tokens, **sums.means()} for name, sums in groups.items()}
    return {
        "layers": layers,
        "utterances": len(dataset),
        "eps": EPS,
        "min_queries": MIN_QUERIES,
        "intermediate": opener,
        "groups": table,
        "largest": [
            {"layer": layer + 1, "value": v, "token": token, "feature": feature, "log10_ratio": ratio}
            for layer, (v, token, feature, ratio) in sorted(largest.items())
        ],
        "massive_tokens_per_utterance": massive / len(dataset),
        "cos2": decorrelation / max(span_tokens, 1),
        "intermediate_activation": _inner(table[opener]["max_abs"]),
        "intermediate_sink_rate": _inner(table[opener]["sink_rate"]),
        "intermediate_sink_rate_text": _inner(table[opener]["sink_rate_text"]),
        "bos_activation": _inner(table["BOS"]["max_abs"]),
        "bos_sink_rate": _inner(table["BOS"]["sink_rate"]),
    }


@torch.no_grad()
def attention_map(model: SpeechLLM, dataset: SpeechDataset, index: int = 0) -> dict[str, Any]:
    """Attention of one utterance in the middle layer, mean over heads, from Hugging Face's eager attention."""
    model.detach()
    batch = collate([dataset[index]])
    rows = model.assemble(batch, with_text=True, names=True)
    decoder = model.decoder.model
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        out = decoder(inputs_embeds=rows.embeddings, attention_mask=rows.mask, output_attentions=True, use_cache=False)
    finally:
        decoder.set_attn_implementation(before)
    layer = len(out.attentions) // 2
    weights = out.attentions[layer][0].float().mean(dim=0).cpu()
    return {
        "utterance": batch.utterances[0].id,
        "layer": layer + 1,
        "tokens": rows.names[0],
        "weights": [[round(float(w), 4) for w in row] for row in weights],
    }


@dataclass
class _Observed:
    """One batch: (L, B, S) statistics."""

    rows: Assembled
    rate: Tensor
    rate_text: Tensor
    cosine: Tensor
    max_abs: Tensor
    feature: Tensor
    median: Tensor  # (L, B)
    decorrelation: float
    count: int
    massive: float


def _observe(model: SpeechLLM, batch: Batch) -> _Observed:
    rows = model.assemble(batch, with_text=True, names=True)
    hidden: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: hidden.append(_cosine(out)))
        for layer in model.decoder.model.layers
    ]
    probe = model.attach(attention=True, decorrelation=True, activations=True, median=True)
    try:
        model.hidden_states(rows)
    finally:
        for hook in hooks:
            hook.remove()
    rate = torch.stack([stats.sink_rate(EPS, MIN_QUERIES) for stats in probe.sinks])
    activations = probe.activations
    decorrelation, count = float(probe.decorrelation_loss), int(probe.decorrelation_count)
    probe = model.attach(attention=True, decorrelation=False, activations=False, queries="after_span")
    model.hidden_states(rows)
    rate_text = torch.stack([stats.sink_rate(EPS) for stats in probe.sinks])
    model.detach()
    assert activations.median is not None
    ratio = activations.max_abs / activations.median.unsqueeze(-1).clamp(min=1e-12)
    is_massive = (ratio >= MASSIVE_RATIO) & (activations.max_abs > MASSIVE_SIZE)
    return _Observed(
        rows,
        rate,
        rate_text,
        torch.stack(hidden),
        activations.max_abs,
        activations.feature,
        activations.median,
        decorrelation,
        count,
        float(is_massive.any(dim=0).sum()),
    )


def _cosine(out: Any) -> Tensor:
    """(B, S) cosine of every state to its row's BOS (rows are padded on the right)."""
    hidden = (out[0] if isinstance(out, tuple) else out).float()
    return torch.nn.functional.cosine_similarity(hidden, hidden[:, :1], dim=-1)


def _add_row(groups: dict[str, _Sums], layers: int, seen: _Observed, b: int, names: list[str]) -> None:
    span = int(seen.rows.spans[b])
    places: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        places.setdefault(_group(name, position, span), []).append(position)
    for name, positions in places.items():
        sums = groups.setdefault(name, _Sums(layers))
        sums.tokens += len(positions)
        sums.add("sink_rate", seen.rate[:, b, positions].T)
        sums.add("sink_rate_text", seen.rate_text[:, b, positions].T)
        sums.add("cosine", seen.cosine[:, b, positions].T)
        sums.add("max_abs", seen.max_abs[:, b, positions].T)


def _group(name: str, position: int, span: int) -> str:
    if position >= span:
        return TEXT
    if name == "BOS" or name.startswith("<") or position == 0:
        return name
    if name[0] in "avf" and name[1:].isdigit():
        return SPEECH
    return f"prompt {name.strip() or name!r}"


def _opener(model: SpeechLLM, groups: dict[str, _Sums]) -> str:
    """The first delimiter; where the first stream has none, the first prompt token."""
    first = f"<{model.streams[0]}>"
    return first if first in groups else next(name for name in groups if name.startswith("prompt "))


def _keep_largest(largest: dict[int, tuple[float, str, int, float]], seen: _Observed, b: int, names: list[str]) -> None:
    values, places = seen.max_abs[:, b].max(dim=-1)
    for layer, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
        if layer not in largest or value > largest[layer][0]:
            median = float(seen.median[layer, b].clamp(min=1e-12))
            ratio = float(torch.log10(torch.tensor(value / median)))
            largest[layer] = (value, names[place], int(seen.feature[layer, b, place]), ratio)


def _batches(dataset: SpeechDataset, config: Config) -> Iterator[Batch]:
    for indices in make_batches(dataset.sizes, max(config.training.frames, max(dataset.sizes)), 16):
        yield collate([dataset[i] for i in indices])


def _inner(by_layer: list[float]) -> float:
    """The mean over layers 1..L-1."""
    inner = by_layer[:-1]
    return sum(inner) / len(inner)
