"""What is analysed: a decoder with rows of embeddings, of a trained run or of a plain language model.

B rows, S tokens, C hidden size, L layers. Rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from avsr.config import TASKS, Config
from avsr.data.batches import collate, make_batches
from avsr.data.dataset import SpeechDataset
from avsr.models.llm import LoadedLLM
from avsr.models.speech_llm import Assembled, SpeechLLM

ROWS = 16  # rows in a batch, at most
TOKENS = 2048  # tokens of plain text in a batch, padding counted


@dataclass
class Subject:
    """A model with its input.

    Attributes:
        lm: Hugging Face causal LM, PEFT-wrapped or not, in eval mode; what ``flashsink.attach`` takes.
        count: number of rows in all batches.
        batches: starts the batches anew; every row of one has its token names, ``names[b][0]`` being "BOS".
        opener: name of the token that is looked at beside BOS: the first delimiter of a run, "" for plain text.
    """

    lm: Any
    count: int
    batches: Callable[[], Iterator[Assembled]]
    opener: str = ""

    @property
    def decoder(self) -> Any:
        """The module with the layers and the final norm."""
        lm = self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm
        return lm.model

    @property
    def layers(self) -> int:
        return len(self.decoder.layers)

    def spread(self, count: int) -> Subject:
        """At most ``count`` rows at even distances in the order of the batches, which is that of length. They are kept,
        so that every pass reads the same."""
        count = min(count, self.count)
        chosen = {(2 * i + 1) * self.count // (2 * count) for i in range(count)}
        kept, first = [], 0
        for batch in self.batches():
            places = [b for b in range(len(batch.names)) if first + b in chosen]
            first += len(batch.names)
            if places:
                kept.append(_only(batch, places))
        return replace(self, count=count, batches=lambda: iter(kept))

    def forward(self, rows: Assembled, **options: Any) -> Tensor:
        """(B, S, C) states after the final norm; ``options`` go to the decoder."""
        call = {"inputs_embeds": rows.embeddings, "attention_mask": rows.mask, "use_cache": False}
        return self.decoder(**call, **options).last_hidden_state


def _only(rows: Assembled, places: list[int]) -> Assembled:
    names = [rows.names[b] for b in places]
    length = max(map(len, names))
    return Assembled(rows.embeddings[places, :length], rows.mask[places, :length], rows.spans[places], names)


def speech_subject(model: SpeechLLM, dataset: SpeechDataset, config: Config) -> Subject:
    """A run's model over utterances with their reference texts."""

    def batches() -> Iterator[Assembled]:
        for indices in make_batches(dataset.sizes, max(config.training.frames, max(dataset.sizes)), ROWS):
            batch = collate([dataset[i] for i in indices])
            with torch.no_grad():
                rows = model.assemble(batch, with_text=True, names=True)
            yield rows

    opener = f"<{TASKS[dataset.reading.task][0]}>" if model.delimiters is not None else ""
    return Subject(model.llm, len(dataset), batches, opener)


def text_subject(loaded: LoadedLLM, texts: Sequence[str]) -> Subject:
    """A language model over plain texts, each behind BOS; only BOS counts as prompt (spans are 1)."""
    ids = sorted(([loaded.bos, *loaded.tokenize(text)] for text in texts), key=len)
    embed = loaded.model.get_input_embeddings()

    def batches() -> Iterator[Assembled]:
        first = 0
        while first < len(ids):
            count = max(1, min(ROWS, TOKENS // len(ids[min(first + ROWS, len(ids)) - 1])))
            yield _embedded(ids[first : first + count])
            first += count

    def _embedded(part: list[list[int]]) -> Assembled:
        lengths = torch.tensor([len(row) for row in part], device=embed.weight.device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in part], batch_first=True)
        mask = torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]
        names = [["BOS", *(loaded.tokenizer.decode([index]) for index in row[1:])] for row in part]
        embeddings = embed(padded.to(lengths.device)) * mask[..., None]
        return Assembled(embeddings.detach(), mask.long(), torch.ones_like(lengths), names)

    return Subject(loaded.model, len(ids), batches)
