"""Data, a collator and short trainings of tiny decoders by a Trainer with flashsink in it."""

from __future__ import annotations

import functools

import decoders
import oracle
import torch

WEIGHT = 5.0


def rows(number=16, labels=None, shortest=6, seed=0):
    """Examples of up to 20 tokens, BOS first; a prompt without labels, then the rest or ``labels`` tokens with them."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, size=(1,), generator=generator)
    examples = []
    for _ in range(number):
        length = int(draw(shortest, 21))
        prompt = length - labels if labels else int(draw(2, length))
        ids = [1, *torch.randint(3, decoders.VOCABULARY, (length - 1,), generator=generator).tolist()]
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


def pad(examples, side="right"):
    """The batch of ``examples``."""
    longest = max(len(example["input_ids"]) for example in examples)

    def column(values, filler):
        gap = [filler] * (longest - len(values))
        return values + gap if side == "right" else gap + values

    masks = [[1] * len(example["input_ids"]) for example in examples]
    return {
        "input_ids": torch.tensor([column(example["input_ids"], 0) for example in examples]),
        "labels": torch.tensor([column(example["labels"], -100) for example in examples]),
        "attention_mask": torch.tensor([column(mask, 0) for mask in masks]),
    }


def flat(examples):
    """One packed row, with the boundaries that kernels for packed rows take."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(examples)


def arguments(folder, kind=None, **options):
    """Two steps of plain SGD over eight examples, whose result is linear in the gradients; of TrainingArguments or
    another ``kind``."""
    from transformers import TrainingArguments

    given = {
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return (kind or TrainingArguments)(output_dir=str(folder), **(given | options))


def make(folder, model, *, base=None, mixin=True, dataset=None, collate=pad, sink=None, trainer=None, **options):
    """A Trainer, with arguments of the mixin in ``sink``, more of the Trainer in ``trainer`` and of its args."""
    from transformers import Trainer

    import flashsink.hf

    bases = (flashsink.hf.SinkTrainerMixin,) * mixin + (base or Trainer,)
    given = ({"decorrelation_weight": WEIGHT} | (sink or {})) if mixin else {}
    return type("MyTrainer", bases, {})(
        model=model,
        args=arguments(folder, **options),
        train_dataset=rows() if dataset is None else dataset,
        data_collator=collate,
        **given,
        **(trainer or {}),
    )


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def logged(trainer, *names):
    """The log lines of training steps, or of them the values of ``names``."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [tuple(line[name] for name in names) for line in lines] if names else lines


class Recorder:
    """A collator that remembers the batches it made."""

    def __init__(self, collate=pad):
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
