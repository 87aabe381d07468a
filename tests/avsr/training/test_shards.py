"""Training and scoring on shards and datasets of others give the numbers of files of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from avsr.data.foreign import _made
from avsr.data.manifest import read_manifest
from avsr.evaluation.run import evaluate
from avsr.tools.pack import pack

pytestmark = [pytest.mark.integration, pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVSR_CACHE", str(tmp_path / "datasets"))
    _made.cache_clear()


def saved(manifest: Path, folder: Path) -> str:
    """The corpus as a folder of save_to_disk."""
    rows = read_manifest(manifest)
    table = {name: [getattr(row, name) for row in rows] for name in ("id", "text", "speaker", "duration")}
    table["audio"] = [{"bytes": row.audio.read_bytes(), "path": "x.wav"} for row in rows if row.audio]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(table).save_to_disk(str(folder))
    return str(folder)


def test_training_on_shards_is_training_on_files(
    tiny_recipe: Callable[..., Path], run: Callable[..., Path], agree: Callable[..., float], tmp_path: Path
) -> None:
    """With babble from the training set, and the cache; the scores too."""
    recipe = tiny_recipe(tmp_path, **{"augment.snr": [0.0], "augment.views": 2, "data.cache": None})
    plain = run(recipe, f"run={tmp_path / 'plain'}", f"data.cache={tmp_path / 'cache-plain'}")
    corpus = tmp_path / "corpus"
    pack(corpus / "train/manifest.jsonl", tmp_path / "packed", clips=3)
    shards = [
        "data.columns.id=id",
        f"data.train=wds:{tmp_path}/packed/manifest-{{000000..000002}}.tar",
        f"data.validation={saved(corpus / 'validation/manifest.jsonl', tmp_path / 'saved')}",
        f"data.test.sentences={saved(corpus / 'sentences/manifest.jsonl', tmp_path / 'saved-test')}",
        f"data.cache={tmp_path / 'cache-shards'}",
    ]
    packed = run(recipe, f"run={tmp_path / 'shards'}", *shards)
    assert agree(plain, packed, "ce", "validation_ce", "tokens", rel=1e-6, rtol=0, atol=1e-6) <= 1e-6
    for folder in plain, packed:
        evaluate(folder, ["noise.snr=[5]"])
    found = [next(path.rglob("hypotheses.jsonl")) for path in (plain, packed)]
    texts = [[json.loads(line)["hypothesis"] for line in path.read_text().splitlines()] for path in found]
    assert len(texts[0]) == 4 + 3 and texts[0] == texts[1]
