"""flashsink inside a process group of one: NCCL on a GPU, gloo elsewhere. Several GPUs are another matter."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import flashsink

pytestmark = pytest.mark.integration

CUDA = torch.cuda.is_available()


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)] if CUDA else ["cpu"])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """One rank, and the name of its backend. A group that is there stays: DeepSpeed remembers it."""
    backend = "nccl" if CUDA else "gloo"
    own = not dist.is_initialized()
    if own:
        store = tmp_path_factory.mktemp("group") / "store"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield backend
    if own:
        dist.destroy_process_group()


def tiny(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return LlamaForCausalLM(config).to(device)


def step(model, wrapped, device):
    """Gradients, loss and received attention of one training step."""
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1)).to(device)
    probe = flashsink.attach(model)
    try:
        with probe.spans(torch.tensor([12, 9], device=device)):
            out = wrapped(input_ids=ids, labels=ids)
        loss = out.loss + 10.0 * probe.decorrelation_loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return gradients, loss.detach(), [sinks.received.clone() for sinks in probe.sinks]
    finally:
        probe.detach()


def test_collectives_of_one_rank_change_nothing(group, device):
    assert dist.get_backend() == group and dist.get_world_size() == 1
    given = torch.arange(6.0, device=device)
    summed, gathered, part = given.clone(), torch.empty_like(given), torch.empty_like(given)
    dist.all_reduce(summed)
    dist.all_gather_into_tensor(gathered, given)
    dist.reduce_scatter_tensor(part, given.clone())
    dist.broadcast(summed, src=0)
    for result in (summed, gathered, part):
        assert torch.equal(result, given)


def test_a_step_under_ddp_is_the_step_alone(group, device):
    """Its hooks reduce gradients while the backward runs, on another stream on a GPU."""
    model = tiny(device)
    plain = step(model, model, device)
    model.zero_grad()
    reduced = step(model, torch.nn.parallel.DistributedDataParallel(model), device)
    torch.testing.assert_close(reduced[1], plain[1])
    torch.testing.assert_close(reduced[2], plain[2])
    for name, gradient in plain[0].items():
        torch.testing.assert_close(reduced[0][name], gradient, msg=name)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_under_zero_is_the_step_alone(group, device, stage, monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    if device == "cpu":
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 leaves its own there
    deepspeed = pytest.importorskip("deepspeed")
    model = tiny(device)
    loss = step(model, model, device)[1]
    model.zero_grad()
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    ids = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(1)).to(device)
    probe = flashsink.attach(engine.module)
    with probe.spans(torch.tensor([12, 9], device=device)):
        out = engine(input_ids=ids, labels=ids)
    total = out.loss + 10.0 * probe.decorrelation_loss
    engine.backward(total)
    engine.step()
    torch.testing.assert_close(total.detach(), loss)
    probe.detach()
