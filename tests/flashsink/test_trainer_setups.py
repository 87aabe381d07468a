"""The Hugging Face Trainer with flashsink in it: evaluation, resuming, and what it is combined with."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import decoders
import pytest
import torch
import trainers
from trainers import close, everything, flat, prompts, terms_of

import flashsink.hf
from flashsink.hf import trainer as trainer_module

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_collection")]

pytest.importorskip("transformers")

WEIGHT = trainers.WEIGHT


# ---- around the training


def test_evaluation_is_the_trainers_own_and_the_model_is_left_as_it_was(tmp_path, tiny):
    """Bit for bit, within a training and after it."""
    given = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3, "learning_rate": 0.0}
    found = []
    for mixin in (True, False):
        model = tiny("llama", lora=True)
        before = {name: module.__dict__.keys() for name, module in model.named_modules()}
        evaluated = {"eval_dataset": trainers.rows(5, seed=1)}
        trainer = trainers.make(tmp_path, model, mixin=mixin, trainer=evaluated, **given)
        trainer.train()
        assert model.config._attn_implementation == "sdpa"
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in decoders.decoder(model).layers)
        assert {name: module.__dict__.keys() for name, module in model.named_modules()} == before
        losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        found.append([*losses, trainer.evaluate()["eval_loss"], trainer.predict(trainers.rows(3)).metrics["test_loss"]])
        assert len(trainers.logged(trainer)) == 2
    assert found[0] == found[1] and len(found[0]) == 4
    assert all("largest_activation" in line for line in trainers.logged(trainer)) is mixin


def test_an_error_in_a_training_leaves_the_model_as_it_was(tmp_path, tiny):
    model, batches = tiny("llama"), []

    def collate(examples):
        batches.append(trainers.pad(examples))
        if len(batches) == 3:
            raise OSError("disk")
        return batches[-1]

    with pytest.raises(OSError, match="disk"):
        trainers.make(tmp_path, model, collate=collate, per_device_train_batch_size=2).train()
    assert model.config._attn_implementation == "sdpa"
    flashsink.attach(model).detach()


def test_a_second_training_goes_on(tmp_path, tiny):
    trainer = trainers.make(tmp_path, tiny("llama"), max_steps=1)
    trainer.train()
    first = trainers.logged(trainer)
    trainer.train()
    assert len(first) == len(trainers.logged(trainer)) == 1
    assert trainers.logged(trainer)[0]["lm_loss"] < first[0]["lm_loss"]


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
SAVING |= {"per_device_train_batch_size": 3, "lr_scheduler_type": "linear", "seed": 5}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, tiny, lora):
    found = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = tiny("llama", lora=lora)
        folder = tmp_path / ("again" if resume else "run")
        trainer = trainers.make(folder, model, sink={"gradient_norm_steps": 2}, **SAVING)
        trainer.train(resume_from_checkpoint=resume)
        found.append((trainers.weights(model), trainers.logged(trainer)))
    close(found[0][0], found[1][0], 0.0)
    assert found[0][1] == found[1][1] and len(found[0][1]) == 4


def test_a_checkpoint_holds_nothing_of_flashsink_and_loads_without_it(tmp_path, tiny):
    import transformers

    for mixin in (True, False):
        trainer = trainers.make(tmp_path / str(mixin), tiny("llama"), mixin=mixin, **SAVING)
        trainer.train()
    ours, stock = (tmp_path / str(mixin) / "checkpoint-4" for mixin in (True, False))
    assert files(ours) == files(stock)
    assert json.loads((ours / "config.json").read_text()) == json.loads((stock / "config.json").read_text())
    for path in ours.iterdir():
        assert b"flashsink" not in path.read_bytes() and b"sink_capture" not in path.read_bytes(), path
    loaded = transformers.AutoModelForCausalLM.from_pretrained(ours)
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.state_dict().keys() == transformers.AutoModelForCausalLM.from_pretrained(stock).state_dict().keys()
    plain = trainers.make(tmp_path / "on", loaded, mixin=False, **{**SAVING, "max_steps": 5})
    plain.train(resume_from_checkpoint=str(ours))
    assert plain.state.global_step == 5


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_model_is_loaded_at_the_end(tmp_path, tiny, lora):
    """Here the worst one, which is not the last."""
    model = tiny("llama", lora=lora)
    given = SAVING | {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    given |= {"metric_for_best_model": "loss", "greater_is_better": True}
    evaluated = {"eval_dataset": trainers.rows()}
    trainer = trainers.make(tmp_path, model, trainer=evaluated, **given)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(losses) == 4 and max(losses) > losses[-1] + 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-6)
    assert model.training is False and len(trainers.logged(trainer)) == 4


# ---- what it composes with


@pytest.mark.parametrize("spans", ["prompt", "all"])
def test_packed_rows_train_as_padded_ones(tmp_path, tiny, spans):
    found = []
    for collate in (trainers.pad, flat):
        model = tiny("llama")
        trainer = trainers.make(tmp_path, model, collate=collate, sink={"spans": spans})
        trainer.train()
        found.append((trainers.weights(model), trainers.logged(trainer, "loss", "lm_loss", "decorrelation_loss")))
    close(found[0][0], found[1][0], 2e-6)
    torch.testing.assert_close(*(torch.tensor(each[1]) for each in found), atol=1e-5, rtol=1e-5)


def test_a_loss_over_whole_packed_sequences_counts_all_their_tokens(tmp_path, tiny):
    """Their collator sets the label of every first token to -100."""
    dataset = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in trainers.rows(8)]
    found = []
    for spans in ("prompt", "all"):
        trainer = trainers.make(
            tmp_path, tiny("llama"), dataset=dataset, collate=flat, sink={"spans": spans}, max_steps=1
        )
        trainer.train()
        found += trainers.logged(trainer, "decorrelation_loss")
    assert found[0] == found[1] and found[0][0] > 0


@pytest.fixture
def tokenizer():
    """Of words "3", "4" and so on, with their numbers as ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(n): n for n in range(3, decoders.VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def words(ids):
    return " " + " ".join(map(str, ids))


@pytest.mark.integration
@pytest.mark.parametrize("prompted", [True, False])
def test_an_sft_trainer_packs_as_it_pads(tmp_path, tiny, tokenizer, prompted):
    """Prompts with a loss on their completions, or a loss over whole texts, against the loss in float64."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    examples = [(row["input_ids"][1:], max(2, row["labels"].count(-100) - 1)) for row in trainers.rows(8)]
    dataset = [{"prompt": words(ids[:n]), "completion": words(ids[n:])} for ids, n in examples]
    if not prompted:
        dataset = [{"text": words(ids)} for ids, _ in examples]
    found = []
    for packing in (False, True):
        model = tiny("llama", pad_token_id=0)
        plain = copy.deepcopy(model).double()
        options = {"packing": packing, "max_length": 64, "bf16": False, "gradient_checkpointing": False}
        given = {"model": model, "train_dataset": datasets.Dataset.from_list(dataset), "processing_class": tokenizer}
        bases = (flashsink.hf.SinkTrainerMixin, trl.SFTTrainer)
        args = trainers.arguments(tmp_path, trl.SFTConfig, eos_token="</s>", **options)
        trainer = type("MyTrainer", bases, {})(args=args, decorrelation_weight=WEIGHT, **given)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("attention_mask" in batch) is not packing
        trainer.train()
        names = ("loss", "lm_loss", "decorrelation_loss", "mean_token_accuracy", "num_tokens")
        found.append((trainers.weights(model), trainers.logged(trainer, *names)))
        if not packing:
            lm, own = terms_of(plain, [batch], prompts if prompted else everything)
            both = (lm.item(), own.item())
            assert trainers.logged(trainer, "lm_loss", "decorrelation_loss")[0] == pytest.approx(both, rel=1e-4)
    close(found[0][0], found[1][0], 1e-6)
    torch.testing.assert_close(*(torch.tensor(each[1]) for each in found), atol=1e-5, rtol=1e-5)


@pytest.mark.integration
def test_a_compiled_model_is_compiled_twice_for_twenty_lengths(tmp_path, tiny):
    """Once for the first length, once for all others."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    dataset = [
        {"input_ids": [1, *range(3, n)], "labels": [-100] * (n // 2) + list(range(n // 2 + 2, n))}
        for n in range(20, 40)
    ]
    found = []
    for compiled in (False, True):
        model = tiny("llama", num_hidden_layers=2)
        given = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        given |= {"per_device_train_batch_size": 1, "max_steps": 20, "logging_steps": 5, "learning_rate": 1e-3}
        trainer = trainers.make(tmp_path, model, dataset=dataset, **given)
        trainer.train()
        found.append((trainers.weights(model), trainers.logged(trainer, "loss", "decorrelation_loss", "bos_sink_rate")))
    close(found[0][0], found[1][0], 1e-5)
    torch.testing.assert_close(*(torch.tensor(each[1]) for each in found), atol=1e-4, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_evaluation_of_a_compiled_model_stays_attached_and_gives_the_same_loss(tmp_path, tiny, monkeypatch):
    attached = []
    real = trainer_module.attach
    monkeypatch.setattr(trainer_module, "attach", lambda *given, **more: attached.append(1) or real(*given, **more))
    given = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3, "learning_rate": 0.0}
    losses = []
    for compiles in (True, False):
        monkeypatch.setattr(trainer_module, "_compiles", lambda trainer, answer=compiles: answer)
        evaluated = {"eval_dataset": trainers.rows(5, seed=1)}
        trainer = trainers.make(tmp_path, tiny("llama"), trainer=evaluated, **given)
        trainer.train()
        losses += [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert len(attached) == 1 + 3 and losses == pytest.approx([losses[0]] * 6, rel=1e-5)


def test_norms_that_liger_patched_train_as_before(tmp_path, tiny):
    """Those that flashsink takes over: Liger's own kernels need a GPU."""
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    found = []
    for patched in (False, True):
        model = tiny("llama")
        decoder = decoders.decoder(model)
        for norm in [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]:
            if patched:
                monkey_patch._patch_rms_norm_module(norm)
        assert ("Liger" in repr(decoder.norm.forward)) is patched
        trainer = trainers.make(tmp_path, model)
        trainer.train()
        assert ("Liger" in repr(decoder.norm.forward)) is patched
        found.append((trainers.weights(model), trainers.logged(trainer, "loss", "decorrelation_loss")))
    close(found[0][0], found[1][0], 1e-6)


def test_a_model_with_accelerates_hooks_trains_the_same(tmp_path, tiny):
    """They move weights to where they are used, here from the CPU to the CPU. (What they offload is not trained.)"""
    from accelerate import dispatch_model

    found = []
    for hooked in (False, True):
        model = tiny("llama")
        if hooked:
            parts = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head")
            model = dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)
            assert hasattr(decoders.decoder(model).norm, "_hf_hook")
        trainer = trainers.make(tmp_path, model)
        trainer.train()
        found.append((trainers.weights(model), trainers.logged(trainer, "loss", "decorrelation_loss")))
    close(found[0][0], found[1][0], 1e-6)
