"""``python -m flashsink analyze``: the sinks of a Hugging Face model over a text, with transformers alone.

The text is cut into rows of equally many tokens, each after the tokenizer's BOS (an encoder's CLS) where it has one;
they run one by one, so nothing is padded.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashsink.hf.attach import attach
from flashsink.hf.probe import Probe
from flashsink.hf.report import EPS, MIN_QUERIES

DTYPES = ("float32", "bfloat16", "float16")
PICTURES = (".png", ".svg")
_UNUSED = re.compile(r"pooler|head|classifier|score")  # weights that no layer reads
_SHORTEST = 2  # tokens of a row
_DASH = "-"


class Refused(Exception):
    """One line that says what is wrong and where."""


@dataclass(frozen=True)
class Options:
    """What is read and how: ``rows`` at most, of ``tokens`` tokens at most, BOS included."""

    name: str
    text: str
    device: str | None = None
    dtype: str | None = None
    rows: int = 8
    tokens: int = 512
    out: tuple[str, ...] = ()
    module: str | None = None


def run(options: Options) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """Analyzes a model; returns what goes to JSON, and the table with its header.

    Raises:
        Refused: a file, the model, its tokenizer or a device cannot be used.
        ImportError: a package is missing.
    """
    text = _read_text(options.text)
    for path in options.out:
        if not Path(path).absolute().parent.is_dir():
            raise Refused(f"--out {path}: there is no folder {Path(path).absolute().parent}")
    with _quiet():
        model, tokenizer = _load(options)
    rows = _cut(tokenizer, text, options, model)
    try:
        probe = attach(model, module=options.module, median=True, nonfinite=True)
        held = _measure(model, probe, tokenizer, rows, options)
        for path in options.out:
            if Path(path).suffix == ".json":
                Path(path).write_text(json.dumps(held, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise Refused(f"{options.name}: {_line(error)}") from error
    return held, _table(held)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and warnings that repeat what is refused."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--text {path}: cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise Refused(f"--text {path}: expected text, found none")
    return text


# ---- the model


def _load(options: Options) -> tuple[Any, Any]:
    """The model on its device, in eval mode, and its tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    name, path = options.name, Path(options.name).expanduser()
    if path.is_dir():
        name = str(path)
        if not (path / "config.json").is_file():
            raise Refused(f"{name}: expected a model, found no config.json in this folder")
    elif path.exists() or name.count("/") > 1 or name[:1] in ("/", ".", "~"):
        raise Refused(f"{name}: no such folder")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"{name}: no model that transformers knows: {_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # the libraries behind it raise what they like
        raise Refused(f"{name}: no tokenizer: {_line(error)}") from error
    causal = any(own.endswith(("CausalLM", "LMHeadModel")) for own in getattr(config, "architectures", None) or [])
    kind: Any = AutoModelForCausalLM if causal else AutoModel
    device = _device(options.device)
    dtype = _dtype(options, config, device)
    _check_memory(name, kind, config, device, dtype)
    try:
        model, found = kind.from_pretrained(name, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except Exception as error:  # the same
        raise Refused(f"{name}: its weights cannot be loaded: {_line(error)}") from error
    missing = sorted(own for own in found["missing_keys"] if not _UNUSED.search(own))
    if missing:
        raise Refused(f"{name}: {len(missing)} weights are missing, such as {missing[0]}")
    try:
        return model.to(device).eval(), tokenizer
    except RuntimeError as error:
        raise Refused(f"--device {device}: {_line(error)}") from error


def _device(name: str | None) -> torch.device:
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise Refused(f"--device {name}: {_line(error)}") from error


def _dtype(options: Options, config: Any, device: torch.device) -> torch.dtype:
    """As asked for, else float32 on the CPU and the file's own elsewhere."""
    if options.dtype is not None:
        return getattr(torch, options.dtype)
    own = getattr(config, "dtype", None)
    return own if device.type != "cpu" and isinstance(own, torch.dtype) else torch.float32


def _check_memory(name: str, kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raises:
    Refused: the weights are larger than the memory that is free, or there is no such device.
    """
    try:
        with torch.device("meta"):
            size = sum(own.numel() for own in kind.from_config(config, dtype=dtype).parameters()) * dtype.itemsize
        free = _free(device)
    except (ValueError, KeyError) as error:
        raise Refused(f"{name}: {_line(error)}") from error
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"--device {device}: {_line(error)}") from error
    if size > free:
        raise Refused(
            f"{name}: too large: its weights take {size / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and "
            f"{free / 1e9:.1f} GB are free on {device}"
        )


def _free(device: torch.device) -> float:
    """Bytes that are free, infinite where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.is_file():
        return math.inf
    found = re.search(r"MemAvailable:\s+(\d+) kB", known.read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else math.inf


# ---- the text


def _cut(tokenizer: Any, text: str, options: Options, model: Any) -> list[list[int]]:
    """Rows of token ids."""
    first = next((own for own in (tokenizer.bos_token_id, tokenizer.cls_token_id) if own is not None), None)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    sizes = [getattr(own, "max_position_embeddings", None) for own in (model.config, model.config.get_text_config())]
    longest = min([options.tokens, *(size for size in sizes if isinstance(size, int) and size > 0)])
    step = longest - (first is not None)
    lead = [] if first is None else [first]
    rows = [lead + ids[place : place + step] for place in range(0, min(len(ids), step * options.rows), step)]
    rows = [row for row in rows if len(row) >= _SHORTEST]
    if not rows:
        raise Refused(f"--text {options.text}: expected two tokens or more, got {len(ids)}")
    highest, size = max(map(max, rows)), model.get_input_embeddings().weight.shape[0]
    if highest >= size:
        raise Refused(f"{options.name}: the tokenizer gives id {highest}, the model has {size} embeddings")
    return rows


# ---- measuring


@torch.no_grad()
def _measure(model: Any, probe: Probe, tokenizer: Any, rows: list[list[int]], options: Options) -> dict[str, Any]:
    device = model.get_input_embeddings().weight.device
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    layers: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    loss, count, broken = 0.0, 0, None
    for place, row in enumerate(rows):
        try:
            model(input_ids=torch.tensor([row], device=device), **extra)
        except torch.OutOfMemoryError as error:
            raise Refused(f"--tokens {options.tokens}: not enough memory for a row: {_line(error)}") from error
        own = list(_by_layer(probe, place))
        layers = [_joined(*pair) for pair in zip(layers, own, strict=True)] if layers else own
        found += [entry | {"row": place, "text": tokenizer.decode([row[entry["token"]]])} for entry in probe.report()]
        broken = broken or _broken(probe, place)
        try:
            counted = int(probe.decorrelation_count)
            loss, count = loss + float(probe.decorrelation_loss) * counted, count + counted
        except RuntimeError:  # an encoder, or a single layer, has none
            pass
        if place == 0:
            for path in options.out:
                if Path(path).suffix in PICTURES:
                    probe.plot(path)
    for entry in layers:
        rate = entry.pop("rates")
        entry["bos_sink_rate"] = sum(rate) / len(rate) if rate else None
        for key in ("other", "largest"):
            if entry[key] is not None:
                entry[key]["text"] = tokenizer.decode([rows[entry[key]["row"]][entry[key]["token"]]])
    return {
        "model": options.name,
        "rows": len(rows),
        "tokens": sum(map(len, rows)),
        "eps": EPS,
        "min_queries": MIN_QUERIES,
        "decorrelation_loss": loss / count if count and math.isfinite(loss) else None,
        "first_nonfinite": broken,
        "layers": layers,
        "report": found,
    }


def _by_layer(probe: Probe, row: int) -> Iterator[dict[str, Any]]:
    """Of every layer BOS's sink rate, the token but BOS that receives most, and the largest activation."""
    sinks, activations = probe.sinks_by_layer, probe.activations
    for layer in range(len(activations.max_abs)):
        sizes = activations.max_abs[layer, 0].nan_to_num(nan=torch.inf, posinf=torch.inf)
        token = int(sizes.argmax())
        size = float(sizes[token])
        largest = {"row": row, "token": token, "max_abs": size if math.isfinite(size) else None}
        entry: dict[str, Any] = {"layer": layer, "rates": [], "other": None}
        entry["largest"] = largest | {"feature": int(activations.feature[layer, 0, token])}
        if layer in sinks:
            stats = sinks[layer]
            rates = stats.sink_rate(EPS, MIN_QUERIES)[0]
            mean = stats.mean_received[0].mean(dim=0).masked_fill(stats.queries[0] < MIN_QUERIES, -1.0)[1:]
            entry["rates"] = [float(rates[0])]
            if len(mean) and float(mean.max()) >= 0:
                token = 1 + int(mean.argmax())
                entry["other"] = {"row": row, "token": token, "mean_received": float(mean.max())}
                entry["other"]["sink_rate"] = float(rates[token])
        yield entry


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """One layer over the rows so far and one more."""

    def larger(key: str, by: str) -> Any:
        known = [own[key] for own in (first, second) if own[key] is not None]
        return max(known, key=lambda own: math.inf if own[by] is None else own[by], default=None)

    other, largest = larger("other", "mean_received"), larger("largest", "max_abs")
    return first | {"rates": first["rates"] + second["rates"], "other": other, "largest": largest}


def _broken(probe: Probe, row: int) -> dict[str, Any] | None:
    if probe.first_nonfinite is None:
        return None
    layer, block, (_, token), feature, value = probe.first_nonfinite
    return {"layer": layer, "block": block, "row": row, "token": token, "feature": feature, "value": str(value)}


def _table(held: dict[str, Any]) -> list[tuple[str, ...]]:
    head = ("layer", "BOS sink rate", "other token", "received", "its sink rate", "max |h|", "at token", "feature")
    return [head, *(_cells(entry) for entry in held["layers"])]


def _cells(entry: dict[str, Any]) -> tuple[str, ...]:
    rate, other, largest = entry["bos_sink_rate"], entry["other"], entry["largest"]
    middle = (_DASH,) * 3
    if other is not None:
        middle = (_named(other), f"{other['mean_received']:.3f}", f"{other['sink_rate']:.2f}")
    size = "not finite" if largest["max_abs"] is None else f"{largest['max_abs']:,.1f}"
    return (
        str(entry["layer"]),
        _DASH if rate is None else f"{rate:.2f}",
        *middle,
        size,
        _named(largest),
        str(largest["feature"]),
    )


def _named(token: dict[str, Any]) -> str:
    return f"{token['token']} {token['text'][:20]!r}"
