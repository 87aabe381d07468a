"""Sections and figures of made-up analyses: many groups, and what there is to say where something is missing."""

from __future__ import annotations

from typing import Any

from avsr.tools.analysis import figures, mechanism, sections
from avsr.tools.analysis.plots import training_curves

Run = tuple[str, dict[str, Any]]
MANY = ["BOS", "<audio>", "</audio>", "<video>", "</video>", *(f"prompt {i}" for i in range(9)), "speech", "text"]


def many(name: str) -> Run:
    groups = {group: {"mass": [1 / len(MANY)] * 3, "sink_rate": [0.1] * 3} for group in MANY}
    return name, {"layers": 3, "shown": MANY, "groups": groups}


def causes(**held: Any) -> Run:
    return "model", {"traced": 4, "turned": 2, "utterances": 9, **held}


def sets(**common: list[int]) -> dict[str, Any]:
    table = {"count": 3, "identical": 0, "cosine": 0.5, "p_value": 0.1}
    return {"layer": 3, "tokens": {name: {**table, "common": found} for name, found in common.items()}}


def test_more_groups_than_colours_are_all_drawn() -> None:
    for svg in (
        figures.mass([many("one")], MANY)[0],
        figures.layer_lines([many("one")], "sink_rate", MANY, "rate")[0],
        figures.lines_by_layer([many("one")], "sink_rate", MANY, "rate"),
    ):
        for group in MANY:
            assert f">{group.replace('<', '&lt;').replace('>', '&gt;')}<" in svg, group


def test_more_runs_than_colours_are_all_drawn() -> None:
    (svg,) = training_curves([(f"run {i}", [{"step": 1, "ce": 2.0}]) for i in range(14)])
    assert ">run 13<" in svg


def test_ordinary_tokens_are_drawn_behind_many_sinks() -> None:
    table = {"activation": [1.0, 2.0], "sink_rate": [0.0, 1.0]}
    causal = {"fractions": [0, 1], "sinks": {f"prompt {i}": table for i in range(13)}, "normal": table}
    for svg in mechanism.turning(causes(causal=causal)):
        assert "ordinary, towards BOS" in svg


def test_what_the_embedding_makes_is_said_to_be_left_out() -> None:
    causal = {"fractions": [0, 1], "sinks": {"BOS": None, "<audio>": None}, "normal": None}
    shown = sections._causal([causes(causal=causal)])
    assert "Not turned, as the embedding makes it: BOS, &lt;audio&gt;." in shown and "<table" not in shown
    assert "model: 2 of 9 rows, at even distances in the order of length." in shown
    assert mechanism.turning(causes(causal=causal)) == []


def test_why_there_is_no_origin() -> None:
    run = causes(untraced="GraniteModel: layer 1 does not add")
    for build in (sections._origin, sections._causal):
        assert build([run]) == "<p>model: left out. GraniteModel: layer 1 does not add.</p>"


def test_sinks_without_massive_features_are_counted_apart() -> None:
    found = sets(BOS=[7], a=[7], b=[], c=[])
    shown = sections._features([causes(features={**found, "same": False, "same_massive": True})])
    assert "4 of 9 rows" in shown and "all have BOS' set" in shown and "2 of 3 kinds" in shown
    shown = sections._features([causes(features={**found, "same": False, "same_massive": None})])
    assert "there are none" in shown
    shown = sections._features([causes(features={**sets(BOS=[7]), "same": None, "same_massive": None})])
    assert "nothing stands out beside BOS" in shown
