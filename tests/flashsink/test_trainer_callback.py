"""The callback that logs sinks, and what both it and the mixin refuse."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import trainers
from trainers import Recorder, close, everything, terms_of

import flashsink.hf
from flashsink.hf import trainer as trainer_module

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_collection")]

pytest.importorskip("transformers")


# ---- the callback


def callback_run(folder, model, reports=None, make=None, **options):
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if reports is not None:
                reports.append(dict(logs))

    trainer = trainers.make(folder, model, mixin=False, trainer={"callbacks": [Reporter()]}, **options)
    if make is not None:
        trainer.add_callback(make(trainer))
    trainer.train()
    return trainer


def test_the_callback_logs_and_changes_nothing(tmp_path, tiny):
    """Also to reporters that were there before it."""
    plain, watched, reports, recorder = tiny("llama", lora=True), tiny("llama", lora=True), [], Recorder()
    oracle_model = copy.deepcopy(plain).double()
    callback_run(tmp_path, plain, max_steps=3)
    options = {"max_steps": 3, "collate": recorder}
    trainer = callback_run(tmp_path, watched, reports, flashsink.hf.SinkCallback, **options)
    close(trainers.weights(plain), trainers.weights(watched), 1e-6)
    lines = trainers.logged(trainer)
    names = {"decorrelation_loss", "bos_sink_rate", "intermediate_sink_rate_max", "largest_activation_layer"}
    assert all(names <= line.keys() for line in [*lines, *reports[:3]]) and len(lines) == 3
    assert reports[0].items() <= lines[0].items()
    assert lines[0]["decorrelation_loss"] == pytest.approx(
        terms_of(oracle_model, recorder.batches[:1], everything)[1].item(), rel=1e-4
    )
    assert watched.config._attn_implementation == "sdpa"


def test_the_callback_reads_a_probe_that_is_there_already(tmp_path, tiny):
    model = tiny("llama")
    probe = flashsink.attach(model, decorrelation=False)
    trainer = callback_run(tmp_path, model, None, lambda trainer: flashsink.hf.SinkCallback(trainer, probe))
    for line in trainers.logged(trainer):
        assert "bos_sink_rate" in line and "decorrelation_loss" not in line
    assert model.config._attn_implementation != "sdpa"  # it is left attached
    probe.detach()
    with pytest.raises(ValueError, match="attach_options: expected none with a probe, got margin"):
        flashsink.hf.SinkCallback(trainer, probe, margin=0.5)


# ---- what is refused


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        ({"decorrelation_weight": -1.0}, "decorrelation_weight: expected a number of at least 0, got -1.0"),
        ({"decorrelation_weight": float("nan")}, "decorrelation_weight: expected a number of at least 0, got nan"),
        ({"decorrelation_weight": float("inf")}, "decorrelation_weight: expected a number of at least 0, got inf"),
        ({"spans": "audio"}, "spans: expected 'prompt', 'all' or a function of the batch, got 'audio'"),
        ({"spans": 12}, "spans: expected 'prompt', 'all' or a function of the batch, got 12"),
        ({"gradient_norm_steps": -1}, "gradient_norm_steps: expected at least 0, got -1"),
        ({"attach_options": {"decorrelation": False}}, "attach_options: expected decorrelation=True"),
    ],
)
def test_bad_arguments_are_named(tmp_path, tiny, sink, message):
    with pytest.raises(ValueError, match=message):
        trainers.make(tmp_path, tiny("llama"), sink=sink)


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        ({"decorrelation_margin": 2.0}, "margin: expected 0 <= margin < 1, got 2.0"),
        ({"attach_options": {"stats_every": 0}}, "stats_every: expected at least 1, got 0"),
        ({"spans": lambda batch: everything(batch) + 30}, "spans"),
    ],
)
def test_what_attach_and_its_forwards_refuse_is_refused_in_training(tmp_path, tiny, sink, message):
    model = tiny("llama")
    with pytest.raises(ValueError, match=message):
        trainers.make(tmp_path, model, sink=sink).train()
    assert model.config._attn_implementation == "sdpa"


def test_setups_that_split_sequences_or_models_are_refused(tmp_path, tiny, monkeypatch):
    import peft

    model = tiny("llama")
    trainer = trainers.make(tmp_path, model, mixin=False)
    for owner, name, kind in (
        (trainer.args, "_n_gpu", "nn.DataParallel"),
        (trainer, "is_fsdp_enabled", "FSDP"),
        (trainer.accelerator.state, "parallelism_config", "context parallelism"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, {"_n_gpu": 2, "is_fsdp_enabled": True}.get(name, Split()), raising=False)
            with pytest.raises(ValueError, match=f"args: expected one process per GPU.* got {kind}"):
                flashsink.hf.SinkCallback(trainer)
    with pytest.raises(ValueError, match="gradient_norm_steps: expected 0 with torch_compile, got 3"):
        trainers.make(tmp_path, model, sink={"gradient_norm_steps": 3}, torch_compile=True)
    trainer.gradient_norm_steps = 3
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    with pytest.raises(ValueError, match="gradient_norm_steps: expected 0 with DeepSpeed, got 3"):
        trainer_module._check_setup(trainer)
    prompted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(
        ValueError, match="model: expected PEFT without additional tokens, got prompt learning in adapter"
    ):
        trainers.make(tmp_path, prompted).train()


class Split:
    """accelerate's parallelism config with context parallelism."""

    tp_enabled = sp_enabled = False
    cp_enabled = True


@pytest.mark.integration
def test_names_are_imported_when_they_are_asked_for():
    from transformers import TrainerCallback

    code = "import sys, flashsink.hf; flashsink.hf.SinkTrainerMixin; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert issubclass(flashsink.hf.SinkCallback, TrainerCallback)
    assert flashsink.hf.SinkCallback is flashsink.hf.SinkCallback
    with pytest.raises(AttributeError, match="no attribute 'SinkTrainer'"):
        _ = flashsink.hf.SinkTrainer
