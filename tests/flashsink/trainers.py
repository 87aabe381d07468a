"""Data, a collator and short trainings of tiny decoders by a Trainer with flashsink in it."""

from __future__ import annotations

import functools

import decoders
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
