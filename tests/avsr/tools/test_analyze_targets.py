"""``avsr analyze`` of language models, and everything that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
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
from avsr.models.llm import LoadedLLM
from avsr.tools.analysis.inputs import check_attention
from avsr.tools.analysis.subject import text_subject
from avsr.tools.analyze import analyze, kind_of, refuse_unlike, run_label

Refuse = Callable[..., str]


def test_a_model_reads_fixed_sentences(tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["analyze", str(tiny_llm), "--out", str(tmp_path / "out"), "limit=6"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "report.html")
    held = json.loads((tmp_path / "out" / "analysis.json").read_text())[tiny_llm.name]
    assert held["utterances"] == 6 and held["layers"] == 3
    assert held["shown"][0] == "BOS" and "text" in held["shown"] and held["intermediate"] in held["shown"]
    assert held["identity"]["reads"] == "plain text"
    assert "curve" not in held


def test_two_models_read_a_file_side_by_side(tiny_llm: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("bin blue at f two now\n\nplace white in q nine again\n")
    other = tmp_path / "other"
    shutil.copytree(tiny_llm, other)
    main(["analyze", str(tiny_llm), str(other), "--text", str(text), "--out", str(tmp_path / "out")])
    held = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert [analysis["utterances"] for analysis in held.values()] == [2, 2]
    first, second = held.values()
    assert first["groups"] == second["groups"]
    assert f"<b>{tiny_llm.name}</b>" in (tmp_path / "out" / "report.html").read_text()


def test_the_anchor_is_named_where_the_tokenizer_has_none(tiny_llm: Path, tmp_path: Path, refuse: Refuse) -> None:
    folder = tmp_path / "anchorless"
    shutil.copytree(tiny_llm, folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.bos_token = None
    tokenizer.save_pretrained(str(folder))
    assert "model.llm.bos_token" in refuse("analyze", folder, "--out", tmp_path / "out")
    assert "'nothing'" in refuse("analyze", folder, "model.llm.bos_token=nothing")
    main(["analyze", str(folder), "model.llm.bos_token=</s>", "limit=3", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.html").is_file()


def test_two_models_of_one_name_are_written_beside_neither(
    tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of models has its place, and one that is named twice is read once."""
    for name in ("a", "b"):
        shutil.copytree(tiny_llm, tmp_path / name / "model")
    monkeypatch.chdir(tmp_path)
    first, second = str(tmp_path / "a" / "model"), "b/model"
    assert analyze([first, second, "./a/model"], ["limit=2"]) == Path("runs/analysis/model/report.html")
    assert list(json.loads(Path("runs/analysis/model/analysis.json").read_text())) == [first, second]
    monkeypatch.chdir(tmp_path / "b" / "model")
    assert run_label(".", ["."]) == "model"
    assert analyze(["."], ["limit=2"]) == Path("runs/analysis/model/report.html")


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
    main(["analyze", str(folder), "limit=3", "--out", str(tmp_path / "out")])
    held = json.loads((tmp_path / "out" / "analysis.json").read_text())["model"]
    assert held["features"] and held["traced"] == 3
    if not why:
        assert held["origin"] and held["causal"] and "untraced" not in held
        return
    assert why in held["untraced"] and "origin" not in held and "causal" not in held
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count(f"left out. {held['untraced']}.") == 2


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
    assert "no hub id" in refuse("analyze", "nowhere")
    monkeypatch.chdir(tmp_path)
    assert "empty/mien is not a run and no model: there is none of this name in empty" in refuse(
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
    assert "cannot be compared" in message and "other data" in message and str(manifest) in message


def test_one_condition_of_a_run_is_read(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["analyze", str(run_folder), "noise.snr=[5,0]", "--out", str(tmp_path / "out")])
    assert "sentences 5 dB" in (shown := capsys.readouterr().err) and "0 dB" not in shown.replace("5 dB", "")
    held = json.loads((tmp_path / "out" / "analysis.json").read_text())["run"]
    assert held["identity"]["noise"] == "at 5 dB"


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("metrics.json", '{"sentences": {"we', "not a readable JSON file"),
        ("metrics.json", "[1]", "expected an object"),
        ("metrics.jsonl", '{"step": 1}\n{"ste\n', "line 2 is damaged"),
        ("metrics.jsonl", "3\n", "line 1 is damaged"),
    ],
)
def test_damaged_files_of_a_run_are_named_before_anything_is_measured(
    run_folder: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, name: str, text: str, why: str
) -> None:
    (run_folder / name).write_text(text)
    monkeypatch.setattr(avsr.tools.analyze, "analyze_subject", None)
    message = refuse("analyze", run_folder)
    assert f"{run_folder / name}: " in message and why in message and "\n" not in message


def test_scores_are_what_has_a_word_error_rate(run_folder: Path, tmp_path: Path) -> None:
    (run_folder / "metrics.json").write_text('{"sentences": {"wer": 0.5}, "decoding": {"beams": 1}, "note": "wer"}')
    main(["analyze", str(run_folder), "--out", str(tmp_path / "out")])
    held = json.loads((tmp_path / "out" / "analysis.json").read_text())["run"]
    assert held["scores"] == {"sentences": {"wer": 0.5}} and held["curve"] == []


def test_runs_of_other_tasks() -> None:
    same = {"layers": 3, "hidden_size": 48, "heads": 4, "reads": "audio", "noise": "none"}
    same |= {"data": "a.jsonl", "digest": "1"}
    refuse_unlike(("one", {"identity": same}), ("two", dict(same, data="b.jsonl")))  # a copy of the same corpus
    for change, words in (
        ({"reads": "video"}, "input audio and video"),
        ({"noise": "at -5 dB"}, "noise none and at -5 dB"),
        ({"hidden_size": 64}, "hidden size 48 and 64"),
        ({"digest": "2", "data": "b.jsonl"}, "other data \\(a.jsonl and b.jsonl\\)"),
    ):
        with pytest.raises(UserError, match=f"one and two cannot be compared: .*{words}"):
            refuse_unlike(("one", {"identity": same}), ("two", {**same, **change}))
