"""Official Llama-AVSR checkpoints, imported, against models put together by hand from the same tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from avsr.cli import main
from avsr.config import read_run_config
from avsr.data.batches import Example, collate
from avsr.data.manifest import Utterance
from avsr.errors import UserError
from avsr.models.build import load_run
from avsr.tools.importing import import_checkpoint

pytestmark = pytest.mark.integration

Recipe = Callable[..., Path]


TEXT = "bin blue"  # as the oracle's


def example(model: Any, task: str, features: dict[str, Tensor]) -> Example:
    utterance = Utterance(id="u", audio=Path("u.wav"), text=TEXT, duration=1.0)
    return Example(utterance, features, model.tokenize(TEXT), task)


def imported_logits(run: Path, task: str, features: dict[str, Tensor], *overrides: str) -> tuple[Any, Tensor]:
    _, model, _ = load_run(run, list(overrides), torch.device("cpu"))
    batch = collate([example(model, task, features)])
    with torch.no_grad():
        return model, model.label_logits(batch, model.assemble(batch, with_text=True))[0]


def check(official: Any, prompt: str, speech: list[tuple[str, Tensor]], logits: Tensor, error: float = 1e-4) -> None:
    """``logits`` are those of the merged Llama after the delimited ``speech`` and the prompt."""
    expected = official.logits(official.prompts[prompt], speech, official.merged_llm())[:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, rtol=error, atol=error)


def grey_mouth(frames: int) -> tuple[Tensor, Tensor]:
    """(T, 88 * 88) bytes as a batch holds them, and as AV-HuBERT reads them."""
    grey = torch.randint(0, 256, (frames, 88 * 88), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return grey, ((grey.double() / 255.0 - 0.421) / 0.165).float()


@pytest.mark.parametrize(("prefix", "by_factor"), [("", True), ("model.", False)])
def test_an_audio_model_gives_the_logits_of_the_merged_llama(
    parts: Any, audio_recipe: Callable[..., Path], official: Any, tmp_path: Path, prefix: str, by_factor: bool
) -> None:
    path = official.write(tmp_path / "model_avg_1.pth", prefix)
    factor = {"reduction": parts.R, "alpha": parts.ALPHA} if by_factor else {}
    lora = {"model.lora": {"rank": 3, "alpha": 1.0}} if by_factor else {}
    run = import_checkpoint(path, str(audio_recipe(**lora)), tmp_path / "official", **factor)
    features = torch.randn(42, 32, generator=torch.Generator().manual_seed(1))
    model, logits = imported_logits(run, "audio", {"audio": features})

    # the scale of one layer, from the checkpoint's tensors alone
    x = torch.randn(5, 48, dtype=torch.float64)
    for part, name in (("Q", "q_proj"), ("V", "v_proj")):
        start = "llm.model.layers.1.self_attn."
        down, up = (official.state[f"{start}lora_{side}_{part}.weight"].double() for side in ("down", "up"))
        expected = x @ official.state[f"{start}{name}.weight"].double().T + parts.ALPHA / parts.R * (x @ down.T @ up.T)
        layer = model.decoder.model.layers[1].self_attn.get_submodule(name)
        with torch.no_grad():
            torch.testing.assert_close(layer(x.float()).double(), expected, rtol=1e-5, atol=1e-5)

    speech = [("audio", official.project("audio_proj", parts.pooled(features, 4)))]
    check(official, "audio", speech, logits)
    assert logits.std() > 0.1

    config = read_run_config(run)
    assert config.model.audio.encoder.pad_to_30s and config.model.audio.encoder.normalise
    assert config.model.lora.rank == 8 and config.model.lora.alpha == 4.0
    assert json.loads((run / "checkpoints/best/state.json").read_text())["imported"] == "model_avg_1.pth"
    assert all(t.dtype == torch.float32 for t in load_file(str(run / "checkpoints/best/model.safetensors")).values())


def test_the_command_and_what_it_leads_to(
    parts: Any,
    audio_recipe: Callable[..., Path],
    official: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    tone: Any,
) -> None:
    """Stored in bf16 as the official ones, stacking, without LayerNorm; then evaluated and used."""
    for key in [key for key in official.state if ".3." in key]:
        del official.state[key]
    official.state["audio_proj.0.weight"] = torch.randn(32, 96)
    path = official.write(tmp_path / "model_avg_4.pth", dtype=torch.bfloat16)
    recipe = audio_recipe(**{"data.cache": None})
    overrides = ["model.audio.compression.kind=stack", "model.audio.compression.rate=3"]
    overrides += ["model.projector.layernorm=false", "model.audio.encoder.pad_to_30s=false"]
    out = tmp_path / "official"
    command = ["import", str(path), "--config", str(recipe), "--out", str(out)]
    main([*command, *overrides, "--reduction", "6", "--alpha", "3"])
    assert capsys.readouterr().out.strip() == str(out)
    assert not read_run_config(out).model.audio.encoder.pad_to_30s
    assert read_run_config(out).training.precision == "fp32"
    main(["evaluate", str(out), "data.limit=2"])
    assert "sentences: WER" in capsys.readouterr().out
    main(["transcribe", str(out), str(tone(tmp_path / "a.wav", 0.8))])
    assert capsys.readouterr().out.startswith(str(tmp_path / "a.wav"))
    assert sorted(path.name for path in out.parent.glob("official*")) == ["official"]


def test_rows_of_a_tokenizer_that_has_some_of_the_tokens(
    parts: Any, tiny_recipe: Callable[..., Path], tiny_llm: Path, tmp_path: Path
) -> None:
    official = parts.Official(tiny_llm, {"audio_proj": (32, 32)})  # its tokenizer knows <pad>: four rows are added
    path = official.write(tmp_path / "model.pth")
    run = import_checkpoint(path, str(tiny_recipe(tmp_path)), tmp_path / "out", reduction=parts.R, alpha=parts.ALPHA)
    features = torch.randn(9, 32)
    _, logits = imported_logits(run, "audio", {"audio": features})
    speech = [("audio", official.project("audio_proj", parts.pooled(features, 4)))]
    check(official, "audio", speech, logits)


def test_a_video_model_carries_its_own_encoder(
    parts: Any, audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path
) -> None:
    official = parts.mouth_checkpoint(plain_llm)
    path = official.write(tmp_path / "vsr.pth")
    run = import_checkpoint(path, str(parts.mouth_recipe(audio_recipe, "video")), tmp_path / "out")
    grey, mouth = grey_mouth(13)
    model, logits = imported_logits(run, "video", {"video": grey})
    features = parts.run_network(parts.avhubert(official, "video_encoder"), None, mouth)
    speech = [("video", official.project("video_proj", parts.pooled(features, 3)))]
    check(official, "video", speech, logits, 1e-3)
    frozen = parts.run_network(parts.avhubert(official, "video_encoder", lora=False), None, mouth)
    assert (frozen - features).abs().max() > 0.1  # else the adapters would prove nothing
    assert read_run_config(run).model.video.encoder.name == "run:encoders/video_encoder.safetensors"
    held = load_file(str(run / "encoders" / "video_encoder.safetensors"))
    assert not any("lora" in key or "final_proj" in key or "label_embs" in key for key in held)


def test_an_imported_run_can_be_moved(
    parts: Any, audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    official = parts.mouth_checkpoint(plain_llm)
    recipe = parts.mouth_recipe(audio_recipe, "video")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = import_checkpoint(official.write(tmp_path / "vsr.pth"), str(recipe), Path("out"))
    grey, _ = grey_mouth(6)
    _, before = imported_logits(run, "video", {"video": grey})
    (tmp_path / "there").mkdir()
    run.rename(tmp_path / "there" / "moved")
    monkeypatch.chdir(tmp_path / "there")
    _, after = imported_logits(Path("moved"), "video", {"video": grey})
    assert torch.equal(before, after)
    monkeypatch.chdir(tmp_path)
    _, after = imported_logits(tmp_path / "there" / "moved", "video", {"video": grey})
    assert torch.equal(before, after)
    (tmp_path / "there" / "moved" / "encoders" / "video_encoder.safetensors").unlink()
    with pytest.raises(UserError, match=r"there/moved/encoders/video_encoder\.safetensors: there is no such file"):
        load_run("there/moved", [], torch.device("cpu"))


def test_a_fused_model_has_no_delimiters(
    parts: Any, audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path
) -> None:
    official = parts.Official(plain_llm, {"audiovisual_proj": (128, 32)})
    official.add_avhubert("audiovisual_encoder")
    path = official.write(tmp_path / "fused.pth")
    run = import_checkpoint(path, str(parts.mouth_recipe(audio_recipe, "fused")), tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    sound, mouth = (torch.randn(12, width, generator=generator) for width in (104, 88 * 88))
    model, logits = imported_logits(run, "fused", {"fused": torch.cat([sound, mouth], dim=1)})
    assert model.delimiters is None
    features = parts.run_network(parts.avhubert(official, "audiovisual_encoder"), sound, mouth)
    speech = [("", official.project("audiovisual_proj", parts.pooled(features, 2)))]
    check(official, "audiovisual", speech, logits, 1e-3)


def test_whisper_and_a_frozen_avhubert(
    parts: Any, audio_recipe: Callable[..., Path], plain_llm: Path, tiny_whisper: Path, tmp_path: Path
) -> None:
    """Its AV-HuBERT has adapters that never learned: zero in ``down``, as Llama-AVSR leaves them."""
    official = parts.Official(plain_llm, {"audio_proj": (32, 32), "video_proj": (256, 32)})
    official.add_whisper(tiny_whisper)
    official.add_avhubert("video_encoder", zero=True)
    path = official.write(tmp_path / "avsr.pth")
    settings = {"model.video": {"encoder": {"kind": "avhubert", "name": "nowhere.pt"}}, "data.cache": None}
    settings["model.video"]["compression"] = {"kind": "stack", "rate": 2}
    settings["model.audio.compression"] = {"kind": "average", "rate": 4}
    recipe = audio_recipe(**{"model.task": "audiovisual", **settings})
    # average and stack cannot be mixed by a user of Llama-AVSR, but shapes do not care
    run = import_checkpoint(path, str(recipe), tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    sound, mouth = torch.randn(16, 32, generator=generator), torch.randn(9, 88 * 88, generator=generator)
    seen = parts.run_network(parts.avhubert(official, "video_encoder", lora=False), None, mouth)
    # with a cache the model reads features
    cache = f"data.cache={tmp_path / 'cache'}"
    _, logits = imported_logits(run, "audiovisual", {"audio": sound, "video": seen}, cache)
    speech = [
        ("audio", official.project("audio_proj", parts.pooled(sound, 4))),
        ("video", official.project("video_proj", parts.stacked(seen, 2))),
    ]
    check(official, "audiovisual", speech, logits)


def test_one_avhubert_for_two_projectors(
    parts: Any, audio_recipe: Callable[..., Path], plain_llm: Path, tmp_path: Path
) -> None:
    official = parts.Official(plain_llm, {"audio_proj": (128, 32), "video_proj": (128, 32)})
    official.add_avhubert("audiovisual_encoder")
    path = official.write(tmp_path / "double.pth")
    encoder = {"kind": "avhubert", "name": "nowhere.pt", "lora": {"rank": 8, "alpha": 16.0}}
    stream = {"encoder": encoder, "compression": {"kind": "average", "rate": 2}}
    recipe = audio_recipe(
        **{"model.task": "audiovisual", "model.audio": stream, "model.video": stream, "data.cache": None}
    )
    run = import_checkpoint(path, str(recipe), tmp_path / "out")
    sound = torch.randn(8, 104, generator=torch.Generator().manual_seed(3))
    grey, mouth = grey_mouth(8)
    _, logits = imported_logits(run, "audiovisual", {"audio": sound, "video": grey})
    network = parts.avhubert(official, "audiovisual_encoder")
    speech = [
        ("audio", official.project("audio_proj", parts.pooled(parts.run_network(network, sound, None), 2))),
        ("video", official.project("video_proj", parts.pooled(parts.run_network(network, None, mouth), 2))),
    ]
    check(official, "audiovisual", speech, logits, 1e-3)
    assert [p.name for p in (run / "encoders").iterdir()] == ["audiovisual_encoder.safetensors"]
