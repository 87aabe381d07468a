"""A projector taught where the words are, and trainings that begin with given weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avsr.config import Config, load_config
from avsr.data.dataset import Reading, load_dataset
from avsr.errors import UserError
from avsr.models.build import build_model, build_store
from avsr.models.compression import compress
from avsr.training.run import train
from avsr.training.warm_start import warm_projector

pytestmark = pytest.mark.integration
Recipe = Callable[..., Path]
CPU = torch.device("cpu")


def with_times(manifest: Path) -> None:
    """Gives every utterance its three words, a third of its length each."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        third, words = row["duration"] / 3, row["text"].split()
        row["times"] = f"{row['id']}.json"
        times = {"words": [(word, i * third, (i + 1) * third) for i, word in enumerate(words)]}
        (manifest.parent / row["times"]).write_text(json.dumps(times))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def config(tiny_recipe: Recipe, tmp_path: Path) -> Config:
    config = load_config(str(tiny_recipe(tmp_path)))
    with_times(Path(config.data.train))
    return config


def test_every_speech_token_points_to_its_word(config: Config, tmp_path: Path) -> None:
    path = warm_projector(config, tmp_path / "projector.safetensors", steps=300)
    store = build_store(config, CPU)
    model, loaded = build_model(config, store, CPU)
    table = model.decoder.get_input_embeddings().weight
    projector = model.projectors["audio"]
    projector.load_state_dict({k.removeprefix("projectors.audio."): v for k, v in load_file(path).items()})
    reading = Reading("audio")
    data = load_dataset(config.data.train, config.data, store, loaded.tokenize, title="", reading=reading)
    nearest = []
    for index, utterance in enumerate(data.utterances):
        tokens = projector(compress(data[index].features["audio"][None], "average", 4)[0])
        words = utterance.text.split()
        means = torch.stack([table[torch.tensor(loaded.tokenize(f" {word}"))].mean(0) for word in words])
        cosines = torch.cosine_similarity(tokens[:, None], means[None], dim=-1)
        for place, row in enumerate(cosines):
            middle = (place + 0.5) * 4 / 50 / utterance.duration * 3  # in thirds of the utterance
            if abs(middle - round(middle)) > 0.2:  # not at the edge between two words
                nearest.append(int(row.argmax()) == int(middle))
    assert len(nearest) > 20 and sum(nearest) / len(nearest) > 0.9


def test_a_training_begins_with_the_given_weights(config: Config, tmp_path: Path) -> None:
    path = warm_projector(config, tmp_path / "projector.safetensors", steps=5)
    stamp = path.stat().st_mtime_ns
    assert warm_projector(config, path, steps=5).stat().st_mtime_ns == stamp
    config.training.initial_weights = str(path)
    config.training.learning_rate = 1e-12
    run = train(config)
    trained = load_file(run / "checkpoints" / "last" / "model.safetensors")
    for name, tensor in load_file(path).items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-6)
    config.resume = True
    path.unlink()
    train(config)  # a resumed run has weights of its own


def test_weights_that_do_not_fit_are_named(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    config.training.initial_weights = str(path)
    with pytest.raises(UserError, match="initial_weights.*no readable safetensors"):
        train(config)
    for state, reason in (
        ({"projectors.audio.9.weight": torch.zeros(2)}, "projectors.audio.9.weight.*no such tensor"),
        ({"projectors.audio.0.weight": torch.zeros(2)}, r"projectors.audio.0.weight \(2,\).*shape \("),
    ):
        save_file(state, path)
        with pytest.raises(UserError, match=reason):
            train(config)


def test_what_cannot_be_taught_is_named(config: Config, tmp_path: Path, tiny_recipe: Recipe) -> None:
    out = tmp_path / "projector.safetensors"
    config.data.train = config.data.validation  # has no times
    with pytest.raises(UserError, match="has no word times"):
        warm_projector(config, out)
    config.data.cache = None
    with pytest.raises(UserError, match="data.cache"):
        warm_projector(config, out)
    config.model.task = "video"
    with pytest.raises(UserError, match="no projector for sound"):
        warm_projector(config, out)
    assert not out.exists()
