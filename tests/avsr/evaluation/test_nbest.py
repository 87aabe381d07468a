"""n-best lists: what a score is, which hypotheses there are, and that neither depends on the batch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from avsr.cli import main
from avsr.config import (
    CompressionConfig,
    DecodeConfig,
    EncoderConfig,
    LLMConfig,
    LoraConfig,
    ModelConfig,
    StreamConfig,
)
from avsr.config import ProjectorConfig as Projector
from avsr.data.batches import Example, collate
from avsr.data.manifest import Utterance
from avsr.evaluation.decode import Hypothesis, token_budget, transcribe, transcribe_batch
from avsr.models.llm import load_llm
from avsr.models.speech_llm import SpeechLLM

WIDTH = 32


@pytest.fixture(scope="module")
def model(tiny_llm: Path) -> SpeechLLM:
    config = ModelConfig(
        audio=StreamConfig(EncoderConfig(name="none"), CompressionConfig(rate=4)),
        llm=LLMConfig(name=str(tiny_llm)),
        projector=Projector(hidden=16),
        lora=LoraConfig(rank=4),
    )
    torch.manual_seed(0)
    model = SpeechLLM(config, load_llm(config.llm), {"audio": WIDTH})
    with torch.no_grad():
        for name, parameter in model.own_state().items():
            if "lora_" in name or name.startswith("projectors.") and parameter.dim() == 1:
                parameter.normal_(0, 0.3)
        # ends of text at all lengths, not only at the budget
        model.decoder.lm_head.weight[model.eos] *= 3
    return model.eval()


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


class Numbers:
    """A tokenizer whose text is the token ids themselves: nothing is left out or stripped."""

    pad_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


SECONDS = [0.4, 1.3, 0.4, 2.2, 0.7, 0.9, 0.3]


def teacher_forced(model: SpeechLLM, example: Example, tokens: list[int], *, ended: bool) -> float:
    """Sum of log-probabilities of ``tokens`` behind the prompt, and of the end token when ``ended``."""
    rows = model.assemble(collate([example]), with_text=False)
    embed = model.decoder.get_input_embeddings()
    text = embed(torch.tensor([tokens], dtype=torch.long))
    with torch.no_grad():
        logits = model.decoder(inputs_embeds=torch.cat([rows.embeddings, text], dim=1)).logits[0]
    log_probs = logits.double().log_softmax(dim=-1)
    start = rows.embeddings.shape[1] - 1
    targets = [*tokens, model.eos] if ended else tokens
    return float(sum(log_probs[start + i, token] for i, token in enumerate(targets)))


@pytest.mark.parametrize(
    ("beams", "nbest", "penalty"), [(1, 1, 1.0), (1, 1, 0.5), (4, 4, 1.0), (5, 3, 0.0), (3, 2, 2.0)]
)
def test_scores_are_log_probabilities_of_the_model(
    model: SpeechLLM, beams: int, nbest: int, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one pass over every text, in texts that end by themselves and in texts that the budget ends."""
    monkeypatch.setattr(model, "tokenizer", Numbers())
    examples = make_examples(SECONDS)
    config = DecodeConfig(beams=beams, nbest=nbest, length_penalty=penalty, base_tokens=3, tokens_per_second=5.0)
    kinds = set()
    for example, found in zip(examples, transcribe_batch(model, collate(examples), config), strict=True):
        assert len(found) == nbest
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        budget = token_budget(config, example.utterance.duration)
        for text, score in found:
            tokens = [int(word) for word in text.split()]
            assert len(tokens) <= budget
            ended = len(tokens) < budget
            kinds.add(ended)
            expected = teacher_forced(model, example, tokens, ended=ended) / (len(tokens) + 1) ** penalty
            assert score == pytest.approx(expected, abs=2e-5)
    assert beams == 1 or penalty > 1 or kinds == {True, False}


def test_many_beams_find_the_best_of_all_texts(model: SpeechLLM) -> None:
    """With more beams than there are texts of two tokens the list is the exhaustive one."""
    (example,) = make_examples([0.5])
    config = DecodeConfig(beams=40, nbest=20, length_penalty=1.0, base_tokens=2, tokens_per_second=0.0)
    ((found),) = transcribe_batch(model, collate([example]), config)
    vocabulary = [i for i in range(model.decoder.config.vocab_size) if i != model.eos]
    scores = [teacher_forced(model, example, [], ended=True)]
    for first in vocabulary:
        scores.append(teacher_forced(model, example, [first], ended=True) / 2)
    rows = model.assemble(collate([example]), with_text=False)
    embed = model.decoder.get_input_embeddings()
    texts = torch.tensor([[first] for first in vocabulary])
    with torch.no_grad():
        inputs = torch.cat([rows.embeddings.expand(len(texts), -1, -1), embed(texts)], dim=1)
        log_probs = model.decoder(inputs_embeds=inputs).logits.double().log_softmax(dim=-1)
    start = rows.embeddings.shape[1] - 1
    for (row, first), second in itertools.product(enumerate(vocabulary), vocabulary):
        scores.append(float(log_probs[row, start, first] + log_probs[row, start + 1, second]) / 3)
    best = sorted(scores, reverse=True)[:5]
    assert [h.score for h in found[:5]] == pytest.approx(best, abs=2e-5)


def same(found: list[Hypothesis], other: list[Hypothesis]) -> bool:
    return [h.text for h in found] == [h.text for h in other] and [h.score for h in found] == pytest.approx(
        [h.score for h in other], abs=1e-5
    )


@pytest.mark.parametrize("base", [2, 9])
def test_lists_alone_as_in_a_batch(model: SpeechLLM, base: int) -> None:
    examples = make_examples(SECONDS)
    config = DecodeConfig(beams=4, nbest=4, base_tokens=base, tokens_per_second=6.0)
    together = transcribe_batch(model, collate(examples), config)
    assert len({found[0].text for found in together}) > 3
    for example, found in zip(examples, together, strict=True):
        assert same(transcribe_batch(model, collate([example]), config)[0], found)
    by_three = dict(
        transcribe(
            model,
            examples.__getitem__,
            [e.utterance.duration for e in examples],
            DecodeConfig(**{**vars(config), "batch": 3}),
        )
    )
    assert all(same(by_three[i], found) for i, found in enumerate(together))
    again = transcribe_batch(model, collate(examples), config)
    assert again == together


def test_a_shorter_list_is_the_head_of_a_longer_one(model: SpeechLLM) -> None:
    examples = make_examples(SECONDS)
    lists = [
        transcribe_batch(model, collate(examples), DecodeConfig(beams=4, nbest=n, base_tokens=4)) for n in (1, 2, 4)
    ]
    for one, two, four in zip(*lists, strict=True):
        assert one == two[:1] and two == four[:2]


def test_a_larger_length_penalty_favours_longer_texts(model: SpeechLLM) -> None:
    examples = make_examples(SECONDS)
    lengths = []
    for penalty in (0.0, 1.0, 4.0):
        config = DecodeConfig(beams=4, length_penalty=penalty, base_tokens=20)
        found = transcribe_batch(model, collate(examples), config)
        lengths.append(sum(len(hypotheses[0].text) for hypotheses in found))
    assert lengths[0] <= lengths[1] <= lengths[2] and lengths[0] < lengths[2]


def test_evaluate_writes_the_lists(run_folder: Path) -> None:
    main(["evaluate", str(run_folder), "decode.beams=3", "decode.nbest=2", "data.limit=2"])
    rows = [json.loads(line) for line in (run_folder / "hypotheses.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        first, second = row["nbest"]
        assert first["text"] == row["hypothesis"] and first["score"] >= second["score"]
        assert row["seconds"] == pytest.approx(0.6)
    main(["evaluate", str(run_folder), "decode.beams=3", "data.limit=2"])
    rows = [json.loads(line) for line in (run_folder / "hypotheses.jsonl").read_text().splitlines()]
    assert all("nbest" not in row for row in rows)
    metrics = json.loads((run_folder / "metrics.json").read_text())
    part = metrics["sentences"]
    assert sum(p["words"] for p in part["by_speaker"].values()) == part["words"] == 6
    assert set(part["by_speaker"]) == {"s0", "s1"}
    assert part["by_length"]["words"]["1-5"] == part["by_length"]["seconds"]["0-2"]
    assert part["by_length"]["words"]["1-5"]["wer"] == pytest.approx(part["wer"])


def test_no_more_hypotheses_than_beams(refuse, run_folder: Path) -> None:
    message = refuse("evaluate", run_folder, "decode.nbest=4", "decode.beams=3")
    assert "decode.nbest" in message and "decode.beams = 3" in message and "4" in message
    assert "decode.nbest" in refuse("evaluate", run_folder, "decode.nbest=0")
