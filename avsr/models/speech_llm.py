"""The composition: encoder features -> compression -> projector -> prompt assembly -> LLM with LoRA.

:mod:`avsr.models.prompt` says what a row holds. Dimensions: B utterances, T encoder frames, S tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import flashsink
from avsr.config import TASKS, Config, ModelConfig, parts_of
from avsr.data.batches import Batch
from avsr.errors import UserError
from avsr.models.compression import compress, compressed_width
from avsr.models.encoder import SpeechEncoder
from avsr.models.label_loss import label_loss
from avsr.models.llm import LoadedLLM, add_lora, load_llm
from avsr.models.projector import make_projector
from avsr.models.prompt import KINDS, NO_LIMIT, PromptLayout, prompt_text
from avsr.models.rows import Assembled, Packed, Places, Table
from avsr.runtime.machine import settled_precision
from avsr.runtime.transfer import on_device


@dataclass(frozen=True)
class OwnTerms:
    """The losses as the model computed them: an engine puts hooks on the tensors that a forward returns, which would
    fire in every backward. Not a tuple, so that the engine does not find these."""

    cross_entropy: Tensor
    decorrelation: Tensor | None


class Terms(NamedTuple):
    """Losses of one micro-batch, to be divided by global counts (see :mod:`avsr.training.losses`).

    A tuple, since ZeRO-3 looks for tensors in tuples to gather weights before their backward.
    """

    cross_entropy: Tensor  # float32 scalar, sum over label tokens
    decorrelation: Tensor | None  # float32 scalar, mean over this micro-batch's prompt tokens after BOS, if computed
    correct: Tensor  # int64 scalar, label tokens predicted correctly
    own: OwnTerms  # for a second backward, of each term alone


class SpeechLLM(nn.Module):
    """A frozen LLM that reads projected speech.

    Trainable: projectors, LoRA adapters and (by config) the delimiter tokens. These are a parameter outside the
    vocabulary, so that the tied head and the tokenizer stay unchanged.

    Args:
        config: the model's.
        loaded: the language model.
        widths: feature size of every stream.
        encoders: of streams whose batches hold encoder inputs instead of features.
        packed: :meth:`forward` concatenates the rows of a batch instead of padding them, which needs an attached probe
            with flashsink's attention: it keeps the rows apart.
        cross_entropy: how :meth:`forward` computes it, see :func:`~avsr.models.label_loss.label_loss`.
    """

    def __init__(
        self,
        config: ModelConfig,
        loaded: LoadedLLM,
        widths: Mapping[str, int],
        encoders: Mapping[str, SpeechEncoder] | None = None,
        *,
        packed: bool = False,
        cross_entropy: str = "plain",
    ) -> None:
        super().__init__()
        self.config = config
        self.streams = TASKS[config.task]
        self.bos, self.eos = loaded.bos, loaded.eos
        self.prompts = {task: loaded.tokenize(prompt_text(config, task)) for task in parts_of(config.task)}
        self.tokenizer = loaded.tokenizer
        self.tokenize = loaded.tokenize
        table = loaded.model.get_input_embeddings().weight
        self.max_positions = int(getattr(loaded.model.config, "max_position_embeddings", NO_LIMIT))
        self.layout = PromptLayout.of(config, lambda text: len(loaded.tokenize(text)), self.max_positions)
        self.hidden = int(loaded.model.config.hidden_size)
        with _whole(table):
            embeddings = table.detach()
            scale = float(embeddings.float().std())
            self.llm: Any = add_lora(loaded.model, config.lora)
            self.projectors = nn.ModuleDict({name: self._projector(name, widths[name], scale) for name in self.streams})
            self.delimiters: nn.Parameter | None = None
            if self.layout.delimited:
                first = init_delimiters(config.delimiters.init, 2 * len(self.layout.delimited), embeddings)
                self.delimiters = nn.Parameter(first, requires_grad=config.delimiters.train)
        trained = {name: e for name, e in (encoders or {}).items() if config.streams[name].encoder.lora.rank}
        self.encoders = nn.ModuleDict(trained)
        # a plain dict, so that the engine neither casts nor partitions frozen encoders
        self._frozen = {name: e for name, e in (encoders or {}).items() if name not in trained}
        self._widths = dict(widths)
        self._counts = {name: encoder.feature_count for name, encoder in (encoders or {}).items()}
        self.probe: flashsink.Probe | None = None
        self._segmented = False  # whether the probe records attention between kinds of tokens
        self._packed, self._cross_entropy = packed, cross_entropy
        # state dicts hold what a checkpoint holds, or DeepSpeed would save the frozen tied head each time
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
        """Attaches flashsink with ``options``, replacing an earlier probe."""
        self.detach()
        self.probe = flashsink.attach(self.llm, **options)
        self._segmented = bool(options.get("segment_mass"))
        return self.probe

    def detach(self) -> None:
        if self.probe is not None:
            self.probe.detach()
            self.probe = None

    def base_states(self) -> Tensor:
        """(L, C) float32 states of BOS in the language model without adapters: see :func:`flashsink.bos_states`. Before
        :meth:`attach`; under ZeRO-3 every rank holds the whole model while this runs."""
        with _whole(*self.llm.parameters()):
            return flashsink.bos_states(self.llm, self.bos)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def own_state(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: everything trainable, and the delimiter tokens, whose frozen values are random."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad or name == "delimiters" or "lora_" in name or name.startswith("projectors.")
        }

    def assemble(self, batch: Batch, *, with_text: bool, left: bool = False, names: bool = False) -> Assembled:
        """Prompt (and text) embeddings of every utterance, padded on the right, or on the left for generation.

        Padding is zero and masked; it never changes a row.
        """
        return self._places(batch, with_text=with_text, names=names, kinds=self._watched()).padded(left=left)

    def _watched(self) -> bool:
        return self.probe is not None and self._segmented and not self.training

    def _places(self, batch: Batch, *, with_text: bool, names: bool, kinds: bool) -> Places:
        """The rows as places in a table of all that they are made of, so that one gather makes them."""
        embed = self.decoder.get_input_embeddings()
        device, dtype = embed.weight.device, embed.weight.dtype
        # one call for all: under ZeRO-3 every call gathers the weight, and ranks must make the same number of calls
        written = [[self.bos], *self.prompts.values(), *batch.text]
        known = embed(on_device([index for part in written for index in part], device))
        table = Table(known.new_zeros(1, self.hidden))
        begins = list(accumulate(map(len, written), initial=table.add(known)))
        bos, *others = [range(*bounds) for bounds in pairwise(begins)]
        prompts, texts = dict(zip(self.prompts, others, strict=False)), others[len(self.prompts) :]
        framing = 0
        if self.delimiters is not None:  # once for every row, so that their gradient is a sum in float32
            own = self.delimiters.expand(len(batch.text), -1, -1)
            framing = table.add(own.to(dtype).flatten(0, 1))
        starts, counts = {}, {}
        for name in self.streams:
            tokens, counts[name] = self._project(name, batch, device)
            # a stream that no utterance has adds no tokens, only a zero gradient: see _project
            first = table.add(tokens.to(dtype).flatten(0, 1))
            starts[name] = [first + b * tokens.shape[1] for b in range(len(batch.text))]
        rows, lengths, labels, numbers = [], [], [], []
        for b, task in enumerate(batch.tasks):
            pieces = self.layout.pieces(task, {name: counts[name][b] for name in TASKS[task]})
            found = {"bos": bos, "prompt": prompts[task]}
            row: list[int] = []
            for piece in pieces:
                if piece.kind in found:
                    row += found[piece.kind]
                elif piece.kind == "speech":
                    row += range(starts[piece.stream][b], starts[piece.stream][b] + piece.length)
                else:
                    place = self.layout.delimited.index(piece.stream) * 2 + (piece.kind == "closing")
                    row.append(framing + b * 2 * len(self.layout.delimited) + place)
            lengths.append(len(row))
            rows.append(row + list(texts[b]) if with_text else row)
            if kinds:
                text_kind = [KINDS.index("text")] * (len(rows[-1]) - len(row))
                numbers.append([piece.number for piece in pieces for _ in range(piece.length)] + text_kind)
            if names:
                prompt, text = map(self._decode, (self.prompts[task], batch.text[b] if with_text else []))
                labels.append([name for piece in pieces for name in piece.names(prompt)] + text)
        return Places(table.whole(), rows, lengths, labels, numbers)

    def _decode(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([index]) for index in ids]

    def forward(self, batch: Batch) -> Terms:
        """One pass over a micro-batch with text. Logits are computed only where there are labels.

        Raises:
            RuntimeError: packed rows without a probe, whose attention would mix them.
        """
        if self._packed:
            if self.probe is None:
                raise RuntimeError("packed rows need flashsink's attention: call attach() first")
            places = self._places(batch, with_text=True, names=False, kinds=self._watched())
            rows: Assembled | Packed = places.packed()
        else:
            rows = self.assemble(batch, with_text=True)
        loss, correct = label_loss(self.decoder.lm_head, *self.label_states(batch, rows), self._cross_entropy)
        probe = self.probe
        decorrelation = probe.decorrelation_loss if probe is not None and probe.computes_decorrelation else None
        if batch.is_dummy:
            loss, correct = loss * 0, correct * 0
        hooked = None if decorrelation is None else decorrelation.view_as(decorrelation)
        return Terms(loss.view_as(loss), hooked, correct, OwnTerms(loss, decorrelation))

    def label_logits(self, batch: Batch, rows: Assembled | Packed) -> tuple[Tensor, Tensor]:
        """(n, vocabulary) logits at the n positions that predict text and end tokens, and their (n,) targets."""
        states, targets = self.label_states(batch, rows)
        return self.decoder.lm_head(states), targets

    def label_states(self, batch: Batch, rows: Assembled | Packed) -> tuple[Tensor, Tensor]:
        """(n, C) states at the n positions that predict text and end tokens, and their (n,) targets."""
        hidden = self.hidden_states(rows)
        places: list[int] = []
        targets: list[int] = []
        for ids, start, length in zip(batch.text, rows.starts, rows.prompts, strict=True):
            first = start + length - 1  # the last prompt token predicts the first text token
            places += range(first, first + len(ids) + 1)
            targets += [*ids, self.eos]
        chosen = hidden.flatten(0, 1).index_select(0, on_device(places, hidden.device))
        return chosen, on_device(targets, hidden.device)

    def hidden_states(self, rows: Assembled | Packed) -> Tensor:
        """States after the final norm, of the embeddings' shape."""
        if self.probe is None:
            return self.decoder.model(**rows.decoder_inputs(), use_cache=False).last_hidden_state
        kinds = rows.kinds
        segments = None if kinds is None else {name: kinds == number for number, name in enumerate(KINDS)}
        with self.probe.spans(rows.spans, segments=segments):
            return self.decoder.model(**rows.decoder_inputs(), use_cache=False).last_hidden_state

    def prompt_lengths(self, batch: Batch) -> list[int]:
        """Number of prompt tokens of every utterance, known without a forward."""
        if batch.is_dummy:
            return []
        frames = {name: [self._features(name, n) for n in rows.tolist()] for name, rows in batch.lengths.items()}
        return [
            self.layout.prompt_length(task, {name: frames[name][b] for name in TASKS[task]})
            for b, task in enumerate(batch.tasks)
        ]

    def _features(self, name: str, rows: int) -> int:
        """Number of features of an encoder input of so many rows."""
        return self._counts[name](rows) if name in self._counts else rows

    def _project(self, name: str, batch: Batch, device: torch.device) -> tuple[Tensor, list[int]]:
        """Speech tokens (B, n, C), of which the first few of every row are an utterance's, and how many; 0 if its task
        lacks the stream.

        Trained modules run even if the whole batch lacks the stream, since all ranks gather weights (ZeRO-3) and reduce
        gradients together: each needs a gradient of every parameter, if only a zero.
        """
        dtype = next(self.projectors[name].parameters()).dtype
        compression = self.config.streams[name].compression
        given = name in batch.features
        features = (self._encode(name, batch, device) if given else self._blank(name, device)).to(dtype)
        tokens = self.projectors[name](compress(features, compression.kind, compression.rate))
        if not given:
            return tokens, [0] * len(batch.text)
        counts = [self.layout.speech_tokens(name, self._features(name, n)) for n in batch.lengths[name].tolist()]
        for utterance, task, count in zip(batch.utterances, batch.tasks, counts, strict=True):
            if count < 1 and name in TASKS[task]:
                raise UserError(f"{utterance.where}: {utterance.id!r} is shorter than one token at this rate")
        return tokens, counts

    def _encode(self, name: str, batch: Batch, device: torch.device) -> Tensor:
        """(B, T, D) features: as given, or computed by the stream's encoder."""
        inputs, lengths = batch.features[name].to(device, non_blocking=True), batch.lengths[name]
        if name not in self._counts:
            return inputs
        encoder = self._frozen[name] if name in self._frozen else self.encoders[name]
        # an utterance whose task lacks the stream is not encoded
        present = [b for b, length in enumerate(lengths.tolist()) if length]
        chosen = None if len(present) == len(lengths) else on_device(present, device)
        if chosen is not None:
            inputs, lengths = inputs.index_select(0, chosen), lengths[present]
        if name in self._frozen:
            with torch.no_grad():
                rows = encoder(inputs, lengths).half().float()  # rounded as in the cache
        else:
            rows = encoder(inputs, lengths)
        if chosen is None:
            return rows
        return rows.new_zeros(len(batch.text), *rows.shape[1:]).index_copy(0, chosen, rows)

    def _blank(self, name: str, device: torch.device) -> Tensor:
        """(1, T, D) features of a blank clip, computed by the stream's encoder if that is trained."""
        if name not in self.encoders:
            return torch.zeros(1, 0, self._widths[name], device=device)
        from avsr.data.clip import Clip  # needs the libraries that read sound and video

        encoder: Any = self.encoders[name]
        blank = Clip(torch.zeros(3200), torch.zeros(5, 96, 96, dtype=torch.uint8))
        inputs = encoder.prepare(blank)[None].to(device)
        return encoder(inputs, torch.tensor([inputs.shape[1]]))


def make_model(
    config: Config,
    widths: Mapping[str, int],
    device: torch.device,
    encoders: Mapping[str, SpeechEncoder] | None = None,
    around: AbstractContextManager[None] = nullcontext(),  # noqa: B008
    *,
    training: bool = False,
) -> tuple[SpeechLLM, LoadedLLM]:
    """The untrained model, its parts by arguments as of :class:`SpeechLLM`; the others are documented in
    :func:`avsr.models.build.build_model`, which has the encoders made too."""
    dtype = torch.bfloat16 if settled_precision(config.training.precision) == "bf16" else torch.float32
    loaded = load_llm(config.model.llm, dtype, around)
    torch.manual_seed(config.training.seed)
    ways: Any = {"packed": config.training.packed, "cross_entropy": config.loss.cross_entropy} if training else {}
    return SpeechLLM(config.model, loaded, widths, encoders, **ways).to(device), loaded


@contextmanager
def _whole(*parameters: nn.Parameter) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 may have partitioned have their values."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(partitioned):
        yield


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
