"""The composition: encoder features -> compression -> projector -> prompt assembly -> LLM with LoRA.

A row is ``BOS <audio> A </audio> PROMPT TEXT``, tight per utterance; the end token is only predicted. Dimensions:
B utterances, T encoder frames, S tokens, C hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import flashsink
from avsr.config import ModelConfig
from avsr.data.batches import Batch
from avsr.errors import UserError
from avsr.models.compression import compress, compressed_length, compressed_width
from avsr.models.llm import LoadedLLM, add_lora
from avsr.models.projector import make_projector

# Modalities of a task, in the order in which they stand in the prompt.
TASKS = {"audio": ("audio",)}


@dataclass
class Assembled:
    """Rows of embeddings. ``spans`` counts the leading tokens of a row that are not text."""

    embeddings: Tensor  # (B, S, C)
    mask: Tensor  # (B, S) int64, 1 = token
    spans: Tensor  # (B,) int64
    names: list[list[str]] = field(default_factory=list)  # token names of every row, when asked for


@dataclass
class Terms:
    """Sums of one micro-batch, to be divided by global counts (design: averages are global)."""

    cross_entropy: Tensor  # float32 scalar, sum over label tokens
    decorrelation: Tensor | None  # float32 scalar, local mean over span tokens; None = not computed
    correct: Tensor  # int64 scalar, label tokens predicted right


class SpeechLLM(nn.Module):
    """A frozen LLM that reads projected speech.

    Trainable: the projector, LoRA adapters and (by config) the delimiters. The delimiters are a parameter
    outside the vocabulary, so that the tied head and the tokenizer stay as they are.
    """

    def __init__(self, config: ModelConfig, loaded: LoadedLLM, widths: dict[str, int]) -> None:
        super().__init__()
        self.config = config
        self.modalities = TASKS[config.task]
        self.bos, self.eos = loaded.bos, loaded.eos
        self.prompt = loaded.tokenize(config.prompt)
        self.tokenizer = loaded.tokenizer
        self.tokenize = loaded.tokenize
        table = loaded.model.get_input_embeddings().weight.detach()
        self.hidden = int(table.shape[1])
        self.max_positions = int(getattr(loaded.model.config, "max_position_embeddings", 1 << 30))
        self.llm: Any = add_lora(loaded.model, config.lora)
        self.projectors = nn.ModuleDict(
            {
                name: make_projector(
                    compressed_width(widths[name], config.compression.kind, config.compression.rate),
                    config.projector.hidden,
                    self.hidden,
                    config.projector.layernorm,
                    float(table.float().std()),
                )
                for name in self.modalities
            }
        )
        # rows 2i and 2i + 1 open and close modality i
        self.delimiters = nn.Parameter(
            init_delimiters(config.delimiters.init, 2 * len(self.modalities), table),
            requires_grad=config.delimiters.train,
        )
        self.probe: flashsink.Probe | None = None
        # a state dict holds what a checkpoint holds; else DeepSpeed would save the frozen tied head each time
        self.register_state_dict_post_hook(_keep_own)

    @property
    def decoder(self) -> Any:
        """The causal LM inside a PEFT wrapper, or the model itself."""
        return self.llm.get_base_model() if hasattr(self.llm, "get_base_model") else self.llm

    def attach(self, **options: Any) -> flashsink.Probe:
        """Attaches flashsink with ``options``, in place of an earlier probe."""
        self.detach()
        self.probe = flashsink.attach(self.llm, **options)
        return self.probe

    def detach(self) -> None:
        if self.probe is not None:
            self.probe.detach()
            self.probe = None

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def own_state(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: everything trainable and the delimiters, which are random when frozen."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad or name == "delimiters" or "lora_" in name or name.startswith("projectors.")
        }

    def assemble(self, batch: Batch, *, with_text: bool, left: bool = False, names: bool = False) -> Assembled:
        """Prompt (and text) embeddings of every utterance, padded on the right, or on the left for generation.

        Padding is zeros and is masked; it never changes a row.
        """
        embed = self.decoder.get_input_embeddings()
        device, dtype = embed.weight.device, embed.weight.dtype
        speech = {name: self._project(name, batch, device) for name in self.modalities}
        # one call for all: under ZeRO-3 every call gathers the table from all ranks, whatever their batch sizes
        pieces = [[self.bos, *self.prompt], *batch.text]
        ids = torch.tensor([index for piece in pieces for index in piece], device=device)
        prompt, *texts = embed(ids).split([len(piece) for piece in pieces])
        delimiters = self.delimiters.to(dtype)
        rows, spans, labels = [], [], []
        for b in range(len(batch.text)):
            parts = [prompt[:1]]
            for i, name in enumerate(self.modalities):
                parts += [
                    delimiters[2 * i : 2 * i + 1],
                    speech[name][b].to(dtype),
                    delimiters[2 * i + 1 : 2 * i + 2],
                ]
            parts.append(prompt[1:])
            spans.append(sum(len(part) for part in parts))
            if with_text:
                parts.append(texts[b])
            rows.append(torch.cat(parts))
            if names:
                labels.append(self._names([len(speech[m][b]) for m in self.modalities], batch.text[b], with_text))
        lengths = torch.tensor([len(row) for row in rows], device=device)
        side = "left" if left else "right"
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        position = torch.arange(embeddings.shape[1], device=device)
        mask = position < lengths[:, None]
        if left:
            mask = mask.flip(1)
        return Assembled(embeddings, mask.long(), torch.tensor(spans, device=device), labels)

    def forward(self, batch: Batch) -> Terms:
        """One pass over a micro-batch with text. Logits are computed only where there are labels."""
        rows = self.assemble(batch, with_text=True)
        logits, targets = self.label_logits(batch, rows)
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        probe = self.probe
        decorrelation = probe.decorrelation_loss if probe is not None and probe.computes_decorrelation else None
        return Terms(loss, decorrelation, (logits.argmax(dim=-1) == targets).sum())

    def label_logits(self, batch: Batch, rows: Assembled) -> tuple[Tensor, Tensor]:
        """(n, vocabulary) logits at the n positions that predict text and end tokens, and their (n,) targets."""
        hidden = self.hidden_states(rows)
        places: list[int] = []
        targets: list[int] = []
        for b, (ids, span) in enumerate(zip(batch.text, rows.spans.tolist(), strict=True)):
            first = b * hidden.shape[1] + span - 1  # the last prompt token predicts the first text token
            places += range(first, first + len(ids) + 1)
            targets += [*ids, self.eos]
        chosen = hidden.flatten(0, 1)[torch.tensor(places, device=hidden.device)]
        return self.decoder.lm_head(chosen), torch.tensor(targets, device=hidden.device)

    def hidden_states(self, rows: Assembled) -> Tensor:
        """(B, S, C) after the final norm."""
        call = {"inputs_embeds": rows.embeddings, "attention_mask": rows.mask, "use_cache": False}
        if self.probe is None:
            return self.decoder.model(**call).last_hidden_state
        with self.probe.spans(rows.spans):
            return self.decoder.model(**call).last_hidden_state

    def span_tokens(self, batch: Batch) -> list[int]:
        """Number of prompt tokens of every utterance, known without a forward."""
        fixed = 1 + len(self.prompt) + 2 * len(self.modalities)
        rate = self.config.compression.rate
        return [
            fixed + sum(compressed_length(int(batch.lengths[m][b]), rate) for m in self.modalities)
            for b in range(len(batch.text))
        ]

    def room(self, frames: int) -> int:
        """Positions left for text behind a prompt with ``frames`` encoder frames."""
        fixed = 1 + len(self.prompt) + 2 * len(self.modalities)
        return self.max_positions - fixed - compressed_length(frames, self.config.compression.rate)

    def refuse(self, frames: int, tokens: int) -> str:
        """Why an utterance of ``frames`` encoder frames and ``tokens`` text tokens cannot be used, or ""."""
        rate = self.config.compression.rate
        if compressed_length(frames, rate) < 1:
            return f"is shorter than one token at model.compression.rate = {rate}"
        if tokens + 1 > self.room(frames):
            return f"and its transcript of {tokens} tokens do not fit the model's {self.max_positions} positions"
        return ""

    def _project(self, name: str, batch: Batch, device: torch.device) -> list[Tensor]:
        weight = next(self.projectors[name].parameters())
        compression = self.config.compression
        features = batch.features[name].to(device=device, dtype=weight.dtype)
        tokens = self.projectors[name](compress(features, compression.kind, compression.rate))
        counts = [compressed_length(int(n), compression.rate) for n in batch.lengths[name]]
        for utterance, count in zip(batch.utterances, counts, strict=True):
            if count < 1:
                raise UserError(f"{utterance.where}: {utterance.id!r} is shorter than one token at this rate")
        return [row[:count] for row, count in zip(tokens, counts, strict=True)]

    def _names(self, counts: list[int], text: list[int], with_text: bool) -> list[str]:
        names = ["BOS"]
        for name, count in zip(self.modalities, counts, strict=True):
            names += [f"<{name}>", *(f"{name[0]}{i}" for i in range(count)), f"</{name}>"]
        ids = self.prompt + (text if with_text else [])
        return names + [self.tokenizer.decode([index]) for index in ids]


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    own = module.own_state()  # type: ignore[operator]
    for name in [key for key in state if key.removeprefix(prefix) not in own]:
        del state[name]


def init_delimiters(kind: str, count: int, table: Tensor) -> Tensor:
    """(count, C) float32: ``normal:STD`` around 0, ``table`` = the embedding table's std, ``mean`` = its mean."""
    shape = (count, table.shape[1])
    if kind == "table":
        return torch.randn(shape) * table.float().std().cpu()
    if kind == "mean":
        return table.float().mean(dim=0).cpu().repeat(count, 1)
    name, _, value = kind.partition(":")
    try:
        std = float(value)
    except ValueError:
        std = -1.0
    if name != "normal" or not 0 <= std < float("inf"):
        raise UserError(f"model.delimiters.init: expected normal:STD, table or mean, got {kind!r}")
    return torch.randn(shape) * std
