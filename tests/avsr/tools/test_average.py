"""Kept checkpoints and their mean."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file, save_file

from avsr.cli import main
from avsr.config import load_config, read_run_config, to_yaml
from avsr.errors import UserError
from avsr.models.build import load_run
from avsr.models.weights import WEIGHTS, find_checkpoint, step_checkpoints
from avsr.tools.average import average
from avsr.training.resume import prepare_run
from avsr.training.run import train

pytestmark = pytest.mark.integration

Refuse = Callable[..., str]


@pytest.fixture
def kept(run_folder: Path) -> Path:
    """A run with three kept checkpoints of random weights."""
    best = run_folder / "checkpoints" / "best"
    for step in (8, 90, 1_000_000):
        folder = run_folder / "checkpoints" / f"step-{step:06d}"
        shutil.copytree(best, folder)
        generator = torch.Generator().manual_seed(step)
        state = load_file(str(best / WEIGHTS))
        save_file({k: torch.randn(v.shape, generator=generator) for k, v in state.items()}, str(folder / WEIGHTS))
    return run_folder


def test_training_keeps_the_newest_and_their_mean_can_be_evaluated(
    tiny_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"training.keep_last": 2, "training.steps": 6, "training.learning_rate": 0.05}
    run = train(load_config(str(tiny_recipe(tmp_path, **settings))))
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"best", "last", "previous", "step-000004", "step-000006"}
    newest = run / "checkpoints" / "step-000006"
    assert {path.name for path in newest.iterdir()} == {WEIGHTS, "config.yaml", "state.json", "SHA256SUMS"}
    assert json.loads((newest / "state.json").read_text())["step"] == 6
    last = load_file(str(run / "checkpoints" / "last" / WEIGHTS))
    assert all(torch.equal(last[name], tensor) for name, tensor in load_file(str(newest / WEIGHTS)).items())

    capsys.readouterr()
    main(["average", str(run)])
    assert capsys.readouterr().out.strip() == str(run / "checkpoints" / "average")
    for which in ("average", "step-000004"):
        main(["evaluate", str(run), "--checkpoint", which, "data.limit=1"])
        assert "sentences: WER" in capsys.readouterr().out
    _, model, _ = load_run(run, [], torch.device("cpu"), "average")
    own = model.own_state()
    for name, parameter in load_file(str(run / "checkpoints" / "average" / WEIGHTS)).items():
        assert torch.equal(own[name], parameter)

    # a resumed training may keep another number
    prepare_run(load_config(str(tmp_path / "recipe.yaml"), ["resume=true", "training.keep_last=1"]), 1)


def test_the_mean(kept: Path) -> None:
    every = [8, 90, 1_000_000]
    for last, steps in ((0, every), (2, every[1:]), (3, every)):  # each replaces the one before
        folder = average(kept, last)
        found = safetensors.numpy.load_file(str(folder / WEIGHTS))
        parts = [safetensors.numpy.load_file(str(kept / "checkpoints" / f"step-{s:06d}" / WEIGHTS)) for s in steps]
        assert found.keys() == parts[0].keys()
        for name, tensor in found.items():
            assert tensor.dtype == np.float32
            expected = np.mean([part[name].astype(np.float64) for part in parts], axis=0)
            np.testing.assert_allclose(tensor, expected, rtol=1e-6, atol=1e-7)
        assert json.loads((folder / "state.json").read_text()) == {"step": 1_000_000, "averaged": steps}
        assert read_run_config(folder).model == read_run_config(kept).model
    assert not list((kept / "checkpoints").glob("*.part"))


def test_too_few(refuse: Refuse, kept: Path, run_folder: Path) -> None:
    assert "--last" in refuse("average", kept, "--last", 1)
    assert "--last" in refuse("average", kept, "--last", -2)
    message = refuse("average", kept, "--last", 4)
    assert "has 3" in message and "at least 4" in message and "training.keep_last" in message
    for step in ("000008", "000090"):
        shutil.rmtree(kept / "checkpoints" / f"step-{step}")
    assert "has 1" in refuse("average", kept) and not (kept / "checkpoints" / "average").exists()
    assert "is not a run" in refuse("average", kept / "nosuch")


def test_checkpoints_that_do_not_belong_together(refuse: Refuse, kept: Path) -> None:
    folder = kept / "checkpoints" / "step-000090"
    state = load_file(str(folder / WEIGHTS))
    name = next(iter(sorted(state)))
    for changed, part in (
        ({**state, name: state[name][:-1].clone()}, str(tuple(state[name].shape))),
        ({key: value for key, value in state.items() if key != name}, "missing"),
        ({**state, "more": torch.zeros(1)}, "missing"),
    ):
        save_file(changed, str(folder / WEIGHTS))
        message = refuse("average", kept)
        assert "step-000090" in message and part in message
        assert ("more" if "more" in changed else name) in message
    save_file(state, str(folder / WEIGHTS))
    config = read_run_config(folder)
    config.model.audio.compression.rate = 5
    (folder / "config.yaml").write_text(to_yaml(config))
    message = refuse("average", kept)
    assert "model.audio.compression.rate: 5 != 4" in message and "step-000090" in message
    assert not (kept / "checkpoints" / "average").exists()
    assert "step-000090" not in refuse("average", kept, "--last", 5)


def test_a_damaged_checkpoint(refuse: Refuse, kept: Path) -> None:
    path = kept / "checkpoints" / "step-000008" / WEIGHTS
    path.write_bytes(path.read_bytes()[:50])
    assert str(path) in refuse("average", kept)


def test_an_unknown_checkpoint_lists_what_there_is(refuse: Refuse, kept: Path) -> None:
    (kept / "checkpoints" / "step-000008").rename(kept / "checkpoints" / "step-000008.part")
    message = refuse("evaluate", kept, "--checkpoint", "average")
    assert "'average'" in message and "best, last, step-000090, step-1000000" in message
    assert "step-000008" not in message
    assert "'x'" in refuse("evaluate", kept, "data.limit=1", "--checkpoint", "x", "decode.beams=2")
    assert "decode.beam" in refuse("evaluate", kept, "--checkpoint", "best", "decode.beam=2")
    for unknown in (["evaluate", kept, "--chekpoint", "best"], ["average", kept, "--last", 2, "data.limit=1"]):
        assert "unrecognized" in refuse(*unknown)
    for name in ("..", "../checkpoints/best", "", "."):
        with pytest.raises(UserError, match="there are: best"):
            find_checkpoint(kept, name)
    (kept / "checkpoints" / "best" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"best has no {WEIGHTS}: restore it"):
        find_checkpoint(kept, "best")
    shutil.rmtree(kept / "checkpoints" / "best")
    assert find_checkpoint(kept, "best").name == "last"
    shutil.rmtree(kept / "checkpoints")
    with pytest.raises(UserError, match="train it first"):
        find_checkpoint(kept, "best")


def test_the_oldest_first(kept: Path) -> None:
    (kept / "checkpoints" / "step-x").mkdir()
    shutil.copy(kept / "checkpoints" / "best" / WEIGHTS, kept / "checkpoints" / "step-x" / WEIGHTS)
    (kept / "checkpoints" / "step-000002").mkdir()  # without weights
    assert [path.name for path in step_checkpoints(kept)] == ["step-000008", "step-000090", "step-1000000"]


def test_a_step_without_weights_is_not_left_out_in_silence(refuse: Refuse, kept: Path) -> None:
    (kept / "checkpoints" / "step-000008" / WEIGHTS).unlink()
    assert f"step-000008 has no {WEIGHTS}" in refuse("average", kept)


def test_half_a_config_is_not_read(refuse: Refuse, kept: Path) -> None:
    path = kept / "config.yaml"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} ends within a line" in refuse("average", kept)
