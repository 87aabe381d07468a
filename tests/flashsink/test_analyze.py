"""``python -m flashsink analyze`` of tiny models that are saved with a tokenizer."""

from __future__ import annotations

import json
import string

import pytest
import torch

from flashsink.__main__ import FEATURE, main, toy_model
from flashsink.hf import analyze

pytestmark = pytest.mark.integration

TEXT = "bin blue at f two now. " * 6
LETTERS = string.ascii_lowercase + string.digits + " .,"


def tokenizer(bos="<s>"):
    import transformers as hf
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = ["<s>", "!", "<unk>", *LETTERS]
    core = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, unk_token="<unk>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 4 layers with sinks planted at BOS (id 0) and at "!" (id 1)."""
    path = tmp_path_factory.mktemp("planted")
    torch.manual_seed(0)
    toy_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:20] + "!" + TEXT[20:])
    return path


def run(capsys, *argv):
    assert main(["analyze", *map(str, argv)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_planted_sink_is_found_with_its_text(folder, text, tmp_path, capsys):
    """Against eager's probabilities and hidden states."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "report.json"
    lines = run(capsys, folder, "--text", text, "--tokens", 64, "--rows", 2, "--out", out, "--out", tmp_path / "a.png")
    assert len(lines) == 6 and "21 '!'" in lines[1] and lines[1].split()[:2] == ["0", "1.00"]
    held = json.loads(out.read_text())
    assert lines[5] == f"2 rows, 128 tokens; decorrelation loss {held['decorrelation_loss']:.4f}"
    ids = [0, *tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]]
    rows = torch.tensor([ids[:64], [0, *ids[64:127]]])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        seen = model(input_ids=rows, output_attentions=True, output_hidden_states=True)
    queries = torch.arange(64, 0, -1)
    for layer, entry in enumerate(held["layers"]):
        mean = seen.attentions[layer].double().sum(dim=2) / queries  # (B, H, S)
        assert entry["layer"] == layer
        assert entry["bos_sink_rate"] == pytest.approx(float((mean[:, :, 0] > 0.3).double().mean()))
        heads = mean.mean(dim=1)[:, 1:57]
        assert entry["other"]["mean_received"] == pytest.approx(float(heads.max()), rel=1e-4)
        row, token = divmod(int(heads.argmax()), 56)
        assert (entry["other"]["row"], entry["other"]["token"]) == (row, token + 1) == (0, 21)
        assert entry["other"]["text"] == "!"
    for layer in range(3):  # transformers gives the last layer's output only after the norm
        states, entry = seen.hidden_states[layer + 1].abs(), held["layers"][layer]["largest"]
        assert entry["max_abs"] == pytest.approx(float(states.max()), rel=1e-5) and entry["feature"] == FEATURE
        assert states[entry["row"], entry["token"], FEATURE] == states.max()
    states = torch.stack(seen.hidden_states[1:-1]).double()
    cosine = torch.cosine_similarity(states[:, :, :1], states[:, :, 1:], dim=-1)
    assert held["decorrelation_loss"] == pytest.approx(float(cosine.square().mean()), rel=1e-4)
    marked = [entry for entry in held["report"] if entry["text"] == "!"]
    assert [entry["layer"] for entry in marked] == [0, 1, 2, 3] and all(entry["token"] == 21 for entry in marked)
    assert {entry["row"] for entry in held["report"]} == {0, 1}
    assert held["first_nonfinite"] is None and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_overflow_in_half_precision_is_named(folder, text, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5] = 6e4
        model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
    model.save_pretrained(tmp_path / "large")
    tokenizer().save_pretrained(tmp_path / "large")
    options = ("--text", text, "--tokens", 32, "--rows", 1)
    assert len(run(capsys, tmp_path / "large", *options)) == 6
    lines = run(capsys, tmp_path / "large", *options, "--dtype", "float16", "--out", tmp_path / "a.json")
    assert lines[-1].startswith("not finite: layer 1, mlp.down_proj, row 0, token ") and "feature 5" in lines[-1]
    held = json.loads((tmp_path / "a.json").read_text())
    assert held["layers"][1]["largest"]["max_abs"] is None and "not finite" in lines[2]


def test_an_encoder_and_a_tokenizer_without_bos(folder, text, tmp_path, capsys):
    import transformers as hf

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = hf.BertForMaskedLM(hf.BertConfig(**sizes, vocab_size=64, max_position_embeddings=40))
    encoder.save_pretrained(tmp_path / "bert")
    tokenizer(bos=None).save_pretrained(tmp_path / "bert")
    lines = run(capsys, tmp_path / "bert", "--text", text, "--out", tmp_path / "a.json")
    held = json.loads((tmp_path / "a.json").read_text())
    assert len(lines) == 4 and lines[-1] == "4 rows, 139 tokens; decorrelation loss -"  # rows of 40, without BOS
    assert all(entry["kind"] == "token" for entry in held["report"])
    llama = tmp_path / "llama"
    hf.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(llama)
    tokenizer(bos=None).save_pretrained(llama)
    run(capsys, llama, "--text", text, "--rows", 1, "--tokens", 10, "--out", tmp_path / "b.json")
    held = json.loads((tmp_path / "b.json").read_text())
    assert held["tokens"] == 10 and held["report"][0]["text"] == "b" and held["report"][0]["kind"] == "BOS"


def failed(capsys, *argv):
    capsys.readouterr()
    assert main(["analyze", *map(str, argv)]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("python -m flashsink: error: ") and error.count("\n") == 1
    return error


def test_what_cannot_be_used_is_one_line_and_status_1(folder, text, tmp_path, capsys, monkeypatch):
    import transformers as hf

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such folder" in failed(capsys, tmp_path / "nothing", "--text", text)
    assert "nobody/nothing: no model" in failed(capsys, "nobody/nothing", "--text", text)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in failed(capsys, tmp_path / "empty", "--text", text)
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "no such thing"}')
    assert "no model that transformers knows" in failed(capsys, tmp_path / "empty", "--text", text)
    assert "cannot be read" in failed(capsys, folder, "--text", tmp_path / "missing.txt")
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n")
    assert "expected text, found none" in failed(capsys, folder, "--text", blank)
    blank.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in failed(capsys, folder, "--text", blank)
    blank.write_text("a")
    bare = tmp_path / "bare"
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(bare)
    assert "no tokenizer" in failed(capsys, bare, "--text", text)
    tokenizer(bos=None).save_pretrained(bare)
    assert "expected two tokens or more, got 1" in failed(capsys, bare, "--text", blank)
    assert "no submodule 'tower'" in failed(capsys, folder, "--text", text, "--module", "tower")
    assert "--device nothing" in failed(capsys, folder, "--text", text, "--device", "nothing")
    assert "there is no folder" in failed(capsys, folder, "--text", text, "--out", tmp_path / "no" / "a.json")
    (tmp_path / "a.json").mkdir()
    assert "a.json" in failed(capsys, folder, "--text", text, "--out", tmp_path / "a.json")
    model.resize_token_embeddings(8)
    model.save_pretrained(bare)
    assert "the model has 8 embeddings" in failed(capsys, bare, "--text", text)
    (bare / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be loaded" in failed(capsys, bare, "--text", text)


def test_weights_that_are_missing_or_too_large_are_refused(folder, text, tmp_path, capsys, monkeypatch):
    from safetensors.torch import load_file, save_file

    short = tmp_path / "short"
    short.mkdir()
    for path in folder.iterdir():
        (short / path.name).write_bytes(path.read_bytes())
    weights = load_file(short / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, short / "model.safetensors", metadata={"format": "pt"})
    message = failed(capsys, short, "--text", text)
    assert "1 weights are missing, such as model.layers.2.mlp.up_proj.weight" in message
    monkeypatch.setattr(analyze, "_free", lambda device: 1e5)
    size = sum(own.numel() for own in weights.values()) * 4
    assert 1e5 < size < 1e7
    assert "too large: its weights take" in failed(capsys, folder, "--text", text)


@pytest.mark.parametrize("argv", [[], ["--rows", "0"], ["--tokens", "1"], ["--dtype", "int8"], ["--out", "a.txt"]])
def test_bad_usage_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", "x", *(["--text", "y"] if argv else []), *argv])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
