"""A run decoded, analysed and reported; numbers against Hugging Face's own attentions and hidden states."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from avsr.cli import main
from avsr.config import load_config
from avsr.data.batches import collate
from avsr.errors import UserError
from avsr.evaluation.run import evaluate, test_sets, transcribe_files
from avsr.models.build import load_run
from avsr.tools.analysis.collect import collect
from avsr.tools.analysis.example import look_at
from avsr.tools.analysis.subject import speech_subject
from avsr.tools.demo import summarise
from avsr.training.metrics import read_metrics
from avsr.training.run import train

collect_sets = test_sets
del test_sets  # pytest would take it for a test


@pytest.fixture
def trained(tiny_recipe: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    before = dict(os.environ)
    yield train(load_config(str(tiny_recipe(tmp_path, **{"loss.decorrelation": 1.0}))))
    os.environ.clear()
    os.environ.update(before)


def test_evaluate_writes_scores_and_hypotheses_and_repeats_itself(trained: Path) -> None:
    first = evaluate(trained, [])
    rows = [json.loads(line) for line in (trained / "hypotheses.jsonl").read_text().splitlines()]
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(first) == {"sentences", "unseen_voices"} <= set(metrics)
    assert {row["set"] for row in rows} == set(first)
    assert all({"id", "speaker", "reference", "hypothesis"} <= row.keys() for row in rows)
    assert metrics["sentences"]["wer"] == pytest.approx(first["sentences"].wer)
    assert "REF" in (trained / "errors.txt").read_text()  # four steps of training: everything is wrong
    assert evaluate(trained, []) == first
    assert [json.loads(line) for line in (trained / "hypotheses.jsonl").read_text().splitlines()] == rows


def test_transcribe_gives_what_evaluate_gave(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evaluate(trained, [])
    rows = [json.loads(line) for line in (trained / "hypotheses.jsonl").read_text().splitlines()]
    config, _, store = load_run(trained, [], torch.device("cpu"))
    manifest = Path(config.data.test["sentences"])
    by_id = {json.loads(line)["id"]: json.loads(line)["audio"] for line in manifest.read_text().splitlines()}
    chosen = [row for row in rows if row["set"] == "sentences"][:3]
    files = [str(manifest.parent / by_id[row["id"]]) for row in chosen]
    assert [text for _, text in transcribe_files(trained, files, [])] == [row["hypothesis"] for row in chosen]
    bad = tmp_path / "bad.wav"
    bad.write_text("no sound")
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main(["transcribe", str(trained), files[0], str(bad), str(tmp_path / "none.wav")])
    out, err = capsys.readouterr()
    assert status.value.code == 2
    assert out.splitlines() == [f"{files[0]}\t{chosen[0]['hypothesis']}"]
    assert "bad.wav" in err and "none.wav" in err and "Traceback" not in err


def test_statistics_are_those_of_eager_attentions_and_hidden_states(trained: Path) -> None:
    """Utterance by utterance, without padding, from output_attentions and output_hidden_states."""
    config, model, store = load_run(trained, [], torch.device("cpu"))
    dataset = collect_sets(config, model, store)["sentences"]
    got, _ = collect(speech_subject(model, dataset, config))
    layers = got["layers"]
    decoder = model.decoder.model
    decoder.set_attn_implementation("eager")
    rate, cosine, size, tokens = torch.zeros(layers), torch.zeros(layers - 1), torch.zeros(layers - 1), 0
    squares, count = 0.0, 0
    for index in range(len(dataset)):
        rows = model.assemble(collate([dataset[index]]), with_text=True)
        with torch.no_grad():
            out = decoder(
                inputs_embeds=rows.embeddings, output_attentions=True, output_hidden_states=True, use_cache=False
            )
        length, span = rows.embeddings.shape[1], int(rows.spans[0])
        for layer, attention in enumerate(out.attentions):
            mean = attention[0, :, :, 1].sum(dim=-1) / (length - 1)
            rate[layer] += float((mean > 0.3).float().mean())
        for layer, state in enumerate(out.hidden_states[1:-1]):
            h = state[0]
            cosines = torch.nn.functional.cosine_similarity(h[:1], h, dim=-1)
            cosine[layer] += cosines[1]
            size[layer] += h[1].abs().max()
            squares += float((cosines[1:span] ** 2).sum()) / (layers - 1)
        count += span - 1
        tokens += 1
    table = got["groups"]["<audio>"]
    assert table["tokens"] == tokens == got["utterances"]
    torch.testing.assert_close(torch.tensor(table["sink_rate"]), rate / tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(table["cosine"][:-1]), cosine / tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(table["max_abs"][:-1]), size / tokens, rtol=1e-4, atol=1e-5)
    assert got["cos2"] == pytest.approx(squares / count, rel=1e-4)
    assert got["intermediate_sink_rate"] == pytest.approx(float(rate[:-1].mean()) / tokens, abs=1e-5)
    assert got["intermediate_activation"] == pytest.approx(float(size.mean()) / tokens, rel=1e-4)


def test_attention_map_has_a_name_for_every_token(trained: Path) -> None:
    config, model, store = load_run(trained, [], torch.device("cpu"))
    subject = speech_subject(model, collect_sets(config, model, store)["sentences"], config)
    shown = look_at(subject, collect(subject)[1])
    assert shown["tokens"][:2] == ["BOS", "<audio>"]
    assert [(entry["layer"], entry["head"] is None) for entry in shown["maps"]] == [
        (layer, mean) for layer in (1, 2, 3) for mean in (True, False)
    ]
    for entry in shown["maps"]:
        weights = torch.tensor(entry["weights"])
        assert weights.shape == (len(shown["tokens"]),) * 2
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights)), rtol=0, atol=2e-3)
        assert float(weights.triu(1).abs().max()) == 0.0


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key in ("src", "href", "xlink:href", "data") and value and not value.startswith(("#", "data:")):
                self.links.append(value)
            if key == "id" and value:
                self.ids.append(value)


def test_report_of_two_runs_stands_alone(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evaluate(trained, [])
    other = tmp_path / "other"
    other.mkdir()
    for path in ("config.yaml", "metrics.jsonl", "checkpoints"):
        (other / path).symlink_to(trained / path)
    capsys.readouterr()
    main(["analyze", str(trained), str(other), "--out", str(tmp_path / "report")])
    report = Path(capsys.readouterr().out.strip())
    text = report.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.links == [] and "script" not in page.tags and "@import" not in text
    assert page.tags.count("svg") >= 30
    assert "&lt;audio&gt;" in text and "prefers-color-scheme: dark" in text
    assert report.stat().st_size < 1_500_000
    assert "WER, sentences" in text
    held = json.loads((tmp_path / "report" / "analysis.json").read_text())
    assert set(held) == {"run", "other"}
    assert held["run"]["cos2"] == pytest.approx(held["other"]["cos2"])
    assert len(held["run"]["curve"]) == len(read_metrics(trained))


def test_the_demos_summary_has_its_keys(trained: Path) -> None:
    config, model, store = load_run(trained, [], torch.device("cpu"))
    analysis, _ = collect(speech_subject(model, collect_sets(config, model, store)["sentences"], config))
    analysis["scores"] = {"sentences": {"wer": 0.25}, "unseen_voices": {"wer": 0.5}}
    analysis["curve"], analysis["lambda"], analysis["margin"] = read_metrics(trained), 1.0, 0.0
    summary = summarise(1.5, {"off": analysis, "on": analysis}, 60.0)
    for key in (
        *("wer_before", "wer_off", "wer_on", "wer_off_unseen_voices", "wer_on_unseen_voices", "cos2_off", "cos2_on"),
        *("intermediate_activation_off", "intermediate_activation_on", "intermediate_sink_rate_off"),
        *("intermediate_sink_rate_on", "lambda", "seconds", "seconds_per_step_off", "seconds_per_step_on"),
        "peak_memory_mb",
    ):
        assert isinstance(summary[key], float), key


def test_a_run_without_test_sets_says_which_key_is_missing(trained: Path) -> None:
    config, model, store = load_run(trained, [], torch.device("cpu"))
    config.data.test = {}
    with pytest.raises(UserError, match=r"data\.test"):
        collect_sets(config, model, store)
