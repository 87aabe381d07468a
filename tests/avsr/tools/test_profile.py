"""avsr profile: FLOPs against torch's counter, intervals against a grid, and a whole profile of tiny parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from avsr.config import load_config
from avsr.data.batches import collate
from avsr.data.dataset import Reading, load_dataset
from avsr.models.build import build_model, build_store
from avsr.tools.estimate.flops import Rows, step_flops
from avsr.tools.estimate.memory import read_sizes
from avsr.tools.estimate.profiling import profile
from avsr.tools.estimate.trace import Trace, length_alone

pytestmark = pytest.mark.integration

Recipe = Callable[..., Path]


def test_model_flops_are_those_that_torch_counts(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """One utterance, so that nothing is padded. Eager attention computes both halves of its square, and the first
    matrix of a projector has no gradient to hand on."""
    config = load_config(str(tiny_recipe(tmp_path)), ["model.llm.attention=eager"])
    cpu = torch.device("cpu")
    store = build_store(config, cpu)
    model, loaded = build_model(config, store, cpu)
    data = load_dataset(config.data.train, config.data, store, loaded.tokenize, title="x", reading=Reading("audio"))
    batch = collate([data[0]])
    with FlopCounterMode(display=False) as counter:
        model.train()(batch).cross_entropy.backward()
    span, size = model.prompt_lengths(batch)[0], model.decoder.config.hidden_size
    tokens, speech = span + len(batch.text[0]), span - model.layout.prompt_length("audio", {"audio": 0})
    projectors = sum(parameter.numel() for parameter in model.projectors.parameters())
    sizes = read_sizes(model.decoder.config, model.llm, config.model.lora, projectors, 0)
    expected = step_flops(sizes, Rows([tokens], speech, batch.label_tokens))
    expected += 12 * model.decoder.config.num_hidden_layers * size * tokens**2 / 2
    expected -= 2 * speech * model.projectors["audio"][0].weight.numel()
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


PIECES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)).map(lambda p: (p[0], p[0] + p[1])), max_size=8)


@settings(deadline=None)
@given(PIECES, PIECES)
def test_intervals_are_those_of_a_grid(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    def cells(intervals: list[tuple[int, int]]) -> set[int]:
        return {cell for start, end in intervals for cell in range(start, end)}

    assert length_alone(one, other) == len(cells(one) - cells(other))


def made_up(path: Path, device: int) -> Trace:
    def span(name: str, start: float, end: float, kind: str) -> dict[str, object]:
        return {"ph": "X", "name": name, "cat": kind, "ts": start, "dur": end - start}

    def bytes_(time: float, count: int, device: int) -> dict[str, object]:
        return {"ph": "i", "name": "[memory]", "ts": time, "args": {"Bytes": count, "Device Type": device}}

    events = [
        span("avsr/forward", 0, 50, "user_annotation"),
        span("aten::mm", 10, 30, "cpu_op"),
        span("gloo:all_reduce", 20, 45, "cpu_op"),
        bytes_(5, 100, 0),
        bytes_(12, 900, 0),
        bytes_(20, -900, 0),
        bytes_(25, 7, 1),
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    return Trace(path, device)


def test_a_trace_gives_peaks_and_communication_that_nothing_hides(tmp_path: Path) -> None:
    trace = made_up(tmp_path / "trace.json", 0)
    (forward,) = trace.ranges("avsr/forward")
    assert trace.peak(forward) == 1000 and trace.held(50) == 100 and trace.held(15) == 1000
    assert trace.exposed_communication(forward) == pytest.approx(15 / 50)
    assert made_up(tmp_path / "other.json", 1).peak(forward) == 7


def test_a_profile_says_where_time_and_memory_go(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path, **{"loss.decorrelation": 1.0, "training.accumulation": 2, "training.utterances": 2})
    result = profile(load_config(str(recipe)), 3)
    shown = capsys.readouterr().out
    folder = tmp_path / "run-profile"
    assert json.loads((folder / "profile.json").read_text()) == result
    assert "traceEvents" in json.loads((folder / "trace.json").read_text())
    for key in ("tokens a second", "audio hours an hour", "MFU", "data-wait share", "memory, MB"):
        assert key in shown
    memory = result["memory, MB"]
    assert memory["frozen weights"] > memory["optimizer"] > memory["trained weights"] > 0
    assert 0 < memory["of it: logits"] < memory["head or layer"] < 50  # DeepSpeed's own buckets would be 2 GB
    assert memory["activations"] > memory["of it: logits"]
    stages = result["data, ms a clip"]
    assert stages.keys() >= {"row", "cache", "tokens", "collate"} and all(0 < spent < 1000 for spent in stages.values())
    assert 0 <= result["exposed communication share"] < 1 and 0 < result["data-wait share"] < 1
    assert len(result["stages, ms"]) == 4 and min(result["stages, ms"].values()) > 0
    assert result["largest training.frames"] > 1e5 and result["training.frames"] == 120
    assert not (tmp_path / "run").exists()
    profile(load_config(str(recipe)), 1)  # in place of the first


def test_a_profile_does_not_replace_what_is_none(
    tiny_recipe: Recipe, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "run-profile").mkdir()
    (tmp_path / "run-profile" / "precious").touch()
    message = refuse("profile", tiny_recipe(tmp_path))
    assert "run-profile exists and is not a profile" in message


def test_a_profile_of_no_step_is_refused(tiny_recipe: Recipe, tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "--steps: expected at least 1, got 0" in refuse("profile", tiny_recipe(tmp_path), "--steps", "0")
