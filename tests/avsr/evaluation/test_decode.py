"""Greedy and beam decoding: which hypotheses, with which scores, and that neither depends on the other utterances."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from avsr.cli import main
from avsr.config import DecodeConfig
from avsr.data.batches import Example, collate
from avsr.evaluation.decode import BUDGET, POSITIONS, Hypothesis, token_budget, transcribe, transcribe_batch
from avsr.models.speech_llm import SpeechLLM

SECONDS = [0.4, 1.3, 0.4, 2.2, 0.7, 0.9, 0.3]
PLAIN = DecodeConfig()
Make = Callable[..., SpeechLLM]


@pytest.fixture(scope="module")
def built(speech_llm: Make) -> SpeechLLM:
    return speech_llm(adapters=0.1, biases=1.0)


@pytest.fixture
def model(built: SpeechLLM) -> Iterator[SpeechLLM]:
    """It seldom ends a text by itself, and one token is one character."""
    eos = built.eos
    yield built
    built.eos = eos


@pytest.fixture(scope="module")
def ending(speech_llm: Make) -> SpeechLLM:
    """It ends texts at all lengths, not only at the budget."""
    model = speech_llm()
    with torch.no_grad():
        model.decoder.lm_head.weight[model.eos] *= 3
    return model


@pytest.fixture
def examples(make_examples: Callable[..., list[Example]]) -> list[Example]:
    return make_examples(SECONDS)


def naive(model: SpeechLLM, example: Example, budget: int, config: DecodeConfig = PLAIN) -> str:
    """The most likely token again and again, without a cache."""
    rows = model.assemble(collate([example]), with_text=False)
    sequence, ids = rows.embeddings, []
    with torch.no_grad():
        while len(ids) < budget:
            best = int(penalized(model.llm(inputs_embeds=sequence).logits[0, -1], ids, config).argmax())
            if best == model.eos:
                break
            ids.append(best)
            sequence = torch.cat([sequence, model.decoder.get_input_embeddings()(torch.tensor([[best]]))], dim=1)
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def penalized(values: torch.Tensor, tokens: Sequence[int], config: DecodeConfig) -> torch.Tensor:
    """Logits or log-probabilities (V,) of the token after ``tokens``: those in it are made smaller, and those that
    would complete a sequence of ``no_repeat_ngram`` tokens for the second time are forbidden."""
    size, values = config.no_repeat_ngram, values.double().clone()
    for token in set(tokens):
        values[token] = values[token] * config.repetition_penalty ** (1 if values[token] < 0 else -1)
    done = {tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)}
    for token in range(len(values)):
        if size and (*tokens[len(tokens) - size + 1 :], token) in done:
            values[token] = -torch.inf
    return values


def decode(model: SpeechLLM, examples: list[Example], config: DecodeConfig) -> list[str]:
    return [hypotheses[0].text for hypotheses in transcribe_batch(model, collate(examples), config)]


def teacher_forced(model: SpeechLLM, example: Example, tokens: list[int], *, ended: bool) -> float:
    """Sum of log-probabilities of ``tokens`` after the prompt, and of the end token when ``ended``."""
    rows = model.assemble(collate([example]), with_text=False)
    text = model.decoder.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
    with torch.no_grad():
        logits = model.decoder(inputs_embeds=torch.cat([rows.embeddings, text], dim=1)).logits[0]
    log_probs = logits.double().log_softmax(dim=-1)
    start = rows.embeddings.shape[1] - 1
    targets = [*tokens, model.eos] if ended else tokens
    return float(sum(log_probs[start + i, token] for i, token in enumerate(targets)))


# The texts


@pytest.mark.parametrize("endless", [False, True])
def test_greedy_is_the_most_likely_token_again_and_again(
    model: SpeechLLM, make_examples: Callable[..., list[Example]], endless: bool
) -> None:
    """``endless``: each text continues to its own budget, the longest beyond 32 tokens."""
    if endless:
        model.eos = 3  # <unk>: hardly ever the most likely token
    examples = make_examples([0.4, 1.3, 0.2, 2.2, 5.0])
    config = DecodeConfig(base_tokens=4, tokens_per_second=10.0)
    found = decode(model, examples, config)
    assert found == [naive(model, each, token_budget(config, each.utterance.duration)) for each in examples]
    assert len(set(found)) == len(found) and all(found)  # the oracle is no constant
    if endless:
        assert len(found[-1]) > 40 and len(found[2]) <= 6


def test_what_follows_the_end_token_is_left_out(model: SpeechLLM, examples: list[Example]) -> None:
    config = DecodeConfig(base_tokens=6, tokens_per_second=10.0)
    whole = decode(model, examples, config)
    fourth = model.tokenize(whole[1])[3]
    model.eos = fourth
    shorter = decode(model, examples, config)
    for before, after in zip(whole, shorter, strict=True):
        assert before.startswith(after) and model.tokenizer.decode([fourth]) not in after
    assert len(shorter[1]) <= 3


def test_the_budget_grows_with_the_duration() -> None:
    config = DecodeConfig(base_tokens=8, tokens_per_second=12.0)
    assert [token_budget(config, s) for s in (0.0, 0.5, 1.0, 1.01, 10.0)] == [8, 14, 20, 21, 128]
    assert token_budget(DecodeConfig(base_tokens=3, tokens_per_second=0.0), 60.0) == 3


def test_many_beams_find_the_best_of_all_texts(ending: SpeechLLM, make_examples: Callable[..., list[Example]]) -> None:
    """With more beams than there are texts of two tokens the list is the exhaustive one."""
    (example,) = make_examples([0.5])
    config = DecodeConfig(beams=40, nbest=20, length_penalty=1.0, base_tokens=2, tokens_per_second=0.0)
    (found,) = transcribe_batch(ending, collate([example]), config)
    vocabulary = [i for i in range(ending.decoder.config.vocab_size) if i != ending.eos]
    rows = ending.assemble(collate([example]), with_text=False)
    start = rows.embeddings.shape[1] - 1
    with torch.no_grad():
        second = ending.decoder.get_input_embeddings()(torch.tensor(vocabulary)[:, None])
        inputs = torch.cat([rows.embeddings.expand(len(vocabulary), -1, -1), second], dim=1)
        log_probs = ending.decoder(inputs_embeds=inputs).logits.double().log_softmax(dim=-1)[:, start:]
    scores = [float(log_probs[0, 0, ending.eos])]
    scores += [float(log_probs[n, 0, t] + log_probs[n, 1, ending.eos]) / 2 for n, t in enumerate(vocabulary)]
    for (n, first), last in itertools.product(enumerate(vocabulary), vocabulary):
        scores.append(float(log_probs[n, 0, first] + log_probs[n, 1, last]) / 3)
    assert [h.score for h in found[:5]] == pytest.approx(sorted(scores, reverse=True)[:5], abs=2e-5)


# The scores


@pytest.mark.parametrize(
    ("beams", "nbest", "penalty"), [(1, 1, 1.0), (1, 1, 0.5), (4, 4, 1.0), (5, 3, 0.0), (3, 2, 2.0)]
)
def test_scores_are_log_probabilities_of_the_model(
    ending: SpeechLLM,
    examples: list[Example],
    ids_as_text: Callable[[SpeechLLM], None],
    beams: int,
    nbest: int,
    penalty: float,
) -> None:
    """Against one pass over every text, in texts that end by themselves and in texts that the budget ends."""
    ids_as_text(ending)
    config = DecodeConfig(beams=beams, nbest=nbest, length_penalty=penalty, base_tokens=3, tokens_per_second=5.0)
    kinds = set()
    for example, found in zip(examples, transcribe_batch(ending, collate(examples), config), strict=True):
        assert len(found) == nbest
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        budget = token_budget(config, example.utterance.duration)
        for text, score, cut in found:
            tokens = [int(word) for word in text.split()]
            assert len(tokens) <= budget
            ended = len(tokens) < budget
            assert cut == ("" if ended else BUDGET)
            kinds.add(ended)
            expected = teacher_forced(ending, example, tokens, ended=ended) / (len(tokens) + 1) ** penalty
            assert score == pytest.approx(expected, abs=2e-5)
    assert beams == 1 or penalty > 1 or kinds == {True, False}


def test_a_shorter_list_is_the_head_of_a_longer_one(ending: SpeechLLM, examples: list[Example]) -> None:
    batch = collate(examples)
    lists = [transcribe_batch(ending, batch, DecodeConfig(beams=4, nbest=n, base_tokens=4)) for n in (1, 2, 4)]
    for one, two, four in zip(*lists, strict=True):
        assert one == two[:1] and two == four[:2]


def test_a_larger_length_penalty_favours_longer_texts(ending: SpeechLLM, examples: list[Example]) -> None:
    lengths = []
    for penalty in (0.0, 1.0, 4.0):
        config = DecodeConfig(beams=4, length_penalty=penalty, base_tokens=20)
        lengths.append(sum(map(len, decode(ending, examples, config))))
    assert lengths[0] <= lengths[1] <= lengths[2] and lengths[0] < lengths[2]


# Against repetition


@pytest.mark.parametrize(("penalty", "ngram"), [(1.2, 0), (4.0, 0), (1.0, 1), (1.0, 3), (1.1, 2)])
def test_greedy_with_penalties_is_the_most_likely_token_that_they_leave(
    model: SpeechLLM, examples: list[Example], ids_as_text: Callable[[SpeechLLM], None], penalty: float, ngram: int
) -> None:
    """The score is the model's, without them; the padding before an utterance does not hide its tokens from them."""
    model.eos = 3  # <unk>: hardly ever the most likely token
    ids_as_text(model)
    examples = examples[:4]
    config = DecodeConfig(repetition_penalty=penalty, no_repeat_ngram=ngram)
    budgets = [token_budget(config, example.utterance.duration) for example in examples]
    found = [hypotheses[0] for hypotheses in transcribe_batch(model, collate(examples), config)]
    texts = [naive(model, *each, config) for each in zip(examples, budgets, strict=True)]
    assert [hypothesis.text for hypothesis in found] == texts != decode(model, examples, PLAIN)
    for example, budget, (text, score, cut) in zip(examples, budgets, found, strict=True):
        tokens = [int(word) for word in text.split()]
        assert (len(tokens) == budget) == (cut == BUDGET)
        expected = teacher_forced(model, example, tokens, ended=not cut) / (len(tokens) + 1)
        assert score == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("penalty", "ngram"), [(3.0, 0), (1.0, 1), (2.0, 1)])
def test_beams_with_penalties_rank_all_texts_by_what_they_leave(
    ending: SpeechLLM,
    make_examples: Callable[..., list[Example]],
    ids_as_text: Callable[[SpeechLLM], None],
    penalty: float,
    ngram: int,
) -> None:
    """Against all texts of two tokens; the end token is free after them and is never penalized."""
    (example,) = make_examples([0.5])
    ids_as_text(ending)
    options = {"repetition_penalty": penalty, "no_repeat_ngram": ngram, "base_tokens": 2, "tokens_per_second": 0.0}
    config = DecodeConfig(beams=60, nbest=40, **options)
    (found,) = transcribe_batch(ending, collate([example]), config)
    prompt = ending.assemble(collate([example]), with_text=False).embeddings
    start = prompt.shape[1] - 1
    vocabulary = torch.arange(ending.decoder.config.vocab_size)
    with torch.no_grad():
        second = ending.decoder.get_input_embeddings()(vocabulary[:, None])
        inputs = torch.cat([prompt.expand(len(vocabulary), -1, -1), second], dim=1)
        log_probs = ending.decoder(inputs_embeds=inputs).logits.double().log_softmax(dim=-1)[:, start:]
    ranks = {"": float(log_probs[0, 0, ending.eos])}
    scores = dict(ranks)
    for first, last in itertools.product(vocabulary.tolist(), repeat=2):
        if ending.eos == first:
            continue
        left = log_probs[first, 0, first] + penalized(log_probs[first, 1], [first], config)[last]
        text, length = (f"{first}", 2) if last == ending.eos else (f"{first} {last}", 3)
        ranks[text] = float(left) / length
        scores[text] = float(log_probs[first, 0, first] + log_probs[first, 1, last]) / length
    best = sorted(ranks, key=ranks.__getitem__, reverse=True)[: len(found)]
    assert [hypothesis.text for hypothesis in found] == best
    assert [hypothesis.score for hypothesis in found] == pytest.approx([scores[text] for text in best], abs=2e-5)
    assert best != sorted(scores, key=scores.__getitem__, reverse=True)[: len(found)]  # the penalty matters


@pytest.mark.parametrize("beams", [1, 4])
def test_no_sequence_of_tokens_comes_twice(
    model: SpeechLLM, examples: list[Example], ids_as_text: Callable[[SpeechLLM], None], beams: int
) -> None:
    ids_as_text(model)
    model.eos = 3
    repeated = []
    for ngram in (0, 2):
        config = DecodeConfig(beams=beams, nbest=beams, no_repeat_ngram=ngram, base_tokens=30)
        lists = transcribe_batch(model, collate(examples), config)
        pairs = [list(itertools.pairwise(h.text.split())) for found in lists for h in found]
        repeated.append(sum(len(each) - len(set(each)) for each in pairs))
    assert repeated[0] > 0 == repeated[1]


def test_a_text_is_cut_by_its_budget_or_by_the_models_positions(
    model: SpeechLLM, make_examples: Callable[..., list[Example]]
) -> None:
    model.eos = 3
    short, long = make_examples([0.5, 17.6])  # the latter leaves almost none of the 256 positions
    config = DecodeConfig(base_tokens=16, tokens_per_second=4.0)
    (own,), (other,) = transcribe_batch(model, collate([short, long]), config)
    assert (own.cut, other.cut) == (BUDGET, POSITIONS) and len(own.text) > 10 > len(other.text)
    model.eos = model.tokenize(own.text)[3]
    (ended,), _ = transcribe_batch(model, collate([short, long]), config)
    assert ended.cut == ""


# What does not matter


def same(found: list[Hypothesis], other: list[Hypothesis]) -> bool:
    scores = pytest.approx([h.score for h in other], abs=1e-5)
    return [(h.text, h.cut) for h in found] == [(h.text, h.cut) for h in other] and [h.score for h in found] == scores


@pytest.mark.parametrize("base", [2, 9])
@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram": 2}])
def test_lists_alone_as_in_a_batch(
    ending: SpeechLLM, examples: list[Example], beams: int, base: int, penalties: dict[str, Any]
) -> None:
    """Also where the budget ends a text: other utterances then continue for longer."""
    config = DecodeConfig(beams=beams, nbest=beams, base_tokens=base, tokens_per_second=6.0, batch=3, **penalties)
    together = transcribe_batch(ending, collate(examples), config)
    assert len({found[0].text for found in together}) > 3
    assert transcribe_batch(ending, collate(examples), config) == together
    for example, found in zip(examples, together, strict=True):
        assert same(transcribe_batch(ending, collate([example]), config)[0], found)
    lengths = [example.utterance.duration for example in examples]
    by_three = list(transcribe(ending, examples.__getitem__, lengths, config))
    assert sorted(index for index, _ in by_three) == list(range(len(examples)))
    assert all(same(found, together[index]) for index, found in by_three)
    assert list(transcribe(ending, [].__getitem__, [], config)) == []


@pytest.mark.parametrize("beams", [1, 3])
def test_a_long_neighbour_does_not_cut_a_short_utterance(
    model: SpeechLLM, make_examples: Callable[..., list[Example]], beams: int
) -> None:
    """The long one leaves almost none of the model's 256 positions."""
    short, long = make_examples([0.5, 17.6])
    config = DecodeConfig(beams=beams, base_tokens=16, tokens_per_second=4.0)
    assert decode(model, [short, long], config)[0] == decode(model, [short], config)[0]


@pytest.mark.parametrize("beams", [1, 3])
def test_neither_the_seed_nor_dropout_nor_the_models_own_generation_config(
    model: SpeechLLM, speech_llm: Make, examples: list[Example], tiny_llm: Path, tmp_path: Path, beams: int
) -> None:
    config = DecodeConfig(beams=beams)
    torch.manual_seed(1)
    expected = decode(model, examples, config)
    torch.manual_seed(2)
    model.train()
    assert decode(model, examples, config) == expected
    model.eval()
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
    other = speech_llm(folder, adapters=0.1, biases=1.0)
    for _ in range(2):
        assert decode(other, examples, config) == expected


@pytest.mark.parametrize("beams", [1, 3])
def test_the_head_reads_contiguous_states(model: SpeechLLM, examples: list[Example], beams: int) -> None:
    """A slice of the prompt's states would be multiplied by one copy of the vocabulary's matrix for every row."""
    seen: list[bool] = []
    hook = model.decoder.lm_head.register_forward_hook(lambda head, args, out: seen.append(args[0].is_contiguous()))
    transcribe_batch(model, collate(examples), DecodeConfig(beams=beams))
    hook.remove()
    assert len(seen) > 1 and all(seen)
    assert not model.decoder.lm_head._forward_pre_hooks


# By command


@pytest.mark.integration
def test_evaluate_writes_the_lists(run_folder: Path, tmp_path: Path) -> None:
    def rows(*overrides: str) -> list[dict]:
        main(
            ["evaluate", str(run_folder), "decode.beams=3", "data.limit=2", "--out", str(tmp_path / "out"), *overrides]
        )
        found = [json.loads(line) for line in (tmp_path / "out" / "hypotheses.jsonl").read_text().splitlines()]
        shutil.move(tmp_path / "out", tmp_path / "last")
        return found

    found = rows("decode.nbest=2")
    assert len(found) == 4
    for row in found:
        first, second = row["nbest"]
        assert first["text"] == row["hypothesis"] and first["score"] >= second["score"]
        assert row["seconds"] == pytest.approx(0.6)
    shutil.rmtree(tmp_path / "last")
    assert all("nbest" not in row for row in rows())
    part = json.loads((tmp_path / "last" / "metrics.json").read_text())["sentences"]
    assert sum(p["words"] for p in part["by_speaker"].values()) == part["words"] == 6
    assert set(part["by_speaker"]) == {"s0", "s1"}
    assert part["by_length"]["words"]["1-5"] == part["by_length"]["seconds"]["0-2"]
    assert part["by_length"]["words"]["1-5"]["wer"] == pytest.approx(part["wer"])


def test_no_more_hypotheses_than_beams(refuse: Callable[..., str], run_folder: Path) -> None:
    message = refuse("evaluate", run_folder, "decode.nbest=4", "decode.beams=3")
    assert "decode.nbest" in message and "decode.beams = 3" in message and "4" in message
    assert "decode.nbest" in refuse("evaluate", run_folder, "decode.nbest=0")
