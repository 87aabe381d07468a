"""The statistics of plain text against eager attention in float64, row by row and without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from avsr.tools.analysis.collect import collect
from avsr.tools.analysis.groups import GroupSums, group_of
from avsr.tools.analysis.inputs import ModelOptions, load_text_subject
from avsr.tools.analysis.report import write_report
from avsr.tools.analysis.subject import Subject
from avsr.tools.analyze import analyze_subject

TEXTS = ["bin blue at f two now", "lay red", "place white in q nine again", "set green by x", "a b"]
MASSIVE = 7  # the feature in which BOS is made massive


@pytest.fixture
def subject(tiny_llm: Path) -> Subject:
    made = load_text_subject(str(tiny_llm), TEXTS, ModelOptions(), torch.device("cpu"))
    with torch.no_grad():
        made.lm.get_input_embeddings().weight[1, MASSIVE] = 4000.0
        for layer in made.decoder.layers:
            layer.self_attn.q_proj.weight.mul_(4)  # peaked attention: some keys are sinks
    return made


def eager(subject: Subject) -> list[dict[str, Any]]:
    """Of every row: names, attentions (L, H, S, S), states (L, S, C) and value norms (L, H, S), in float64."""
    lm = subject.lm.double()
    decoder = subject.decoder
    decoder.set_attn_implementation("eager")
    found = []
    for rows in subject.batches():
        for b, names in enumerate(rows.names):
            values: list[torch.Tensor] = []
            states: list[torch.Tensor] = []
            hooks = []
            for layer in decoder.layers:
                hooks.append(layer.self_attn.v_proj.register_forward_hook(lambda m, a, out, at=values: at.append(out)))
                hooks.append(layer.register_forward_hook(lambda m, a, out, at=states: at.append(out)))
            with torch.no_grad():
                out = decoder(inputs_embeds=rows.embeddings[b : b + 1, : len(names)], output_attentions=True)
            for hook in hooks:
                hook.remove()
            heads = out.attentions[0].shape[1]
            norms = [v[0].view(len(names), 2, -1).norm(dim=-1).T for v in values]
            found.append(
                {
                    "names": names,
                    "a": torch.stack([a[0] for a in out.attentions]),
                    "h": torch.stack([state[0] for state in states]),
                    "v": torch.stack([norm.repeat_interleave(heads // 2, dim=0) for norm in norms]),
                }
            )
    lm.float()
    decoder.set_attn_implementation("sdpa")
    return found


def test_corrected_rates_values_and_mass_are_those_of_eager_attention(subject: Subject) -> None:
    got, example = collect(subject)
    sums = {key: torch.zeros(3, dtype=torch.float64) for key in ("rate", "received", "value", "mass", "raw")}
    heads = torch.zeros(3, 4, dtype=torch.float64)
    queries = long = 0
    for row in eager(subject):
        a, size = row["a"], len(row["names"])
        text = a[:, :, 1:]  # BOS is no text query
        mean = text[..., 0].mean(dim=-1)  # BOS has no self term among them
        sums["rate"] += (mean > 0.3).double().mean(dim=1)
        heads += mean > 0.3
        sums["received"] += mean.mean(dim=1)
        sums["value"] += (mean * row["v"][..., 0]).mean(dim=1)
        sums["mass"] += text[..., 0].mean(dim=1).sum(dim=-1)
        if size >= 8:  # as many queries see BOS
            sums["raw"] += (a[..., 0].mean(dim=-1) > 0.3).double().mean(dim=1)
            long += 1
        queries += size - 1
    bos = got["groups"]["BOS"]
    assert bos["tokens"] == bos["counted"] == got["utterances"] == len(TEXTS)
    assert got["groups"]["BOS"]["sink_rate_corrected"] == pytest.approx((sums["rate"] / 5).tolist(), abs=1e-6)
    assert bos["counted_raw"] == long < len(TEXTS)
    assert bos["sink_rate"] == pytest.approx((sums["raw"] / long).tolist(), abs=1e-6)
    assert got["positions"][0]["sink_rate"] == pytest.approx(float(sums["raw"].mean()) / long, abs=1e-6)
    assert bos["received"] == pytest.approx((sums["received"] / 5).tolist(), rel=1e-4)
    assert bos["received_value"] == pytest.approx((sums["value"] / 5).tolist(), rel=1e-4)
    assert bos["mass"] == pytest.approx((sums["mass"] / queries).tolist(), rel=1e-4)
    assert torch.tensor(got["heads"]["BOS"]).double() == pytest.approx(heads / 5)
    assert max(bos["sink_rate"]) > 0  # or the comparison says nothing
    for layer in range(3):
        assert sum(group["mass"][layer] for group in got["groups"].values()) == pytest.approx(1.0, abs=1e-5)
    assert len(example.names[0]) == example.embeddings.shape[1] == int(example.mask.sum())


def test_text_tokens_are_judged_without_themselves_and_by_eight_queries_at_least(subject: Subject) -> None:
    got, _ = collect(subject)
    total, counted, tokens = torch.zeros(3, dtype=torch.float64), 0, 0
    places: dict[int, list[torch.Tensor]] = {}
    for row in eager(subject):
        a, size = row["a"], len(row["names"])
        for key in range(1, size):
            tokens += 1
            if size - 1 - key < 8:
                continue
            rate = (a[:, :, key + 1 :, key].mean(dim=-1) > 0.3).double().mean(dim=1)
            places.setdefault(key, []).append(rate.mean())
            total += rate
            counted += 1
    text = [group for name, group in got["groups"].items() if name != "BOS"]
    assert sum(group["tokens"] for group in text) == tokens
    assert sum(group["counted"] for group in text) == counted > 0
    sums = torch.zeros(3, dtype=torch.float64)
    for group in text:
        if group["counted"]:
            sums += group["counted"] * torch.tensor(group["sink_rate_corrected"], dtype=torch.float64)
        else:
            assert group["sink_rate_corrected"] is None
    torch.testing.assert_close(sums, total, rtol=1e-5, atol=1e-6)
    by_position = {row["position"]: row for row in got["positions"]}
    assert by_position[0]["rows"] == len(TEXTS) and max(by_position) == max(map(len, TEXTS))
    for place, rates in places.items():
        want = float(torch.stack(rates).mean())
        assert by_position[place]["sink_rate_corrected"] == pytest.approx(want, abs=1e-6)
    assert by_position[max(by_position)]["sink_rate_corrected"] is None
    assert by_position[max(by_position)]["sink_rate"] is None


def test_raw_rates_are_means_over_the_keys_that_eight_queries_see(subject: Subject) -> None:
    got, _ = collect(subject)
    rates: dict[int, list[torch.Tensor]] = {}
    for row in eager(subject):
        a, size = row["a"], len(row["names"])
        for key in range(1, size - 7):
            mean = a[:, :, key:, key].mean(dim=-1)
            rates.setdefault(key, []).append((mean > 0.3).double().mean(dim=1))
    text = [group for name, group in got["groups"].items() if name != "BOS"]
    each = [rate for found in rates.values() for rate in found]
    assert sum(group["counted_raw"] for group in text) == len(each)
    parts = [group["counted_raw"] * torch.tensor(group["sink_rate"]).double() for group in text if group["counted_raw"]]
    torch.testing.assert_close(torch.stack(parts).sum(dim=0), torch.stack(each).sum(dim=0), rtol=1e-5, atol=1e-6)
    for place, found in rates.items():
        want = float(torch.stack(found).mean())
        assert got["positions"][place]["sink_rate"] == pytest.approx(want, abs=1e-6)


def test_rows_too_short_for_a_raw_rate_have_none(tiny_llm: Path, tmp_path: Path) -> None:
    short = load_text_subject(str(tiny_llm), ["a b", "c d e"], ModelOptions(), torch.device("cpu"))
    got = analyze_subject(short)
    for group in got["groups"].values():
        assert group["sink_rate"] is None and group["counted_raw"] == 0 and group["max_abs"]
    assert got["bos_sink_rate"] is None and all(row["sink_rate"] is None for row in got["positions"])
    write_report(tmp_path / "report.html", [("short", got)], "short")
    page = (tmp_path / "report.html").read_text()
    assert "BOS: sink rate, raw" in page and "None" not in page and ">nan<" not in page


def test_massive_in_the_last_layer_alone_does_not_count(tiny_llm: Path) -> None:
    calm = load_text_subject(str(tiny_llm), TEXTS, ModelOptions(), torch.device("cpu"))
    mlp = calm.decoder.layers[-1].mlp
    mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(48))
    with torch.no_grad():
        mlp.down_proj.bias[3] = 1e5
    got, _ = collect(calm)
    assert {entry["layer"] for entry in got["massive"]} == {3}
    assert got["massive_tokens_per_utterance"] == 0


def test_massive_activations_are_listed_with_feature_ratio_and_count(subject: Subject) -> None:
    got, _ = collect(subject)
    values, ratios = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for row in eager(subject):
        size = row["h"][:, 0].abs().amax(dim=1)
        ratios += torch.log10(size / row["h"].abs().flatten(1).median(dim=1).values)
        values = torch.maximum(values, size)
    massive = [entry for entry in got["massive"] if entry["group"] == "BOS"]
    assert [(entry["layer"], entry["feature"], entry["count"]) for entry in massive] == [
        (layer, MASSIVE, len(TEXTS)) for layer in (1, 2, 3)
    ]
    assert [entry["value"] for entry in massive] == pytest.approx(values.tolist(), rel=1e-4)
    assert got["groups"]["BOS"]["log10_ratio"] == pytest.approx((ratios / 5).tolist(), rel=1e-4)
    assert got["massive_tokens_per_utterance"] >= 1
    assert got["cos2"] is None  # plain text has no prompt


def test_the_strongest_text_tokens_stand_alone() -> None:
    assert group_of("BOS", 0, 1, True) == "BOS"
    assert group_of(" the", 3, 1, True) == "' the'"
    assert group_of(" the", 3, 1, False) == "text"
    assert group_of("<audio>", 1, 4, False) == "<audio>"
    assert group_of("a12", 2, 4, False) == "speech"
    assert group_of("\n", 3, 4, False) == r"prompt '\n'"
    assert group_of("", 3, 5, False) == "prompt ''"


def test_sums_of_names_that_come_later() -> None:
    sums = GroupSums()
    sums.add("x", sums.places(["a", "b", "a"]), torch.tensor([1.0, 2.0, 3.0]))
    sums.add("n", sums.places(["a", "b", "a"]), torch.ones(3))
    sums.add("x", sums.places(["c"]), torch.tensor([5.0]))
    sums.add("n", sums.places(["c"]), torch.zeros(1))
    assert sums.total("x", ["a", "c"]) == 9
    assert sums.means("x", ["a", "b"], "n") == 2
    assert sums.means("x", ["c"], "n") is None
