"""loss.anchor=base: the loss towards the states of BOS in the language model without adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import flashsink
from avsr.config import Config, load_config
from avsr.data.batches import Batch, collate
from avsr.data.dataset import Reading, SpeechDataset, load_dataset
from avsr.models.build import build_model, build_store
from avsr.models.speech_llm import SpeechLLM
from avsr.training.checkpoint import Progress
from avsr.training.engine import make_engine, start_distributed
from avsr.training.metrics import read_metrics
from avsr.training.run import attach
from avsr.training.trainer import Trainer

pytestmark = pytest.mark.integration
Recipe = Callable[..., Path]
CPU = torch.device("cpu")
LAMBDA, MARGIN = 3.0, 0.01


@pytest.fixture
def config(tiny_recipe: Recipe, tmp_path: Path) -> Config:
    settings = {"loss.decorrelation": LAMBDA, "loss.margin": MARGIN, "loss.anchor": "base", "training.clip": 1.0e9}
    rates = {"training.learning_rate": 0.02, "training.weight_decay": 0.0, "model.delimiters.train": True}
    return load_config(str(tiny_recipe(tmp_path, **settings, **rates)), [])


def built(config: Config) -> tuple[SpeechLLM, SpeechDataset]:
    """A model, with adapters that are not the identity, and its utterances."""
    store = build_store(config, CPU)
    model, loaded = build_model(config, store, CPU, training=True)
    data = load_dataset(config.data.train, config.data, store, loaded.tokenize, title="train", reading=Reading("audio"))
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model, data


def by_hand(model: SpeechLLM, batch: Batch, anchor: str) -> Tensor:
    """The loss out of the hidden states that transformers hands out of the model without a probe."""
    rows = model.assemble(batch, with_text=True)
    out = model.decoder.model(
        inputs_embeds=rows.embeddings, attention_mask=rows.mask, use_cache=False, output_hidden_states=True
    )
    states = torch.stack(out.hidden_states[1:-1])  # of the layers 1..L-1
    anchors = None
    if anchor == "base":
        anchors = flashsink.bos_states(model.llm, model.bos)[: len(states)]
        with torch.no_grad(), model.llm.disable_adapter():
            bos = torch.tensor([[model.bos]])
            base = model.decoder.model(input_ids=bos, use_cache=False, output_hidden_states=True).hidden_states
        torch.testing.assert_close(anchors, torch.stack(base[1:-1])[:, 0, 0])
    return flashsink.decorrelation_loss(states, rows.spans, margin=MARGIN, anchors=anchors, backend="reference")


def test_training_steps_follow_the_gradient_towards_the_base_model(config: Config) -> None:
    """The weights change from step to step, and with them BOS as trained, but not the anchor."""
    start_distributed()
    plain, data = built(config)
    trained, _ = built(config)
    attach(trained, config)
    loop = Trainer(make_engine(trained, config), config, data, data, Progress(step=1))
    own, other = trained.trainable(), plain.trainable()
    first = {name: parameter.detach().clone() for name, parameter in own.items()}
    for group in ((0, 1, 2), (3, 4), (5, 6, 7)):
        batch = collate([data[i] for i in group])
        with torch.no_grad():
            for name, parameter in own.items():
                other[name].copy_(parameter)
        plain.train()
        ce = plain(batch).cross_entropy / batch.label_tokens
        loss, as_trained = by_hand(plain, batch, "base"), by_hand(plain, batch, "bos")
        grads = torch.autograd.grad(ce + LAMBDA * loss, list(other.values()), allow_unused=True)
        norm = torch.stack([grad.norm() for grad in grads if grad is not None]).norm()
        trained.train()
        row = loop.row(loop.step(loop.data([batch])))
        assert row["decorrelation"] == pytest.approx(float(loss.detach()), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        assert abs(float(as_trained.detach()) - float(loss.detach())) > 1e-3 * float(loss.detach())
    assert all(not torch.equal(own[name], value) for name, value in first.items())


def test_a_resumed_run_is_the_uninterrupted_one(
    tiny_recipe: Recipe,
    run: Callable[..., Path],
    stop: Callable[..., int],
    identical: Callable[..., None],
    tmp_path: Path,
) -> None:
    settings = {"loss.decorrelation": LAMBDA, "training.steps": 5, "training.learning_rate": 0.02}
    recipe = tiny_recipe(tmp_path, **settings)
    one = run(recipe, f"run={tmp_path / 'one'}", "loss.anchor=base")
    stop(2, recipe, f"run={tmp_path / 'parts'}", "loss.anchor=base")
    identical(one, run(recipe, f"run={tmp_path / 'parts'}", "resume=true", "loss.anchor=base"))
    bos = read_metrics(run(recipe, f"run={tmp_path / 'bos'}"))
    assert bos[-1]["decorrelation"] != pytest.approx(read_metrics(one)[-1]["decorrelation"], rel=1e-3)
