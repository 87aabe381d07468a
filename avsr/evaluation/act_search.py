"""``avsr act-search RUN``: the heads in which attention calibration (ACT) lowers the validation loss.

As in Yu et al. (2024), one (layer, head) is tried at a time and those that help are kept. They count correct answers;
here the criterion is the cross entropy of the reference text, since one head changes too few words to move a word error
rate. The text is teacher-forced after the prompt with the sinks of the prompt, as in decoding. Heads that help alone
may not help together, so of the best 1, 2, 4, ... the set with the lowest loss is taken, or none.

The search computes in float32 unless ``training.precision`` is overridden: one head changes the mean loss by 1e-4 to
1e-2, and bfloat16 alone by 1e-3 (SmolLM2).

Only what can differ is computed. A head without a sink in an utterance changes nothing there. The layers below a head
are those of the unchanged model, whose states before every layer are kept for one batch at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flashsink
from avsr.config import ActConfig, Config, read_run_config
from avsr.data.batches import Batch, collate, make_batches
from avsr.data.dataset import Reading, SpeechDataset, load_dataset
from avsr.errors import UserError
from avsr.evaluation.act import Heads, calibrated, every_head, heads_file, size_of
from avsr.evaluation.results import MADE_BY, UNFINISHED, made_by, refuse_other, row_key
from avsr.evaluation.run import decode_set
from avsr.models.build import load_run, pick_device
from avsr.models.rows import Assembled
from avsr.models.speech_llm import SpeechLLM
from avsr.models.weights import find_checkpoint
from avsr.runtime.folders import write_durably
from avsr.runtime.locks import claim
from avsr.runtime.machine import enough_memory
from avsr.runtime.progress import ProgressBar
from avsr.runtime.rows import Row, Rows

PAPER_BETA = 0.4  # used if act.beta is 1, which means off
ROWS = 16  # utterances in a batch, at most
_BATCH, _TOGETHER = "batch", "heads together"  # sets of the rows that a search keeps
Load = Callable[
    [list[int]], tuple[Batch, Assembled]
]  # a batch by its indices, loaded in every pass so that only one is in memory


@dataclass
class Search:
    """Result of a search. Cross entropies are means over label tokens, in nats.

    Attributes:
        heads: the chosen set, the most helpful first; empty if no set helps.
        tokens: label tokens of all utterances.
        plain: cross entropy without ACT.
        alone: cross entropy with one head calibrated; heads without a sink are left out.
        together: (size, cross entropy) of every set that was tried.
    """

    heads: Heads
    tokens: int
    plain: float
    alone: dict[tuple[int, int], float]
    together: list[tuple[int, float]]

    @property
    def best(self) -> float:
        """Cross entropy with the chosen set."""
        return min([self.plain, *(loss for _, loss in self.together)])


def act_search(run: str | Path, overrides: list[str], which: str = "best") -> str:
    """Searches on the validation manifest and writes the file that ``act.heads`` names, by default the run's own.
    A search that was stopped goes on where it was.

    Returns:
        A one-line summary.

    Raises:
        UserError: bad input; the file cannot be written, holds what other settings found, or another process writes it.
    """
    precise = ["training.precision=fp32", *overrides]
    path = heads_file(read_run_config(run, precise))
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    with claim(path.parent, path.name):
        return _act_search(run, precise, which, path)


def _act_search(run: str | Path, overrides: list[str], which: str, path: Path) -> str:
    made = _made_by(run, overrides, which)
    refuse_other(path, made, "name another file with act.heads")
    kept = Rows(path.with_name(f"{path.name}{UNFINISHED}"), row_key, made)
    config, model, store = load_run(run, overrides, pick_device(), which, single=True)
    act = config.act
    if act.beta == 1.0:
        act.beta = PAPER_BETA
    task = (config.decode.tasks or [config.model.task])[0]
    dataset = load_dataset(
        config.data.validation,
        config.data,
        store,
        model.tokenize,
        title="read validation",
        reading=Reading(task),
        refuse=model.layout.unusable,
    )
    with enough_memory("searching heads", f"lower training.frames = {config.training.frames}, those of a batch"):
        found = search(model, dataset, config, kept)
    before, after = _error_rates(config, model, dataset, found.heads, kept)
    layers, count = size_of(model)
    held: dict[str, Any] = {
        MADE_BY: made,
        "heads": found.heads,
        "layers": layers,
        "heads_per_layer": count,
        "beta": act.beta,
        "threshold": act.threshold,
        "checkpoint": find_checkpoint(run, which).name,
        "validation": config.data.validation,
        "task": task,
        "utterances": len(dataset),
        "label_tokens": found.tokens,
        "ce": found.plain,
        "ce_act": found.best,
        "wer": before,
        "wer_act": after,
        "heads_without_sink": layers * count - len(found.alone),
        "together": [{"heads": size, "ce": loss} for size, loss in found.together],
        "alone": [{"layer": layer, "head": head, "ce": loss} for (layer, head), loss in sorted(found.alone.items())],
    }
    try:
        write_durably(path, (json.dumps(held, indent=1) + "\n").encode())
        kept.path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    return (
        f"{len(found.heads)} of {layers * count} heads ({held['heads_without_sink']} have no sink): validation cross "
        f"entropy {found.plain:.4f} -> {found.best:.4f}, WER {before:.4f} -> {after:.4f}; written to {path}"
    )


def _made_by(run: str | Path, overrides: list[str], which: str) -> dict[str, Any]:
    config = read_run_config(run, overrides)
    act, config.act, config.data.test = config.act, ActConfig(), {"validation": config.data.validation}
    beta = PAPER_BETA if act.beta == 1.0 else act.beta
    found = {"act.beta": beta, "act.threshold": act.threshold, "training.frames": config.training.frames}
    return made_by(run, config, which) | found


@torch.no_grad()
def search(model: SpeechLLM, dataset: SpeechDataset, config: Config, kept: Rows | None = None) -> Search:
    """Searches with ``config.act``'s beta and threshold; leaves the model as it was. ``kept`` receives the losses of
    every batch and of every set of heads as they come; what it holds is not computed again."""
    model.eval()
    groups = make_batches(dataset.sizes, max(config.training.frames, max(dataset.sizes)), ROWS)

    def load(indices: list[int]) -> tuple[Batch, Assembled]:
        batch = collate([dataset[i] for i in indices])
        return batch, model.assemble(batch, with_text=True)

    probe = model.attach(attention=True, decorrelation=False, activations=False)
    try:
        plain, tokens, changes = _one_by_one(model, probe, groups, load, config.act, kept)
        helping = sorted((head for head, change in changes.items() if change < 0), key=lambda head: changes[head])
        together = []
        for size in _sizes(len(helping)):
            row = _held(kept, _TOGETHER, size)
            if row is None:
                probe.calibrate(helping[:size], config.act.beta, config.act.threshold)
                loss = sum(float(_losses(model, batch, rows).sum()) for batch, rows in map(load, groups))
                row = {"set": _TOGETHER, "id": size, "loss": loss}
                _keep(kept, row)
            together.append((size, row["loss"] / tokens))
    finally:
        model.detach()
    plain /= tokens
    size, loss = min(together, key=lambda pair: pair[1], default=(0, plain))
    chosen = helping[:size] if loss < plain else []
    alone = {head: plain + change / tokens for head, change in changes.items()}
    return Search(chosen, tokens, plain, alone, together)


def _one_by_one(
    model: SpeechLLM, probe: flashsink.Probe, groups: list[list[int]], load: Load, act: ActConfig, kept: Rows | None
) -> tuple[float, int, dict[tuple[int, int], float]]:
    """The summed loss without ACT, its number of label tokens, and its change by every head that has sinks."""
    plain, tokens = 0.0, 0
    changes: dict[tuple[int, int], float] = {}
    layers, _ = size_of(model)
    with ProgressBar("search heads", len(groups) * layers * (layers + 1) // 2) as bar:  # unit: passes through one layer
        for index, group in enumerate(groups):
            row = _held(kept, _BATCH, index)
            if row is None:
                batch, rows = load(group)
                before, changed = _batch_changes(model, probe, batch, rows, act, bar)
                row = {"set": _BATCH, "id": index, "ce": before, "tokens": batch.label_tokens, "changes": changed}
                _keep(kept, row)
            else:
                bar.advance(layers * (layers + 1) // 2)
            plain += row["ce"]
            tokens += row["tokens"]
            for layer, head, change in row["changes"]:
                changes[layer, head] = changes.get((layer, head), 0.0) + change
    return plain, tokens, changes


def _batch_changes(
    model: SpeechLLM, probe: flashsink.Probe, batch: Batch, rows: Assembled, act: ActConfig, bar: ProgressBar
) -> tuple[float, list[tuple[int, int, float]]]:
    """A batch's summed loss without ACT, and (layer, head, its change) of every head that has sinks there."""
    changes = []
    layers, heads = size_of(model)
    probe.calibrate(every_head(model), 1.0, act.threshold)
    before, states = _plain(model, batch, rows)
    sinks = {layer: found.any(dim=-1) for layer, found in probe.calibrated_sinks.items()}
    for layer in range(layers):
        with _only_from(model, layer):
            for head in range(heads):
                hit = sinks[layer][:, head].nonzero().flatten()
                if not len(hit):
                    continue
                probe.calibrate([(layer, head)], act.beta, act.threshold)
                part = replace(batch, text=[batch.text[i] for i in hit.tolist()])  # the loss needs nothing else
                entering = Assembled(states[layer][hit], rows.mask[hit], rows.spans[hit])
                change = (_losses(model, part, entering) - before[hit]).sum()
                changes.append((layer, head, float(change)))
        bar.advance(layers - layer)
    return float(before.sum()), changes


def _held(kept: Rows | None, name: str, number: int) -> Row | None:
    return None if kept is None else kept.held.get((name, str(number)))


def _keep(kept: Rows | None, row: Row) -> None:
    if kept is not None:
        kept.add(row)


def _plain(model: SpeechLLM, batch: Batch, rows: Assembled) -> tuple[Tensor, list[Tensor]]:
    """(B,) losses, and the states (B, S, C) before every layer."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        for layer in model.decoder.model.layers
    ]
    try:
        return _losses(model, batch, rows), states
    finally:
        for hook in hooks:
            hook.remove()


def _losses(model: SpeechLLM, batch: Batch, rows: Assembled) -> Tensor:
    """(B,) float64: cross entropy of every utterance, summed over its label tokens."""
    logits, targets = model.label_logits(batch, rows)
    each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double()
    return torch.stack([part.sum() for part in each.split([len(ids) + 1 for ids in batch.text])])


@contextmanager
def _only_from(model: SpeechLLM, layer: int) -> Iterator[None]:
    """Inside this context the decoder begins with ``layer`` (from 0) and is given the states before it."""
    decoder = model.decoder.model
    layers = decoder.layers
    decoder.layers = layers[layer:]
    try:
        yield
    finally:
        decoder.layers = layers


def _sizes(most: int) -> list[int]:
    """1, 2, 4, ... below ``most``, and ``most``."""
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [*sizes, most] if most else []


def _error_rates(
    config: Config, model: SpeechLLM, dataset: SpeechDataset, heads: Heads, kept: Rows
) -> tuple[float, float]:
    """Validation WER without ACT, and with ACT in ``heads``."""
    before = decode_set(model, dataset, config, "validation", kept)[0].wer
    if not heads:
        return before, before
    with calibrated(config, model, heads):
        return before, decode_set(model, dataset, config, "validation with ACT", kept)[0].wer
