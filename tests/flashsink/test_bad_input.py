"""Wrong shapes, dtypes, devices and values raise ValueError naming the argument; names of backends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import flashsink
from flashsink import checks as _checks

B, H, HK, S, D = 2, 4, 2, 6, 8
NAMES = {"reference", "cpu", "sdpa", "triton"}


def ints(*values):
    return torch.tensor(values)


def qkv(**changes):
    tensors = {"q": torch.randn(B, H, S, D), "k": torch.randn(B, HK, S, D), "v": torch.randn(B, HK, S, D)}
    return tensors | changes


def attention(**options):
    tensors = qkv(**{n: options.pop(n) for n in ("q", "k", "v") if n in options})
    return flashsink.attention(**tensors, **options)


def calibrated(**options):
    tensors = qkv(**{n: options.pop(n) for n in ("q", "k", "v") if n in options})
    sinks = options.pop("sinks", torch.zeros(B, H, S, dtype=torch.bool))
    return flashsink.calibrated_attention(**tensors, sinks=sinks, **options)


def decorrelation(hidden_states=None, spans=None, **options):
    hidden_states = torch.randn(3, B, S, D) if hidden_states is None else hidden_states
    return flashsink.decorrelation_loss(hidden_states, ints(3, 4) if spans is None else spans, **options)


def activation(hidden_states=None, **options):
    hidden_states = torch.randn(3, B, S, D) if hidden_states is None else hidden_states
    return flashsink.activation_stats(hidden_states, **options)


def packed(**options):
    one = {"q": torch.randn(1, H, S, D), "k": torch.randn(1, HK, S, D), "v": torch.randn(1, HK, S, D)}
    return attention(**(one | options))


def packed_decorrelation(**options):
    return flashsink.decorrelation_loss(torch.randn(3, 1, S, D), **({"spans": ints(2, 2)} | options))


def check(call, argument, options):
    with pytest.raises(ValueError) as caught:
        call(**options)
    # messages begin with the argument: "lengths: expected ..., got ..."
    assert str(caught.value).split(":")[0].split("[")[0] == argument
    assert "expected" in str(caught.value) or argument == "backend"


BAD_QKV = [
    ("q", {"q": torch.randn(H, S, D)}),
    ("q", {"q": None}),
    ("q", {"q": torch.randn(B, H, S + 1, D)}),
    ("q", {"q": torch.ones(B, H, S, D, dtype=torch.long)}),
    ("q", {"q": torch.ones(B, H, S, D, dtype=torch.complex64)}),
    ("q", {"q": torch.randn(B, H, S, 0), "k": torch.randn(B, HK, S, 0)}),
    ("k", {"k": torch.randn(B, HK, S)}),
    ("k", {"k": torch.randn(B, 3, S, D), "v": torch.randn(B, 3, S, D)}),
    ("k", {"k": torch.randn(B, 0, S, D), "v": torch.randn(B, 0, S, D)}),
    ("k", {"k": torch.randn(B + 1, HK, S, D), "v": torch.randn(B + 1, HK, S, D)}),
    ("k", {"k": torch.randn(B, HK, S, D + 1), "v": torch.randn(B, HK, S, D + 1)}),
    ("k", {"k": torch.randn(B, HK, S, D).half()}),
    ("k", {"k": torch.randn(B, HK, S, D, device="meta")}),
    ("v", {"v": torch.randn(B, HK, S + 1, D)}),
    ("v", {"v": torch.randn(B, HK, S, 0)}),
    ("v", {"v": torch.randn(B, HK, D)}),
    ("v", {"v": torch.randn(B, 1, S, D)}),
    ("v", {"v": torch.randn(B, HK, S, D).double()}),
    ("v", {"v": torch.randn(B, HK, S, D, device="meta")}),
    ("v", {"v": [1.0]}),
]


def vectors(name):
    """What is no vector of two integers on the CPU."""
    bad = [ints(1, 2, 3), ints(1), torch.tensor(3), ints(3, 4)[:, None], [3, 4], torch.tensor([3.0, 4.0])]
    bad += [torch.tensor([True, False]), ints(3, 4).to("meta")]
    return [(name, {name: value}) for value in bad]


BAD_LENGTHS = [
    *vectors("lengths"),
    ("lengths", {"lengths": ints(-1, 4)}),
    ("lengths", {"lengths": ints(3, S + 1)}),
    ("lengths", {"lengths": ints(3, S), "starts": ints(0, 1)}),
]
BAD_STARTS = [*vectors("starts"), ("starts", {"starts": ints(-1, 0)}), ("starts", {"starts": ints(0, S + 1)})]
BAD_BOUNDS = [
    ("cu_seqlens", {"cu_seqlens": ints(0)}),
    ("cu_seqlens", {"cu_seqlens": ints(1, 4, 6)}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 4, 3)}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 4, S + 1)}),
    ("cu_seqlens", {"cu_seqlens": ints(0, -1, 4)}),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 3.0, 6.0])}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 3, 6)[None]}),
    ("cu_seqlens", {"cu_seqlens": [0, 3, 6]}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 3, 6).to("meta")}),
    ("cu_seqlens", {"cu_seqlens": ints(0, 3, 6), "starts": ints(0)}),
]
BAD_HIDDEN = [
    ("hidden_states", {"hidden_states": torch.randn(B, S, D)}),
    ("hidden_states", {"hidden_states": torch.randn(1, 3, B, S, D)}),
    ("hidden_states", {"hidden_states": []}),
    ("hidden_states", {"hidden_states": torch.randn(0, B, S, D)}),
    ("hidden_states", {"hidden_states": torch.randn(3, B, S, 0)}),
    ("hidden_states", {"hidden_states": [torch.randn(B, S, D), torch.randn(B, S, D + 1)]}),
    ("hidden_states", {"hidden_states": [torch.randn(B, S, D), torch.randn(B, S - 1, D)]}),
    ("hidden_states", {"hidden_states": [torch.randn(S, D)]}),
    ("hidden_states", {"hidden_states": torch.ones(3, B, S, D, dtype=torch.long)}),
    ("hidden_states", {"hidden_states": [torch.randn(B, S, D), torch.randn(B, S, D, device="meta")]}),
    ("hidden_states", {"hidden_states": [torch.randn(B, S, D), None]}),
]


@pytest.mark.parametrize(
    ("argument", "options"),
    BAD_QKV
    + BAD_LENGTHS
    + BAD_STARTS
    + [
        ("cu_seqlens", {"cu_seqlens": ints(0, 3, 6)}),  # two rows
        *((name, options | {"return_stats": True}) for name, options in vectors("query_starts")),
    ],
)
def test_attention(argument, options):
    check(attention, argument, options)


BLOCKS = torch.zeros(B, S, dtype=torch.long)
BAD_PATTERNS = [
    *((name, {name: bad}) for name in ("window", "chunk") for bad in (0, -3, 2.0, True, ints(3), "4")),
    *(("softcap", {"softcap": bad}) for bad in (0, 0.0, -1.0, float("nan"), float("inf"), True, torch.tensor(2.0))),
    *vectors("prefix"),
    ("prefix", {"prefix": ints(-1, 4)}),
    ("prefix", {"prefix": ints(1, 4), "lengths": ints(6, 3)}),
    *(("blocks", {"blocks": bad}) for bad in (BLOCKS[:1], BLOCKS[:, 1:], BLOCKS[0], BLOCKS.float(), BLOCKS > 0, [1])),
    ("blocks", {"blocks": BLOCKS.to("meta")}),
]


@pytest.mark.parametrize(("argument", "options"), BAD_PATTERNS)
def test_patterns(argument, options):
    check(attention, argument, options)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("prefix", {"prefix": ints(2)}),  # one a sequence
        ("prefix", {"prefix": ints(3, 4)}),
        ("blocks", {"blocks": torch.zeros(2, S, dtype=torch.long)}),
    ],
)
def test_packed_patterns(argument, options):
    check(packed, argument, options | {"cu_seqlens": ints(0, 3, 6)})


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(scale):
    check(attention, "scale", {"scale": scale})


@pytest.mark.parametrize(
    ("argument", "options"),
    BAD_BOUNDS
    + [
        ("cu_seqlens", {"cu_seqlens": ints(0, 3, 6), "lengths": ints(6)}),
        ("cu_seqlens", {"cu_seqlens": ints(0, 3, 6), "q": torch.randn(1, H, S - 1, D)}),
        ("query_starts", {"cu_seqlens": ints(0, 3, 6), "query_starts": ints(2), "return_stats": True}),
    ],
)
def test_packed_attention(argument, options):
    check(packed, argument, options)


@pytest.mark.parametrize(
    ("argument", "options"),
    BAD_QKV
    + BAD_LENGTHS
    + BAD_STARTS
    + [
        ("sinks", {"sinks": torch.zeros(B, H, S)}),
        ("sinks", {"sinks": torch.zeros(B, HK, S, dtype=torch.bool)}),
        ("sinks", {"sinks": torch.zeros(B, H, S + 1, dtype=torch.bool)}),
        ("sinks", {"sinks": torch.zeros(H, S, dtype=torch.bool)}),
        ("sinks", {"sinks": None}),
        ("sinks", {"sinks": torch.zeros(B, H, S, dtype=torch.bool, device="meta")}),
        ("beta", {"beta": -0.1}),
        ("beta", {"beta": 1.5}),
        ("beta", {"beta": float("nan")}),
    ],
)
def test_calibrated_attention(argument, options):
    check(calibrated, argument, options)


@pytest.mark.parametrize(
    ("argument", "options"),
    BAD_HIDDEN
    + BAD_STARTS
    + [
        *vectors("spans"),
        ("spans", {"spans": ints(-1, 2)}),
        ("spans", {"spans": ints(1, S + 1)}),
        ("spans", {"spans": ints(1, S), "starts": ints(0, 1)}),
        ("margin", {"margin": -0.1}),
        ("margin", {"margin": 1.0}),
        ("margin", {"margin": float("nan")}),
    ],
)
def test_decorrelation_loss(argument, options):
    check(decorrelation, argument, options)


@pytest.mark.parametrize(
    ("argument", "options"),
    BAD_BOUNDS
    + [
        ("spans", {"cu_seqlens": ints(0, 3, 6), "spans": ints(1)}),
        ("spans", {"cu_seqlens": ints(0, 3, 6), "spans": ints(1, 4)}),
        ("spans", {"cu_seqlens": ints(0, 3, 6), "spans": ints(-1, 3)}),
    ],
)
def test_packed_decorrelation_loss(argument, options):
    check(packed_decorrelation, argument, options)


@pytest.mark.parametrize(("argument", "options"), BAD_HIDDEN + BAD_LENGTHS + BAD_STARTS)
def test_activation_stats(argument, options):
    check(activation, argument, options)


@pytest.mark.parametrize("call", [attention, calibrated, decorrelation, activation])
def test_messages_show_the_value(call):
    with pytest.raises(ValueError, match=r"starts: .*got .*\[0, 99\]"):
        call(starts=ints(0, 99))


@pytest.mark.parametrize("call", [attention, calibrated, decorrelation, activation])
def test_unknown_backend(call):
    with pytest.raises(ValueError, match="backend.*'cuda'"):
        call(backend="cuda")


@pytest.mark.parametrize("call", [attention, calibrated, decorrelation, activation])
def test_a_backend_that_is_not_usable_is_refused_with_its_reason(call):
    state = flashsink.backends()
    blocked = [name for name in NAMES if state[name] != "usable"]
    for name in blocked:
        with pytest.raises(ValueError, match="backend") as caught:
            call(backend=name)
        assert name in str(caught.value) and state[name] in str(caught.value)
    for name in {"reference", "cpu"} - set(blocked):
        assert call(backend=name) is not None


def test_backends_are_exactly_four_and_the_reference_is_always_there():
    state = flashsink.backends()
    assert set(state) == NAMES
    assert state["reference"] == "usable"
    assert all(isinstance(reason, str) and reason for reason in state.values())


@pytest.mark.integration
def test_importing_flashsink_imports_neither_transformers_nor_avsr():
    code = "import sys, flashsink; print(sorted({'transformers', 'peft', 'avsr', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("bounds", [[3, 5, 9], [0, 7, 4, 30], [-2, 2, 2, -5], [0, 0, 0]])
def test_unchecked_bounds_are_clamped_to_the_tokens(monkeypatch, bounds):
    """As on a GPU, where looking at values would synchronise: no kernel may leave its tensors."""
    monkeypatch.setattr(_checks, "check_values", lambda *_: False)
    layout = _checks.resolve_layout(1, 9, torch.device("cpu"), cu_seqlens=torch.tensor(bounds))
    assert layout.starts[0] == 0 and bool((layout.lengths >= 0).all())
    assert torch.equal(layout.starts[1:], (layout.starts + layout.lengths)[:-1])
    assert int((layout.starts + layout.lengths).max()) <= 9
