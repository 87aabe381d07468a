"""The operators of the ``triton`` backend, for CUDA tensors and, under TRITON_INTERPRET=1, CPU tensors."""

from __future__ import annotations

from flashsink.operators import Gradient, Operator
from flashsink.triton import (
    activations,
    attention_backward,
    attention_forward,
    by_segment,
    calibrate,
    decorrelation,
    norm,
    received,
    segments,
)
from flashsink.triton.patterns import NAMES, SCHEMA

OPERATORS = (
    Operator(
        "triton_segments",
        "(Tensor starts, Tensor lengths, SymInt tokens) -> Tensor",
        segments.forward,
        segments.forward_like,
    ),
    Operator(
        "triton_attention",
        "(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? capture, Tensor starts, Tensor lengths,"
        f" Tensor? segments, Tensor? first, bool packed, bool causal, float scale, {SCHEMA})"
        " -> (Tensor out, Tensor lse)",
        attention_forward.forward,
        attention_forward.forward_like,
        Gradient(
            "triton_attention_backward",
            takes="grad:out q k v out lse sink_logits starts lengths segments first packed causal scale"
            f" {NAMES} needs:capture",
            gives="q k v sink_logits capture",
        ),
    ),
    Operator(
        "triton_attention_backward",
        "(Tensor upstream, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sink_logits, Tensor starts,"
        f" Tensor lengths, Tensor? segments, Tensor? first, bool packed, bool causal, float scale, {SCHEMA},"
        " bool capture) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        attention_backward.backward,
        attention_backward.backward_like,
    ),
    Operator(
        "triton_received",
        "(Tensor q, Tensor k, Tensor lse, Tensor starts, Tensor lengths, Tensor? segments, Tensor? first, bool packed,"
        f" bool causal, float scale, {SCHEMA}) -> Tensor",
        received.forward,
        received.forward_like,
    ),
    Operator(
        "triton_by_segment",
        "(Tensor q, Tensor k, Tensor lse, Tensor? sink_logits, Tensor kinds, SymInt number, Tensor starts,"
        " Tensor lengths, Tensor? segments, Tensor? first, bool packed, bool causal, float scale,"
        f" {SCHEMA}) -> (Tensor sums, Tensor entropy)",
        by_segment.forward,
        by_segment.forward_like,
    ),
    Operator(
        "triton_calibrate",
        "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sink_logits, Tensor sinks, Tensor starts,"
        f" Tensor lengths, bool causal, float beta, float scale, {SCHEMA}) -> Tensor",
        calibrate.forward,
        calibrate.forward_like,
    ),
    Operator(
        "triton_decorrelation_sums",
        "(Tensor[] layers, Tensor starts, Tensor spans, bool packed, float margin)"
        " -> (Tensor sums, Tensor weights, Tensor ratios, Tensor parts)",
        decorrelation.forward,
        decorrelation.forward_like,
        Gradient(
            "triton_decorrelation_sums_backward",
            takes="grad:sums layers starts spans packed weights ratios parts",
            gives="layers",
        ),
    ),
    Operator(
        "triton_decorrelation_sums_backward",
        "(Tensor upstream, Tensor[] layers, Tensor starts, Tensor spans, bool packed, Tensor weights, Tensor ratios,"
        " Tensor parts) -> Tensor[]",
        decorrelation.backward,
        decorrelation.backward_like,
    ),
    Operator(
        "triton_activation_max",
        "(Tensor[] layers, Tensor starts, Tensor lengths, bool packed) -> (Tensor, Tensor)",
        activations.forward,
        activations.forward_like,
    ),
    Operator(
        "triton_rms_norm",
        "(Tensor h, Tensor weight, Tensor starts, Tensor lengths, Tensor? spans, bool packed, float eps, float margin)"
        " -> (Tensor out, Tensor total, Tensor max_abs, Tensor feature, Tensor rstd, Tensor weights, Tensor ratios,"
        " Tensor bos)",
        norm.forward,
        norm.forward_like,
        Gradient(
            "triton_rms_norm_backward",
            takes="grad:out grad:total h weight starts spans packed rstd weights ratios bos needs:weight",
            gives="h weight",
        ),
    ),
    Operator(
        "triton_rms_norm_backward",
        "(Tensor? upstream, Tensor? of_total, Tensor h, Tensor weight, Tensor starts, Tensor? spans, bool packed,"
        " Tensor rstd, Tensor weights, Tensor ratios, Tensor bos, bool need_weight) -> (Tensor, Tensor)",
        norm.backward,
        norm.backward_like,
    ),
)
