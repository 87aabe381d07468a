"""Many processes under the deepspeed launcher give the numbers of one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avsr.errors import EXIT_HUNG, EXIT_PREEMPTED, UserError
from avsr.models.avhubert_network import AVHubert, AVHubertConfig
from avsr.training.metrics import read_metrics
from avsr.training.trainer import Trainer

pytestmark = [pytest.mark.distributed, pytest.mark.integration, pytest.mark.timeout(900)]
Recipe = Callable[..., Path]
Run = Callable[..., Path]
Agree = Callable[..., float]
LAUNCHER = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
SETTINGS = {
    "training.utterances": 3,
    "training.gradient_norms_every": 1,
    "loss.decorrelation": 2.0,
    "training.clip": 1.0e9,
}


def environment() -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    found.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found['PATH']}"
    return found


def deepspeed(*arguments: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "deepspeed"), *arguments]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch(recipe: Path, *overrides: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    port = str(20000 + os.getpid() % 20000)
    where = ["--num_accelerators", str(ranks), "--master_port", port]
    return finish(deepspeed(*where, "--module", "avsr.train", str(recipe), *overrides))


CURVE = ("ce", "decorrelation", "grad_norm", "tokens", "validation_ce")


ACCUMULATED = "training.accumulation=2"
ONE = (ACCUMULATED, "deepspeed.stage=1")


@pytest.fixture(scope="module")
def two_batches(tiny_recipe: Recipe, run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and its training by one process with two micro-batches a step."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("one"), **SETTINGS, **{"model.delimiters.train": True})
    return recipe, run(recipe, *ONE)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_train_as_one_process_with_two_micro_batches(
    two_batches: tuple[Path, Path], run: Run, agree: Agree, tmp_path: Path, stage: int
) -> None:
    """Different numbers of labels and prompt tokens on the two ranks: losses, gradient norms and weights agree. Then
    one process continues from what two ranks saved half way."""
    recipe, one = two_batches
    folder, norms = f"run={tmp_path / 'two'}", f"training.gradient_norms_every={int(stage < 3)}"
    done = launch(recipe, folder, f"deepspeed.stage={stage}", norms)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    more = ("grad_norm_ce", "grad_norm_decorrelation") if stage < 3 else ()
    agree(one, tmp_path / "two", *CURVE, *more)
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "last")  # the one before is of step 2
    with pytest.raises(UserError, match=r"a step was 2 ranks x .* = 1.*training\.accumulation=2"):
        run(recipe, folder, norms, "resume=true", "deepspeed.stage=1")
    run(recipe, folder, norms, "resume=true", *ONE)
    agree(one, tmp_path / "two", *CURVE, *more)


@pytest.mark.slow
def test_constant_anchors_and_shares_of_attention_under_zero_3(
    tiny_recipe: Recipe, run: Run, agree: Agree, tmp_path: Path
) -> None:
    """The base model's states of BOS are computed while its weights are divided among the ranks, and the shares of
    their validations are added up."""
    recipe = tiny_recipe(tmp_path, **SETTINGS, **{"loss.anchor": "base", "log.attention": True})
    one = run(recipe, f"run={tmp_path / 'one'}", *ONE)
    done = launch(recipe, f"run={tmp_path / 'two'}", "deepspeed.stage=3", "training.gradient_norms_every=0")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shares = [f"validation_attention_text_to_{kind}" for kind in ("bos", "speech", "text")]
    agree(one, tmp_path / "two", *CURVE, *shares, "validation_entropy_text")
    assert any(shares[0] in row for row in read_metrics(one))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_rank_that_loses_its_clip_holds_up_nobody(
    tiny_recipe: Recipe, run: Run, agree: Agree, tmp_path: Path, stage: int
) -> None:
    """One utterance a rank and step. The clip disappears after everything has been read, and the step counts the other
    rank alone: losses, gradient norms and weights are those of one process that loses it too."""
    settings = {**SETTINGS, "training.utterances": 1, "training.gradient_norms_every": 0, "data.on_bad": "skip"}
    recipe = tiny_recipe(tmp_path, **settings, **{"data.cache": None, "training.steps": 4})
    clip = tmp_path / "corpus" / "train" / "u005.wav"
    content = clip.read_bytes()
    ranks = [finish(process) for process in hurt(tmp_path, f"lose {clip}", recipe, f"deepspeed.stage={stage}")]
    for done in ranks:
        assert done.returncode == 0, done.stderr[-2000:]
    assert not clip.exists() and sum(done.stderr.count("u005 is left out") for done in ranks) == 1
    rows = read_metrics(tmp_path / "run")
    assert [row["lost"] for row in rows if "lost" in row] == [1]  # four steps of two are all eight
    clip.write_bytes(content)
    real = Trainer.fit

    def fit(self: Trainer) -> None:
        clip.unlink()
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", fit)
        one = run(recipe, f"run={tmp_path / 'one'}", ACCUMULATED)
    agree(one, tmp_path / "run", *CURVE, "lost")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_on_every_number_of_ranks_gives_one_curve(
    tiny_recipe: Recipe,
    make_corpus: Callable[..., Path],
    run: Run,
    agree: Agree,
    tmp_path: Path,
    stage: int,
    ranks: int,
    checkpointing: bool,
    record_property: Callable[[str, object], None],
) -> None:
    """Four micro-batches a step, in turn or at once."""
    corpus = make_corpus(tmp_path / "many", seconds=[0.3 + 0.1 * (n % 7) for n in range(16)])
    settings = {"training.utterances": 1, "training.steps": 3, "loss.decorrelation": 2.0, "training.clip": 1.0e9}
    recipe = tiny_recipe(tmp_path, **settings, **{"data.train": str(corpus), "model.delimiters.train": True})
    one = run(recipe, f"run={tmp_path / 'one'}", "training.accumulation=4")
    options = [f"deepspeed.stage={stage}", f"training.accumulation={4 // ranks}"]
    options.append(f"training.gradient_checkpointing={str(checkpointing).lower()}")
    done = launch(recipe, f"run={tmp_path / 'many_ranks'}", *options, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record_property("largest relative difference", agree(one, tmp_path / "many_ranks", *CURVE))  # for --junitxml
    evaluate = [sys.executable, "-m", "avsr.cli", "evaluate"]
    scores = []
    for folder in (one, tmp_path / "many_ranks"):
        subprocess.run([*evaluate, str(folder)], check=True, env=environment(), capture_output=True, timeout=200)
        scores.append((folder / "hypotheses.jsonl").read_text())
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_two_nodes_meet_on_one_machine(tiny_recipe: Recipe, run: Run, agree: Agree, tmp_path: Path) -> None:
    """Two launchers, one rendezvous on loopback, as with deepspeed --hostfile --no_ssh on two machines."""
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    nodes = []
    for rank in range(2):
        where = ["--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--node_rank", str(rank)]
        where += ["--master_addr", "127.0.0.1", "--master_port", str(20000 + os.getpid() % 20000)]
        nodes.append(deepspeed(*where, "--module", "avsr.train", str(recipe), f"run={tmp_path / 'two'}"))
    for done in [finish(node) for node in nodes]:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    agree(run(recipe, f"run={tmp_path / 'one'}", ACCUMULATED), tmp_path / "two", *CURVE)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_whose_batches_lack_other_streams_train_together(
    av_recipe: Recipe, run: Run, tmp_path: Path, stage: int
) -> None:
    """Modality dropout: one rank hears while the other sees, and the parts of each belong to both."""
    settings = {"training.utterances": 1, "training.tasks": {"audio": 1, "video": 1}, "training.clip": 1.0e9}
    recipe = av_recipe(tmp_path, "audiovisual", **settings, **{"model.video.encoder.lora": {"rank": 2}})
    done = launch(recipe, f"run={tmp_path / 'two'}", f"deepspeed.stage={stage}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    one = run(recipe, f"run={tmp_path / 'one'}", ACCUMULATED)
    for a, b in zip(read_metrics(one), read_metrics(tmp_path / "two"), strict=True):
        for key in ("ce", "grad_norm", "tokens"):
            assert b[key] == pytest.approx(a[key], rel=2e-3), (a["step"], key)


@pytest.mark.slow
def test_zero_3_partitions_a_visual_front_end_that_works_in_chunks(
    av_recipe: Recipe,
    make_corpus: Callable[..., Path],
    run: Run,
    agree: Agree,
    weights: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
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
    one = run(recipe, f"run={tmp_path / 'one'}", ACCUMULATED)
    agree(one, tmp_path / "two", "ce", "grad_norm", "tokens", rel=2e-3)
    assert any(name.startswith("encoders.video.") and tensor.any() for name, tensor in weights(one).items())


HURT = """
    import math, os, sys, time
    from avsr import train
    from avsr.models.speech_llm import SpeechLLM
    from avsr.training.trainer import Trainer

    kind, second = sys.argv.pop(1), os.environ["RANK"] == "1"
    kind, _, clip = kind.partition(" ")
    real_step, real_forward, real_fit, calls = Trainer.step, SpeechLLM.forward, Trainer.fit, []

    def fit(self):
        if kind == "lose":
            import torch.distributed as dist
            if second:
                os.unlink(clip)
            dist.barrier()
        real_fit(self)

    def step(self, batches):
        if kind == "sleep" and second and self.progress.step == 3:
            time.sleep(600)
        if kind == "slow":
            print("in step", self.progress.step, flush=True)
            time.sleep(0.5)
        return real_step(self, batches)

    def forward(self, batch):
        terms = real_forward(self, batch)
        calls.append(self.training)
        spoilt = kind == "nan" and second and sum(calls) == 2 and self.training
        return terms._replace(cross_entropy=terms.cross_entropy * math.nan) if spoilt else terms

    Trainer.step, SpeechLLM.forward, Trainer.fit = step, forward, fit
    train.main()
"""


def hurt(tmp_path: Path, kind: str, recipe: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """Two ranks, started without a launcher, as SLURM does. What happens to them is up to ``kind``."""
    script = tmp_path / "hurt.py"
    script.write_text(textwrap.dedent(HURT))
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    return [
        subprocess.Popen(
            [sys.executable, str(script), kind, str(recipe), *overrides],
            env={**environment(), **where, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_one_rank_that_hangs_ends_both_and_is_named(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    ranks = [finish(process) for process in hurt(tmp_path, "sleep", recipe, "training.timeout=5")]
    assert [done.returncode for done in ranks] == [EXIT_HUNG, EXIT_HUNG], ranks[0].stderr[-2000:]
    said = ranks[0].stderr + ranks[1].stderr
    assert "rank 1 hangs in counts of step 3 for" in said
    assert "in step" in said and "rank 0 hangs" not in said  # where rank 1 hangs; rank 0 only waits for it


@pytest.mark.slow
def test_a_loss_of_one_rank_that_is_not_finite_skips_the_step_on_all(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{**SETTINGS, "deepspeed.stage": 2})
    for done in [finish(process) for process in hurt(tmp_path, "nan", recipe)]:
        assert done.returncode == 0, done.stderr[-2000:]
    rows = read_metrics(tmp_path / "run")
    assert [row.get("skipped", False) for row in rows] == [False, True, False, False]
    (entry,) = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
    assert [part["rank"] for part in entry["ranks"]] == [1] and len(entry["ranks"][0]["utterances"]) == 3


@pytest.mark.slow
def test_pre_emption_of_two_ranks_saves_and_the_next_start_goes_on(
    tiny_recipe: Recipe, run: Run, agree: Agree, tmp_path: Path
) -> None:
    """SIGTERM reaches the ranks at different times, here one of them alone."""
    recipe = tiny_recipe(tmp_path, **SETTINGS, **{"training.steps": 12, "training.validate_every": 100})
    ranks = hurt(tmp_path, "slow", recipe, "resume=true")
    assert ranks[1].stdout is not None
    while "in step 3" not in ranks[1].stdout.readline():
        assert ranks[1].poll() is None
    ranks[1].send_signal(signal.SIGTERM)
    assert [finish(process).returncode for process in ranks] == [EXIT_PREEMPTED, EXIT_PREEMPTED]
    reached = len(read_metrics(tmp_path / "run"))
    assert 3 <= reached < 12 and (tmp_path / "run/checkpoints/last/SHA256SUMS").is_file()
    for done in [finish(process) for process in hurt(tmp_path, "none", recipe, "resume=true")]:
        assert done.returncode == 0, done.stderr[-2000:]
    agree(run(recipe, f"run={tmp_path / 'one'}", ACCUMULATED), tmp_path / "run", *CURVE)


def test_a_refusal_ends_the_command_with_its_status(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Started threads of the process group must not abort the exit."""
    recipe = tiny_recipe(tmp_path, **{"data.train": str(tmp_path / "none.jsonl")})
    command = [sys.executable, "-m", "avsr.cli", "train", str(recipe)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 2, done.stderr
    assert "none.jsonl" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr


@pytest.mark.slow
def test_bad_input_ends_every_rank_with_one_line(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **SETTINGS)
    done = launch(recipe, f"run={tmp_path / 'bad'}", "training.utterances=64", "training.frames=100000")
    assert done.returncode != 0
    assert "one step of 2 ranks" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr.split("avsr:")[0]
