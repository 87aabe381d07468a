"""The decorrelation loss and the log of sinks inside a Hugging Face Trainer, one process."""

from __future__ import annotations

import copy

import decoders
import pytest
import torch
import trainers
from trainers import Recorder, close, everything, flat, half, prompts, terms_of

from flashsink.hf import trainer_terms as terms

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_collection")]

pytest.importorskip("transformers")

WEIGHT = trainers.WEIGHT


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
