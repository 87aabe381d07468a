"""``avsr analyze`` of language models, and everything that it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from avsr.analyze import refuse_unlike
from avsr.cli import main
from avsr.errors import UserError

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


def test_folders_that_are_neither_run_nor_model(tmp_path: Path, refuse: Refuse) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refuse("analyze", empty)
    assert str(empty) in message and "config.yaml" in message and "config.json" in message
    assert "no hub id" in refuse("analyze", "nowhere")
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


def test_runs_of_other_tasks() -> None:
    same = {"layers": 3, "hidden_size": 48, "heads": 4, "reads": "audio", "data": "a.jsonl", "digest": "1"}
    refuse_unlike(("one", {"identity": same}), ("two", dict(same, data="b.jsonl")))  # a copy of the same corpus
    for change, words in (
        ({"reads": "video"}, "input audio and video"),
        ({"hidden_size": 64}, "hidden size 48 and 64"),
        ({"digest": "2", "data": "b.jsonl"}, "other data \\(a.jsonl and b.jsonl\\)"),
    ):
        with pytest.raises(UserError, match=f"one and two cannot be compared: .*{words}"):
            refuse_unlike(("one", {"identity": same}), ("two", {**same, **change}))
