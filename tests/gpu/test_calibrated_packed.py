"""ACT in a packed row goes to the reference: no kernel takes it for a dense one."""

from __future__ import annotations

import pytest
import torch

from flashsink import reference
from flashsink.checks import resolve_layout
from flashsink.cpu import backend as cpu
from flashsink.triton import attention as triton


@pytest.mark.parametrize("module", [triton, cpu])
def test_each_sequence_for_itself(module, device):
    q, k, v = (torch.randn(1, heads, 12, 16, device=device) for heads in (4, 2, 2))
    layout = resolve_layout(1, 12, q.device, cu_seqlens=torch.tensor([0, 5, 12], device=device))
    sinks = torch.rand(1, 4, 12, device=device) < 0.4
    got = module.calibrated_attention(q, k, v, sinks, layout, beta=0.4, scale=0.3)
    want = reference.calibrated_attention(q, k, v, sinks, layout, beta=0.4, scale=0.3)
    torch.testing.assert_close(got, want)
