"""Every statistic against eager attention and hidden states in float64, row by row, without padding or batches."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flashsink
from avsr.evaluation.run import test_sets as load_test_sets
from avsr.models.build import load_run
from avsr.tools.analysis import attention
from avsr.tools.analysis.attention import pooled_attention, text_attention
from avsr.tools.analysis.collect import collect
from avsr.tools.analysis.example import ALONE, CELLS, cells_of, examine_row, map_layers
from avsr.tools.analysis.groups import GroupSums, group_of
from avsr.tools.analysis.inputs import ModelOptions, load_text_subject, speech_subject
from avsr.tools.analysis.report import write_report
from avsr.tools.analysis.statistics import measure_batch
from avsr.tools.analysis.subject import Subject
from avsr.tools.analysis.walk import QKV
from avsr.tools.analyze import analyze_subject

TEXTS = ["bin blue at f two now", "lay red", "place white in q nine again", "set green by x", "a b"]
MASSIVE = 7  # the feature in which BOS is made massive
CPU = torch.device("cpu")


def text_subject(tiny_llm: Path, texts: list[str] = TEXTS) -> Subject:
    return load_text_subject(str(tiny_llm), texts, ModelOptions(), CPU)


@pytest.fixture(params=["text", "run"])
def subject(request: pytest.FixtureRequest, tiny_llm: Path) -> Subject:
    """A language model whose BOS is massive, or a run over speech; peaked attention makes some keys sinks."""
    if request.param == "text":
        made = text_subject(tiny_llm)
        made.lm.get_input_embeddings().weight.data[1, MASSIVE] = 4000.0
    else:
        config, model, store = load_run(request.getfixturevalue("run_folder"), [], CPU)
        made = speech_subject(model, load_test_sets(config, model, store)["sentences"], config)
    for layer in made.decoder.layers:
        getattr(layer.self_attn.q_proj, "base_layer", layer.self_attn.q_proj).weight.data.mul_(4)
    return made


@torch.no_grad()
def eager(subject: Subject) -> list[dict[str, Any]]:
    """Of every row: names, span, attentions (L, H, S, S), states (L, S, C) and value norms (L, H, S), in float64."""
    batches = list(subject.batches())
    subject.lm.double()
    decoder = subject.decoder
    decoder.set_attn_implementation("eager")
    values: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda m, a, out: states.append(out[0])) for layer in decoder.layers]
    hooks += [
        layer.self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out[0]))
        for layer in decoder.layers
    ]
    found = []
    for rows in batches:
        for b, names in enumerate(rows.names):
            values.clear(), states.clear()
            out = decoder(inputs_embeds=rows.embeddings[b : b + 1, : len(names)].double(), output_attentions=True)
            a = torch.stack([attention[0] for attention in out.attentions])
            norms = torch.stack([v.view(len(names), 2, -1).norm(dim=-1).T for v in values])
            v = norms.repeat_interleave(a.shape[1] // 2, dim=1)
            found.append({"names": names, "span": int(rows.spans[b]), "a": a, "h": torch.stack(states), "v": v})
    for hook in hooks:
        hook.remove()
    subject.lm.float()
    decoder.set_attn_implementation("sdpa")
    return found


def kind_of(name: str, place: int, span: int) -> str:
    if place == 0:
        return "BOS"
    if place >= span:
        return "text"
    return name if name.startswith("<") else "speech" if name[1:].isdigit() else "prompt"


def sums_by_kind(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sums over the tokens of a kind, by layer; token by token from the definitions."""
    sums: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    for row in found:
        a, h, v, span, n = row["a"], row["h"], row["v"], row["span"], len(row["names"])
        median = h.abs().flatten(1).median(dim=1).values
        for j, name in enumerate(row["names"]):
            text = [i for i in range(max(j, span), n)]
            others = [i for i in text if i != j]
            size = h[:, j].abs().amax(dim=1)
            here = sums[kind_of(name, j, span)]
            values: dict[str, Any] = {"tokens": 1, "max_abs": size, "log10_ratio": torch.log10(size / median)}
            values["cosine"] = torch.cosine_similarity(h[:, j], h[:, 0], dim=-1)
            values["value_norm"] = v[:, :, j].mean(dim=1)
            values["mass"] = a[:, :, text, j].mean(dim=1).sum(dim=-1)
            values["sink_rate_text"] = (a[:, :, text, j].mean(dim=-1) > 0.3).double().mean(dim=1)
            if n - j >= 8:
                values["counted_raw"] = 1
                values["sink_rate"] = (a[:, :, j:, j].mean(dim=-1) > 0.3).double().mean(dim=1)
                sums[f"position {j}"]["counted_raw"] += 1
                sums[f"position {j}"]["sink_rate"] += values["sink_rate"].mean()
            if len(others) >= min(8, max(n - span, 1)):
                mean = a[:, :, others, j].mean(dim=-1)
                values["counted"] = 1
                values["heads"] = (mean > 0.3).double()
                values["sink_rate_corrected"] = values["heads"].mean(dim=1)
                values["received"] = mean.mean(dim=1)
                values["received_value"] = (mean * v[:, :, j]).mean(dim=1)
                sums[f"position {j}"]["counted"] += 1
                sums[f"position {j}"]["sink_rate_corrected"] += values["sink_rate_corrected"].mean()
            for key, value in values.items():
                here[key] += value
    return sums


def test_every_statistic_is_that_of_eager_attention(subject: Subject) -> None:
    got, example = collect(subject)
    found = eager(subject)
    want = sums_by_kind(found)
    queries = sum(len(row["names"]) - row["span"] for row in found)
    per = {key: "tokens" for key in ("max_abs", "log10_ratio", "cosine", "value_norm", "sink_rate_text")}
    per |= {
        "sink_rate": "counted_raw",
        **dict.fromkeys(("sink_rate_corrected", "received", "received_value"), "counted"),
    }
    merged: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    for name, group in got["groups"].items():
        into = merged["prompt" if name.startswith("prompt ") else "text" if name[0] in "'\"" else name]
        for key in ("tokens", "counted", "counted_raw"):
            into[key] += group[key]
        for key, count in per.items():
            assert (group[key] is None) == (group[count] == 0)
            into[key] += torch.tensor(group[key] or [0.0] * 3).double() * group[count]
        into["mass"] += torch.tensor(group["mass"]).double() * queries
    assert set(merged) == {kind for kind in want if not kind.startswith("position")}
    for kind, group in merged.items():
        for key, value in group.items():
            expected = torch.as_tensor(want[kind][key]).double().expand_as(torch.as_tensor(value))
            torch.testing.assert_close(torch.as_tensor(value).double(), expected, rtol=1e-4, atol=1e-4)
    assert any(float(torch.as_tensor(sums["sink_rate"]).max()) > 0 for sums in want.values())  # or this says nothing
    assert 0 < want["text"]["counted"] < want["text"]["tokens"]
    torch.testing.assert_close(
        torch.tensor(got["heads"]["BOS"]).double(), want["BOS"]["heads"] / want["BOS"]["counted"]
    )
    for row in got["positions"]:
        sums = want[f"position {row['position']}"]
        assert row["rows"] == sum(len(one["names"]) > row["position"] for one in found)
        for key, count in (("sink_rate", "counted_raw"), ("sink_rate_corrected", "counted")):
            mean = float(sums[key] / sums[count]) if sums[count] else None
            assert row[key] == (None if mean is None else pytest.approx(mean, abs=1e-5))
    inner = got["groups"][got["intermediate"]]["max_abs"][:-1]
    assert got["intermediate_activation"] == pytest.approx(sum(inner) / 2)
    assert len(example.names[0]) == example.embeddings.shape[1] == int(example.mask.sum())
    squares = [
        torch.cosine_similarity(row["h"][:-1], row["h"][:-1, :1], dim=-1)[:, 1 : row["span"]] ** 2 for row in found
    ]
    count = sum(row["span"] - 1 for row in found)
    assert got["cos2"] == (pytest.approx(float(sum(s.sum() for s in squares)) / 2 / count, rel=1e-4) if count else None)
    largest = torch.stack([row["h"].abs().flatten(1).amax(dim=1) for row in found]).amax(dim=0)
    assert [one["value"] for one in got["largest"]] == pytest.approx(largest.tolist(), rel=1e-4)


@pytest.mark.parametrize("subject", ["text"], indirect=True)
def test_massive_activations_are_listed_with_feature_ratio_and_count(subject: Subject) -> None:
    got, _ = collect(subject)
    sizes = torch.stack([row["h"][:, 0].abs().amax(dim=1) for row in eager(subject)])
    massive = [entry for entry in got["massive"] if entry["group"] == "BOS"]
    assert [(entry["layer"], entry["feature"], entry["count"]) for entry in massive] == [
        (layer, MASSIVE, len(TEXTS)) for layer in (1, 2, 3)
    ]
    assert [entry["value"] for entry in massive] == pytest.approx(sizes.amax(dim=0).tolist(), rel=1e-4)
    assert got["massive_tokens_per_utterance"] >= 1


def test_massive_in_the_last_layer_alone_does_not_count(tiny_llm: Path) -> None:
    calm = text_subject(tiny_llm)
    mlp = calm.decoder.layers[-1].mlp
    mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(48).index_fill(0, torch.tensor(3), 1e5))
    got, _ = collect(calm)
    assert {entry["layer"] for entry in got["massive"]} == {3}
    assert got["massive_tokens_per_utterance"] == 0


def test_rows_too_short_for_a_raw_rate_have_none(tiny_llm: Path, tmp_path: Path) -> None:
    got = analyze_subject(text_subject(tiny_llm, ["a b", "c d e"]))
    for group in got["groups"].values():
        assert group["sink_rate"] is None and group["counted_raw"] == 0 and group["max_abs"]
    assert got["bos_sink_rate"] is None and all(row["sink_rate"] is None for row in got["positions"])
    write_report(tmp_path / "report.html", [("short", got)], "short")
    page = (tmp_path / "report.html").read_text()
    assert "BOS: sink rate, raw" in page and "None" not in page and ">nan<" not in page


@pytest.mark.parametrize(
    ("name", "position", "words", "group"),
    [
        ("BOS", 0, True, "BOS"),
        (" the", 4, True, "' the'"),
        (" the", 4, False, "text"),
        ("<audio>", 1, False, "<audio>"),
        ("a12", 2, False, "speech"),
        ("\n", 3, False, r"prompt '\n'"),
        ("", 3, False, "prompt ''"),
    ],
)
def test_groups(name: str, position: int, words: bool, group: str) -> None:
    assert group_of(name, position, 4, words) == group


def test_sums_of_names_that_come_later() -> None:
    sums = GroupSums()
    for names, values, counts in ((["a", "b", "a"], [1.0, 2.0, 3.0], [1.0] * 3), (["c"], [5.0], [0.0])):
        sums.add("x", sums.places(names), torch.tensor(values))
        sums.add("n", sums.places(names), torch.tensor(counts))
    assert sums.total("x", ["a", "c"]) == 9
    assert sums.means("x", ["a", "b"], "n") == 2
    assert sums.means("x", ["c"], "n") is None


@pytest.mark.parametrize("length", [2, 60])
def test_short_rows_are_drawn_as_eager_attention_has_them(tiny_llm: Path, length: int) -> None:
    subject = text_subject(tiny_llm, ["ab" * (length // 2)])
    got = examine_row(subject, next(subject.batches()))
    (row,) = eager(subject)
    assert got["tokens"] == row["names"] and got["positions"] == list(range(length + 1))
    assert [entry["layer"] for entry in got["maps"]] == [1, 1, 2, 2, 3, 3]
    for mean, one in zip(got["maps"][::2], got["maps"][1::2], strict=True):
        a = row["a"][mean["layer"] - 1]
        torch.testing.assert_close(torch.tensor(mean["weights"]).double(), a.mean(dim=0), rtol=0, atol=6e-5)
        torch.testing.assert_close(torch.tensor(one["weights"]).double(), a[one["head"] - 1], rtol=0, atol=6e-5)
        others = a[:, 1:, 1:].tril(-1).sum(dim=1).amax(dim=1)  # of text queries, without themselves
        assert float(others[one["head"] - 1]) == pytest.approx(float(others.max()), rel=1e-4)
    shown = got["activation"]
    state = row["h"][shown["layer"] - 1].abs()
    assert shown["max_abs"] == pytest.approx(state.amax(dim=1).tolist(), rel=1e-4)
    assert shown["feature"] == state.argmax(dim=1).tolist()
    assert shown["median"] == pytest.approx(float(state.median()), rel=1e-4)


@pytest.mark.parametrize(("tokens", "cells"), [(130, 64), (97, 97), (50, 3)])
def test_cells_average_queries_and_sum_keys(tokens: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BLOCK", 6 * tokens * 17)  # blocks of 17 queries that end nowhere in particular
    torch.manual_seed(0)
    q, k = torch.randn(1, 6, tokens, 8, dtype=torch.float64), torch.randn(1, 2, tokens, 8, dtype=torch.float64)
    qkv = QKV(q, k, k, 0.7)
    which = torch.arange(tokens) * cells // tokens
    scores = q @ k.repeat_interleave(3, dim=1).mT * 0.7
    a = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=-1)[0]
    member = torch.nn.functional.one_hot(which).double()
    mean, one = pooled_attention(qkv, which, 4)
    for got, want in ((mean, a.mean(dim=0)), (one, a[4])):
        torch.testing.assert_close(got, (member / member.sum(dim=0)).T @ want @ member)
    received, own = text_attention(qkv, torch.tensor([5]), torch.tensor([tokens - 3]))
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
    subject = text_subject(tiny_llm, ["ab" * 50])
    monkeypatch.setattr(attention, "BLOCK", 500_000)
    row = next(subject.batches())
    row.embeddings = torch.randn(1, tokens, 48)
    row.mask, row.names = torch.ones(1, tokens, dtype=torch.long), [["BOS", *("x" for _ in range(tokens - 1))]]
    with _Largest() as seen:
        measure_batch(subject, row)
        got = examine_row(subject, row)
    assert 0 < seen.size < tokens * tokens / 16
    assert len(got["tokens"]) == CELLS == len(got["maps"][0]["weights"])
    sums = torch.tensor(got["maps"][0]["weights"]).sum(dim=1)
    torch.testing.assert_close(sums, torch.ones(CELLS), rtol=0, atol=6e-3)
