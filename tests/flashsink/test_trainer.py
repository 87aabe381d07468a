"""The decorrelation loss and the log of sinks inside a Hugging Face Trainer, one process."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from pathlib import Path

import decoders
import oracle
import pytest
import torch
import trainers

import flashsink.hf
from flashsink.hf import trainer as trainer_module
from flashsink.hf import trainer_terms as terms

pytestmark = pytest.mark.integration

pytest.importorskip("transformers")

WEIGHT = trainers.WEIGHT


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """accelerate collects garbage at the start of every training, which takes half a second here."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


class Recorder:
    """A collator that remembers the batches it made."""

    def __init__(self, collate=trainers.pad):
        self.collate, self.batches = collate, []

    def __call__(self, examples):
        self.batches.append(self.collate(examples))
        return self.batches[-1]


def terms_of(model, batches, spans):
    """Both terms of a step over ``batches`` in float64, written out, with their graph: cross entropy over all labels,
    and the decorrelation loss over all counted tokens."""
    entropy, number, cosines, counted = [], [], 0.0, 0
    for batch in batches:
        out = model(**{**batch, "labels": None}, output_hidden_states=True, use_cache=False)
        target = batch["labels"][:, 1:].flatten()
        logits = out.logits[:, :-1].flatten(0, 1).double()
        entropy.append(torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum"))
        number.append(int((target != -100).sum()))
        starts = batch["attention_mask"].int().argmax(dim=1)
        own = spans(batch)
        count = int((own - 1).clamp(min=0).sum())
        cosines = cosines + count * oracle.decorrelation(out.hidden_states[1:-1], own, starts=starts)
        counted += count
    return sum(entropy) / sum(number), cosines / counted


def prompts(batch):
    """Tokens before the first label, row by row."""
    found = []
    for labels, mask in zip(batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True):
        valid = [label for label, kept in zip(labels, mask, strict=True) if kept]
        found.append(next((i for i, label in enumerate(valid) if label != -100), len(valid)))
    return torch.tensor(found)


def everything(batch):
    return batch["attention_mask"].sum(dim=1)


def half(batch):
    return (everything(batch) + 1) // 2


def close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name].double(), atol=atol, rtol=0, msg=name)


# ---- the spans


@pytest.mark.parametrize(
    ("labels", "mask", "expected"),
    [
        ([-100, -100, -100, 7, 7, 7], None, 3),
        ([-100, -100, 7, -100, 7, 7], None, 2),  # a later turn
        ([7, 7, 7, 7, 7, 7], None, 6),  # a loss over all tokens
        ([-100, 7, 7, 7, 7, 7], None, 6),  # and as packing collators write it
        ([-100] * 6, None, 6),
        ([-100, -100, -100, 7, -100, -100], [1, 1, 1, 1, 0, 0], 3),
        ([-100, -100, -100, -100, 7, 7], [0, 0, 1, 1, 1, 1], 2),
        ([-100, -100, -100, 7, 7, 7], [0, 0, 1, 1, 1, 1], 4),
        ([9, -100, -100, 7, 7, 7], [0, 1, 1, 1, 1, 1], 2),  # a label at padding is none
        ([-100] * 6, [0, 0, 1, 1, 1, 0], 3),
    ],
)
def test_the_prompt_ends_before_the_first_label(labels, mask, expected):
    batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "labels": torch.tensor([labels, [-100] * 5 + [1]])}
    if mask is not None:
        batch["attention_mask"] = torch.tensor([mask, [1] * 6])
    assert terms.span_lengths(batch, "prompt").tolist() == [expected, 5]
    assert terms.span_lengths(batch, "all").tolist() == [6 if mask is None else sum(mask), 6]


def test_packed_sequences_have_a_prompt_each():
    labels = [-100, -100, 3, -100, 5, 6, 7, -100, -100, -100, 8]
    positions = [0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2]
    batch = {
        "input_ids": torch.ones(1, 11),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
    assert terms.span_lengths(batch, "prompt").tolist() == [2, 4, 1, 2]
    assert terms.span_lengths(batch, "all").tolist() == [3, 4, 1, 3]
    assert terms.counted(torch.tensor([2, 4, 1, 0])) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 1, 6, 6)},
            r"attention_mask: expected a padding mask \(2, 6\), got \(2, 1, 6",
        ),
        ({"labels": torch.ones(2, 5)}, r"labels: expected \(2, 6\) as input_ids has, got \(2, 5\)"),
        ({"input_ids": None}, "batch: expected input_ids or inputs_embeds, got input_ids"),
    ],
)
def test_a_batch_without_known_sequences_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        terms.span_lengths({"input_ids": torch.ones(2, 6)} | change, "prompt")


@pytest.mark.parametrize("given", [[3, 2], torch.tensor([3.0, 2.0]), torch.tensor([3])])
def test_a_function_of_spans_gives_one_integer_a_sequence(given):
    with pytest.raises(ValueError, match=r"spans: expected a function that gives \(2,\) integers, got"):
        terms.span_lengths({"input_ids": torch.ones(2, 6)}, lambda batch: given)


# ---- the loss


@pytest.mark.parametrize(
    ("lora", "spans", "count", "side"),
    [
        (False, "prompt", prompts, "right"),
        (True, "prompt", prompts, "left"),
        (True, "all", everything, "right"),
        (False, half, half, "left"),
    ],
)
def test_two_steps_are_those_of_the_loss_written_out_in_float64(tmp_path, tiny, lora, spans, count, side):
    model = tiny("llama", lora=lora)
    plain = copy.deepcopy(model).double()
    collate = Recorder(lambda examples: trainers.pad(examples, side))
    trainer = trainers.make(
        tmp_path,
        model,
        collate=collate,
        sink={"spans": spans},
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    trainer.train()
    lines = trainers.logged(trainer, "loss", "lm_loss", "decorrelation_loss")
    for step, line in enumerate(lines):
        both = terms_of(plain, collate.batches[3 * step : 3 * step + 3], count)
        loss = both[0] + WEIGHT * both[1]
        assert line == pytest.approx((loss.item(), both[0].item(), both[1].item()), rel=1e-4)
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
    assert len(lines) == 2
    close(trainers.weights(model), trainers.weights(plain), 5e-6)


@pytest.mark.parametrize("kwargs", [True, False])
@pytest.mark.parametrize(("number", "whole", "part"), [(16, (8, 1), (2, 4)), (6, (4, 1), (2, 2))])
def test_accumulated_batches_give_one_batch(tmp_path, tiny, kwargs, number, whole, part):
    """A model that does not take ``num_items_in_batch`` has its own loss divided by the Trainer: that is the mean over
    the batch where all rows have as many labels. With six examples the second step has one micro-batch instead of two.
    """
    found = []
    for size, accumulated in (whole, part):
        model = tiny("llama")
        model.accepts_loss_kwargs = kwargs
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = trainers.make(tmp_path, model, dataset=trainers.rows(number, labels=4), **options)
        trainer.train()
        found.append((trainers.weights(model), trainers.logged(trainer, "loss", "lm_loss", "decorrelation_loss")))
    close(found[0][0], found[1][0], 1e-6)
    torch.testing.assert_close(*(torch.tensor(each[1]) for each in found), atol=1e-5, rtol=1e-5)


def test_a_weight_of_zero_is_the_stock_trainer(tmp_path, tiny):
    found = []
    for mixin in (True, False):
        model = tiny("llama")
        trainers.make(tmp_path, model, mixin=mixin, sink={"decorrelation_weight": 0.0}).train()
        found.append(trainers.weights(model))
    close(*found, 1e-6)


@pytest.mark.parametrize("options", [{"compute_loss_func": True}, {"label_smoothing_factor": 0.1}])
def test_whatever_loss_the_trainer_has_is_added_to(tmp_path, tiny, options):
    """The Trainer takes the labels out of the batch for these."""

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits[labels != -100].square().sum() / num_items_in_batch

    trainer = {"compute_loss_func": loss} if "compute_loss_func" in options else None
    options = {} if trainer else options
    lines = {}
    for mixin in (True, False):
        made = trainers.make(tmp_path, tiny("llama"), mixin=mixin, trainer=trainer, max_steps=1, **options)
        made.train()
        (lines[mixin],) = trainers.logged(made)
    assert lines[True]["lm_loss"] == pytest.approx(lines[False]["loss"], rel=1e-5)
    assert lines[True]["loss"] == pytest.approx(
        lines[False]["loss"] + WEIGHT * lines[True]["decorrelation_loss"], rel=1e-5
    )


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_checkpointing_and_bf16_train_the_same(tmp_path, tiny, options):
    found = []
    for given in ({}, options):
        model = tiny("llama")
        trainer = trainers.make(tmp_path, model, **given)
        trainer.train()
        found.append((trainers.weights(model), trainers.logged(trainer)))
    exact = "bf16" not in options
    if exact:
        close(found[0][0], found[1][0], 1e-6)
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "decorrelation_loss", "largest_activation"):
            assert other[name] == pytest.approx(one[name], rel=1e-5 if exact else 0.03)


# ---- the log


def flat(examples):
    """One packed row, with the boundaries that kernels for packed rows take."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)


@pytest.mark.parametrize("collate", [trainers.pad, flat])
def test_statistics_are_those_of_the_last_batch(tmp_path, tiny, collate):
    """Against eager attention and hidden states of every sequence alone, with a learning rate of 0."""
    model = tiny("llama", attn_implementation="eager")
    recorder = Recorder(collate)
    given = {"learning_rate": 0.0, "max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2}
    given |= {"per_device_train_batch_size": 2, "dataset": trainers.rows(shortest=12)}
    trainer = trainers.make(tmp_path, model, collate=recorder, **given)
    trainer.train()
    lines = trainers.logged(trainer)
    assert len(lines) == 2
    for line, batch in zip(lines, recorder.batches[3:8:4], strict=True):
        bos, others, tops = [], [], []
        for ids in sequences_of(batch):
            out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
            last = []  # the log's hidden states are the layers' outputs, the last one before the final norm
            hook = decoders.decoder(model).layers[-1].register_forward_hook(lambda *given, to=last: to.append(given[2]))
            model(torch.tensor([ids]))
            hook.remove()
            for s in range(len(ids) - 7):
                rates = [(p[0, :, s:, s].mean(dim=1) > 0.3).double().mean() for p in out.attentions]
                (others if s else bos).append((s, float(sum(rates)) / len(rates)))
            for layer, h in enumerate([*out.hidden_states[1:-1], *last]):
                place = int(h[0].abs().argmax())
                tops.append((float(h.detach().abs().max()), layer, place // decoders.HIDDEN, place % decoders.HIDDEN))
        value, *where = max(tops)
        assert line["largest_activation"] == pytest.approx(value, rel=1e-4)
        assert [line[f"largest_activation_{name}"] for name in ("layer", "token", "feature")] == where
        mean = [sum(rate for _, rate in kind) / len(kind) for kind in (bos, others)]
        assert [line["bos_sink_rate"], line["intermediate_sink_rate_mean"]] == pytest.approx(mean, abs=1e-6)
        assert line["intermediate_sink_rate_max"] == pytest.approx(max(rate for _, rate in others), abs=1e-6)


def sequences_of(batch):
    """The token ids of every sequence of a padded or packed batch."""
    if "attention_mask" in batch:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        return [[i for i, kept in zip(ids, mask, strict=True) if kept] for ids, mask in rows]
    bounds = batch["cu_seq_lens_q"].tolist()
    return [batch["input_ids"][0, a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def test_tokens_that_few_queries_see_are_not_logged(tmp_path, tiny):
    dataset = [{"input_ids": [1, 5, 6, 7, 8, 9, 10], "labels": [-100] * 3 + [7, 8, 9, 10]}] * 16
    trainer = trainers.make(tmp_path, tiny("llama"), dataset=dataset, max_steps=1)
    trainer.train()
    (line,) = trainers.logged(trainer)
    assert not [name for name in line if "sink_rate" in name] and line["largest_activation"] > 0


def test_what_is_not_recorded_is_not_logged(tmp_path, tiny, caplog):
    sink = {"attach_options": {"attention": False, "activations": False}}
    trainer = trainers.make(tmp_path, tiny("llama"), sink=sink)
    trainer.train()
    for line in trainers.logged(trainer):
        assert "decorrelation_loss" in line and not [n for n in line if "sink" in n or "largest" in n]
    assert "not logged: this probe was attached with attention=False" in caplog.text


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_norms_are_those_of_the_terms_and_change_nothing(tmp_path, tiny, lora, checkpointing):
    found = []
    for steps in (0, 2):
        model = tiny("llama", lora=lora)
        options = {"max_steps": 3, "gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
        options["per_device_train_batch_size"] = 2
        trainer = trainers.make(tmp_path, model, sink={"gradient_norm_steps": steps}, **options)
        trainer.train()
        found.append((trainers.weights(model), trainers.logged(trainer, "loss", "lm_loss", "decorrelation_loss")))
    assert found[0][1] == found[1][1]
    close(found[0][0], found[1][0], 0.0)
    lines = trainers.logged(trainer)
    assert [i for i, line in enumerate(lines) if "grad_norm_lm" in line] == [1]

    model = tiny("llama", lora=lora)
    plain, recorder = copy.deepcopy(model).double(), Recorder()
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_checkpointing": checkpointing}
    trainer = trainers.make(tmp_path, model, sink={"gradient_norm_steps": 1}, collate=recorder, **options)
    trainer.train()
    (line,) = trainers.logged(trainer)
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    lm, own = terms_of(plain, recorder.batches[:1], prompts)
    for name, term in (("lm", lm), ("decorrelation", WEIGHT * own)):
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        norm = torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()
        assert line[f"grad_norm_{name}"] == pytest.approx(float(norm), rel=1e-4)


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
