"""The visual encoder: padding, shapes, views of the frames, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from avsr.config import EncoderConfig
from avsr.data.clip import Clip
from avsr.errors import UserError
from avsr.models.visual import VisualConfig, VisualEncoder, VisualModel, load_visual, save_visual, shrink

TINY = VisualConfig(pool=8, channels=[4, 6, 8], width=12, hidden=7, layers=2)
LENGTHS = [1, 4, 9, 23]


def make_model(config: VisualConfig = TINY) -> VisualModel:
    """Random weights, with statistics of batch norm and features that are not the neutral ones."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = VisualModel(config, ["none", "AA", "BMP"], ["bin", "blue", "now", "soon"])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.5)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
            if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
                nn.init.normal_(module.bias, std=0.5)
        nn.init.normal_(model.feature_mean)
        nn.init.uniform_(model.feature_scale, 0.5, 2.0)
    return model.eval()


def make_inputs(side: int = 11, lengths: list[int] = LENGTHS) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length, side * side), generator=draw).float() for length in lengths]


def pad(rows: list[Tensor], frames: int, value: float = 0.0) -> Tensor:
    out = torch.full((len(rows), frames, rows[0].shape[1]), value)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out


@pytest.mark.parametrize("value", [0.0, 255.0, float("nan")])
def test_padding_changes_nothing(value: float) -> None:
    model, rows = make_model(), make_inputs()
    together = model(pad(rows, 30, value), torch.tensor(LENGTHS))
    assert together.shape == (4, 30, model.width) == (4, 30, 14)
    for row, out in zip(rows, together, strict=True):
        alone = model(row[None], torch.tensor([len(row)]))[0]
        torch.testing.assert_close(out[: len(row)], alone, atol=1e-5, rtol=1e-5)
        assert (out[len(row) :] == 0).all()


def test_heads_match_and_train_over_valid_frames_alone() -> None:
    """In training mode too: the batch statistics and every gradient are those of the valid frames."""
    rows = make_inputs()
    config = VisualConfig(pool=8, channels=[8, 8, 8], width=12, hidden=7, layers=1, dropout=0.0)
    found = []
    for frames, value in ((23, 0.0), (40, 255.0)):
        model = make_model(config).train()
        logits = model.logits(pad(rows, frames, value), torch.tensor(LENGTHS))
        assert logits.visemes.shape == (sum(LENGTHS), 3)
        assert logits.units.shape == logits.ctc.shape == (4, frames, 5)
        valid = torch.arange(frames) < torch.tensor(LENGTHS)[:, None]
        (logits.units[valid].square().sum() + logits.ctc[valid].sum() + logits.visemes.square().sum()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)
        assert tensor is not None and tensor.abs().max() > 0, name


def test_stem_is_a_convolution_over_space_and_time() -> None:
    model, rows = make_model(), make_inputs()
    row = rows[2]
    seen = []
    model.stem[0].register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    model(row[None], torch.tensor([len(row)]))
    weight = model.stem[0].weight
    clip = ((row.double() - row.double().mean()) / row.double().std(correction=0)).view(1, 1, -1, 11, 11)
    expected = nn.functional.conv3d(clip, weight[:, None].double(), stride=(1, 2, 2), padding=2)[0].transpose(0, 1)
    torch.testing.assert_close(seen[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_light_does_not_matter_and_a_blank_clip_is_finite() -> None:
    model, (_, _, row, _) = make_model(), make_inputs()
    length = torch.tensor([len(row)])
    bright = 0.5 * row[None] + 40.0
    torch.testing.assert_close(model(bright, length), model(row[None], length), atol=1e-4, rtol=1e-4)
    assert model(torch.full_like(row[None], 128.0), length).isfinite().all()


def test_later_frames_matter_to_earlier_ones() -> None:
    model, (*_, row) = make_model(), make_inputs()
    other = row.clone()
    other[-1] = other[-1].flip(0)
    length = torch.tensor([len(row)])
    assert (model(other[None], length) - model(row[None], length))[0, 0].abs().max() > 0


def test_shrink_averages_around_the_middle() -> None:
    draw = torch.Generator().manual_seed(1)
    mouth = torch.randint(0, 256, (2, 96, 96), dtype=torch.uint8, generator=draw)
    assert shrink(mouth, 4).shape == (2, 24, 24) and shrink(mouth, 8).shape == (2, 11, 11)
    expected = mouth[1, 4:8, 8:12].double().mean()
    assert float(shrink(mouth, 4)[1, 1, 2]) == pytest.approx(float(expected))
    assert float(shrink(mouth, 8)[1, 0, 0]) == pytest.approx(float(mouth[1, 4:12, 4:12].double().mean()))


@pytest.mark.parametrize("size", [(88, 88), (96, 96), (97, 91), (120, 100)])
def test_prepare_takes_the_middle_88(size: tuple[int, int], tmp_path: Path) -> None:
    encoder = save_and_load(tmp_path)
    mouth = torch.zeros(3, *size, dtype=torch.uint8)
    top, left = (size[0] - 88) // 2, (size[1] - 88) // 2
    mouth[:, top : top + 88, left : left + 88] = 200
    prepared = encoder.prepare(Clip(None, mouth))
    assert prepared.shape == (3, 121) and prepared.dtype == torch.float32
    assert (prepared == 200).all()


@pytest.mark.parametrize("shape", [(3, 87, 96), (0, 96, 96), (96, 96), None])
def test_prepare_refuses(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    mouth = None if shape is None else torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(UserError, match="needs video" if shape is None else "at least 88 x 88"):
        save_and_load(tmp_path).prepare(Clip(torch.zeros(16000), mouth))


def test_encode_equals_forward(tmp_path: Path) -> None:
    encoder = save_and_load(tmp_path, batch=3)
    draw = torch.Generator().manual_seed(2)
    clips = [Clip(None, torch.randint(0, 256, (n, 96, 96), dtype=torch.uint8, generator=draw)) for n in (9, 2, 30, 5)]
    encoded = encoder.encode(clips)
    for clip, features in zip(clips, encoded, strict=True):
        inputs = encoder.prepare(clip)
        assert features.shape == (encoder.frames(0, len(inputs)), encoder.width)
        expected = encoder(inputs[None], torch.tensor([len(inputs)]))[0]
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
        assert not features.requires_grad


def test_encoder_is_frozen_and_says_what_it_is(tmp_path: Path) -> None:
    encoder = save_and_load(tmp_path)
    assert (encoder.frames_per_second, encoder.max_seconds, encoder.needs) == (25, float("inf"), {"video"})
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    other = make_model()
    nn.init.zeros_(other.project[1].bias)
    save_visual(other, tmp_path / "other")
    assert VisualEncoder(EncoderConfig(name=str(tmp_path / "other"))).identity != encoder.identity
    assert save_and_load(tmp_path).identity == encoder.identity


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    model, rows = make_model(), make_inputs()
    save_visual(model, tmp_path / "run")
    again = load_visual(tmp_path / "run")
    assert (again.config, again.visemes, again.units) == (model.config, model.visemes, model.units)
    assert not again.training
    saved, own = again.state_dict(), model.state_dict()
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
    lengths = torch.tensor(LENGTHS)  # sums may be grouped by where in memory the weights lie
    torch.testing.assert_close(again(pad(rows, 23), lengths), model(pad(rows, 23), lengths), rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"config\.json: not the config"):
        load_visual(folder)
    save_visual(make_model(), folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(content: object, message: str) -> None:
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_visual(folder)

    refused([], "expected the format")
    refused({**config, "format": "avsr-visual-0"}, "expected the format 'avsr-visual-1'")
    refused({**config, "model": {**config["model"], "depth": 3}}, "depth")
    refused({**config, "model": {**config["model"], "pool": 3}}, r"model\.pool: expected 1, 2, 4, 8 or 11, got 3")
    refused({**config, "units": config["units"][:-1]}, r"does not fit config\.json: ctc_head\.bias is \(5,\)")
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(str(folder / "model.safetensors"))
    del state["feature_mean"]
    save_file(state, str(folder / "model.safetensors"))
    with pytest.raises(UserError, match="feature_mean is missing"):
        load_visual(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable checkpoint"):
        VisualEncoder(EncoderConfig(name=str(folder)))


def test_a_hub_id_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.video\.encoder\.name: someone/some-model is not a folder"):
        VisualEncoder(EncoderConfig(name="someone/some-model"))


def save_and_load(folder: Path, batch: int = 16) -> VisualEncoder:
    save_visual(make_model(), folder / "visual")
    return VisualEncoder(EncoderConfig(name=str(folder / "visual"), batch=batch))
