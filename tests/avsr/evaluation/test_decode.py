"""Greedy and beam decoding: a hypothesis depends on nothing but its own utterance."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from avsr.config import CompressionConfig, DecodeConfig, EncoderConfig, LLMConfig, LoraConfig, ModelConfig, StreamConfig
from avsr.config import ProjectorConfig as Projector
from avsr.data.batches import Example, collate
from avsr.data.manifest import Utterance
from avsr.evaluation.decode import token_budget, transcribe, transcribe_batch
from avsr.models.llm import load_llm
from avsr.models.speech_llm import SpeechLLM

WIDTH = 32
SECONDS = [0.4, 1.3, 0.4, 2.2, 0.7]


def build(folder: Path) -> SpeechLLM:
    """A speech LLM on the tiny Llama, whose random adapters do something."""
    config = ModelConfig(
        audio=StreamConfig(EncoderConfig(name="none"), CompressionConfig(rate=4)),
        llm=LLMConfig(name=str(folder)),
        projector=Projector(hidden=16),
        lora=LoraConfig(rank=4, dropout=0.3),
    )
    torch.manual_seed(0)
    model = SpeechLLM(config, load_llm(config.llm), {"audio": WIDTH})
    with torch.no_grad():
        for name, parameter in model.own_state().items():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
            elif name.startswith("projectors.") and parameter.dim() == 1:
                parameter.normal_(0, 1)
    return model.eval()


@pytest.fixture(scope="module")
def model(tiny_llm: Path) -> SpeechLLM:
    return build(tiny_llm)


def make_examples(seconds: list[float]) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    return [
        Example(
            Utterance(id=f"u{i}", audio=Path(f"u{i}.wav"), text="", duration=duration),
            {"audio": 3 * torch.randn(round(duration * 50), WIDTH, generator=generator)},
            [],
        )
        for i, duration in enumerate(seconds)
    ]


def lengths(examples: list[Example]) -> list[float]:
    return [example.utterance.duration for example in examples]


@pytest.fixture
def examples() -> list[Example]:
    return make_examples(SECONDS)


def naive(model: SpeechLLM, example: Example, budget: int) -> str:
    """The most likely token again and again, without a cache."""
    rows = model.assemble(collate([example]), with_text=False)
    sequence, ids = rows.embeddings, []
    with torch.no_grad():
        while len(ids) < budget:
            best = int(model.llm(inputs_embeds=sequence).logits[0, -1].argmax())
            if best == model.eos:
                break
            ids.append(best)
            sequence = torch.cat([sequence, model.decoder.get_input_embeddings()(torch.tensor([[best]]))], dim=1)
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def decode(model: SpeechLLM, examples: list[Example], config: DecodeConfig) -> list[str]:
    return [hypotheses[0].text for hypotheses in transcribe_batch(model, collate(examples), config)]


def test_greedy_is_the_most_likely_token_again_and_again(model: SpeechLLM, examples: list[Example]) -> None:
    config = DecodeConfig(base_tokens=6, tokens_per_second=10.0)
    expected = [naive(model, example, token_budget(config, example.utterance.duration)) for example in examples]
    assert decode(model, examples, config) == expected
    assert len(set(expected)) == len(expected) and all(expected)  # the oracle is no constant


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("base", [3, 12])
def test_utterances_alone_as_in_a_batch(model: SpeechLLM, beams: int, base: int) -> None:
    """Also where the budget ends a text: other utterances then go on for longer."""
    examples = make_examples([0.4, 1.3, 0.2, 2.2, 0.6, 0.4, 1.9, 0.5, 0.3, 2.6])
    config = DecodeConfig(beams=beams, base_tokens=base, tokens_per_second=10.0)
    together = decode(model, examples, config)
    assert len(set(together)) == len(together)
    assert [decode(model, [example], config)[0] for example in examples] == together
    assert decode(model, examples[::-1], config) == together[::-1]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_long_neighbour_does_not_cut_a_short_utterance(model: SpeechLLM, beams: int) -> None:
    """The long one leaves almost none of the model's 256 positions."""
    short, long = make_examples([0.5, 17.6])
    config = DecodeConfig(beams=beams, base_tokens=16, tokens_per_second=4.0)
    assert decode(model, [short, long], config)[0] == decode(model, [short], config)[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_twice_whatever_the_seed(model: SpeechLLM, examples: list[Example], beams: int) -> None:
    config = DecodeConfig(beams=beams)
    torch.manual_seed(1)
    first = decode(model, examples, config)
    torch.manual_seed(2)
    assert decode(model, examples, config) == first


def test_decoding_leaves_no_dropout_on(model: SpeechLLM, examples: list[Example]) -> None:
    first = decode(model, examples, DecodeConfig())
    model.train()
    assert decode(model, examples, DecodeConfig()) == first
    model.eval()


@pytest.mark.parametrize("beams", [1, 3])
def test_the_head_reads_contiguous_states(model: SpeechLLM, examples: list[Example], beams: int) -> None:
    """A slice of the prompt's states would be multiplied by one copy of the vocabulary's matrix for every row."""
    seen: list[bool] = []
    hook = model.decoder.lm_head.register_forward_hook(lambda head, args, out: seen.append(args[0].is_contiguous()))
    transcribe_batch(model, collate(examples), DecodeConfig(beams=beams))
    hook.remove()
    assert len(seen) > 1 and all(seen)
    assert not model.decoder.lm_head._forward_pre_hooks


def test_transcribe_gives_every_index_once(model: SpeechLLM, examples: list[Example]) -> None:
    config = DecodeConfig(batch=2, base_tokens=6, tokens_per_second=10.0)
    found = list(transcribe(model, examples.__getitem__, lengths(examples), config))
    assert sorted(index for index, _ in found) == list(range(len(examples)))
    assert [best[0].text for _, best in sorted(found)] == decode(model, examples, config)
    assert list(transcribe(model, [].__getitem__, [], config)) == []


@pytest.mark.parametrize("beams", [1, 3])
def test_a_generation_config_of_the_models_own_changes_nothing(
    model: SpeechLLM, examples: list[Example], tiny_llm: Path, tmp_path: Path, beams: int
) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(tiny_llm, folder)
    leaks = {
        "do_sample": True,
        "temperature": 3.0,
        "top_k": 5,
        "top_p": 0.7,
        "repetition_penalty": 4.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 2,
        "length_penalty": -5.0,
        "max_length": 5,
        "max_new_tokens": 2,
        "min_new_tokens": 9,
        "suppress_tokens": list(range(5, 40)),
        "eos_token_id": [2, 7, 8, 9],
    }
    (folder / "generation_config.json").write_text(json.dumps(leaks))
    other = build(folder)
    config = DecodeConfig(beams=beams)
    expected = decode(model, examples, config)
    assert decode(other, examples, config) == expected
    assert decode(other, examples, config) == expected


def test_the_budget_grows_with_the_duration() -> None:
    config = DecodeConfig(base_tokens=8, tokens_per_second=12.0)
    assert [token_budget(config, s) for s in (0.0, 0.5, 1.0, 1.01, 10.0)] == [8, 14, 20, 21, 128]
    assert token_budget(DecodeConfig(base_tokens=3, tokens_per_second=0.0), 60.0) == 3


def test_texts_end_at_their_own_budget_and_not_at_32(model: SpeechLLM) -> None:
    """This model seldom ends by itself, and one token is one character."""
    model = _without_end(model)
    examples = make_examples([0.2, 1.0, 5.0])
    config = DecodeConfig(base_tokens=4, tokens_per_second=10.0)
    rows = model.assemble(collate(examples), with_text=False, left=True)
    assert rows.embeddings.shape[1] + 54 < model.max_positions
    for example, text in zip(examples, decode(model, examples, config), strict=True):
        budget = 4 + math.ceil(10.0 * example.utterance.duration)
        assert len(naive(model, example, budget)) == len(text) <= budget
    assert len(decode(model, examples, config)[2]) > 40
    assert len(decode(model, examples, config)[0]) <= 6


def _without_end(model: SpeechLLM) -> SpeechLLM:
    model.eos = 3  # <unk>: hardly ever the most likely token
    return model


@pytest.fixture(autouse=True)
def restore_end(request: pytest.FixtureRequest, model: SpeechLLM) -> Callable[[], None]:
    eos = model.eos
    request.addfinalizer(lambda: setattr(model, "eos", eos))
    return lambda: None


def test_what_follows_the_end_token_is_left_out(model: SpeechLLM, examples: list[Example]) -> None:
    config = DecodeConfig(base_tokens=6, tokens_per_second=10.0)
    whole = decode(model, examples, config)
    third = model.tokenize(whole[1])[3]
    model.eos = third  # now the fourth character ends the text
    shorter = decode(model, examples, config)
    for before, after in zip(whole, shorter, strict=True):
        assert before.startswith(after)
        assert model.tokenizer.decode([third]) not in after
    assert len(shorter[1]) <= 3
