"""What the frames of one clip do inside a speech encoder: attention they receive, activations, and where they are.

L layers, H heads, T frames that the encoder sees, of which the first ``own`` are the clip's; the others, if any, pad it
to 30 s. Every query sees every key. Rates and multiples:

- *raw*: mean attention of all T queries, a frame's own included; a sink exceeds ``EPS`` = 0.3 as in language models.
- *corrected*: of the clip's own frames as queries, without a frame's attention to itself; the same threshold. The
  uncorrected mean hardly differs here, since every key is seen by all queries: a frame's own one is one of T.
- *multiple*: the corrected mean times T. Uniform attention gives every frame exactly 1.
- *relative sink*: the corrected mean is at least ``WORTH`` / duration, so that the frame takes as much attention as
  half a second of the clip has to give. Unpadded, that is a multiple of 25 at 50 frames a second. A threshold in shares
  of the attention depends on the length (0.3 is a multiple of 30 in 2 s and of 450 in 30 s), one in multiples on the
  frame rate. Half a second is the least that attention to neighbors cannot reach: all frames within 0.25 s of one,
  more than a syllable, would have to look at nothing else. In a clip of 1.67 s it is the 0.3 of ``EPS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

import flashsink
from avsr.data.clip import Clip
from avsr.data.rates import SAMPLE_RATE
from avsr.models.avhubert_network import HEAD
from avsr.models.encoder import SpeechEncoder
from avsr.tools.analysis.attention import FrameAttention, frame_attention
from avsr.tools.analysis.statistics import is_massive
from avsr.tools.analysis.walk import QKV

WORTH = 0.5  # seconds of the clip's attention that make a relative sink
EDGE = 0.1  # seconds at either end that are regions of their own
SILENT = 40.0  # dB below the clip's loudest frame
FIRST, SPEECH, SILENCE, UNHEARD, LAST, PADDING = "first", "speech", "silence", "between", "last", "padding"
REGIONS = (FIRST, SPEECH, SILENCE, UNHEARD, LAST, PADDING)  # UNHEARD: neither end, of a clip without sound


@dataclass
class FrameStatistics:
    """One clip; tensors on the CPU.

    Attributes:
        raw, mean, others: (L, H, T), see :class:`~avsr.tools.analysis.attention.FrameAttention`.
        value_norm: (L, H, T), |v|.
        max_abs, feature: (L, T), max |h| of the layers' outputs, and where it is; median: (L,) of |h|.
        regions: (T,) int64, places in ``REGIONS``.
        own: number of the clip's own frames.
        seconds: their duration.
    """

    raw: Tensor
    mean: Tensor
    others: Tensor
    value_norm: Tensor
    max_abs: Tensor
    feature: Tensor
    median: Tensor
    regions: Tensor
    own: int
    seconds: float

    @property
    def multiple(self) -> Tensor:
        """(L, H, T)."""
        return self.others * self.others.shape[-1]

    @property
    def sinks(self) -> Tensor:
        """(L, H, T) bool: relative sinks."""
        return self.others >= WORTH / self.seconds

    @property
    def massive(self) -> Tensor:
        """(L, T) bool."""
        return is_massive(self.max_abs, self.median[:, None])


@torch.no_grad()
def measure_clip(encoder: SpeechEncoder, clip: Clip) -> FrameStatistics:
    """Statistics of one clip, from one forward of it alone.

    Raises:
        UserError: the encoder cannot read the clip.
    """
    device = next(encoder.parameters()).device
    inputs = encoder.prepare(clip)[None].to(device)
    own = encoder.feature_count(inputs.shape[1])
    attention: list[FrameAttention] = []
    norms: list[Tensor] = []
    outputs: list[Tensor] = []

    def see(qkv: QKV, bias: Tensor | None) -> None:
        attention.append(frame_attention(qkv, own, bias))
        norms.append(qkv.v[0].float().norm(dim=-1))

    with _watched(encoder, see, outputs.append):
        encoder(inputs, torch.tensor([inputs.shape[1]], device=device))
    states = flashsink.activation_stats(outputs, median=True)
    assert states.median is not None
    frames = outputs[0].shape[1]
    raw, mean, others, _ = (torch.stack(values).cpu() for values in zip(*attention, strict=True))
    return FrameStatistics(
        *(raw, mean, others, torch.stack(norms).cpu()),
        max_abs=states.max_abs[:, 0].cpu(),
        feature=states.feature[:, 0].long().cpu(),
        median=states.median[:, 0].cpu(),
        regions=regions_of(clip.wave, own, frames, encoder.frames_per_second),
        own=own,
        seconds=own / encoder.frames_per_second,
    )


def regions_of(wave: Tensor | None, own: int, frames: int, rate: int) -> Tensor:
    """(frames,) int64: the region of every frame.

    A frame is silent when the samples of its 1 / ``rate`` seconds have a mean square at least ``SILENT`` dB below that
    of the clip's loudest frame, or are all zero.

    Args:
        wave: (samples,) at 16 kHz, or None.
        own: frames of the clip.
        frames: of the encoder, at least that many.
        rate: frames per second.
    """
    regions = torch.full((frames,), REGIONS.index(UNHEARD))
    if wave is not None:
        hop = SAMPLE_RATE // rate
        padded = nn.functional.pad(wave.double(), (0, max(own * hop - len(wave), 0)))[: own * hop]
        power = padded.reshape(own, hop).square().mean(dim=1)
        silent = (power <= power.max() * 10 ** (-SILENT / 10)) | (power == 0)
        regions[:own] = torch.where(silent, REGIONS.index(SILENCE), REGIONS.index(SPEECH))
    edge = max(1, round(EDGE * rate))
    regions[:edge], regions[own - edge : own] = REGIONS.index(FIRST), REGIONS.index(LAST)
    regions[own:] = REGIONS.index(PADDING)
    return regions


@contextmanager
def _watched(
    encoder: SpeechEncoder, see: Callable[[QKV, Tensor | None], None], output: Callable[[Tensor], Any]
) -> Iterator[None]:
    """Calls ``see`` before the attention of every layer, and ``output`` with the (1, T, D) states after it."""
    with ExitStack() as stack:
        for layer in encoder.layers:
            attention: Any = layer.attention if hasattr(layer, "attention") else layer.self_attn
            if isinstance(attention, WavLMAttention):
                stack.enter_context(_watched_wavlm(attention, see))
            else:
                handle = attention.register_forward_pre_hook(_at_input(see), with_kwargs=True)
                stack.callback(handle.remove)

            def after(module: Any, args: Any, out: Any) -> None:
                output(out[0] if isinstance(out, tuple) else out)

            stack.callback(layer.register_forward_hook(after).remove)
        yield


def _at_input(see: Callable[[QKV, Tensor | None], None]) -> Callable[[Any, Any, Any], None]:
    def before(module: Any, args: Any, kwargs: Any) -> None:
        see(_project(module, args[0] if args else kwargs["hidden_states"]), None)

    return before


@contextmanager
def _watched_wavlm(attention: WavLMAttention, see: Callable[[QKV, Tensor | None], None]) -> Iterator[None]:
    """WavLM adds to the scores a bias that depends on positions and states; what computes attention is given it."""
    compute = attention.torch_multi_head_self_attention

    def computed(states: Tensor, mask: Any, bias: Tensor, *rest: Any, **options: Any) -> Any:
        see(_project(attention, states), bias)
        return compute(states, mask, bias, *rest, **options)

    attention.torch_multi_head_self_attention = computed
    try:
        yield
    finally:
        del attention.torch_multi_head_self_attention  # the class has it


def _project(attention: Any, states: Tensor) -> QKV:
    """Queries, keys and values of (1, T, D) states by the projections of an attention module."""
    heads = getattr(attention, "num_heads", states.shape[-1] // HEAD)
    q, k, v = (
        projection(states).unflatten(-1, (heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return QKV(q, k, v, q.shape[-1] ** -0.5)
