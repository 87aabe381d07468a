"""The report in headless Chromium: the figures are there, nothing runs over the edge of a phone, dark is dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from avsr.cli import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
SIZES = ((390, 844), (1280, 900))
FIGURES = {  # section: figures of one run
    **{"sinks": 2, "where": 2, "heads": 2, "value": 3, "mass": 1},
    **{"massive": 2, "activations": 1, "cosine": 1, "maps": 6},
    **{"origin": 1, "features": 0, "causal": 2, "training": 1},  # two of training, for both runs
}


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
def tiny_llm(tiny_llm: Path, tmp_path: Path) -> Path:
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
def page(run_folder: Path, tmp_path: Path) -> Path:
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
