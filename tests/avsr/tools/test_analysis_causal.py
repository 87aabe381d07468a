"""Rotated states: on a planted model, where a token's direction alone makes it a sink, and against plain forwards."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from avsr.errors import UserError
from avsr.tools.analysis.causal import causal_test, rotate
from avsr.tools.analysis.features import feature_sets
from avsr.tools.analysis.origin import trace_origin
from avsr.tools.analysis.statistics import measure_tokens

planted: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("planted_sinks.py"))))
STRAY = f"text w{planted.STRAY}"


def angle_of(first: torch.Tensor, second: torch.Tensor) -> float:
    cosine = float(first.double() @ second.double() / first.double().norm() / second.double().norm())
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_rotation_keeps_the_norm_and_goes_a_part_of_the_angle(fraction: float) -> None:
    generator = torch.Generator().manual_seed(0)
    state, goal = (torch.randn(20, 7, generator=generator, dtype=torch.float64) * 50 for _ in range(2))
    got = rotate(state, goal, fraction)
    torch.testing.assert_close(got.norm(dim=1), state.norm(dim=1))
    for h, g, x in zip(state, goal, got, strict=True):
        whole = angle_of(h, g)
        assert angle_of(h, x) == pytest.approx(fraction * whole, abs=1e-5)
        assert angle_of(x, g) == pytest.approx((1 - fraction) * whole, abs=1e-5)
    assert fraction or torch.equal(got, state)


def test_a_rotation_with_nowhere_to_go() -> None:
    h = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    goal = torch.tensor([[6.0, 8.0], [0.0, 0.0], [1.0, 0.0], [-3.0, -4.0]])
    got = rotate(h, goal, 0.5)
    torch.testing.assert_close(got[:3], h[:3])
    assert torch.isfinite(got).all()


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return causal_test(planted.plant())


def test_nothing_rotated_is_the_untouched_model(result: dict[str, Any]) -> None:
    seen = measure_tokens(planted.plant())
    inner = slice(planted.LAYER - 1, planted.LAYERS - 1)
    for position, name in enumerate(("BOS", "<audio>")):
        table = result["sinks"][name]
        size = torch.cat([batch.max_abs[inner, :, position] for batch in seen], dim=1).double()
        median = torch.cat([batch.median[inner] for batch in seen], dim=1).double()
        rate = torch.cat([batch.sink_rate[inner, :, position] for batch in seen], dim=1).double()
        assert table["activation"][0] == pytest.approx(float(size.amax(dim=0).mean()), rel=1e-6)
        assert table["sink_rate"][0] == pytest.approx(float(rate.mean()), rel=1e-6)
        assert table["log10_ratio"][0] == pytest.approx(float((size / median).amax(dim=0).log10().mean()), rel=1e-6)
        assert table["cosine"][0] == pytest.approx(1.0, abs=1e-4)


def test_rotated_sinks_vanish_and_a_rotated_token_becomes_one(result: dict[str, Any]) -> None:
    assert result["fractions"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert set(result["sinks"]) == {"BOS", "<audio>"}
    for table in result["sinks"].values():
        assert (table["layer"], table["rows"]) == (planted.LAYER - 1, 6)
        assert table["activation_vanished"] is True and table["sink_vanished"] is True
        assert table["massive"] == [1.0, 1.0, 0.0, 0.0, 0.0]  # the goal shuts the gate beyond 45 degrees
        assert table["activation"][0] > 8000 and table["activation"][-1] < 20
        assert table["sink_rate"][0] > 0.6 and table["sink_rate"][-1] == 0.0
        assert table["cosine"][-1] < 0.1 and 80 < table["angle"] < 100
        assert table["received_by_others"][-1] > 0.6 > table["received_by_others"][0]
    normal = result["normal"]
    assert (normal["layer"], normal["rows"]) == (planted.LAYER - 1, 6)
    assert normal["activation_appeared"] is True and normal["sink_appeared"] is True
    assert normal["massive"] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert normal["cosine"][0] < 0.1 and normal["cosine"][-1] > 0.999


@torch.no_grad()
def test_a_whole_rotation_is_a_forward_with_another_embedding() -> None:
    """At layer 0 the embeddings are rotated: <audio> to its nearest token by hand, then transformers alone."""
    subject = planted.plant()
    table = causal_test(subject, layer=0)["sinks"]["<audio>"]
    sizes, angles, cosines = [], [], []
    for rows in subject.batches():
        embeddings = rows.embeddings.clone()
        for b, length in enumerate(rows.mask.sum(dim=1).tolist()):
            row = rows.embeddings[b, :length]
            goal = row[2 + int(torch.cosine_similarity(row[1:2], row[2:], dim=-1).argmax())]
            embeddings[b, 1] = goal / goal.norm() * row[1].norm()
            angles.append(angle_of(row[1], goal))
        bos, states = (
            planted.states_of(subject, rows)[1:-1, :, 0],
            planted.states_of(subject, rows, embeddings)[1:-1, :, 1],
        )
        sizes.append(states.abs().amax(dim=(0, 2)))
        cosines.append(torch.cosine_similarity(states, bos, dim=-1))
    assert table["layer"] == 0
    assert table["angle"] == pytest.approx(sum(angles) / len(angles), rel=1e-6)
    assert table["activation"][-1] == pytest.approx(float(torch.cat(sizes).mean()), rel=1e-5)
    assert table["cosine"][-1] == pytest.approx(float(torch.cat(cosines, dim=1).mean()), rel=1e-4)


def test_a_massive_token_that_is_no_sink_cannot_stop_being_one() -> None:
    stray = causal_test(planted.plant(stray=True))["sinks"][STRAY]
    assert stray["activation_vanished"] is True and stray["sink_vanished"] is None


def test_later_than_the_origin_the_activation_stays() -> None:
    """In layer 4's output the activation is there already. The rotation keeps a token's norm: BOS stays massive, in the
    direction of another, in which it is no sink; and no token gets the activation from BOS' direction."""
    got = causal_test(planted.plant(), layer=4)
    bos = got["sinks"]["BOS"]
    assert bos["layer"] == 4 and got["normal"]["layer"] == 4
    assert bos["massive"] == [1.0] * 5 and bos["activation_vanished"] is False and bos["sink_vanished"] is True
    assert got["normal"]["activation_appeared"] is False
    assert got["normal"]["activation"][-1] < 100


def test_layers_that_do_not_exist_and_a_model_of_one() -> None:
    subject = planted.plant()
    for test, layers, allowed in ((causal_test, (-1, 5), "0 to 4"), (feature_sets, (0, 7), "1 to 6")):
        for layer in layers:
            with pytest.raises(UserError, match=f"layer: expected {allowed}, got {layer}"):
                test(subject, layer=layer)
    del subject.decoder.layers[1:]
    with pytest.raises(UserError, match="at least 2 layers"):
        causal_test(subject)


def test_no_hook_stays_and_labels_without_an_origin_are_left_out(result: dict[str, Any]) -> None:
    subject = planted.plant()
    seen, attention = measure_tokens(subject), subject.lm.config._attn_implementation
    hooks = planted.hooks_of(subject.lm)
    origin = {"tokens": {"BOS": {"layer": planted.LAYER}}}

    def fail(*given: Any) -> None:
        raise RuntimeError("device lost")

    broken = subject.decoder.layers[-1].register_forward_hook(fail)
    for step in (trace_origin, feature_sets, lambda *given: causal_test(*given, origin)):
        with pytest.raises(RuntimeError, match="device lost"):
            step(subject, seen)
    with pytest.raises(RuntimeError, match="device lost"):
        measure_tokens(subject)
    broken.remove()
    got = causal_test(subject, seen, origin)
    assert planted.hooks_of(subject.lm) == hooks and subject.lm.config._attn_implementation == attention
    assert list(got["sinks"]) == ["BOS"] and got["sinks"]["BOS"] == result["sinks"]["BOS"]
    assert got["normal"] == result["normal"]
