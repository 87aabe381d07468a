"""Activation checkpointing, ways to compute cross entropy, Liger's kernels: the same results, or a refusal by key."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode

from avsr.config import Config, load_config, read_run_config, to_yaml
from avsr.data.batches import Batch, Example, collate
from avsr.data.dataset import Reading, load_dataset
from avsr.errors import UserError
from avsr.models.build import build_model, build_store
from avsr.models.label_loss import CHUNKS, label_loss
from avsr.models.speech_llm import SpeechLLM
from avsr.tools.estimate.trace import Trace
from avsr.training import options
from avsr.training.losses import attach
from avsr.training.metrics import read_metrics
from avsr.training.run import make_trainer, train

pytestmark = pytest.mark.integration

Recipe = Callable[..., Path]
CPU = torch.device("cpu")
SECONDS = [0.6, 2.4, 1.1, 2.9, 1.7, 2.2]


@pytest.fixture
def recipe(tiny_recipe: Recipe, make_corpus: Callable[..., Path], tmp_path: Path) -> Recipe:
    """With utterances of different lengths, six of them in a batch."""

    def make(**changes: Any) -> Path:
        found = tmp_path / "uneven" / "manifest.jsonl"
        corpus = str(found if found.is_file() else make_corpus(tmp_path / "uneven", seconds=SECONDS))
        settings = {"data.train": corpus, "training.frames": 900, "training.utterances": 6, "loss.decorrelation": 2.0}
        return tiny_recipe(tmp_path, **settings, **changes)

    return make


def prepared(config: Config) -> tuple[SpeechLLM, list[Example]]:
    """The model as a training has it, in training mode, and the utterances."""
    store = build_store(config, CPU)
    model, loaded = build_model(config, store, CPU, training=True)
    data = load_dataset(config.data.train, config.data, store, loaded.tokenize, title="train", reading=Reading("audio"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # an untrained adapter is the identity and would hide mistakes
            nn.init.normal_(parameter, std=0.05)
    options.apply(model, config)
    attach(model, config)
    return model.train(), [data[i] for i in range(len(data))]


def measured(path: Path, *overrides: str) -> dict[str, Any]:
    """Terms, gradients and statistics of one step, and the bytes that its forward keeps and that it peaks at."""
    config = load_config(str(path), overrides)
    model, examples = prepared(config)
    batch, probe = collate(examples), model.probe
    assert probe is not None
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    for context in (nullcontext(), profiler):  # the first step allocates what stays
        model.zero_grad()
        with context, record_function("step"):
            with record_function("forward"):
                terms = model(batch)
                assert terms.decorrelation is not None
                loss = terms.cross_entropy + 3.0 * terms.decorrelation
            loss.backward()
    profiler.export_chrome_trace(str(path.parent / "trace.json"))
    trace = Trace(path.parent / "trace.json", 0)
    (step,), (forward,) = trace.ranges("step"), trace.ranges("forward")
    return {
        "terms": tuple(term.detach() for term in terms[:3]),
        "gradients": {name: p.grad for name, p in model.trainable().items() if p.grad is not None},
        "received": [layer.received for layer in probe.sinks],
        "kept": trace.held(forward[1]) - trace.held(forward[0]),
        "peak": trace.peak(step),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for key in ("terms", "received"):
        torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5)
    assert one["gradients"].keys() == other["gradients"].keys()
    for name, gradient in one["gradients"].items():  # sums of many terms: rounding goes by the largest entry
        torch.testing.assert_close(other["gradients"][name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))
    assert any(float(grad.abs().max()) > 1e-3 for grad in one["gradients"].values())


# Activation checkpointing


@pytest.mark.parametrize(
    ("text", "value"), [("true", "true"), ("false", "false"), ("True", "true"), ("selective", "selective")]
)
def test_booleans_of_yaml_and_of_saved_configs_stay_valid(recipe: Recipe, text: str, value: str) -> None:
    path = recipe()
    assert load_config(str(path)).training.gradient_checkpointing == "false"
    config = load_config(str(path), [f"training.gradient_checkpointing={text}"])
    assert config.training.gradient_checkpointing == value
    run = path.parent / "saved"
    run.mkdir()
    written = to_yaml(config)
    (run / "config.yaml").write_text(written, encoding="utf-8")
    assert read_run_config(run).training.gradient_checkpointing == value
    quoted = f"gradient_checkpointing: '{value}'" if value != "selective" else f"gradient_checkpointing: {value}"
    assert quoted in written
    (run / "config.yaml").write_text(written.replace(quoted, f"gradient_checkpointing: {text}"), encoding="utf-8")
    assert read_run_config(run).training.gradient_checkpointing == value


@pytest.mark.parametrize("settings", [[], ["training.packed=true"], ["model.llm.attention=sdpa"]], ids=str)
def test_selective_checkpointing_changes_memory_alone(recipe: Recipe, settings: list[str]) -> None:
    own = "model.llm.attention=sdpa" not in settings
    path, found = recipe(), {}
    for kind in ("false", "selective", "true"):
        run = measured if own else measured_without_sinks
        found[kind] = run(path, *settings, f"training.gradient_checkpointing={kind}")
    same(found["false"], found["selective"])
    same(found["false"], found["true"])
    for key in ("kept", "peak"):
        none, some, most = (found[kind][key] for kind in ("false", "selective", "true"))
        assert most < some < none, key
    assert found["selective"]["kept"] < 0.8 * found["false"]["kept"]


def measured_without_sinks(path: Path, *overrides: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashsink.Probe.sinks", property(lambda self: []))
        return measured(path, *overrides)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.name()] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "again"), [("false", 0), ("selective", 0), ("true", 1)])
def test_expensive_operators_run_once(recipe: Recipe, kind: str, again: int) -> None:
    """Attention, and the products of a layer's own matrices: q, k, v, o, gate and up."""
    model, examples = prepared(load_config(str(recipe()), [f"training.gradient_checkpointing={kind}"]))
    batch = collate(examples)
    layers = model.decoder.config.num_hidden_layers
    counts = []
    with Counting() as counting:
        terms = model(batch)
        counts.append(counting.calls.copy())
        (terms.cross_entropy + terms.decorrelation).backward()
    rest = counting.calls - counts[0]
    assert counts[0]["flashsink::attention"] == layers
    assert rest["flashsink::attention"] == again * layers
    # of every layer two gradients of an adapter's input, two of its weights for q and v, seven of frozen products
    plain = layers * (2 * (2 + 2) + 7)
    thin = {"false": 0, "selective": 2, "true": 4}[kind]  # products of adapters that run again
    own = {"false": 0, "selective": 0, "true": 6}[kind]
    others = 1 + 3  # the vocabulary's matrix; the projector's two, of which the first has no gradient to hand on
    assert rest["aten::mm"] == plain + others + layers * (thin + own), rest["aten::mm"]


def test_products_with_a_bias_run_once() -> None:
    """Qwen2's q, k and v."""
    from transformers import Qwen2Config, Qwen2Model

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen2Model(Qwen2Config(vocab_size=50, num_hidden_layers=2, **sizes)).train().requires_grad_(False)
    again = []
    for context in ({}, {"context_fn": options.selective(model.config)}):
        model.gradient_checkpointing_enable({"use_reentrant": False, **context})
        out = model(inputs_embeds=torch.randn(2, 7, 32).requires_grad_(), use_cache=False).last_hidden_state
        with Counting() as counting:
            out.sum().backward()
        again.append(counting.calls["aten::addmm"])
    assert again == [2 * 3, 0]


# The cross entropy


def states(count: int, hidden: int = 16, vocabulary: int = 300) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(hidden, vocabulary, bias=False).requires_grad_(False)
    x = torch.randn(count, hidden)
    targets = torch.randint(vocabulary, (count,))
    targets[::2] = head(x).argmax(dim=-1)[::2]  # some are right
    return head, x.requires_grad_(), targets


@pytest.mark.parametrize("count", [1, CHUNKS - 1, CHUNKS, 3 * CHUNKS + 2])
def test_chunks_give_the_same_loss_gradient_and_count(count: int) -> None:
    head, x, targets = states(count)
    results = []
    for how in ("plain", "chunked"):
        loss, right = label_loss(head, x, targets, how)
        first, second = (torch.autograd.grad(2.0 * loss, x, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, second)  # as for the norms of both loss terms
        results.append((loss.detach(), right, first))
    torch.testing.assert_close(results[0], results[1])
    assert int(results[0][1]) >= (count + 1) // 2 and float(results[0][2].abs().max()) > 0.1


def test_chunks_hold_a_part_of_the_logits() -> None:
    from bench.runner.measure import peak_memory

    head, x, targets = states(64, vocabulary=20_000)
    peaks = {}
    for how in ("plain", "chunked"):
        peaks[how] = peak_memory(lambda how=how: label_loss(head, x, targets, how)[0].backward(), CPU)
    whole = 64 * 20_000 * 4
    assert 2 * whole <= peaks["plain"] and peaks["chunked"] < 1.1 * peaks["plain"] / CHUNKS


# Liger


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A stand-in for the package: it keeps the options that it was called with, and its loss is torch's."""
    calls: list[dict[str, Any]] = []

    class Loss(nn.Module):
        def __init__(self, *, reduction: str, return_predicted_tokens: bool) -> None:
            super().__init__()
            assert return_predicted_tokens and reduction == "sum"

        def forward(self, weight: Tensor, x: Tensor, targets: Tensor, bias: Tensor | None) -> Any:
            logits = nn.functional.linear(x, weight, bias)
            loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            return SimpleNamespace(loss=loss, predicted_tokens=logits.argmax(dim=-1))

    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    inner._apply_liger_kernel_to_instance = lambda **given: calls.append(given)  # type: ignore[attr-defined]
    inner.LigerFusedLinearCrossEntropyLoss = Loss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    yield calls


@pytest.mark.parametrize("key", ["training.kernels", "loss.cross_entropy"])
def test_liger_needs_its_package_and_a_cuda_device(
    recipe: Recipe, key: str, one_process: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    config = load_config(str(recipe()), [f"{key}=liger"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=rf"^{key}: .*need a CUDA device.* cpu; set it to plain$"):
            make_trainer(dataclasses.replace(config))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError, match=rf"^{key}: Liger is missing .*pip install 'flashsink\[liger\]'$"):
        options.check(config, torch.device("cuda"))
    request.getfixturevalue("liger")
    options.check(config, torch.device("cuda"))


def test_liger_takes_over_all_but_the_loss(recipe: Recipe, liger: list[dict[str, Any]]) -> None:
    model, _ = prepared(load_config(str(recipe()), ["training.kernels=liger"]))
    (call,) = liger
    assert call.pop("model") is model.decoder
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert call == {"rope": True, "swiglu": True, "rms_norm": True, **off}
    model.decoder.config.model_type = "gemma"
    with pytest.raises(UserError, match=r"^training\.kernels: .*llama, mistral, qwen2, qwen3.*gemma"):
        options.use_liger(model.decoder)


def test_ligers_loss_stands_in_for_ours(recipe: Recipe, liger: list[dict[str, Any]]) -> None:
    path = recipe()
    same(measured(path), measured(path, "loss.cross_entropy=liger"))


# torch.compile


def steps(model: SpeechLLM, batches: list[Batch]) -> list[Any]:
    """Loss and gradients of every batch, and its loss alone, as in a validation."""
    found = []
    for batch in batches:
        model.zero_grad()
        terms = model.train()(batch)
        (terms.cross_entropy + 3.0 * (terms.decorrelation or 0.0)).backward()
        gradients = {name: p.grad for name, p in model.trainable().items() if p.grad is not None}
        with torch.no_grad():
            loss = model.eval()(batch).cross_entropy
        found.append((terms.cross_entropy.detach(), terms.decorrelation, gradients, loss))
    return found


@pytest.mark.parametrize(
    ("settings", "graphs"),
    [
        ([], 8),  # MLP and norm, of one row and of many, with gradients and without
        (["training.packed=true"], 6),
        (
            [
                "training.gradient_checkpointing=true",
                "loss.decorrelation=0",
                "model.lora.targets=[q_proj,v_proj,gate_proj,down_proj]",
            ],
            8,
        ),
    ],
    ids=str,
)
def test_compiled_parts_give_the_same_in_few_graphs(recipe: Recipe, settings: list[str], graphs: int) -> None:
    model, examples = prepared(load_config(str(recipe()), settings))
    groups = ([0, 1, 2], [3, 4, 5], [1, 3], [2], [0, 1, 2, 3, 4], [5], [0, 4])
    batches = [collate([examples[i] for i in group]) for group in groups]
    want = steps(model, batches)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options.compile_parts(model, backend="aot_eager")
    torch.testing.assert_close(steps(model, batches), want, rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert 0 < counters["stats"]["unique_graphs"] <= graphs and not counters["graph_break"], counters


@pytest.mark.slow
def test_a_compiled_training_is_the_plain_one(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """By torch's own compiler, down to C++."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    path = tiny_recipe(tmp_path, **{"loss.decorrelation": 2.0, "training.accumulation": 2, "training.utterances": 2})
    rows = [
        read_metrics(train(load_config(str(path), [f"run={tmp_path / value}", f"training.compile={value}"])))
        for value in ("false", "true")
    ]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for one, other in zip(*rows, strict=True):
        for key in ("ce", "decorrelation", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["loss.cross_entropy=some"], "loss.cross_entropy"),
        (["training.kernels=fast"], "training.kernels"),
        (["training.gradient_checkpointing=half"], "training.gradient_checkpointing"),
        (
            ["training.gradient_checkpointing=selective", "training.gradient_norms_every=1"],
            "training.gradient_norms_every",
        ),
        (["loss.cross_entropy=liger", "training.gradient_norms_every=1"], "training.gradient_norms_every"),
        (["training.compile=true", "training.gradient_checkpointing=selective"], "training.compile"),
        (["training.compile=true", "training.kernels=liger"], "training.compile"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(recipe: Recipe, settings: list[str], key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}: .*") as caught:
        load_config(str(recipe()), settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["loss.cross_entropy=liger", "training.compile=true"])
def test_what_zero_3_does_not_know_is_refused(
    recipe: Recipe, liger: list[dict[str, Any]], tmp_path: Path, setting: str
) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    for stage in ("deepspeed.stage=3", f"deepspeed.config={tmp_path / 'ds.json'}"):
        config = load_config(str(recipe()), [setting, stage])
        with pytest.raises(UserError, match=rf"^{setting.partition('=')[0]}: .*ZeRO stage 3"):
            options.check(config, torch.device("cuda"))
