"""Ranks that share the reading of manifests, in two real processes of a gloo group; and what one process says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import torch.distributed as dist

from avsr.config import load_config
from avsr.data.dataset import Reading, load_dataset
from avsr.data.manifest import read_manifest
from avsr.errors import UserError
from avsr.models.build import build_store

pytestmark = pytest.mark.integration

CODE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("t", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.one_rank(int(sys.argv[2]), *sys.argv[3:])
"""


def read_both(recipe: str, *overrides: str) -> dict[str, Any]:
    """What a rank holds of the training and then of the validation manifest."""
    config = load_config(recipe, overrides)
    store = build_store(config, torch.device("cpu"))
    found: dict[str, Any] = {}
    for name, manifest in (("train", config.data.train), ("validation", config.data.validation)):

        def too_long(frames: dict[str, int], tokens: int) -> str:
            return "is too long" if sum(frames.values()) > 100 else ""

        data = load_dataset(
            manifest, config.data, store, list, title=name, reading=Reading(config.model.task), refuse=too_long
        )
        found[name] = [[u.id for u in data.utterances], data.sizes.tolist(), data.skipped]
        found[f"{name} lengths"] = [{k: len(v) for k, v in data[i].features.items()} for i in range(len(data))]
    return found


def one_rank(rank: int, recipe: str, store: str, out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    found = [read_both(recipe, *overrides, *cache) for cache in ([], ["data.cache=null"])]
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_agree_with_one_process(
    av_recipe: Callable[..., Path], make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    """Both manifests use the same ids for clips of other lengths, and clips of either rank are refused; with and
    without a cache."""
    make_corpus(tmp_path / "corpus" / "train", seconds=[0.4, 0.8, 1.2, 0.6, 2.0, 1.0, 0.44], video="beside")
    make_corpus(tmp_path / "corpus" / "validation", seconds=[1.0, 0.48, 0.52, 0.96, 0.6], video="beside")
    rows = read_manifest(tmp_path / "corpus" / "train" / "manifest.jsonl")
    assert rows[3].video is not None
    rows[3].video.write_bytes(b"broken")
    overrides = ["data.on_bad=skip"]
    recipe = str(av_recipe(tmp_path, "audiovisual"))
    command = [sys.executable, "-c", CODE, __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), recipe, str(tmp_path / "store"), str(tmp_path / "out"), *overrides],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), errors
    for cached, ours in enumerate(read_both(recipe, *overrides, *cache) for cache in ([], ["data.cache=null"])):
        assert ours["train"] == [["u000", "u001", "u002", "u005", "u006"], [30, 60, 90, 75, 33], 2]
        assert ours["validation"][1] == [75, 36, 39, 72, 45]
        for rank in range(2):
            assert json.loads((tmp_path / f"out.{rank}").read_text())[cached] == ours
        if not cached:  # without it they are the encoders' inputs
            for name in ("train", "validation"):
                assert [sum(lengths.values()) for lengths in ours[f"{name} lengths"]] == ours[name][1]
    for error in errors:
        assert error.count("skipped 2 of 7 utterances") == 2
        assert str(rows[3].video) in error and "is too long" in error


def test_all_reasons_are_in_one_message(tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    config = load_config(str(tiny_recipe(tmp_path)), ["data.max_text_tokens=11"])
    rows = read_manifest(config.data.train)
    assert rows[0].audio is not None
    soundfile.write(str(rows[0].audio), torch.zeros(9000).numpy(), 16_000)
    lines = Path(config.data.train).read_text().splitlines()
    Path(config.data.train).write_text("\n".join([*lines[:2], "no json", *lines[2:]]))
    store = build_store(config, torch.device("cpu"))
    with pytest.raises(UserError) as caught:
        load_dataset(
            config.data.train,
            config.data,
            store,
            list,
            title="x",
            reading=Reading("audio"),
            refuse=lambda frames, tokens: "is odd" if tokens == 11 else "",
        )
    message = str(caught.value)
    for part in ("of 9 utterances cannot be used", ":3: not a JSON object", "allowed are data.max_text_tokens = 11"):
        assert part in message


@pytest.mark.parametrize(("share", "refused"), [(0.24, True), (0.25, False)])
def test_what_is_skipped_is_listed_and_has_a_limit(
    tiny_recipe: Callable[..., Path], tmp_path: Path, share: float, refused: bool
) -> None:
    overrides = ["data.on_bad=skip", f"data.max_bad={share}", "data.cache=null"]
    config = load_config(str(tiny_recipe(tmp_path)), overrides)
    rows = read_manifest(config.data.train)
    for row, content in ((rows[1], b"broken"), (rows[6], b"")):
        assert row.audio is not None
        row.audio.write_bytes(content)
    path = tmp_path / "rejected.jsonl"
    path.write_text('{"manif\n' + json.dumps({"manifest": "other", "id": "a", "reason": "r"}) + '\n{"manifest": "o')
    store = build_store(config, torch.device("cpu"))
    for _ in range(2):  # a second reading replaces what the first one wrote
        with pytest.raises(UserError, match=r"2 of 8 .* more than data\.max_bad = 0\.24") if refused else nullcontext():
            data = load_dataset(
                config.data.train, config.data, store, list, title="x", reading=Reading("audio"), rejected=path
            )
            assert [u.id for u in data.utterances] == [f"u00{n}" for n in (0, 2, 3, 4, 5, 7)]
        listed = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(row["manifest"], row["id"]) for row in listed[1:]] == [
            (config.data.train, i) for i in ("u001", "u006")
        ]
        assert listed[0]["manifest"] == "other" and str(rows[1].audio) in listed[1]["reason"]
    assert rows[1].audio is not None
    for row in (rows[1], rows[6]):
        soundfile.write(str(row.audio), 0.1 * torch.ones(9600).numpy(), 16_000)
    load_dataset(config.data.train, config.data, store, list, title="x", reading=Reading("audio"), rejected=path)
    assert len(path.read_text().splitlines()) == 1  # all is well now
