"""ACT at inference: decoding and the search for heads, against attention by hand in float64 without a cache."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface

from avsr.config import ActConfig, Config, DecodeConfig
from avsr.data.batches import Example, collate
from avsr.evaluation.act import Heads, calibrated, every_head
from avsr.evaluation.act_search import Search, search
from avsr.evaluation.decode import token_budget, transcribe_batch
from avsr.models.rows import Assembled
from avsr.models.speech_llm import SpeechLLM

pytestmark = pytest.mark.integration

SOME: Heads = [(0, 1), (1, 0), (1, 3), (2, 2)]
Examples = Callable[..., list[Example]]


@pytest.fixture(scope="module")
def model(speech_llm: Callable[..., SpeechLLM]) -> SpeechLLM:
    return speech_llm()


class ByHand:
    """The model in float64 with ACT as Yu et al. write it down: every column and row of attention of one utterance,
    always over the whole row. The sinks are those of the prompt."""

    def __init__(self, model: SpeechLLM, act: ActConfig, heads: Heads) -> None:
        self.model = copy.deepcopy(model).double()
        self.beta, self.threshold, self.heads = act.beta, act.threshold, heads
        self.span = 0
        self.found: set[tuple[int, int]] = set()  # heads in which there was a sink
        AttentionInterface.register("act_by_hand", self._attend)
        self.model.decoder.model.set_attn_implementation("act_by_hand")

    @torch.no_grad()
    def log_probs(self, example: Example, ids: list[int]) -> Tensor:
        """(1 + n, vocabulary) of the next token after the prompt and after each of the n tokens."""
        rows = self.model.assemble(collate([example]), with_text=False)
        self.span = int(rows.spans[0])
        text = self.model.decoder.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
        row = torch.cat([rows.embeddings, text], dim=1)
        # again: an instance made since may have taken the name
        AttentionInterface.register("act_by_hand", self._attend)
        logits = self.model.decoder(inputs_embeds=row, use_cache=False).logits
        return logits[0, self.span - 1 :].log_softmax(dim=-1)

    def loss(self, example: Example) -> float:
        targets = [*example.text, self.model.eos]
        return -float(self.log_probs(example, example.text)[torch.arange(len(targets)), targets].sum())

    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1)[0], v.repeat_interleave(groups, dim=1)[0]
        scores = q[0] @ k.mT * options["scaling"]
        a = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf).softmax(dim=-1)
        for layer, head in self.heads:
            if layer == module.layer_idx:
                a[head] = self._calm(a[head], layer, head)
        return (a @ v).transpose(0, 1)[None], None

    def _calm(self, a: Tensor, layer: int, head: int) -> Tensor:
        means = [float(a[key : self.span, key].sum()) / (self.span - key) for key in range(self.span)]
        assert min(abs(mean - self.threshold) for mean in means[1:]) > 1e-6  # rounding decides nothing
        sinks = [key for key, mean in enumerate(means) if mean > self.threshold and key > 0]
        self.found |= {(layer, head)} if sinks else set()
        out = a.clone()
        for query in range(1, len(a)):
            freed = (1 - self.beta) * a[query, sinks].sum()
            others = [key for key in range(query + 1) if key not in sinks]
            out[query, sinks] = self.beta * a[query, sinks]
            out[query, others] += freed * a[query, others] / a[query, others].sum()
        return out


def decode(model: SpeechLLM, examples: list[Example], config: DecodeConfig) -> list[list[tuple[str, float]]]:
    return [[tuple(h) for h in found] for found in transcribe_batch(model, collate(examples), config)]


def run_config(beta: float, threshold: float = 0.1, **decoding: Any) -> Config:
    decoder = DecodeConfig(**{"base_tokens": 6, "tokens_per_second": 8.0, **decoding})
    return Config(run="none", act=ActConfig(beta, threshold), decode=decoder)


def without_end(model: SpeechLLM) -> None:
    """Texts continue to their budget, which makes the oracle of a beam search short."""

    def forbid(module: Any, args: Any, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., model.eos] = -1e4
        return logits

    model.decoder.lm_head.register_forward_hook(forbid)


# Decoding


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("heads", [SOME, None], ids=["some heads", "all heads"])
def test_decoding_equals_full_recomputation(
    speech_llm: Callable[..., SpeechLLM], make_examples: Examples, beams: int, heads: Heads | None
) -> None:
    """Token by token: cache, padding, batch and beams against whole rows of one utterance."""
    without_end(model := speech_llm())
    config = run_config(0.2, beams=beams, base_tokens=4, tokens_per_second=5.0)
    examples = make_examples([0.4, 1.3, 0.7])
    heads = heads or every_head(model)
    oracle = ByHand(model, config.act, heads)
    plain = decode(model, examples, config.decode)
    with calibrated(config, model, heads) as act:
        got = decode(model, examples, config.decode)
    assert act == {"beta": 0.2, "threshold": 0.1, "heads": len(heads)}
    assert model.probe is None and decode(model, examples, config.decode) == plain
    for example, found, before in zip(examples, got, plain, strict=True):
        texts: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(token_budget(config.decode, example.utterance.duration)):
            more = []
            for total, ids in texts:
                best = oracle.log_probs(example, ids)[-1].topk(beams)
                more += [(total + float(p), [*ids, int(i)]) for p, i in zip(*best, strict=True)]
            texts = sorted(more, reverse=True)[:beams]
        score, ids = texts[0]
        want = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert found[0][0] == want != before[0][0]
        assert found[0][1] == pytest.approx(score / (len(ids) + 1), abs=1e-5)
    assert oracle.found == set(heads)


def test_scores_of_texts_that_end_by_themselves(
    speech_llm: Callable[..., SpeechLLM], make_examples: Examples, ids_as_text: Callable[[SpeechLLM], None]
) -> None:
    """n-best lists of a beam search: the log-probability of a text is that of one pass over all of it."""
    ids_as_text(model := speech_llm())
    model.decoder.lm_head.weight.data[model.eos] *= 6
    config = run_config(0.3, beams=3, nbest=3)
    examples = make_examples([0.5, 0.9, 0.3])
    oracle = ByHand(model, config.act, SOME)
    with calibrated(config, model, SOME):
        got = decode(model, examples, config.decode)
    ended = 0
    for example, found in zip(examples, got, strict=True):
        budget = token_budget(config.decode, example.utterance.duration)
        for text, score, _ in found:
            ids = [int(word) for word in text.split()]
            targets = [*ids, model.eos] if len(ids) < budget else ids
            ended += len(ids) < budget
            log_probs = oracle.log_probs(example, ids)[torch.arange(len(targets)), targets]
            assert score == pytest.approx(float(log_probs.sum()) / (len(ids) + 1), abs=1e-5)
    assert ended >= 3


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_decode_as_alone(model: SpeechLLM, make_examples: Examples, beams: int) -> None:
    config = run_config(0.1, beams=beams)
    examples = make_examples([0.4, 2.2, 0.9, 1.3])
    with calibrated(config, model, every_head(model)):
        together = decode(model, examples, config.decode)
        alone = [decode(model, [example], config.decode)[0] for example in examples]
    assert [found[0][0] for found in together] == [found[0][0] for found in alone]


# The search


class Dataset(list[Example]):
    sizes = (20, 65, 35, 45, 20)


SECONDS = [0.4, 1.3, 0.7, 0.9, 0.4]


@pytest.fixture(scope="module")
def dataset(model: SpeechLLM, make_examples: Examples) -> Any:
    return Dataset(make_examples(SECONDS, ["bin", "lay blue", "set", "a", "now red"], model.tokenize))


def search_config(beta: float, threshold: float) -> Config:
    config = run_config(beta, threshold)
    config.training.frames = 150  # several batches
    return config


@pytest.fixture(scope="module")
def setting() -> Config:
    return search_config(0.2, 0.33)


@pytest.fixture(scope="module")
def found(model: SpeechLLM, dataset: Any, setting: Config) -> Search:
    return search(model, dataset, setting)


def test_the_search_finds_what_brute_force_finds(
    model: SpeechLLM, dataset: Any, setting: Config, found: Search
) -> None:
    """A whole pass over every utterance for every head; heads that are left out change nothing."""

    def brute_force(heads: Heads) -> tuple[float, bool]:
        oracle = ByHand(model, setting.act, heads)
        return sum(oracle.loss(example) for example in dataset) / found.tokens, bool(oracle.found)

    assert model.probe is None and found.tokens == sum(len(e.text) + 1 for e in dataset)
    plain, _ = brute_force([])
    assert found.plain == pytest.approx(plain, abs=1e-6)
    want = {}
    for head in every_head(model):
        loss, has_sinks = brute_force([head])
        assert has_sinks == (head in found.alone)
        if has_sinks:
            want[head] = loss
        else:
            assert abs(loss - plain) < 1e-9
    assert found.alone == pytest.approx(want, abs=1e-6)
    assert 2 < len(want) < len(every_head(model))
    ranked = sorted((head for head in want if want[head] < plain), key=lambda head: want[head])
    sets = {size: brute_force(ranked[:size])[0] for size in dict(found.together)}
    assert dict(found.together) == pytest.approx(sets, abs=1e-6) and len(ranked) in sets and 1 in sets
    size = min(sets, key=lambda n: sets[n])
    assert found.heads == ranked[:size] and found.best == pytest.approx(sets[size], abs=1e-6)


def test_the_search_repeats_itself_and_holds_the_embeddings_of_one_batch(
    model: SpeechLLM, dataset: Any, setting: Config, found: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    assemble = model.assemble

    def watched(*arguments: Any, **options: Any) -> Assembled:
        assert sum(ref() is not None for ref in made) <= 1  # the loop's own
        rows = assemble(*arguments, **options)
        made.append(weakref.ref(rows.embeddings))
        return rows

    monkeypatch.setattr(model, "assemble", watched)
    assert search(model, dataset, setting) == found
    assert len(made) > 4


def test_the_search_finds_a_planted_head(model: SpeechLLM, make_examples: Examples) -> None:
    """Texts that the model says only when the sinks of one head are calmed."""
    setting, planted = search_config(0.05, 0.1), (1, 2)
    with calibrated(setting, model, [planted]):
        texts = [best[0][0] for best in decode(model, make_examples(SECONDS), setting.decode)]
    found = search(model, Dataset(make_examples(SECONDS, texts, model.tokenize)), setting)  # type: ignore[arg-type]
    assert found.heads[0] == planted
    assert found.alone[planted] < min([found.plain, *(loss for head, loss in found.alone.items() if head != planted)])


def test_heads_without_sinks_are_no_ops(model: SpeechLLM, dataset: Any, setting: Config, found: Search) -> None:
    idle = [head for head in every_head(model) if head not in found.alone]
    assert idle
    batch = collate(list(dataset))
    rows = model.assemble(batch, with_text=True)
    with torch.no_grad():
        with calibrated(setting, model, []):
            before, _ = model.label_logits(batch, rows)
        with calibrated(setting, model, idle):
            after, _ = model.label_logits(batch, rows)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_no_sink_at_all_finds_no_head(model: SpeechLLM, dataset: Any) -> None:
    found = search(model, dataset, search_config(0.2, 0.9999999))
    assert (found.heads, found.alone, found.together, found.best) == ([], {}, [], found.plain)
