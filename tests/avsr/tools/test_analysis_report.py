"""The report: what its sections say of made-up analyses, the page of two runs, and how a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from avsr.cli import main
from avsr.config import load_config
from avsr.evaluation.run import evaluate
from avsr.tools.analysis import figures, sections
from avsr.tools.analysis.figures import Run
from avsr.tools.analysis.plots import training_curves
from avsr.tools.demo import summarise
from avsr.training.metrics import read_metrics
from avsr.training.run import train

pytestmark = pytest.mark.integration

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = ((390, 844), (1280, 900))
FIGURES = {  # section: figures of one run
    **{"sinks": 2, "where": 2, "heads": 2, "value": 3, "mass": 1},
    **{"massive": 2, "activations": 1, "cosine": 1, "maps": 6},
    **{"origin": 1, "features": 0, "causal": 2, "training": 1},  # two of training, for both runs
}
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
    for svg in figures.rotations(causes(causal=causal)):
        assert "ordinary, toward BOS" in svg


def test_what_the_embedding_makes_is_said_to_be_left_out() -> None:
    causal = {"fractions": [0, 1], "sinks": {"BOS": None, "<audio>": None}, "normal": None}
    shown = sections._causal([causes(causal=causal)])
    assert "Not rotated, as the embedding makes it: BOS, &lt;audio&gt;." in shown and "<table" not in shown
    assert "model: 2 of 9 rows, at even distances in the order of length." in shown
    assert figures.rotations(causes(causal=causal)) == []


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
    assert "nothing stands out but BOS" in shown


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value
            for key, value in attrs
            if key in ("src", "href", "xlink:href", "data") and value and not value.startswith(("#", "data:"))
        ]


def test_the_report_of_two_trained_runs_needs_no_other_file(
    tiny_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trained = train(load_config(str(tiny_recipe(tmp_path, **{"loss.decorrelation": 1.0}))))
    evaluate(trained, [])
    other = tmp_path / "other"
    other.mkdir()
    for path in ("config.yaml", "metrics.jsonl", "checkpoints"):
        (other / path).symlink_to(trained / path)
    capsys.readouterr()
    main(["analyze", str(trained), str(other), "--out", str(tmp_path / "report")])
    report = Path(capsys.readouterr().out.strip())
    text = report.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.links == [] and "script" not in page.tags and "@import" not in text
    assert page.tags.count("svg") >= 30
    assert "&lt;audio&gt;" in text and "prefers-color-scheme: dark" in text
    assert report.stat().st_size < 1_500_000
    assert "WER, sentences" in text and "worst utterances" in text
    held = json.loads((tmp_path / "report" / "analysis.json").read_text())
    assert set(held) == {"run", "other"}
    assert held["run"]["cos2"] == pytest.approx(held["other"]["cos2"])
    assert len(held["run"]["curve"]) == len(read_metrics(trained))
    held["other"]["scores"] = held["run"]["scores"]
    summary = summarise(1.5, {"off": held["run"], "on": held["other"]}, 60.0)
    numbers = {
        "wer_before",
        "cos2_off",
        "intermediate_activation_on",
        "intermediate_sink_rate_off",
        "lambda",
        "seconds",
    }
    numbers |= {"wer_off", "wer_on_unseen_voices", "seconds_per_step_off", "peak_memory_mb"}
    assert numbers <= {key for key, value in summary.items() if isinstance(value, float)}


def browse(page: Path, size: tuple[int, int], *options: str) -> str:
    """What Chromium prints, run over the page."""
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={size[0]},{size[1]}"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [BROWSER, *flags, profile, *options, page.as_uri()], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def massive_llm(tiny_llm: Path, tmp_path: Path) -> Path:
    """The tiny Llama with a unit in layer 1 that makes BOS massive, so that there is an origin to draw."""
    folder = tmp_path / "llm"
    shutil.copytree(tiny_llm, folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        table, layer = model.get_input_embeddings().weight, model.model.layers[0]
        table[:, 5] = 0.0
        table[1, 5] = 20.0
        layer.self_attn.o_proj.weight[5] = 0.0
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
            weight[3] = 0.0
            weight[3, 5] = 5.0
        layer.mlp.down_proj.weight[7, 3] = 20.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def page(run_folder: Path, tiny_llm: Path, massive_llm: Path, tmp_path: Path) -> Path:
    for path in run_folder.rglob("config.yaml"):
        path.write_text(path.read_text(encoding="utf-8").replace(str(tiny_llm), str(massive_llm)), encoding="utf-8")
    steps = [{"step": step, "ce": 3.0 / step, "grad_norm": 1.0} for step in (1, 2, 3)]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    main(["analyze", str(run_folder), str(other), "--out", str(tmp_path / "report")])
    return tmp_path / "report" / "report.html"


def screenshot(page: Path, size: tuple[int, int], *options: str) -> np.ndarray:
    """(height, width, 3) in 0..1."""
    path = page.with_name("shot.png")
    browse(page, size, f"--screenshot={path}", *options)
    return np.asarray(matplotlib.image.imread(path))[..., :3]


def measure(page: Path, width: int) -> list[float]:
    """Of a copy of the page in a frame of this width (windows may be no narrower than 500 pixels): its inner width, how
    wide it is to scroll, the width of the narrowest figure and the right edge of the rightmost."""
    script = (
        "<script>addEventListener('load', () => {"
        "const boxes = [...document.querySelectorAll('.grid:not(.wide) svg')].map(svg => svg.getBoundingClientRect());"
        "parent.postMessage([innerWidth, document.documentElement.scrollWidth, Math.min(...boxes.map(b => b.width)),"
        "Math.max(...boxes.map(b => b.right))].join(' '), '*')})</script>"
    )
    inner, outer = page.with_name("inner.html"), page.with_name("outer.html")
    inner.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{script}</body>"), encoding="utf-8")
    outer.write_text(
        "<title></title><script>addEventListener('message', event => { document.title = event.data })</script>"
        f"<iframe src={inner.name} style='width:{width}px;height:800px;border:0'></iframe>"
    )
    shown = browse(outer, (1600, 1000), "--virtual-time-budget=10000", "--dump-dom")
    title = re.search(r"<title>(.+?)</title>", shown)
    assert title is not None, shown[:500]
    return [float(number) for number in title[1].split()]


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
@pytest.mark.timeout(900)
def test_a_browser_shows_the_figures_at_both_sizes_in_light_and_in_dark(page: Path) -> None:
    shown = browse(page, SIZES[1], "--dump-dom")
    sections = dict(re.findall(r"<section id=\"(\w+)\">(.*?)</section>", shown, re.DOTALL))
    for name, count in FIGURES.items():
        assert sections[name].count('<svg role="img" aria-label="') == 2 * count, name
        assert f'href="#{name}"' in shown
    assert ">nan<" not in shown and "nan%" not in shown  # as Python writes what is no number
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', shown)
    assert len(set(labels)) == len(labels)
    ids = re.findall(r'\bid="([^"]+)"', shown)
    assert len(set(ids)) == len(ids)

    for size in SIZES:
        inner, wide, narrowest, right = measure(page, size[0])
        assert inner == size[0] and wide <= inner and right <= inner
        assert narrowest > 300  # figures are not squeezed
        light = screenshot(page, size)
        assert light.shape[:2] == (size[1], size[0])
        assert light.mean() > 0.8 and light.std() > 0.05
    dark = screenshot(page, SIZES[0], "--blink-settings=preferredColorScheme=0")
    assert dark.mean() < 0.35 and dark.std() > 0.05
