"""attach to models with 8-bit weights."""

from __future__ import annotations

import families
import pytest
import torch

import flashsink

IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_int8_weights(name):
    quantization = pytest.importorskip("torchao.quantization")
    model = families.build(name)
    plain = model(input_ids=IDS).logits
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    model.set_attn_implementation("eager")
    want = model(input_ids=IDS, output_attentions=True, output_hidden_states=True)
    assert not torch.equal(want.logits, plain)  # the weights are rounded
    probe = flashsink.attach(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, want.logits, rtol=1e-4, atol=1e-4)
    for stats, a in zip(probe.sinks, want.attentions, strict=True):
        torch.testing.assert_close(stats.received, a.sum(dim=2), rtol=1e-4, atol=1e-4)
    assert probe.fused == [0, 1, 2, 3]
    top = torch.stack(want.hidden_states[1:-1]).abs().amax(-1)
    torch.testing.assert_close(probe.activations.max_abs[:-1], top, rtol=1e-4, atol=1e-5)
    probe.detach()
    torch.testing.assert_close(model(input_ids=IDS).logits, want.logits)
