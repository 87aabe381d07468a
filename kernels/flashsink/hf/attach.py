"""``attach``: what a user calls."""

from __future__ import annotations

from torch import nn

from flashsink import functional, versions
from flashsink.dispatch import select
from flashsink.hf.probe import Probe
from flashsink.hf.records import Options
from flashsink.hf.spans import Anchors


def attach(
    model: nn.Module,
    *,
    attention: bool = True,
    decorrelation: bool = True,
    activations: bool = True,
    margin: float = 0.0,
    stats_every: int = 1,
    median: bool = False,
    queries: str = "all",
    validate: bool = False,
    backend: str | None = None,
    learned_sinks: bool = True,
    module: str | None = None,
    cosines: bool = False,
    anchors: Anchors | None = None,
    nonfinite: bool = False,
    segment_mass: bool = False,
) -> Probe:
    """Observes a Hugging Face model: a decoder, an encoder, or the language decoder of a composite model, PEFT-wrapped
    or not.

    The model gives the logits that it gives without, or a forward raises ``ValueError`` with the reason; what cannot be
    checked without a stop (on CUDA, compiled) gives NaN, and the next read of the probe raises. Packed sequences
    (``position_ids`` that restart in a single row) want ``use_cache=False``, without which transformers does not keep
    them apart. One thread at a time may be inside a forward; each reads what its own last one left.

    Args:
        model: its layers run attention through ``AttentionInterface``.
        attention: run attention through flashsink and record :attr:`Probe.sinks`.
        decorrelation: compute :attr:`Probe.decorrelation_loss` in every full forward.
        activations: record :attr:`Probe.activations`.
        margin: of the decorrelation loss.
        stats_every: record sinks and activations in every n-th full forward only.
        median: also record the median of |h| of every row and layer.
        queries: "all", or "after_span": sinks count only the queries after the span (the text tokens).
        validate: check masks and spans on CUDA too, at the cost of a synchronization.
        backend: a name of :func:`flashsink.backends`, or None for the table's choice.
        learned_sinks: where the softmax has a learned sink (GPT-OSS), what it takes is missing from what the keys
            receive; False leaves it out of the statistics, whose rows then sum to 1 (a second pass).
        module: the name of the submodule to observe instead of the language decoder, such as "audio_tower".
        cosines: record :attr:`Probe.cosines`.
        anchors: of the loss, token ids or constants of the layers as in :meth:`Probe.spans`; default BOS.
        nonfinite: record :attr:`Probe.first_nonfinite`: a read of what every submodule of a layer gives, and a layer's
            states kept until its end.
        segment_mass: in a forward with segments, those of :meth:`Probe.segments` or of :meth:`Probe.spans`,
            :attr:`Probe.sinks` also say how much attention goes from segment to segment, and the entropy of every
            query. On the triton backend that is a pass of its own.

    Returns:
        The :class:`Probe`; ``probe.detach()`` undoes everything.

    Raises:
        ValueError: the model is not such a model, or an option is out of range.
    """
    versions.warn("transformers")
    functional.check_margin(margin)
    if stats_every < 1:
        raise ValueError(f"stats_every: expected at least 1, got {stats_every}")
    if queries not in ("all", "after_span"):
        raise ValueError(f"queries: expected 'all' or 'after_span', got {queries!r}")
    if segment_mass and not attention:
        raise ValueError("segment_mass: expected with attention=True, got attention=False")
    if backend is not None:
        select(backend, next((own.device.type for own in model.parameters()), "cpu"))
    options = Options(
        *(attention, decorrelation, activations, margin, stats_every, median, queries, validate, backend),
        learned_sinks=learned_sinks,
        cosines=cosines,
        nonfinite=nonfinite,
        segment_mass=segment_mass,
    )
    return Probe(model, options, module, anchors)
