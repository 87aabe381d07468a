"""Prompt assembly, label-only logits and the losses' terms, against the plain Hugging Face computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from avsr.config import (
    CompressionConfig,
    DelimiterConfig,
    EncoderConfig,
    LLMConfig,
    LoraConfig,
    ModelConfig,
    PromptConfig,
    StreamConfig,
    load_config,
)
from avsr.config import ProjectorConfig as Projector
from avsr.data.batches import Batch, Example, collate
from avsr.data.manifest import Utterance
from avsr.errors import UserError
from avsr.models.llm import load_llm
from avsr.models.speech_llm import SpeechLLM, init_delimiters

WIDTH = 24


def make_model(tiny_llm: Path, **changes: object) -> SpeechLLM:
    config = ModelConfig(
        prompts=PromptConfig(audio="say it"),
        audio=StreamConfig(EncoderConfig(name="unused"), CompressionConfig(kind="average", rate=4)),
        projector=Projector(hidden=16, layernorm=True),
        delimiters=DelimiterConfig(init="table"),
        llm=LLMConfig(name=str(tiny_llm)),
        lora=LoraConfig(rank=2, alpha=4.0),
    )
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = SpeechLLM(config, load_llm(config.llm), {"audio": WIDTH})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # an untrained adapter is the identity and would hide mistakes
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_batch(model: SpeechLLM, frames: list[int], texts: list[str]) -> Batch:
    generator = torch.Generator().manual_seed(sum(frames))
    examples = []
    for i, (count, text) in enumerate(zip(frames, texts, strict=True)):
        features = torch.randn(count, WIDTH, generator=generator)
        utterance = Utterance(id=f"u{i}", audio=Path(f"{i}.wav"), text=text, duration=count / 50, where=f"m:{i}")
        examples.append(Example(utterance, {"audio": features}, model.tokenize(text)))
    return collate(examples)


def single(batch: Batch, i: int) -> Batch:
    count = int(batch.lengths["audio"][i])
    return collate([Example(batch.utterances[i], {"audio": batch.features["audio"][i, :count]}, batch.text[i])])


@pytest.mark.parametrize("attached", [False, True])
def test_an_utterance_alone_and_in_any_batch_has_the_same_logits(tiny_llm: Path, attached: bool) -> None:
    model = make_model(tiny_llm)
    if attached:
        model.attach()
    batch = make_batch(model, [40, 9, 23, 4], ["bin blue", "a", "place red at", "now"])
    together, _ = model.label_logits(batch, model.assemble(batch, with_text=True))
    first = 0
    for i in range(4):
        one = single(batch, i)
        alone, _ = model.label_logits(one, model.assemble(one, with_text=True))
        torch.testing.assert_close(together[first : first + len(alone)], alone, rtol=1e-4, atol=1e-4)
        first += len(alone)
    assert first == len(together)


def test_label_only_cross_entropy_is_hugging_faces_loss(tiny_llm: Path) -> None:
    """HF's shifted loss with -100 everywhere but on text and end token, over full logits."""
    model = make_model(tiny_llm)
    batch = make_batch(model, [17, 30], ["set white", "lay green by"])
    terms = model(batch)
    losses: list[float] = []
    count = 0
    for i in range(2):
        one = single(batch, i)
        rows = model.assemble(one, with_text=True)
        end = model.decoder.get_input_embeddings()(torch.tensor([model.eos]))
        embeddings = torch.cat([rows.embeddings[0], end])[None]
        labels = torch.full((1, embeddings.shape[1]), -100)
        target = [*one.text[0], model.eos]
        labels[0, -len(target) :] = torch.tensor(target)
        out = model.llm(inputs_embeds=embeddings, labels=labels)
        losses.append(float(out.loss.detach()) * len(target))
        count += len(target)
    assert batch.label_tokens == count
    assert float(terms.cross_entropy.detach()) == pytest.approx(sum(losses), rel=1e-5)


@pytest.mark.parametrize("init", ["table", "none"])
@pytest.mark.parametrize("first", [False, True])
def test_rows_hold_bos_speech_in_delimiters_prompt_and_text(tiny_llm: Path, init: str, first: bool) -> None:
    """Against rows assembled by hand; text is predicted from the last token of the span, whatever that is."""
    prompts = PromptConfig(audio="say it", first=first)
    model = make_model(tiny_llm, delimiters=DelimiterConfig(init=init), prompts=prompts)
    batch = make_batch(model, [13, 8], ["bin", "now"])
    rows = model.assemble(batch, with_text=True, names=True)
    table = model.decoder.get_input_embeddings().weight
    prompt, bos, text = (table[ids] for ids in (model.tokenize("say it"), [model.bos], batch.text[0]))
    # 13 frames at rate 4 are 3 tokens: the mean of 4 frames each, the last frame dropped
    frames = batch.features["audio"][0, :12].reshape(3, 4, WIDTH).mean(dim=1)
    speech, names = model.projectors["audio"](frames), ["a0", "a1", "a2"]
    if init == "none":
        assert model.delimiters is None and "delimiters" not in model.own_state()
    else:
        assert model.delimiters is not None
        speech = torch.cat([model.delimiters[:1], speech, model.delimiters[1:]])
        names = ["<audio>", *names, "</audio>"]
    row = torch.cat([bos, prompt, speech, text] if first else [bos, speech, prompt, text])
    torch.testing.assert_close(rows.embeddings[0, : len(row)], row)
    letters = list("say it")
    assert rows.names[0] == ["BOS", *(letters + names if first else names + letters), *"bin"]
    assert rows.spans.tolist() == model.prompt_lengths(batch)
    assert rows.spans[0] == len(row) - 3
    assert rows.mask.sum(dim=1).tolist() == [len(row), int(rows.spans[1]) + 3] == list(map(len, rows.names))
    hidden = model.decoder.model(inputs_embeds=row[None], use_cache=False).last_hidden_state[0, -4:]
    logits, targets = model.label_logits(batch, rows)
    torch.testing.assert_close(logits[:4], model.decoder.lm_head(hidden), rtol=1e-4, atol=1e-4)
    assert targets[:4].tolist() == [*batch.text[0], model.eos]


def test_no_delimiters_cannot_be_trained() -> None:
    none = "model.delimiters.init=none"
    assert load_config("demo", [none]).model.delimiters.init == "none"
    with pytest.raises(UserError, match=r"^model\.delimiters\.train: .*init = none"):
        load_config("demo", [none, "model.delimiters.train=true"])


def test_padding_is_left_for_generation_and_never_inside(tiny_llm: Path) -> None:
    model = make_model(tiny_llm)
    batch = make_batch(model, [40, 8], ["bin", "now"])
    right = model.assemble(batch, with_text=False)
    left = model.assemble(batch, with_text=False, left=True)
    for i, span in enumerate(right.spans.tolist()):
        torch.testing.assert_close(left.embeddings[i, -span:], right.embeddings[i, :span])
        assert left.mask[i].tolist() == [0] * (left.mask.shape[1] - span) + [1] * span


def test_decorrelation_term_is_the_papers_over_output_hidden_states(tiny_llm: Path) -> None:
    model = make_model(tiny_llm)
    batch = make_batch(model, [40, 9, 23], ["bin blue", "a", "place"])
    rows = model.assemble(batch, with_text=True)
    states = model.decoder.model(
        inputs_embeds=rows.embeddings, attention_mask=rows.mask, output_hidden_states=True, use_cache=False
    ).hidden_states[1:-1]
    total, count = 0.0, 0
    for state in states:
        for b, span in enumerate(rows.spans.tolist()):
            h = state[b].double()
            for s in range(1, span):
                total += float(torch.nn.functional.cosine_similarity(h[0], h[s], dim=0).detach() ** 2) / len(states)
    count = sum(span - 1 for span in rows.spans.tolist())
    model.attach(attention=True, decorrelation=True)
    assert float(model(batch).decorrelation.detach()) == pytest.approx(total / count, rel=1e-5)
    model.attach(decorrelation=False)
    assert model(batch).decorrelation is None


def test_only_projector_lora_and_chosen_delimiters_train(tiny_llm: Path) -> None:
    frozen = make_model(tiny_llm)
    assert all("lora_" in name or name.startswith("projectors.") for name in frozen.trainable())
    assert "delimiters" in frozen.own_state()  # random and needed, though frozen
    trained = make_model(tiny_llm, delimiters=DelimiterConfig(init="table", train=True))
    assert "delimiters" in trained.trainable()
    assert frozen.state_dict().keys() == frozen.own_state().keys()
    model = trained.train()
    model(make_batch(model, [16], ["bin"])).cross_entropy.backward()
    assert all(p.grad is not None for p in model.trainable().values())
    table = model.decoder.get_input_embeddings().weight
    loaded = load_llm(LLMConfig(name=str(tiny_llm)))  # no token was added
    assert table.grad is None and table.shape == loaded.model.get_input_embeddings().weight.shape
    assert len(model.tokenizer) == len(loaded.tokenizer)


def test_delimiter_initialisations() -> None:
    torch.manual_seed(0)
    table = torch.randn(500, 400) * 0.3 + 0.1
    assert float(init_delimiters("normal:0.02", 4, table).std()) == pytest.approx(0.02, rel=0.1)
    assert float(init_delimiters("table", 4, table).std()) == pytest.approx(float(table.std()), rel=0.1)
    torch.testing.assert_close(init_delimiters("mean", 2, table), table.mean(dim=0).expand(2, -1))
    for bad in ("normal", "normal:x", "normal:-1", "other:1", "normal:inf"):
        with pytest.raises(UserError, match=r"model\.delimiters\.init"):
            init_delimiters(bad, 2, table)


def test_speech_starts_at_the_scale_of_the_embeddings(tiny_llm: Path) -> None:
    model = make_model(tiny_llm)
    rows = model.assemble(make_batch(model, [400], ["bin"]), with_text=False)
    speech = rows.embeddings[0, 2:102]
    table = model.decoder.get_input_embeddings().weight
    assert float(speech.std()) == pytest.approx(float(table.std()), rel=0.2)


@pytest.mark.parametrize("kind", ["average", "stack"])
@pytest.mark.parametrize("rate", [1, 3])
def test_compressions_fit_the_projector(tiny_llm: Path, kind: str, rate: int) -> None:
    model = make_model(tiny_llm, audio=StreamConfig(compression=CompressionConfig(kind=kind, rate=rate)))
    batch = make_batch(model, [10, 7], ["bin", "now"])
    assert model.prompt_lengths(batch) == model.assemble(batch, with_text=True).spans.tolist()
    assert torch.isfinite(model(batch).cross_entropy)


def test_too_short_an_utterance_is_named(tiny_llm: Path) -> None:
    model = make_model(tiny_llm)
    with pytest.raises(UserError, match="m:1: 'u1' is shorter than one token"):
        model(make_batch(model, [8, 3], ["bin", "now"]))
