"""Two ranks train as one process, with DDP and with DeepSpeed's ZeRO, on gloo; no op of DeepSpeed is compiled."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]

HERE = Path(__file__).parent
SCRIPT = """
    import contextlib, json, os, sys
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    folder, jobs = sys.argv[1], json.loads(sys.argv[2])
    if any("deepspeed" in job["options"] for job in jobs):
        import deepspeed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled otherwise
    import decoders, trainers

    for name, job in ((job.pop("name"), job) for job in jobs):
        model = decoders.build("llama", lora=job["lora"])
        model.accepts_loss_kwargs = job.get("kwargs", True)
        dataset = trainers.rows(16, labels=job.get("labels"))
        trainer = trainers.make(folder + "/" + name, model, dataset=dataset, sink=job["sink"], **job["options"])
        trainer.train()
        assert model.config._attn_implementation == "sdpa"
        whole = contextlib.nullcontext()
        if job["options"].get("deepspeed", {}).get("zero_optimization", {}).get("stage") == 3:
            assert any(parameter.numel() == 0 for parameter in model.parameters())
            whole = deepspeed.zero.GatheredParameters(list(model.parameters()))
        with whole:
            kept = {key: value.contiguous() for key, value in trainers.weights(model).items()}
        if os.environ.get("RANK", "0") == "0":
            save_file(kept, f"{folder}/{name}.safetensors")
            with open(f"{folder}/{name}.json", "w") as file:
                json.dump(trainers.logged(trainer), file)
"""


def ranks(folder, number, jobs):
    """Runs the jobs one after another in ``number`` processes; {name: (weights, log lines)}."""
    script = folder / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    roots = [str(HERE), str(HERE.parents[1] / "kernels")]
    environment["PYTHONPATH"] = os.pathsep.join(roots + [environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), str(folder), json.dumps(jobs)]
    processes = []
    for rank in range(number):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)} if number > 1 else {}
        out = (folder / f"rank{rank}.txt").open("w")
        processes.append(
            subprocess.Popen(
                command, env=environment | own, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = [(folder / f"rank{rank}.txt").read_text()[-3000:] for rank in range(number)]
    assert codes == [0] * number, "\n".join(said)
    return {
        job["name"]: (
            load_file(folder / f"{job['name']}.safetensors"),
            json.loads((folder / f"{job['name']}.json").read_text()),
        )
        for job in jobs
    }


def job(name, lora, options=None, sink=None, **more):
    """Steps of eight rows in two micro-batches, of this many rows in a process."""
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **(options or {})}
    return {"name": name, "lora": lora, "options": given, "sink": {"decorrelation_weight": 5.0, **(sink or {})}, **more}


def zero(stage):
    settings = {"stage": stage, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    if stage == 3:
        settings["stage3_param_persistence_threshold"] = 0
    batch = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    rest = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    return {**batch, "zero_optimization": settings, **rest}


NORMS = {"gradient_norm_steps": 1}
JOBS = [
    job("whole", False, sink=NORMS),
    job("lora", True, {"gradient_checkpointing": True}, sink={"spans": "all", **NORMS}),
    job("own_means", False, kwargs=False, labels=4),
    job("rank_means", True, {"average_tokens_across_devices": False}, labels=4),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("one"), 1, JOBS)


def agree(found, expected, gradient_norms=False):
    weights, lines = found
    assert weights.keys() == expected[0].keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[0][name], atol=2e-6, rtol=0, msg=name)
    assert len(lines) == len(expected[1]) == 2
    names = ["loss", "lm_loss", "decorrelation_loss", "largest_activation", "largest_activation_layer"]
    names += ["largest_activation_token", "largest_activation_feature", "bos_sink_rate", "intermediate_sink_rate_mean"]
    names += ["intermediate_sink_rate_max", *(["grad_norm_lm", "grad_norm_decorrelation"] if gradient_norms else [])]
    for line, other in zip(lines, expected[1], strict=True):
        for name in names:
            assert line[name] == pytest.approx(other[name], rel=2e-5, abs=1e-6), name


def test_two_ranks_of_ddp_train_as_one_process(one, tmp_path):
    """With unequal numbers of labels and prompt tokens; where the Trainer's own loss is a mean of means, with as many
    labels in every row. The second micro-batches of both ranks are that of one process, hence the same statistics."""
    half = [{**given, "options": {**given["options"], "per_device_train_batch_size": 2}} for given in JOBS]
    found = ranks(tmp_path, 2, half)
    for given in JOBS:
        agree(found[given["name"]], one[given["name"]], "gradient_norm_steps" in given["sink"])


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_zero_train_as_one_process(one, tmp_path, stage):
    pytest.importorskip("deepspeed")
    jobs = [
        {**given, "options": {**given["options"], "per_device_train_batch_size": 2, "deepspeed": zero(stage)}}
        for given in JOBS[:2]
    ]
    for given in jobs:
        given["sink"] = {**given["sink"], "gradient_norm_steps": 0}
    for name, result in ranks(tmp_path, 2, jobs).items():
        agree(result, one[name])
