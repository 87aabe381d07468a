"""Many processes under the deepspeed launcher give the numbers of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avsr.config import load_config
from avsr.models.avhubert_network import AVHubert, AVHubertConfig
from avsr.train import train
from avsr.training.metrics import read_metrics

LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
SETTINGS = {
    "training.utterances": 3,
    "training.gradient_norms_every": 1,
    "loss.decorrelation": 2.0,
    "training.clip": 1.0e9,
}


def launch(recipe: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    folder = Path(sys.executable).parent
    environment["PATH"] = f"{folder}{os.pathsep}{environment['PATH']}"
    port = str(20000 + os.getpid() % 20000)
    command = [str(folder / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port]
    command += ["--module", "avsr.train", str(recipe), *overrides]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_train_as_one_process_with_two_micro_batches(
    tiny_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Unlike numbers of labels and prompt tokens on both ranks: losses, gradient norms and weights agree."""
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    done = launch(recipe, f"run={tmp_path / 'two'}", "deepspeed.stage=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before = dict(os.environ)
    one = train(load_config(str(recipe), [f"run={tmp_path / 'one'}", "training.accumulation=2"]))
    os.environ.clear()
    os.environ.update(before)
    rows = zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True)
    for a, b in rows:
        for key in ("ce", "decorrelation", "grad_norm", "grad_norm_ce", "grad_norm_decorrelation", "tokens"):
            assert b[key] == pytest.approx(a[key], rel=1e-3), (a["step"], key)
        if a["step"] % 2 == 0:
            assert b["validation_ce"] == pytest.approx(a["validation_ce"], rel=1e-3)
    saved = [load_file(str(run / "checkpoints/last/model.safetensors")) for run in (one, tmp_path / "two")]
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_3_on_two_ranks_saves_whole_tensors(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{**SETTINGS, "training.gradient_norms_every": 0})
    done = launch(recipe, f"run={tmp_path / 'three'}", "deepspeed.stage=3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    done = launch(recipe, f"run={tmp_path / 'two'}", "deepspeed.stage=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    saved = [load_file(str(tmp_path / run / "checkpoints/last/model.safetensors")) for run in ("two", "three")]
    for name, tensor in saved[0].items():
        assert saved[1][name].shape == tensor.shape
    for a, b in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "three"), strict=True):
        assert b["ce"] == pytest.approx(a["ce"], rel=1e-3)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_whose_batches_lack_other_streams_train_together(
    av_recipe: Callable[..., Path], tmp_path: Path, stage: int
) -> None:
    """Modality dropout: one rank hears while the other sees, and the parts of each belong to both."""
    settings = {"training.utterances": 1, "training.tasks": {"audio": 1, "video": 1}, "training.clip": 1.0e9}
    recipe = av_recipe(tmp_path, "audiovisual", **settings, **{"model.video.encoder.lora": {"rank": 2}})
    done = launch(recipe, f"run={tmp_path / 'two'}", f"deepspeed.stage={stage}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before = dict(os.environ)
    one = train(load_config(str(recipe), [f"run={tmp_path / 'one'}", "training.accumulation=2"]))
    os.environ.clear()
    os.environ.update(before)
    for a, b in zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True):
        for key in ("ce", "grad_norm", "tokens"):
            assert b[key] == pytest.approx(a[key], rel=2e-3), (a["step"], key)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_zero_3_partitions_a_visual_front_end_that_works_in_chunks(
    av_recipe: Callable[..., Path], make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    """One rank has a clip of two chunks and the other of one. The front end has the official width: DeepSpeed
    leaves smaller weights whole on every rank."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = AVHubert(AVHubertConfig(width=64, ffn=96, layers=1, channels=64))
    save_file(network.state_dict(), str(tmp_path / "wide.safetensors"))
    recipe = av_recipe(
        tmp_path,
        "video",
        **{
            "model.video.encoder": {"name": str(tmp_path / "wide.safetensors"), "lora": {"rank": 2}},
            "data.train": str(make_corpus(tmp_path / "uneven", seconds=[11.2, 0.8], video="beside")),
            "data.validation": str(make_corpus(tmp_path / "short", 1, video="beside")),
            "training.utterances": 1,
            "training.frames": 400,
            "training.steps": 2,
            "training.clip": 1.0e9,
        },
    )
    done = launch(recipe, f"run={tmp_path / 'two'}", "deepspeed.stage=3")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    before = dict(os.environ)
    one = train(load_config(str(recipe), [f"run={tmp_path / 'one'}", "training.accumulation=2"]))
    os.environ.clear()
    os.environ.update(before)
    for a, b in zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True):
        for key in ("ce", "grad_norm", "tokens"):
            assert b[key] == pytest.approx(a[key], rel=2e-3), (a["step"], key)
    saved = [load_file(str(run / "checkpoints/last/model.safetensors")) for run in (one, tmp_path / "two")]
    assert any(name.startswith("encoders.video.") and tensor.any() for name, tensor in saved[0].items())
    for name, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][name], tensor, rtol=1e-2, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_a_refusal_ends_the_command_with_its_status(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Started threads of the process group must not abort the exit."""
    recipe = tiny_recipe(tmp_path, **{"data.train": str(tmp_path / "none.jsonl")})
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    command = [sys.executable, "-m", "avsr.cli", "train", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 2, done.stderr
    assert "none.jsonl" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bad_input_ends_every_rank_with_one_line(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    done = launch(recipe, f"run={tmp_path / 'bad'}", "training.utterances=64", "training.frames=100000")
    assert done.returncode != 0
    assert "one step of 2 ranks" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr.split("avsr:")[0]
