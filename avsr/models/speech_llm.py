"""The composition: encoder features -> compression -> projector -> prompt assembly -> LLM with LoRA.

A row is ``BOS <audio> A </audio> <video> V </video> PROMPT TEXT`` with the streams and the prompt of its task, tight
per utterance; a fused stream has no delimiters, nor has any with ``model.delimiters.init: none``; with
``model.prompts.first`` the prompt stands behind BOS. The end token is only predicted. Dimensions: B utterances, T
encoder frames, S tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flashsink
from avsr.config import TASKS, ModelConfig, parts_of
from avsr.data.batches import Batch
from avsr.data.clip import Clip
from avsr.errors import UserError
from avsr.models.compression import compress, compressed_length, compressed_width
from avsr.models.encoder import SpeechEncoder
from avsr.models.label_loss import label_loss
from avsr.models.llm import LoadedLLM, add_lora
from avsr.models.projector import make_projector

_BLANK = Clip(torch.zeros(3200), torch.zeros(5, 96, 96, dtype=torch.uint8))


@dataclass
class Assembled:
    """Rows of embeddings. ``spans`` counts the leading tokens of a row that are not text."""

    embeddings: Tensor  # (B, S, C)
    mask: Tensor  # (B, S) int64, 1 = token
    spans: Tensor  # (B,) int64
    names: list[list[str]] = field(default_factory=list)  # token names of every row, when asked for


@dataclass
class Packed:
    """Rows one behind the other, T tokens in all. ``spans`` as in :class:`Assembled`."""

    embeddings: Tensor  # (1, T, C)
    positions: Tensor  # (1, T) int64, from 0 in every row
    starts: list[int]  # of the B rows
    spans: Tensor  # (B,) int64


class Terms(NamedTuple):
    """Sums of one micro-batch, to be divided by global counts (design: averages are global).

    A tuple, since ZeRO-3 looks for tensors in tuples to gather weights before their backward.
    """

    cross_entropy: Tensor  # float32 scalar, sum over label tokens
    decorrelation: Tensor | None  # float32 scalar, local mean over span tokens; None = not computed
    correct: Tensor  # int64 scalar, label tokens predicted right


class SpeechLLM(nn.Module):
    """A frozen LLM that reads projected speech.

    Trainable: projectors, LoRA adapters and (by config) the delimiters. The delimiters are a parameter outside the
    vocabulary, so that the tied head and the tokenizer stay as they are.

    Args:
        config: the model's.
        loaded: the language model.
        widths: feature size of every stream.
        encoders: of the streams whose batches hold encoder inputs instead of features.
    """

    def __init__(
        self,
        config: ModelConfig,
        loaded: LoadedLLM,
        widths: Mapping[str, int],
        encoders: Mapping[str, SpeechEncoder] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.streams = TASKS[config.task]
        self.bos, self.eos = loaded.bos, loaded.eos
        self._prompt_first = config.prompts.first
        self.prompts = {task: loaded.tokenize(_prompt(config, task)) for task in parts_of(config.task)}
        self.tokenizer = loaded.tokenizer
        self.tokenize = loaded.tokenize
        table = loaded.model.get_input_embeddings().weight
        self.max_positions = int(getattr(loaded.model.config, "max_position_embeddings", 1 << 30))
        self.hidden = int(loaded.model.config.hidden_size)
        framed = [name for name in self.streams if name != "fused" and config.delimiters.init != "none"]
        self._delimiter_of = {name: 2 * index for index, name in enumerate(framed)}
        with _whole(table) as embeddings:
            scale = float(embeddings.float().std())
            self.llm: Any = add_lora(loaded.model, config.lora)
            self.projectors = nn.ModuleDict({name: self._projector(name, widths[name], scale) for name in self.streams})
            self.delimiters: nn.Parameter | None = None
            if framed:
                first = init_delimiters(config.delimiters.init, 2 * len(framed), embeddings)
                self.delimiters = nn.Parameter(first, requires_grad=config.delimiters.train)
        trained = {name: e for name, e in (encoders or {}).items() if config.streams[name].encoder.lora.rank}
        self.encoders = nn.ModuleDict(trained)
        # a plain dict: what is frozen is neither cast nor partitioned by the engine
        self._frozen = {name: e for name, e in (encoders or {}).items() if name not in trained}
        self._widths = dict(widths)
        self._counts = {name: encoder.feature_count for name, encoder in (encoders or {}).items()}
        self.probe: flashsink.Probe | None = None
        self.own_terms: Terms | None = None  # the last forward's, without the hooks that an engine puts on its outputs
        self.packed = False  # rows of a forward stand one behind the other, without padding; flashsink keeps them apart
        self.cross_entropy = "plain"  # how the loss is computed, see label_loss
        # a state dict holds what a checkpoint holds; else DeepSpeed would save the frozen tied head each time
        self.register_state_dict_post_hook(_keep_own)

    def _projector(self, name: str, width: int, scale: float) -> nn.Module:
        part, settings = self.config.streams[name], self.config.projector
        width = compressed_width(width, part.compression.kind, part.compression.rate)
        return make_projector(width, settings.hidden, self.hidden, settings.layernorm, scale)

    @property
    def device(self) -> torch.device:
        return next(self.projectors.parameters()).device

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
        rows, spans, labels = self._rows(batch, with_text=with_text, names=names)
        lengths = torch.tensor([len(row) for row in rows], device=spans.device)
        side = "left" if left else "right"
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        mask = torch.arange(embeddings.shape[1], device=spans.device) < lengths[:, None]
        return Assembled(embeddings, (mask.flip(1) if left else mask).long(), spans, labels)

    def _rows(self, batch: Batch, *, with_text: bool, names: bool) -> tuple[list[Tensor], Tensor, list[list[str]]]:
        """Embeddings (S_b, C) of every utterance, spans (B,), and names of the tokens if asked for."""
        embed = self.decoder.get_input_embeddings()
        device, dtype = embed.weight.device, embed.weight.dtype
        speech = {name: self._project(name, batch, device) for name in self.streams}
        # one call for all: under ZeRO-3 every call gathers the table from all ranks, whatever their batch sizes
        pieces = [[self.bos], *self.prompts.values(), *batch.text]
        ids = torch.tensor([index for piece in pieces for index in piece], device=device)
        bos, *embedded = embed(ids).split([len(piece) for piece in pieces])
        prompts = dict(zip(self.prompts, embedded, strict=False))
        texts = embedded[len(self.prompts) :]
        rows, spans, labels = [], [], []
        for b, task in enumerate(batch.tasks):
            parts = []
            for name in self.streams:
                tokens = speech[name][b].to(dtype)
                # no tokens of a stream that the task lacks, but their (zero) gradients: see _project
                parts += self._framed(name, tokens) if name in TASKS[task] else [tokens]
            parts = [bos, prompts[task], *parts] if self._prompt_first else [bos, *parts, prompts[task]]
            spans.append(sum(len(part) for part in parts))
            if with_text:
                parts.append(texts[b])
            rows.append(torch.cat(parts))
            if names:
                counts = {name: len(speech[name][b]) for name in TASKS[task]}
                labels.append(self._names(task, counts, batch.text[b] if with_text else []))
        return rows, torch.tensor(spans, device=device), labels

    def forward(self, batch: Batch) -> Terms:
        """One pass over a micro-batch with text. Logits are computed only where there are labels."""
        if self.packed:
            rows: Assembled | Packed = _pack(*self._rows(batch, with_text=True, names=False)[:2])
        else:
            rows = self.assemble(batch, with_text=True)
        loss, correct = label_loss(self.decoder.lm_head, *self.label_states(batch, rows), self.cross_entropy)
        probe = self.probe
        decorrelation = probe.decorrelation_loss if probe is not None and probe.computes_decorrelation else None
        if batch.is_dummy:
            loss, correct = loss * 0, correct * 0
        self.own_terms = Terms(loss, decorrelation, correct)
        given = None if decorrelation is None else decorrelation.view_as(decorrelation)
        return Terms(loss.view_as(loss), given, correct)

    def label_logits(self, batch: Batch, rows: Assembled | Packed) -> tuple[Tensor, Tensor]:
        """(n, vocabulary) logits at the n positions that predict text and end tokens, and their (n,) targets."""
        states, targets = self.label_states(batch, rows)
        return self.decoder.lm_head(states), targets

    def label_states(self, batch: Batch, rows: Assembled | Packed) -> tuple[Tensor, Tensor]:
        """(n, C) states at the n positions that predict text and end tokens, and their (n,) targets."""
        hidden = self.hidden_states(rows)
        places: list[int] = []
        targets: list[int] = []
        starts = (
            rows.starts if isinstance(rows, Packed) else range(0, hidden.shape[0] * hidden.shape[1], hidden.shape[1])
        )
        for ids, start, span in zip(batch.text, starts, rows.spans.tolist(), strict=True):
            first = start + span - 1  # the last prompt token predicts the first text token
            places += range(first, first + len(ids) + 1)
            targets += [*ids, self.eos]
        chosen = hidden.flatten(0, 1)[torch.tensor(places, device=hidden.device)]
        return chosen, torch.tensor(targets, device=hidden.device)

    def hidden_states(self, rows: Assembled | Packed) -> Tensor:
        """After the final norm, of the embeddings' shape."""
        call = {"inputs_embeds": rows.embeddings, "use_cache": False}
        call |= {"position_ids": rows.positions} if isinstance(rows, Packed) else {"attention_mask": rows.mask}
        if self.probe is None:
            return self.decoder.model(**call).last_hidden_state
        with self.probe.spans(rows.spans):
            return self.decoder.model(**call).last_hidden_state

    def span_tokens(self, batch: Batch) -> list[int]:
        """Number of prompt tokens of every utterance, known without a forward."""
        if batch.is_dummy:
            return []
        return [
            self._fixed(task) + sum(self._tokens(m, self._features(m, int(batch.lengths[m][b]))) for m in TASKS[task])
            for b, task in enumerate(batch.tasks)
        ]

    def refuse(self, frames: Mapping[str, int], tokens: int) -> str:
        """Why an utterance of so many encoder frames by stream and text tokens cannot be used, or ""."""
        for name, count in frames.items():
            if self._tokens(name, count) < 1:
                return f"is shorter than one token at model.{name}.compression.rate = {self._rate(name)}"
        speech = sum(self._tokens(name, count) for name, count in frames.items())
        if tokens + 1 > self.max_positions - self._fixed(self.config.task) - speech:
            return f"and its transcript of {tokens} tokens do not fit the model's {self.max_positions} positions"
        return ""

    def _features(self, name: str, rows: int) -> int:
        """Features of an input of so many rows."""
        return self._counts[name](rows) if name in self._counts else rows

    def _rate(self, name: str) -> int:
        return self.config.streams[name].compression.rate

    def _tokens(self, name: str, frames: int) -> int:
        return compressed_length(frames, self._rate(name))

    def _fixed(self, task: str) -> int:
        """BOS, delimiters and prompt."""
        return 1 + len(self.prompts[task]) + 2 * sum(name in self._delimiter_of for name in TASKS[task])

    def _framed(self, name: str, tokens: Tensor) -> list[Tensor]:
        """A stream's tokens between its delimiters."""
        if self.delimiters is None:
            return [tokens]
        first = self._delimiter_of[name]
        opening, closing = self.delimiters[first : first + 2].to(tokens.dtype).split(1)
        return [opening, tokens, closing]

    def _project(self, name: str, batch: Batch, device: torch.device) -> list[Tensor]:
        """Projected tokens of every utterance; none where its task lacks the stream.

        Where the whole batch lacks it, what is trained runs all the same, since the ranks gather weights (ZeRO-3) and
        reduce gradients together: each needs a gradient of every parameter, be it zero.
        """
        dtype = next(self.projectors[name].parameters()).dtype
        compression = self.config.streams[name].compression
        given = name in batch.features
        features = (self._encode(name, batch, device) if given else self._blank(name, device)).to(dtype)
        tokens = self.projectors[name](compress(features, compression.kind, compression.rate))
        if not given:
            return [tokens[0, :0]] * len(batch.text)
        rows = []
        for row, utterance, task, length in zip(
            tokens, batch.utterances, batch.tasks, batch.lengths[name].tolist(), strict=True
        ):
            count = self._tokens(name, self._features(name, length))
            if count < 1 and name in TASKS[task]:
                raise UserError(f"{utterance.where}: {utterance.id!r} is shorter than one token at this rate")
            rows.append(row[:count])
        return rows

    def _encode(self, name: str, batch: Batch, device: torch.device) -> Tensor:
        """(B, T, D) features: as they came, or by the stream's encoder."""
        inputs, lengths = batch.features[name].to(device), batch.lengths[name].to(device)
        if name not in self._counts:
            return inputs
        encoder = self._frozen[name] if name in self._frozen else self.encoders[name]
        present = lengths > 0  # an utterance whose task lacks the stream is not encoded
        if name in self._frozen:
            with torch.no_grad():
                rows = encoder(inputs[present], lengths[present]).half().float()  # as from the cache
        else:
            rows = encoder(inputs[present], lengths[present])
        out = rows.new_zeros(len(lengths), *rows.shape[1:])
        out[present] = rows
        return out

    def _blank(self, name: str, device: torch.device) -> Tensor:
        """(1, T, D) features of nothing; by the stream's encoder where that is trained."""
        if name not in self.encoders:
            return torch.zeros(1, 0, self._widths[name], device=device)
        encoder: Any = self.encoders[name]
        inputs = encoder.prepare(_BLANK)[None].to(device)
        return encoder(inputs, torch.tensor([inputs.shape[1]], device=device))

    def _names(self, task: str, counts: dict[str, int], text: list[int]) -> list[str]:
        speech: list[str] = []
        for name, count in counts.items():
            tokens = [f"{name[0]}{i}" for i in range(count)]
            speech += [f"<{name}>", *tokens, f"</{name}>"] if name in self._delimiter_of else tokens
        prompt, written = ([self.tokenizer.decode([index]) for index in ids] for ids in (self.prompts[task], text))
        return ["BOS", *prompt, *speech, *written] if self._prompt_first else ["BOS", *speech, *prompt, *written]


def _prompt(config: ModelConfig, task: str) -> str:
    return str(getattr(config.prompts, "audiovisual" if task == "fused" else task))


def _pack(rows: Sequence[Tensor], spans: Tensor) -> Packed:
    """Rows (S_b, C) and their spans (B,)."""
    counts = [len(row) for row in rows]
    positions = torch.cat([torch.arange(count, device=spans.device) for count in counts])
    return Packed(torch.cat(list(rows))[None], positions[None], [0, *accumulate(counts[:-1])], spans)


@contextmanager
def _whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """The values of a parameter that ZeRO-3 may have partitioned."""
    if not hasattr(parameter, "ds_id"):
        yield parameter.detach()
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([parameter]):
        yield parameter.detach()


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
        raise UserError(f"model.delimiters.init: expected normal:STD, table, mean or none, got {kind!r}")
    return torch.randn(shape) * std
