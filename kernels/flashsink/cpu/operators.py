"""The operators of the ``cpu`` backend."""

from __future__ import annotations

from flashsink.cpu import attention, library, norm
from flashsink.operators import Gradient, Operator

_HOW = (
    "Tensor starts, Tensor lengths, bool packed, bool causal, float scale, float? softcap, int? window, int? chunk,"
    " Tensor? prefix, Tensor? blocks, Tensor? mask"
)

OPERATORS = (
    Operator(
        "attention",
        "(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? targets, int sums, bool spread,"
        f" {_HOW}) -> (Tensor out, Tensor lse, Tensor received, Tensor entropy)",
        attention.forward,
        attention.forward_like,
        Gradient(
            "attention_backward",
            takes="grad:out q k v sink_logits out lse starts lengths packed causal scale softcap"
            " window chunk prefix blocks mask",
            gives="q k v sink_logits",
        ),
    ),
    Operator(
        "attention_backward",
        f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor out, Tensor lse, {_HOW}) ->"
        " (Tensor, Tensor, Tensor, Tensor)",
        attention.backward,
        attention.backward_like,
    ),
    Operator(
        "decorrelation_sums",
        "(Tensor[] layers, Tensor starts, Tensor spans, bool packed, float margin)"
        " -> (Tensor sums, Tensor scalars, Tensor bos_gradient)",
        library.sums,
        library.sums_like,
        Gradient(
            "decorrelation_sums_backward",
            takes="grad:sums layers starts spans packed scalars bos_gradient",
            gives="layers",
        ),
    ),
    Operator(
        "decorrelation_sums_backward",
        "(Tensor upstream, Tensor[] layers, Tensor starts, Tensor spans, bool packed, Tensor scalars,"
        " Tensor bos_gradient) -> Tensor[]",
        library.gradients,
        library.gradients_like,
    ),
    Operator(
        "activation_max",
        "(Tensor layer, Tensor starts, Tensor lengths, bool packed) -> (Tensor, Tensor)",
        library.maxima,
        library.maxima_like,
    ),
    Operator(
        "rms_norm",
        "(Tensor h, Tensor weight, float eps, Tensor starts, Tensor lengths, Tensor? spans, bool packed, float margin)"
        " -> (Tensor out, Tensor total, Tensor max_abs, Tensor feature, Tensor rstd, Tensor scalars,"
        " Tensor bos_gradient)",
        norm.forward,
        norm.forward_like,
        Gradient(
            "rms_norm_backward",
            takes="grad:out grad:total h weight starts spans packed rstd scalars bos_gradient needs:weight",
            gives="h weight",
        ),
    ),
    Operator(
        "rms_norm_backward",
        "(Tensor? grad, Tensor? upstream, Tensor h, Tensor weight, Tensor starts, Tensor? spans, bool packed,"
        " Tensor rstd, Tensor scalars, Tensor bos_gradient, bool need_weight) -> (Tensor, Tensor)",
        norm.backward,
        norm.backward_like,
    ),
)
