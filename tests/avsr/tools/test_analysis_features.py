"""Whether sinks share one set of massive features, on models in which they do and do not."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avsr.errors import UserError
from avsr.tools.analysis.features import feature_sets, overlap_p
from avsr.tools.analysis.tokens import look

planted: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted_sinks.py"))))


@pytest.mark.parametrize(
    ("total", "first", "second", "shared"),
    [(576, 1, 1, 1), (3072, 4, 4, 4), (3072, 4, 6, 2), (50, 10, 20, 5), (50, 10, 20, 0), (48, 0, 3, 0), (48, 3, 0, 0)],
)
def test_p_values_are_those_of_scipy(total: int, first: int, second: int, shared: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert overlap_p(total, first, second, shared) == pytest.approx(
        float(stats.hypergeom.sf(shared - 1, total, first, second)), rel=1e-9
    )


def test_sinks_with_the_feature_of_bos_are_the_same() -> None:
    got = feature_sets(planted.planted_subject(planted.planted_model()))
    assert (
        got["same"] is True
        and got["same_massive"] is True
        and got["bos"] == [planted.FEATURE]
        and got["hidden"] == planted.HIDDEN
    )
    assert planted.LAYER <= got["layer"] < planted.LAYERS
    assert set(got["tokens"]) == {"BOS", "<audio>"}
    audio = got["tokens"]["<audio>"]
    assert audio["count"] == audio["identical"] == 6 and audio["jaccard"] == 1.0
    assert audio["common"] == [planted.FEATURE] and audio["p_value"] == pytest.approx(1 / planted.HIDDEN)
    assert audio["features"][0]["count"] == 6 and audio["features"][0]["value"] > 1000
    assert audio["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert got["tokens"]["BOS"]["p_value"] is None


def test_a_token_with_another_feature_is_not_the_same() -> None:
    got = feature_sets(planted.planted_subject(planted.planted_model(stray=True), stray=True), layer=4)
    assert got["same"] is False and got["same_massive"] is False and got["layer"] == 4
    stray = got["tokens"][f"text w{planted.STRAY}"]
    assert stray["common"] == [planted.OTHER_FEATURE]
    assert (stray["count"], stray["identical"], stray["jaccard"], stray["p_value"]) == (6, 0, 0.0, 1.0)
    assert abs(stray["cosine"]) < 0.1


def test_the_threshold_is_that_of_the_tokens_own_row() -> None:
    subject = planted.planted_subject(planted.planted_model())
    seen = look(subject)
    seen[0].median[:, 1] = 1e3  # nothing in this row reaches a thousand times that
    audio = feature_sets(subject, seen, layer=4)["tokens"]["<audio>"]
    assert (audio["count"], audio["identical"], audio["features"][0]["count"]) == (6, 5, 5)
    assert audio["common"] == [planted.FEATURE]


@torch.no_grad()
def test_sets_are_those_of_the_hidden_states() -> None:
    """With a second unit on MARK the set has two features; counted by hand from transformers' states."""
    model = planted.planted_model()
    mlp = model.model.layers[planted.LAYER - 1].mlp
    mlp.down_proj.weight[30, planted.UNIT] = -7.0
    subject = planted.planted_subject(model)
    got = feature_sets(subject, layer=planted.LAYER)
    sets = []
    for rows in subject.batches():
        out = subject.decoder(
            inputs_embeds=rows.embeddings, attention_mask=rows.mask, use_cache=False, output_hidden_states=True
        )
        for b, length in enumerate(rows.mask.sum(dim=1).tolist()):
            h = out.hidden_states[planted.LAYER][b, :length].abs()
            sets.append(((h[1] >= 1000 * h.median()) & (h[1] > 100)).nonzero().flatten().tolist())
    assert sets == [[planted.FEATURE, 30]] * 6
    assert got["tokens"]["<audio>"]["common"] == got["bos"] == [planted.FEATURE, 30]
    values = {entry["feature"]: entry["value"] for entry in got["tokens"]["BOS"]["features"]}
    assert values[30] < -1000 and values[planted.FEATURE] > 1000


def test_a_sink_that_is_not_massive_is_not_the_same() -> None:
    """Before the planted layer nothing is massive: every set is empty, and empty sets share nothing."""
    got = feature_sets(planted.planted_subject(planted.planted_model()), layer=1)
    assert got["bos"] == [] and got["same"] is False and got["same_massive"] is None
    assert got["tokens"]["<audio>"]["identical"] == 0 and got["tokens"]["<audio>"]["jaccard"] == 0.0


def test_without_other_sinks_nothing_is_said() -> None:
    model = planted.planted_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[planted.AUDIO] = model.get_input_embeddings().weight[5]
    got = feature_sets(planted.planted_subject(model))
    assert (
        got["same"] is None
        and got["same_massive"] is None
        and list(got["tokens"]) == ["BOS"]
        and got["bos"] == [planted.FEATURE]
    )


@pytest.mark.parametrize("layer", [0, 7])
def test_a_layer_that_is_not_there(layer: int) -> None:
    subject = planted.planted_subject(planted.planted_model())
    hooks = planted.hooks_of(subject.lm)
    with pytest.raises(UserError, match=f"layer: expected 1 to 6, got {layer}"):
        feature_sets(subject, layer=layer)
    feature_sets(subject)
    assert planted.hooks_of(subject.lm) == hooks
