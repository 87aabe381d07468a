"""What is analyzed: a decoder with rows of embeddings.

B rows, S tokens, C hidden size, L layers. Rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from avsr.models.rows import Assembled


@dataclass
class Subject:
    """A model with its input.

    Attributes:
        lm: Hugging Face causal LM, PEFT-wrapped or not, or its decoder alone; what ``flashsink.attach`` takes.
        count: number of rows in all batches.
        batches: starts the batches anew; every row of one has its token names, ``names[b][0]`` being "BOS".
        opener: name of the token that is examined along with BOS: the first delimiter of a run, "" for plain text.
        inputs: what else the decoder gets in every forward, of a subject with a single row.
    """

    lm: Any
    count: int
    batches: Callable[[], Iterator[Assembled]]
    opener: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def decoder(self) -> Any:
        """The module with the layers and the final norm."""
        lm = self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm
        return getattr(lm, "model", lm)

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
                kept.append(select_rows(batch, places))
        return replace(self, count=count, batches=lambda: iter(kept))

    def forward(self, rows: Assembled, **options: Any) -> Tensor:
        """(B, S, C) states after the final norm; ``options`` go to the decoder."""
        call = {"inputs_embeds": rows.embeddings, "attention_mask": rows.mask, "use_cache": False}
        return self.decoder(**call | self.inputs, **options).last_hidden_state


def select_rows(rows: Assembled, places: list[int]) -> Assembled:
    """The rows at ``places``, without the padding that none of them needs."""
    names = [rows.names[b] for b in places]
    length = max(map(len, names))
    return replace(
        rows,
        embeddings=rows.embeddings[places, :length],
        mask=rows.mask[places, :length],
        spans=rows.spans[places],
        names=names,
    )
