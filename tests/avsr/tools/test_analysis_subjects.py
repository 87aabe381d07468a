"""What ``avsr analyze`` reads, of which rows, and everything that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    T5Config,
)
from transformers import T5ForConditionalGeneration as T5

import avsr.tools.analyze
from avsr.cli import main
from avsr.errors import UserError
from avsr.evaluation.results import results_folder
from avsr.models.llm import LoadedLLM
from avsr.models.rows import Assembled
from avsr.tools.analysis import inputs
from avsr.tools.analysis.inputs import ModelOptions, check_attention, load_text_subject, speech_subject, text_subject
from avsr.tools.analysis.subject import Subject
from avsr.tools.analyze import analyze, analyze_subject, kind_of, refuse_unlike, run_label

pytestmark = pytest.mark.integration

Refuse = Callable[..., str]
TEXTS = ["bin blue at f two now", "lay red", "place white in q nine again"]


def analyses_in(folder: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    return held


def test_a_model_reads_fixed_sentences_after_the_anchor(
    tiny_llm: Path, tmp_path: Path, refuse: Refuse, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is named where the tokenizer has none."""
    folder = tmp_path / "anchorless"
    shutil.copytree(tiny_llm, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.bos_token = None
    tokenizer.save_pretrained(str(folder))
    assert "model.llm.bos_token" in refuse("analyze", folder, "--out", tmp_path / "out")
    assert "'nothing'" in refuse("analyze", folder, "model.llm.bos_token=nothing")
    main(["analyze", str(folder), "model.llm.bos_token=</s>", "limit=6", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    held = analyses_in(tmp_path / "out")["anchorless"]
    assert held["utterances"] == 6 and held["layers"] == 3
    assert held["shown"][0] == "BOS" and "text" in held["shown"] and held["intermediate"] in held["shown"]
    assert held["identity"]["reads"] == "plain text" and "curve" not in held


def test_models_of_one_name_are_compared_under_their_paths(
    tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their report has a folder of its own, and one that is named twice is read once."""
    for name in ("a", "b"):
        shutil.copytree(tiny_llm, tmp_path / name / "model")
    (tmp_path / "text.txt").write_text("bin blue at f two now\n\nplace white in q nine again\n")
    monkeypatch.chdir(tmp_path)
    first, second = str(tmp_path / "a" / "model"), "b/model"
    report = Path("runs/analysis/model/report.html")
    assert analyze([first, second, "./a/model"], [], text="text.txt") == report
    held = analyses_in(report.parent)
    assert list(held) == [first, second] and held[first]["groups"] == held[second]["groups"]
    assert held[first]["utterances"] == 2 and f"<b>{second}</b>" in report.read_text()
    monkeypatch.chdir(tmp_path / "b" / "model")
    assert run_label(".", ["."]) == "model"
    assert analyze(["."], ["limit=2"]) == report


def test_what_is_no_causal_decoder(tmp_path: Path, refuse: Refuse) -> None:
    sizes = {"vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(hidden_size=32, **sizes)).save_pretrained(tmp_path / "bert")
    message = refuse("analyze", tmp_path / "bert")
    assert str(tmp_path / "bert") in message and "BertModel is no causal decoder" in message
    T5(T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(tmp_path / "t5")
    assert "is an encoder with a decoder" in refuse("analyze", tmp_path / "t5")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no such thing"}')
    message = refuse("analyze", tmp_path / "odd")
    assert str(tmp_path / "odd") in message and "no model that transformers knows" in message


SIZES = {
    **{"vocab_size": 73, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1},
}


def save(tiny_llm: Path, folder: Path, config: PretrainedConfig) -> Path:
    """A random model of a family beside the tiny tokenizer."""
    shutil.copytree(tiny_llm, folder)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_decoders_whose_attention_cannot_be_observed(tiny_llm: Path, tmp_path: Path, refuse: Refuse) -> None:
    opt = OPTConfig(
        vocab_size=73, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    message = refuse("analyze", save(tiny_llm, tmp_path / "opt", opt))
    assert "OPTForCausalLM is no causal decoder with Llama's layers" in message and "\n" not in message
    lm = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, head_dim=8)).eval()
    loaded = LoadedLLM(lm, AutoTokenizer.from_pretrained(str(tiny_llm)), 1, 2)
    with pytest.raises(UserError, match="gemma: its attention cannot be observed: softcap"):
        check_attention("gemma", text_subject(loaded, ["a text"]))
    lm = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4)).eval()
    loaded = LoadedLLM(lm, AutoTokenizer.from_pretrained(str(tiny_llm)), 1, 2)
    with pytest.raises(UserError, match="gemma: its attention cannot be observed: attention_mask: .* windows"):
        check_attention("gemma", text_subject(loaded, ["a text"]))


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (GraniteConfig(**SIZES, residual_multiplier=0.22), "GraniteModel: layer 1 does not just add attention and MLP"),
        (Gemma3TextConfig(**SIZES, head_dim=8), "Gemma3TextModel: layer 1 does not just add attention and MLP"),
        (Olmo2Config(**SIZES), "Olmo2Model: layer 1 does not just add attention and MLP"),
        (Phi3Config(**SIZES), "Phi3Model: expected MLPs with gate_proj"),
        (MixtralConfig(**SIZES, num_local_experts=2), "MixtralModel: expected MLPs with gate_proj"),
        (GemmaConfig(**SIZES, head_dim=8), ""),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_decoder_without_an_origin_says_why(
    tiny_llm: Path, tmp_path: Path, config: PretrainedConfig, why: str
) -> None:
    folder = save(tiny_llm, tmp_path / "model", config)
    held = analyze_subject(load_text_subject(str(folder), TEXTS, ModelOptions(), torch.device("cpu")))
    assert held["features"] and held["traced"] == 3
    traced = {"origin", "causal"} & set(held)
    assert (why in held["untraced"] and not traced) if why else (len(traced) == 2 and "untraced" not in held)


def test_a_text_longer_than_the_model_takes(tiny_llm: Path, tmp_path: Path, refuse: Refuse) -> None:
    text = tmp_path / "text.txt"
    text.write_text(f"short\n{'x' * 255}\n{'y' * 256}\n")
    message = refuse("analyze", tiny_llm, "--text", text)
    assert "text 3" in message and "257" in message and "256 (max_position_embeddings)" in message
    folder = tmp_path / "sliding"
    shutil.copytree(tiny_llm, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "sliding_window": 100}))
    assert "100 (sliding_window)" in refuse("analyze", folder, "--text", text)
    (folder / "config.json").write_text(json.dumps({**settings, "sliding_window": 0}))
    assert "max_position_embeddings" in refuse("analyze", folder, "--text", text)  # a window of 0 is none


def test_bad_texts_and_options(tiny_llm: Path, tmp_path: Path, refuse: Refuse) -> None:
    text = tmp_path / "text.txt"
    assert str(text) in refuse("analyze", tiny_llm, "--text", text)
    text.write_text(" \n\n")
    message = refuse("analyze", tiny_llm, "--text", text)
    assert str(text) in message and "no line with text" in message
    text.write_bytes(b"\xff\xfe\x00")
    assert str(text) in refuse("analyze", tiny_llm, "--text", text)
    assert "'limit'" in refuse("analyze", tiny_llm, "limt=3")
    for wrong in ("0", "-1", "many"):
        assert f"limit: expected a whole number above 0, got {wrong!r}" in refuse("analyze", tiny_llm, f"limit={wrong}")


def test_folders_that_are_neither_run_nor_model(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refuse("analyze", empty)
    assert str(empty) in message and "config.yaml" in message and "config.json" in message
    assert "not a hub id" in refuse("analyze", "nowhere")
    monkeypatch.chdir(tmp_path)
    assert "empty/mien is neither a run nor a model: nothing of this name is in empty" in refuse(
        "analyze", "empty/mien"
    )
    assert kind_of("no-such-folder/mien") == "language model"
    assert "is not installed" in refuse("analyze", "package:nothing_of_that_name/model.gguf")


def test_a_model_beside_a_run(run_folder: Path, tiny_llm: Path, refuse: Refuse, tmp_path: Path) -> None:
    assert "a run and a language model cannot be compared" in refuse("analyze", run_folder, tiny_llm)
    text = tmp_path / "text.txt"
    text.write_text("a text\n")
    assert "a text file is for language models" in refuse("analyze", run_folder, "--text", text)


def test_models_of_other_sizes(tiny_llm: Path, tmp_path: Path, refuse: Refuse) -> None:
    other = tmp_path / "two_layers"
    shutil.copytree(tiny_llm, other)
    config = LlamaConfig.from_pretrained(str(tiny_llm))
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(other)
    message = refuse("analyze", tiny_llm, other, "limit=3")
    assert "cannot be compared" in message and "decoder layers 3 and 2" in message and "two_layers" in message


def test_runs_over_other_test_sets(
    run_folder: Path, make_corpus: Callable[..., Path], tmp_path: Path, refuse: Refuse
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    manifest = make_corpus(tmp_path / "elsewhere", 3)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("corpus/sentences/manifest.jsonl", "elsewhere/manifest.jsonl"))
    message = refuse("analyze", run_folder, other)
    assert "cannot be compared" in message and "different data" in message and str(manifest) in message


def test_one_condition_of_a_run_is_read_and_the_scores_that_are_word_error_rates(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "metrics.json").write_text('{"sentences": {"wer": 0.1}}')
    own = results_folder(run_folder, ["noise.snr=[5,0]"])
    own.mkdir(parents=True)
    (own / "metrics.json").write_text('{"sentences": {"wer": 0.5}, "decoding": {"beams": 1}, "note": "wer"}')
    main(["analyze", str(run_folder), "noise.snr=[5,0]", "--out", str(tmp_path / "out")])
    assert "sentences 5 dB" in (shown := capsys.readouterr().err) and "0 dB" not in shown.replace("5 dB", "")
    held = analyses_in(tmp_path / "out")["run"]
    assert held["identity"]["noise"] == "at 5 dB"
    assert held["scores"] == {"sentences": {"wer": 0.5}} and held["curve"] == []


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("metrics.json", '{"sentences": {"we', "not a readable JSON file"),
        ("metrics.json", "[1]", "expected an object"),
    ],
)
def test_damaged_files_of_a_run_are_named_before_anything_is_measured(
    run_folder: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, name: str, text: str, why: str
) -> None:
    (run_folder / name).write_text(text)
    monkeypatch.setattr(avsr.tools.analyze, "analyze_subject", None)
    message = refuse("analyze", run_folder)
    assert f"{run_folder / name}: " in message and why in message and "\n" not in message


def test_an_analysis_of_other_settings_replaces_none(
    run_folder: Path, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(avsr.tools.analyze, "analyze_subject", lambda subject: {})
    monkeypatch.setattr(avsr.tools.analyze, "write_report", lambda path, *rest: path.write_text("report"))
    (run_folder / "metrics.jsonl").write_text('{"step": 1}\n{"ste')
    own = analyze([str(run_folder)], [])
    held = analyses_in(run_folder)
    assert own == run_folder / "report.html" and held["run"]["curve"] == [{"step": 1}]
    assert held["run"]["made_by"]["checkpoint"] == "best" and held["run"]["made_by"]["data.limit"] == 0
    assert analyze([str(run_folder)], ["decode.batch=1"]) == own  # changes nothing
    held = analyses_in(run_folder)
    part = analyze([str(run_folder)], ["data.limit=2"])
    assert part.parent == results_folder(run_folder, ["data.limit=2"]) and analyses_in(run_folder) == held
    assert analyses_in(part.parent)["run"]["made_by"]["data.limit"] == 2

    out = tmp_path / "out"
    for _ in range(2):
        analyze([str(run_folder)], ["data.limit=2"], str(out))
    message = refuse("analyze", run_folder, "--out", out)
    assert f"{out / 'analysis.json'} is the result of other settings (data.limit is 2 there, not 0)" in message
    assert "name another folder with --out" in message
    content = analyses_in(out)
    (out / "analysis.json").write_text(json.dumps(content | {"other": content["run"]}))
    message = refuse("analyze", run_folder, "data.limit=2", "--out", out)
    assert f"{out / 'analysis.json'} is the report of other, run: name another folder with --out" in message
    for text in ('{"run": {}}', "{"):
        (out / "analysis.json").write_text(text)
        assert "does not say what made it" in refuse("analyze", run_folder, "data.limit=2", "--out", out)


def test_too_little_memory_is_one_line(run_folder: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(subject: Subject) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

    monkeypatch.setattr(avsr.tools.analyze, "analyze_subject", measure)
    message = refuse("analyze", run_folder)
    assert f"out of memory while analyzing {run_folder} (CUDA out of memory" in message
    assert "lower training.frames" in message and "\n" not in message


def test_runs_of_other_tasks() -> None:
    same = {"layers": 3, "hidden_size": 48, "heads": 4, "reads": "audio", "noise": "none"}
    same |= {"data": "a.jsonl", "digest": "1"}
    refuse_unlike(("one", {"identity": same}), ("two", dict(same, data="b.jsonl")))  # a copy of the same corpus
    for change, words in (
        ({"reads": "video"}, "input audio and video"),
        ({"noise": "at -5 dB"}, "noise none and at -5 dB"),
        ({"hidden_size": 64}, "hidden size 48 and 64"),
        ({"digest": "2", "data": "b.jsonl"}, "different data \\(a.jsonl and b.jsonl\\)"),
    ):
        with pytest.raises(UserError, match=f"one and two cannot be compared: .*{words}"):
            refuse_unlike(("one", {"identity": same}), ("two", {**same, **change}))


@pytest.fixture(scope="module")
def texts(tiny_llm: Path) -> Subject:
    """60 rows of 3 to 62 tokens with BOS, no two alike."""
    return load_text_subject(str(tiny_llm), ["x" * n for n in range(2, 62)], ModelOptions(), torch.device("cpu"))


def lengths(subject: Subject) -> list[int]:
    return [len(names) for rows in subject.batches() for names in rows.names]


@pytest.mark.parametrize("count", [1, 3, 7, 32, 59, 60, 1000])
def test_spread_rows_are_of_all_lengths_and_stay_the_same(texts: Subject, count: int) -> None:
    part = texts.spread(count)
    count = min(count, 60)
    taken = lengths(part)
    assert len(taken) == part.count == count and lengths(part) == taken
    steps = {after - before for before, after in zip(taken, taken[1:], strict=False)}
    assert all(60 // count <= step <= -(-60 // count) for step in steps)
    assert abs(sum(taken) / count - sum(lengths(texts)) / 60) <= 0.5
    assert lengths(part.spread(2)) == [taken[count // 4], taken[3 * count // 4]] or count < 4


def test_spread_rows_are_those_of_the_whole(texts: Subject) -> None:
    whole = {len(row): (rows, b) for rows in texts.batches() for b, row in enumerate(rows.names)}
    for rows in texts.spread(11).batches():
        assert rows.embeddings.shape[:2] == rows.mask.shape == (len(rows.names), max(map(len, rows.names)))
        for b, names in enumerate(rows.names):
            other, place = whole[len(names)]
            assert int(rows.mask[b].sum()) == len(names) and rows.spans[b] == other.spans[place]
            assert torch.equal(rows.embeddings[b, : len(names)], other.embeddings[place, : len(names)])


@pytest.mark.parametrize(("task", "opener"), [("audio", "<audio>"), ("video", "<video>"), ("audiovisual", "<audio>")])
def test_the_opener_is_that_of_the_task_that_is_read(monkeypatch: pytest.MonkeyPatch, task: str, opener: str) -> None:
    """Also in a model of more streams; and rows are put together without a graph."""
    monkeypatch.setattr(inputs, "collate", list)
    weight = torch.ones(4, requires_grad=True)

    def assemble(batch: list[Any], **options: Any) -> Assembled:
        return Assembled(weight * torch.ones(1, 2, 4), torch.ones(1, 2), torch.ones(1), [["BOS", "a"]])

    class Dataset(list[int]):
        sizes = (3,)
        reading = SimpleNamespace(task=task)

    model = SimpleNamespace(streams=("audio", "video"), delimiters=1, llm=None, assemble=assemble)
    config = SimpleNamespace(training=SimpleNamespace(frames=10))
    subject = speech_subject(model, Dataset([1]), config)  # type: ignore[arg-type]
    assert subject.opener == opener
    (rows,) = subject.batches()
    assert not rows.embeddings.requires_grad and torch.is_grad_enabled()
