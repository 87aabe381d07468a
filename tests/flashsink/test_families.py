"""Twenty families of models with flashsink attached against without, and that the comparison sees what is wrong.

The cells, and what "exact" means, are those of ``bench.families``;
``python -m bench.families --verbose --classes NAME`` prints one family's.
"""

from __future__ import annotations

import types

import pytest
import torch

import flashsink
from bench.families import build, judge, store, work
from bench.families.judge import CRASH, EXACT, NONE, REFUSED, WRONG

TEXT = ("none", "ones", "right", "left", "generate")
ENCODER = ("none", "ones", "right")
WINDOW = ("window: none", "window: left", "window: generate")
CHUNK = ("chunk: none", "chunk: left", "chunk: generate")
IMAGE = ("image", "image left", "image generate")
AUDIO = ("audio", "audio left", "audio generate")

# What must be exact; any other cell may be refused by name. A mask with a hole must be.
FAMILIES = {
    "LlamaForCausalLM": (*TEXT, "packed", "beams", "static cache", "in two", "compiled"),
    "Qwen2ForCausalLM": (*TEXT, *WINDOW, "packed"),
    "Qwen3ForCausalLM": (*TEXT, *WINDOW, "packed"),
    "MistralForCausalLM": (*TEXT, *WINDOW, "window: in two"),
    "MixtralForCausalLM": TEXT,
    "Gemma2ForCausalLM": (*TEXT, *WINDOW),
    "Gemma3ForConditionalGeneration": (*TEXT, *WINDOW, *IMAGE),
    "Phi3ForCausalLM": TEXT,
    "Olmo2ForCausalLM": TEXT,
    "Llama4ForCausalLM": (*TEXT, *CHUNK),
    "GptOssForCausalLM": (*TEXT, *WINDOW),
    "DeepseekV3ForCausalLM": TEXT,
    "GPT2LMHeadModel": (*TEXT, "compiled"),
    "GPTNeoXForCausalLM": TEXT,
    "FalconForCausalLM": TEXT,
    "OPTForCausalLM": TEXT,
    "Qwen3NextForCausalLM": TEXT,
    "PaliGemmaForConditionalGeneration": (*TEXT, *IMAGE),
    "Qwen2AudioForConditionalGeneration": (*TEXT, *AUDIO),
    "VoxtralForConditionalGeneration": (*TEXT, *AUDIO),
    "Qwen2_5_VLForConditionalGeneration": (*TEXT, *IMAGE, "(3,1,S)", "(4,1,S)"),
    "WhisperForConditionalGeneration": TEXT,
    "BertModel": ENCODER,
    "Wav2Vec2Model": ENCODER,
}


@pytest.fixture(scope="module")
def entries():
    work.prepare()
    return {entry.name: entry for entry in build.entries()}


@pytest.fixture(autouse=True)
def quiet_and_fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.integration
@pytest.mark.parametrize("name", FAMILIES)
def test_family(entries, name):
    result = judge.judge(entries[name], compile="compiled" in FAMILIES[name])
    found = {cell: verdict for cell, verdict in result.verdicts.items() if verdict.kind in (WRONG, CRASH)}
    assert not found
    assert not result.unchecked
    assert {cell: result.verdicts[cell] for cell in FAMILIES[name] if result.verdicts[cell].kind != EXACT} == {}
    holes = [verdict.kind for cell, verdict in result.verdicts.items() if cell.endswith("hole")]
    assert set(holes) <= {REFUSED, EXACT}  # exact in audio, where it leaves no frame out


# ---- the comparison itself


class Nothing:
    """A probe that observes nothing."""

    def __init__(self, undo=lambda: None):
        self.detach = undo


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    ["LlamaForCausalLM", "Gemma3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Wav2Vec2Model"],
)
def test_transformers_against_itself_is_exact(entries, name):
    result = judge.judge(entries[name], lambda model: Nothing(), compile=name == "LlamaForCausalLM")
    assert {verdict.kind for verdict in result.verdicts.values()} <= {EXACT, NONE}
    assert {result.verdicts[cell].kind for cell in FAMILIES[name]} == {EXACT}
    assert store.of_class(result.verdicts) == (EXACT, "")


def swapped(change):
    """A function like ``attach`` under which attention is eager's of q, k, v and what ``change(mask)`` makes of the
    additive mask (B, 1, Sq, Sk)."""

    def attach(model):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        def attend(module, q, k, v, mask, scaling=None, **others):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
            return (change(scores + mask[..., : k.shape[2]]).softmax(-1) @ v).transpose(1, 2).contiguous(), None

        AttentionInterface.register("families_test", attend)
        AttentionMaskInterface.register("families_test", eager_mask)
        before = model.config._attn_implementation
        model.set_attn_implementation("families_test")
        return Nothing(lambda: model.set_attn_implementation(before))

    return attach


def without_window(scores):
    tokens = scores.shape[-1]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(tokens - scores.shape[-2] + 1)
    return scores.masked_fill(later, -1e30).where(later | (scores > -1e30), 0)


FAULTS = {
    "a window left out": (without_window, WINDOW[:2]),
    "a mask shifted by one": (lambda scores: scores.roll(1, -1), ("none", "left", "generate", "beams", "in two")),
    "scores off by a thousandth": (lambda scores: scores * 1.001, ("none", "left", "generate")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_attention_is_a_silent_difference(entries, fault):
    change, cells = FAULTS[fault]
    result = judge.judge(entries["MistralForCausalLM"], swapped(change), compile=False)
    assert {cell: result.verdicts[cell].kind for cell in cells} == dict.fromkeys(cells, WRONG)
    assert result.verdicts["detach"].kind == EXACT
    assert store.of_class(result.verdicts)[0] == WRONG
    if fault == "a window left out":
        assert result.verdicts["none"].kind == EXACT


def test_the_swap_alone_is_exact(entries):
    result = judge.judge(entries["MistralForCausalLM"], swapped(lambda scores: scores), only="^(none|left|generate)$")
    assert {verdict.kind for verdict in result.verdicts.values()} == {EXACT}


def misread(**changes):
    """A function like ``attach`` whose probe reads as flashsink's does but for ``changes``."""

    class Misread:
        def __init__(self, model):
            self.real = flashsink.attach(model)
            self.detach = self.real.detach

    for name in ("sinks_by_layer", "decorrelation_loss", "activations"):
        change = changes.get(name, lambda value: value)
        setattr(Misread, name, property(lambda self, name=name, change=change: change(getattr(self.real, name))))
    return Misread


def scaled_layer(sinks):
    return {n: types.SimpleNamespace(received=s.received * (1.01 if n == 2 else 1)) for n, s in sinks.items()}


READINGS = {
    "received": {"sinks_by_layer": scaled_layer},
    "decorrelation_loss": {"decorrelation_loss": lambda loss: loss + 3e-4},
    "activations": {"activations": lambda made: types.SimpleNamespace(max_abs=made.max_abs * 1.001)},
    "gradient": {"decorrelation_loss": lambda loss: loss.detach()},
}


@pytest.mark.parametrize("what", READINGS)
def test_a_wrong_statistic_is_a_silent_difference(entries, what):
    result = judge.judge(entries["LlamaForCausalLM"], misread(**READINGS[what]), only="^(none|left)$", compile=False)
    for cell in ("none", "left"):
        assert result.verdicts[cell].kind == WRONG
        assert result.verdicts[cell].note.startswith(what)


def test_a_fault_in_flashsinks_own_attention_is_seen(entries, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attach(model):
        probe = flashsink.attach(model)
        name = model.config._attn_implementation
        attend = ALL_ATTENTION_FUNCTIONS[name]
        moved = lambda *args, **kwargs: (attend(*args, **kwargs)[0].roll(1, 1), None)  # noqa: E731
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, moved)
        return probe

    result = judge.judge(entries["LlamaForCausalLM"], attach, only="^(none|left|generate)$", compile=False)
    assert {result.verdicts[cell].kind for cell in ("none", "left", "generate")} == {WRONG}


def failing(error):
    def attach(model):
        raise error

    return attach


def test_an_error_that_flashsink_did_not_raise_is_unclear(entries):
    for error in (KeyError("layer"), ValueError("shape: wrong"), RuntimeError("size: mismatch")):
        result = judge.judge(entries["LlamaForCausalLM"], failing(error), only="^(none|left)$", compile=False)
        assert {result.verdicts[cell].kind for cell in ("none", "left")} == {CRASH}
    refused = judge.of_error(_raised(lambda: flashsink.attach(torch.nn.Linear(2, 2))))
    assert refused.kind == REFUSED and refused.note.startswith("model:")
    assert judge.of_error(_raised(lambda: flashsink.attach(None))).kind == CRASH


def _raised(call):
    try:
        call()
    except Exception as error:
        return error


def test_what_detach_leaves_behind_is_seen(entries):
    def attach(model):
        return Nothing(lambda: model.model.set_attn_implementation("eager"))

    verdict = judge.judge(entries["LlamaForCausalLM"], attach, only="^none$", compile=False).verdicts["detach"]
    assert verdict.kind == WRONG and "sdpa became eager" in verdict.note

    def bias(model):
        def undo():
            model.lm_head.weight.data += 1e-6

        return Nothing(undo)

    verdict = judge.judge(entries["LlamaForCausalLM"], bias, only="^none$", compile=False).verdicts["detach"]
    assert verdict.kind == WRONG and "bits" in verdict.note


def test_rows_survive_a_cut_line_and_the_newest_counts(tmp_path):
    path = tmp_path / "families.jsonl"
    row = {"class": "A", "transformers": "5", "verdict": WRONG, "reason": "none: logits"}
    store.append(path, row)
    store.append(path, row | {"verdict": EXACT})
    store.append(path, row | {"class": "B"})
    with path.open("a") as file:
        file.write('{"class": "C", "transf')
    rows = store.read(path)
    assert {key: row["verdict"] for key, row in rows.items()} == {"A, 5": EXACT, "B, 5": WRONG}
    store.compact(path)
    assert store.read(path) == rows and len(path.read_text().splitlines()) == 2


@pytest.mark.integration
def test_a_class_that_takes_too_long_is_left_out_and_the_next_one_has_its_turn(entries):
    chosen = [entries["LlamaForCausalLM"], build.Entry("causal", "NoSuchModel", "LlamaConfig")]
    rows = {entry.name: row for entry, row in work.rows(chosen, workers=1, limit=0.0, compile=False)}
    assert rows["LlamaForCausalLM"]["verdict"] == store.LEFT_OUT
    assert rows["LlamaForCausalLM"]["reason"].startswith("no answer in 0 s")
    assert rows["NoSuchModel"]["verdict"] == store.LEFT_OUT
