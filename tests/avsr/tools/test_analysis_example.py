"""Attention maps in cells, against eager attention and for long rows, whose memory must not grow with the square."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashsink
from avsr.tools.analysis import observe
from avsr.tools.analysis.example import ALONE, CELLS, cells_of, look_at, map_layers
from avsr.tools.analysis.inputs import ModelOptions, load_text_subject
from avsr.tools.analysis.observe import pooled_attention, text_attention
from avsr.tools.analysis.subject import Subject


def subject_of(tiny_llm: Path, length: int) -> Subject:
    return load_text_subject(str(tiny_llm), ["ab" * (length // 2)], ModelOptions(), torch.device("cpu"))


@pytest.mark.parametrize("length", [2, 60])
def test_short_rows_are_drawn_as_eager_attention_has_them(tiny_llm: Path, length: int) -> None:
    subject = subject_of(tiny_llm, length)
    row = next(subject.batches())
    got = look_at(subject, row)
    subject.lm.double()
    subject.decoder.set_attn_implementation("eager")
    with torch.no_grad():
        out = subject.decoder(inputs_embeds=row.embeddings.double(), output_attentions=True, output_hidden_states=True)
    assert got["tokens"] == row.names[0] and got["positions"] == list(range(length + 1))
    assert [entry["layer"] for entry in got["maps"]] == [1, 1, 2, 2, 3, 3]
    for mean, one in zip(got["maps"][::2], got["maps"][1::2], strict=True):
        a = out.attentions[mean["layer"] - 1][0]
        torch.testing.assert_close(torch.tensor(mean["weights"]).double(), a.mean(dim=0), rtol=0, atol=6e-5)
        torch.testing.assert_close(torch.tensor(one["weights"]).double(), a[one["head"] - 1], rtol=0, atol=6e-5)
        others = a[:, 1:, 1:].tril(-1).sum(dim=1).amax(dim=1)  # of text queries, without themselves
        assert float(others[one["head"] - 1]) == pytest.approx(float(others.max()), rel=1e-4)
    shown = got["activation"]
    state = out.hidden_states[shown["layer"]][0]
    assert shown["max_abs"] == pytest.approx(state.abs().amax(dim=1).tolist(), rel=1e-4)
    assert shown["feature"] == state.abs().argmax(dim=1).tolist()
    assert shown["median"] == pytest.approx(float(state.abs().flatten().median()), rel=1e-4)


@pytest.mark.parametrize(("tokens", "cells"), [(130, 64), (97, 97), (50, 3)])
def test_cells_average_queries_and_sum_keys(tokens: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "CELLS", 6 * tokens * 17)  # blocks of 17 queries that end nowhere in particular
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, tokens, 8, dtype=torch.float64), torch.randn(1, 2, tokens, 8, dtype=torch.float64)
    which = torch.arange(tokens) * cells // tokens
    scores = q @ k.repeat_interleave(3, dim=1).mT * 0.7
    a = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)[0]
    member = torch.nn.functional.one_hot(which).double()
    mean, one = pooled_attention(q, k, 0.7, which, 4)
    for got, want in ((mean, a.mean(dim=0)), (one, a[4])):
        torch.testing.assert_close(got, (member / member.sum(dim=0)).T @ want @ member)
        torch.testing.assert_close(got.sum(dim=1), torch.ones(cells, dtype=torch.float64))
    spans, lengths = torch.tensor([5]), torch.tensor([tokens - 3])
    received, own = text_attention(q, k, 0.7, spans, lengths)
    torch.testing.assert_close(received[0], a[:, 5 : tokens - 3].sum(dim=1))
    diagonal = torch.diagonal(a, dim1=1, dim2=2).clone()
    diagonal[:, :5] = diagonal[:, tokens - 3 :] = 0
    torch.testing.assert_close(own[0], diagonal)


def test_cells_of_long_rows() -> None:
    assert cells_of(CELLS).tolist() == list(range(CELLS))
    for tokens in (CELLS + 1, 1000, 4096):
        cells = cells_of(tokens)
        assert cells[:ALONE].tolist() == list(range(ALONE)) and int(cells[-1]) == CELLS - 1
        assert set(cells.diff().tolist()) <= {0, 1}
        sizes = cells.bincount()[ALONE:]
        assert int(sizes.max() - sizes.min()) <= 1
    assert [map_layers(n) for n in (1, 3, 4, 30)] == [[1], [1, 2, 3], [2, 3], [2, 16, 29]]


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_a_long_row_needs_no_square_of_its_length(tiny_llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if flashsink.backends()["cpu"] != "usable":
        pytest.skip("the plain PyTorch reference holds all probabilities; the native library is not built")
    tokens = 4096
    subject = subject_of(tiny_llm, 100)
    monkeypatch.setattr(observe, "CELLS", 500_000)
    row = next(subject.batches())
    row.embeddings = torch.randn(1, tokens, 48)
    row.mask, row.names = torch.ones(1, tokens, dtype=torch.long), [["BOS", *("x" for _ in range(tokens - 1))]]
    with _Largest() as seen:
        observe.observe(subject, row)
        got = look_at(subject, row)
    assert 0 < seen.size < tokens * tokens / 16
    assert len(got["tokens"]) == CELLS == len(got["maps"][0]["weights"])
    sums = torch.tensor(got["maps"][0]["weights"]).sum(dim=1)
    torch.testing.assert_close(sums, torch.ones(CELLS), rtol=0, atol=6e-3)
