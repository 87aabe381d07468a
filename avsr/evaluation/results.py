"""Where results are, and what made them: a result is replaced only by one that was made by the same settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import flashsink
from avsr.config import Config, read_run_config
from avsr.config.composing import leaves
from avsr.data.foreign import resolve
from avsr.errors import UserError
from avsr.evaluation.act import heads_file
from avsr.models.speech_llm import SpeechLLM
from avsr.models.weights import WEIGHTS, find_checkpoint
from avsr.runtime.folders import sha256
from avsr.runtime.machine import settled_precision
from avsr.runtime.rows import Row

METRICS, HYPOTHESES, ERRORS = "metrics.json", "hypotheses.jsonl", "errors.txt"
MADE_BY = "made_by"  # key of a result
UNFINISHED = ".unfinished"  # after the name of a result whose rows are not all there
OTHERS = "evaluations"  # folder in a run
_GROUPS = ("model.", "data.", "noise.", "decode.", "act.")
# what changes only how fast the result is there, and what decoding does not read
_IDLE = ("data.cache", "data.workers", "data.verify", "data.validation", "data.test", "decode.batch")
_SHA256 = ".sha256"
_LONGEST = 80  # letters of the settings in a folder's name


def made_by(run: str | Path, config: Config, which: str = "best") -> dict[str, Any]:
    """Everything that the decoding of a run depends on: keys of its config, and checksums (``NAME.sha256``; None of a
    missing file) of the checkpoint, the test manifests, the source of noise and the heads of ACT."""
    checkpoint = find_checkpoint(run, which)
    made: dict[str, Any] = {"checkpoint": checkpoint.name, f"checkpoint{_SHA256}": _sum(checkpoint / WEIGHTS)}
    made |= {name: value for name, value in leaves(config) if name.startswith(_GROUPS) and not name.startswith(_IDLE)}
    made["training.precision"] = settled_precision(config.training.precision)
    for name, manifest in config.data.test.items():
        path, _ = resolve(manifest, config.data, alone=True)
        made |= {f"data.test.{name}": manifest, f"data.test.{name}{_SHA256}": _sum(Path(path))}
    if config.act.beta == 1.0:
        made = {name: value for name, value in made.items() if not name.startswith("act.")}
    elif config.act.heads != "all":
        made[f"act.heads{_SHA256}"] = _sum(heads_file(config))
    if config.noise.snr:
        source = config.noise.file or config.noise.babble or resolve(config.data.train, config.data, alone=True)[0]
        made |= {"training.seed": config.training.seed, f"noise{_SHA256}": _sum(Path(source))}
    else:
        made = {name: value for name, value in made.items() if not name.startswith(("noise.", "data.train"))}
    return dict(json.loads(json.dumps(made)))


def environment(model: SpeechLLM) -> dict[str, Any]:
    """What a result can depend on in its last digits: where ``model`` is, what computes its attention, and versions. It
    makes no other result: an evaluation may go on elsewhere."""
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    versions = {module.__name__: module.__version__ for module in (flashsink, torch, transformers)}
    return {"device": device, "attention": model.decoder.config._attn_implementation, "versions": versions}


def results_folder(run: str | Path, overrides: list[str], which: str = "best") -> Path:
    """Where ``avsr evaluate`` and ``analyze`` write: the run's folder for its own settings, else in it
    ``evaluations/SETTINGS``."""
    found = _settings(made_by(run, read_run_config(run, overrides), which))
    try:
        own = _settings(made_by(run, read_run_config(run)))
    except UserError:  # it has neither a best checkpoint nor a last one
        own = {}
    changed = [f"{name}={found.get(name)}" for name in sorted(found | own) if found.get(name) != own.get(name)]
    if not changed:
        return Path(run)
    shown = re.sub(r"[^\w.=,+-]", "", ",".join(changed), flags=re.ASCII)[:_LONGEST]
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:8]
    return Path(run, OTHERS, f"{shown}-{digest}")


def refuse_other(path: Path, made: Mapping[str, Any], advice: str, part: str = "") -> None:
    """Raises a ``UserError`` if the JSON file ``path``, or the ``part`` of it, is a result of other settings than
    ``made``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        held = (content[part] if part else content)[MADE_BY]
        there, wanted = _settings(held), _settings(made)
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} does not say what made it and would be replaced: {advice}") from None
    older = {**json.loads(json.dumps(dict(leaves(Config())))), **there}  # it lacks keys that are newer than it
    changed = [name for name in sorted(there | wanted) if older.get(name) != wanted.get(name)]
    if changed:
        shown = "; ".join(f"{name} is {there.get(name)!r} there, not {wanted.get(name)!r}" for name in changed)
        raise UserError(f"{path} is the result of other settings ({shown}): {advice}")


def row_key(row: Row) -> tuple[str, str]:
    """The key of a row of decoding: its set and utterance."""
    return str(row["set"]), str(row["id"])


def _settings(made: Mapping[str, Any]) -> dict[str, Any]:
    """Without checksums: a newer checkpoint of the same settings takes the place of the old one."""
    return {name: value for name, value in made.items() if not name.endswith(_SHA256)}


def _sum(path: Path) -> str | None:
    try:
        return sha256(path)
    except (OSError, ValueError):  # a name with a NUL
        return None
