"""Shares of attention between kinds of tokens at validation, against the stock decoder's weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avsr.config import load_config
from avsr.data.batches import Batch, collate
from avsr.data.dataset import Reading, load_dataset
from avsr.errors import UserError
from avsr.models.build import build_model, build_store
from avsr.models.prompt import KINDS
from avsr.models.speech_llm import SpeechLLM
from avsr.training.attention_shares import AttentionShares
from avsr.training.losses import attach
from avsr.training.metrics import read_metrics

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
KEYS = [f"validation_attention_{query}_to_{kind}" for query in ("prompt", "text") for kind in KINDS]


@pytest.fixture
def recipe(tiny_recipe: Callable[..., Path], make_corpus: Callable[..., Path], tmp_path: Path) -> Path:
    corpus = str(make_corpus(tmp_path / "uneven", seconds=[0.6, 2.4, 1.1, 2.9]))
    return tiny_recipe(
        tmp_path, **{"data.train": corpus, "data.validation": corpus, "log.attention": True, "training.frames": 300}
    )


def kind_of(name: str, place: int, prompt: range) -> str:
    if place == 0:
        return "bos"
    if place in prompt:
        return "prompt"
    if place >= prompt.stop:
        return "text"
    return "delimiters" if name.startswith("<") else "speech"


@torch.no_grad()
def wanted(model: SpeechLLM, batch: Batch) -> dict[str, float]:
    """From the weights of eager attention, query by query."""
    model.detach()
    rows = model.assemble(batch, with_text=True, names=True)
    model.decoder.set_attn_implementation("eager")
    maps = model.decoder.model(**rows.decoder_inputs(), output_attentions=True).attentions
    sums = {key: [] for key in [*KEYS, "validation_entropy_prompt", "validation_entropy_text"]}
    for b, names in enumerate(rows.names):
        length = rows.prompts[b]
        prompt = range(length - len(model.prompts["audio"]), length)
        kinds = [kind_of(name, place, prompt) for place, name in enumerate(names)]
        for a in maps:
            for head in a[b].double():
                for query, kind in enumerate(kinds):
                    if kind not in ("prompt", "text"):
                        continue
                    p = head[query, : len(kinds)]
                    sums[f"validation_entropy_{kind}"].append(float(torch.special.entr(p).sum()))
                    for to in KINDS:
                        share = sum(float(x) for x, other in zip(p, kinds, strict=True) if other == to)
                        sums[f"validation_attention_{kind}_to_{to}"].append(share)
    return {key: sum(values) / len(values) for key, values in sums.items()}


@pytest.mark.parametrize("packed", [False, True])
def test_shares_are_those_of_the_maps(recipe: Path, packed: bool) -> None:
    config = load_config(str(recipe), [f"training.packed={packed}"])
    store = build_store(config, CPU)
    model, loaded = build_model(config, store, CPU, training=True)
    data = load_dataset(config.data.train, config.data, store, loaded.tokenize, title="train", reading=Reading("audio"))
    attach(model, config)
    model.train()(collate([data[0]]))
    assert model.probe is not None and model.probe.sinks[0].segment_mass is None  # not in training
    model.eval()
    shares = AttentionShares(CPU)
    with torch.no_grad():
        for group in ([0, 1, 2], [3]):
            model(collate([data[i] for i in group]))
            shares.add(model.probe)
    found, want = shares.row(), wanted(model, collate([data[i] for i in range(4)]))
    assert found.keys() == want.keys()
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    for query in ("prompt", "text"):
        assert sum(found[f"validation_attention_{query}_to_{kind}"] for kind in KINDS) == pytest.approx(1.0)


def test_a_training_writes_them_at_every_validation(recipe: Path, run: Callable[..., Path]) -> None:
    plain = run(recipe, "log.attention=false", "training.validate_every=2", "training.steps=4")
    before = read_metrics(plain)
    found = read_metrics(run(recipe, f"run={plain}-shares", "training.validate_every=2", "training.steps=4"))
    assert [row["step"] for row in found if KEYS[0] in row] == [2, 4]
    assert not any(KEYS[0] in row for row in before)
    same = ("ce", "validation_ce", "grad_norm")
    assert [[row.get(key) for key in same] for row in found] == [[row.get(key) for key in same] for row in before]
    last = found[-1]
    assert sum(last[key] for key in KEYS) == pytest.approx(2.0) and last["validation_entropy_text"] > 0.0


def test_attention_of_others_is_refused(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"^log\.attention: needs model\.llm\.attention=flashsink"):
        load_config(str(recipe), ["model.llm.attention=sdpa"])
