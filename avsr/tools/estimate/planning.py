"""``avsr plan CONFIG``: the memory that a training will take on every ZeRO stage, and the batches that fit, before it
runs. No weights of the hub's models are loaded; without access to the hub, the models of our configs are planned from a
table of their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from avsr.config import Config
from avsr.data.batches import make_batches
from avsr.data.foreign import resolve
from avsr.data.index import open_manifest
from avsr.errors import UserError
from avsr.models.compression import compressed_width
from avsr.models.llm import add_lora
from avsr.models.projector import make_projector
from avsr.models.prompt import PromptLayout
from avsr.models.sources import inside_run
from avsr.runtime.machine import settled_precision
from avsr.tools.estimate.memory import Load, Sizes, Way, largest, memory, read_sizes
from avsr.tools.estimate.outlines import LETTERS, EncoderOutline, outline_encoder, outline_llm

FREE = 0.1  # share of the device's memory, for its context, fragmentation and the libraries' buffers
_SECONDS, _TOKENS = 4.0, 15  # of the utterances assumed without a manifest: about LRS3's


@dataclasses.dataclass(frozen=True)
class Row:
    """An utterance: encoder frames over all streams, prompt and text tokens."""

    frames: int
    span: int
    text: int


def plan(config: Config, ranks: int, device_memory: float) -> dict[str, Any]:
    """
    Args:
        config: of the training.
        ranks: processes, one per device.
        device_memory: bytes of a device.

    Returns:
        ``stages``: by ZeRO stage the bytes by part, their ``total`` and the largest ``training.frames`` that fits;
        ``sizes``, ``load``, ``assumed`` (there was no manifest), ``published`` (the models planned from the table) and
        ``counted`` (the model's tokenizer counted the tokens).

    Raises:
        UserError: bad input.
    """
    if ranks < 1:
        raise UserError(f"--ranks: expected at least 1, got {ranks}")
    if not device_memory > 0:
        raise UserError(f"--memory: expected more than 0, got {device_memory / 1e9:g}")
    encoders = {
        name: outline_encoder(
            dataclasses.replace(part.encoder, name=inside_run(str(part.encoder.name), config.run)), name
        )
        for name, part in config.model.streams.items()
    }
    outline = outline_llm(config.model.llm)
    published = [str(config.model.streams[name].encoder.name) for name, found in encoders.items() if found.published]
    published += [config.model.llm.name] if outline.published else []
    sizes = _sizes(config, encoders, outline.model)
    there = Path(resolve(config.data.train, config.data)[0]).is_file()
    rows = _rows(config, encoders, outline.count, there)
    way = way_of(config, ranks)
    load = _heaviest(config, rows, config.training.frames, sizes, way)
    whole = sum(row.frames for row in rows)
    stages: dict[int, dict[str, float]] = {}
    for stage in range(4):
        this = dataclasses.replace(
            way,
            stage=stage,
            offload_optimizer=way.offload_optimizer and stage > 0,
            offload_parameters=way.offload_parameters and stage == 3,
        )
        parts = memory(sizes, load, this)

        def fits(frames: int, this: Way = this) -> bool:
            if frames > whole:
                return False
            found = _heaviest(config, rows, frames, sizes, this)
            return sum(memory(sizes, found, this).values()) <= (1 - FREE) * device_memory

        longest = max(row.frames for row in rows)
        stages[stage] = {**parts, "total": sum(parts.values()), "frames": largest(fits, longest)}
    said = {"assumed": not there, "published": published, "counted": not outline.published}
    return {"sizes": sizes, "load": load, "way": way, "stages": stages, "whole": whole, **said}


def way_of(config: Config, ranks: int) -> Way:
    """How ``config`` trains."""
    training, deepspeed = config.training, config.deepspeed
    element = 2 if settled_precision(training.precision) == "bf16" else 4
    ours_on_cpu = config.model.llm.attention == "flashsink" and not torch.cuda.is_available()
    attention = 4 if ours_on_cpu else element
    kinds = training.gradient_checkpointing, config.loss.cross_entropy, training.kernels
    offloads = deepspeed.offload_optimizer, deepspeed.offload_parameters
    return Way(ranks, deepspeed.stage, element, attention, *kinds, *offloads)


def page(config: Config, planned: dict[str, Any], device_memory: float) -> str:
    """The plan as a table to print, in MB."""
    sizes, load, way = planned["sizes"], planned["load"], planned["way"]
    lines = [
        f"{sizes.frozen / 1e6:,.0f} M frozen and {sizes.trained / 1e6:,.1f} M trained parameters, {way.ranks} ranks, "
        f"{device_memory / 2**20:,.0f} MB each",
        f"largest micro-batch of training.frames = {config.training.frames}: {load.tokens} tokens, {load.labels} labels"
        + (" (assumed: utterances of 4 s; there is no manifest)" if planned["assumed"] else ""),
    ]
    if planned["published"]:
        guessed = "" if planned["counted"] else f" (texts: one token per {LETTERS} letters)"
        lines.append(f"not available here, planned from known sizes{guessed}: {', '.join(planned['published'])}")
    lines.append("")
    stages = planned["stages"]
    lines.append(f"{'MB at ZeRO stage':22s}" + "".join(f"{f'{s} <' if s == way.stage else s:>12}" for s in stages))
    for name in [key for key in stages[0] if key != "frames"]:
        lines.append(f"{name:22s}" + "".join(f"{parts[name] / 2**20:12,.0f}" for parts in stages.values()))
    cells = []
    for parts in stages.values():
        frames = f"{parts['frames']:,.0f}" if parts["frames"] else "none"
        cells.append(f"{'all' if parts['frames'] >= planned['whole'] else frames:>12}")
    lines.append(f"{'training.frames':22s}" + "".join(cells) + f"   at most, {FREE:.0%} left free")
    return "\n".join(lines)


def _sizes(config: Config, encoders: Mapping[str, EncoderOutline], llm: Any) -> Sizes:
    projectors, inside = 0, 0
    settings = config.model.projector
    for name, part in config.model.streams.items():
        width = compressed_width(encoders[name].width, part.compression.kind, part.compression.rate)
        with torch.device("meta"):
            projector = make_projector(width, settings.hidden, llm.config.hidden_size, settings.layernorm, 1.0)
        projectors += sum(parameter.numel() for parameter in projector.parameters())
        if config.data.cache is None or part.encoder.lora.rank:  # else its features come from the cache
            inside += encoders[name].entries
    lora = config.model.lora
    return read_sizes(llm.config, add_lora(llm, lora), lora, projectors, inside)


def _rows(
    config: Config, encoders: Mapping[str, EncoderOutline], count_tokens: Callable[[str], int], there: bool
) -> list[Row]:
    model = config.model
    layout = PromptLayout.of(model, count_tokens)
    clips: list[tuple[float, int]] = [(_SECONDS, _TOKENS)] * 512
    if there:
        path, absolute = resolve(config.data.train, config.data)
        found = open_manifest(path, absolute=absolute)
        if found.bad:
            raise UserError(found.bad[0])
        utterances = found.utterances[: config.data.limit or None]
        tokens = map(count_tokens, utterances.column("text").to_pylist())
        clips = list(zip(utterances.numbers("duration").tolist(), tokens, strict=True))
    rows = []
    for seconds, text in clips:
        frames = {name: max(round(seconds * encoders[name].frames_per_second), 1) for name in model.streams}
        rows.append(Row(sum(frames.values()), layout.prompt_length(model.task, frames), text))
    return rows


def _heaviest(config: Config, rows: Sequence[Row], frames: int, sizes: Sizes, way: Way) -> Load:
    """The micro-batch within a budget of ``frames`` that takes the most memory."""
    most = config.training.utterances if frames == config.training.frames else len(rows)
    sizes_of = [row.frames for row in rows]
    if max(sizes_of) > frames:
        raise UserError(f"training.frames: an utterance has {max(sizes_of)} encoder frames, the budget is {frames}")
    loads = []
    for batch in make_batches(sizes_of, frames, most):
        lengths = [rows[i].span + rows[i].text for i in batch]
        tokens = sum(lengths) if config.training.packed else len(lengths) * max(lengths)
        loads.append(Load(tokens, sum(rows[i].text + 1 for i in batch)))
    return max(loads, key=lambda load: sum(memory(sizes, load, way).values()))
