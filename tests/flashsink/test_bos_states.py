"""The base model's states of BOS, as constant anchors of the loss."""

from __future__ import annotations

import pytest
import torch
from decoders import ids

import flashsink

pytestmark = pytest.mark.integration


@torch.no_grad()
def test_bos_states_are_those_of_the_base_model(tiny):
    from peft import PeftModel

    model = tiny("llama", True)
    model.train()
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # as one who freezes it does
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    batch = torch.tensor([[1, 7, 9]])
    outputs = []
    with model.disable_adapter():
        base = model.base_model.model.model
        hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in base.layers]
        base(input_ids=batch)
    for hook in hooks:
        hook.remove()
    for name, p in model.named_parameters():
        p.requires_grad_(learns[name])
    got = flashsink.bos_states(model)
    assert got.shape == (3, 32) and got.dtype == torch.float32 and not got.requires_grad
    torch.testing.assert_close(got, torch.stack([h[0, 0] for h in outputs]), rtol=1e-4, atol=1e-5)
    tokenizer = type("Tokenizer", (), {"bos_token_id": 1})()
    for same_bos in (tokenizer, 1, [1], torch.tensor([1])):
        assert torch.equal(flashsink.bos_states(model, same_bos), got)
    torch.testing.assert_close(
        flashsink.bos_states(model, batch[0]), torch.stack([h[0, 2] for h in outputs]), rtol=1e-4, atol=1e-5
    )
    assert isinstance(model, PeftModel) and all(own.training for own in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learns
    probe = flashsink.attach(model, anchors=got)
    with pytest.raises(ValueError, match=r"^model: expected one without flashsink attached"):
        flashsink.bos_states(model)
    model(input_ids=ids())
    assert int(probe.decorrelation_count) == 14


@pytest.mark.parametrize(
    ("tokens", "why"), [([], "tokens"), (60, "tokens"), ("bos", "tokens"), (object(), "tokens"), (None, "tokens")]
)
def test_bos_states_refuses_by_name(tiny, tokens, why):
    model = tiny("llama", bos_token_id=None)
    with pytest.raises(ValueError, match=f"^{why}: expected "):
        flashsink.bos_states(model, tokens)


def test_bos_states_of_a_merged_adapter_are_refused(tiny):
    model = tiny("llama", True)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"^model: expected adapters apart from their weights"):
        flashsink.bos_states(model)
