"""Models of several streams: rows, mixed tasks, compression of every encoder, encoders and LoRA inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from avsr.config import (
    TASKS,
    CompressionConfig,
    Config,
    DataConfig,
    EncoderConfig,
    LLMConfig,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    PromptConfig,
    StreamConfig,
    load_config,
)
from avsr.data.batches import Batch, Example, collate
from avsr.data.clip import Clip
from avsr.data.manifest import Utterance, read_manifest
from avsr.models.build import build_model, build_store
from avsr.models.encoder import SpeechEncoder
from avsr.models.encoders import build_encoder
from avsr.models.llm import load_llm
from avsr.models.speech_llm import SpeechLLM
from avsr.models.visual import VisualConfig, VisualModel, save_visual
from avsr.models.weights import load_weights
from avsr.training.checkpoint import publish

CPU = torch.device("cpu")
WIDTHS = {"audio": 24, "video": 20, "fused": 28}
Frames = dict[str, int]


def make_model(
    tiny_llm: Path,
    task: str,
    streams: Mapping[str, StreamConfig] | None = None,
    encoders: Mapping[str, SpeechEncoder] | None = None,
    **changes: Any,
) -> SpeechLLM:
    config = ModelConfig(
        task=task,
        prompts=PromptConfig(audio="hear", video="see it", audiovisual="do both"),
        projector=ProjectorConfig(hidden=16),
        llm=LLMConfig(name=str(tiny_llm)),
        lora=LoraConfig(rank=2, alpha=4.0),
        **{name: StreamConfig(EncoderConfig(name="x"), CompressionConfig(rate=2)) for name in WIDTHS},
    )
    for name, stream in (streams or {}).items():
        setattr(config, name, stream)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    widths = {**WIDTHS, **{name: encoder.width for name, encoder in (encoders or {}).items()}}
    model = SpeechLLM(config, load_llm(config.llm), {name: widths[name] for name in TASKS[task]}, encoders)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # an untrained adapter is the identity and would hide mistakes
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def example(model: SpeechLLM, task: str, features: dict[str, Tensor], text: str, name: str = "u") -> Example:
    utterance = Utterance(id=name, audio=Path("u.wav"), text=text, duration=1.0, where=f"m:{name}")
    return Example(utterance, features, model.tokenize(text), task)


def random_examples(model: SpeechLLM, wanted: Sequence[tuple[str, Frames, str]]) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    return [
        example(
            model,
            task,
            {name: torch.randn(frames[name], WIDTHS[name], generator=generator) for name in TASKS[task]},
            text,
            f"u{index}",
        )
        for index, (task, frames, text) in enumerate(wanted)
    ]


MIXED = [
    ("audiovisual", {"audio": 21, "video": 11}, "bin blue"),
    ("video", {"video": 7}, "a"),
    ("audio", {"audio": 40}, "place red at"),
    ("audiovisual", {"audio": 5, "video": 30}, "now"),
    ("video", {"video": 24}, "soon again"),
]


def logits_of(model: SpeechLLM, batch: Batch) -> Tensor:
    return model.label_logits(batch, model.assemble(batch, with_text=True))[0]


# Rows


def test_a_row_has_both_streams_between_their_delimiters(tiny_llm: Path) -> None:
    model = make_model(tiny_llm, "audiovisual")
    batch = collate(random_examples(model, [("audiovisual", {"audio": 7, "video": 5}, "bin")]))
    rows = model.assemble(batch, with_text=True, names=True)
    prompt, text = model.tokenize("do both"), batch.text[0]
    expected = ["BOS", "<audio>", "a0", "a1", "a2", "</audio>", "<video>", "v0", "v1", "</video>"]
    assert rows.names[0] == [*expected, *(model.tokenizer.decode([i]) for i in prompt + text)]
    table = model.decoder.get_input_embeddings().weight
    assert model.delimiters is not None and model.delimiters.shape == (4, model.hidden)
    heard = batch.features["audio"][0, :6].reshape(3, 2, 24).mean(dim=1)
    seen = batch.features["video"][0, :4].reshape(2, 2, 20).mean(dim=1)
    parts = [
        table[[model.bos]],
        model.delimiters[:1],
        model.projectors["audio"](heard),
        model.delimiters[1:3],
        model.projectors["video"](seen),
        model.delimiters[3:],
        table[prompt],
        table[text],
    ]
    torch.testing.assert_close(rows.embeddings[0], torch.cat(parts))
    assert rows.spans.tolist() == [len(expected) + len(prompt)] == model.prompt_lengths(batch)


def test_a_fused_stream_has_no_delimiters(tiny_llm: Path) -> None:
    model = make_model(tiny_llm, "fused")
    batch = collate(random_examples(model, [("fused", {"fused": 7}, "bin"), ("fused", {"fused": 2}, "now")]))
    rows = model.assemble(batch, with_text=False, names=True)
    prompt = model.tokenize("do both")
    assert rows.names[0][:4] == ["BOS", "f0", "f1", "f2"] and len(rows.names[0]) == 4 + len(prompt)
    assert model.delimiters is None and "delimiters" not in model.own_state()
    assert rows.spans.tolist() == [4 + len(prompt), 2 + len(prompt)] == model.prompt_lengths(batch)
    assert torch.isfinite(model(batch).cross_entropy)


def test_each_task_has_its_prompt_and_streams(tiny_llm: Path) -> None:
    model = make_model(tiny_llm, "audiovisual")
    batch = collate(random_examples(model, MIXED))
    rows = model.assemble(batch, with_text=True, names=True)
    assert rows.spans.tolist() == model.prompt_lengths(batch)
    for names, span, (task, _, _) in zip(rows.names, rows.spans.tolist(), MIXED, strict=True):
        prompt = {"audio": "hear", "video": "see it", "audiovisual": "do both"}[task]
        assert "".join(names[:span]).endswith(f"</{TASKS[task][-1]}>{prompt}")
        assert [name for name in ("audio", "video") if f"<{name}>" in names] == list(TASKS[task])
    assert rows.mask.sum(dim=1).tolist() == [len(names) for names in rows.names]


@pytest.mark.parametrize("attached", [False, True])
def test_mixed_tasks_have_the_logits_of_each_alone(tiny_llm: Path, attached: bool) -> None:
    model = make_model(tiny_llm, "audiovisual")
    if attached:
        model.attach()
    examples = random_examples(model, MIXED)
    with torch.no_grad():
        together = logits_of(model, collate(examples)).split([len(e.text) + 1 for e in examples])
        for one, expected in zip(examples, together, strict=True):
            torch.testing.assert_close(logits_of(model, collate([one])), expected, rtol=1e-4, atol=1e-4)
        only = [e for e in examples if e.task == "video"]  # a batch that lacks a stream altogether
        batch = collate(only)
        assert set(batch.features) == {"video"}
        expected = torch.cat([t for t, e in zip(together, examples, strict=True) if e.task == "video"])
        torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_model_of_two_streams_hears_as_one_of_one(tiny_llm: Path) -> None:
    """Its audio task gives the same numbers as an audio model with the same weights."""
    both, one = make_model(tiny_llm, "audiovisual"), make_model(tiny_llm, "audio")
    state = both.own_state()
    with torch.no_grad():
        for name, parameter in one.own_state().items():
            parameter.copy_(state[name][: len(parameter)])
    assert one.delimiters is not None and len(one.delimiters) == 2
    batch = collate(random_examples(both, [("audio", {"audio": 12}, "bin"), ("audio", {"audio": 31}, "lay")]))
    torch.testing.assert_close(logits_of(both, batch), logits_of(one, batch), rtol=1e-4, atol=1e-4)


# What cannot be used


def test_refusals_name_stream_and_rate(tiny_llm: Path) -> None:
    streams = {
        "audio": StreamConfig(compression=CompressionConfig(rate=16)),
        "video": StreamConfig(compression=CompressionConfig(rate=5)),
    }
    model = make_model(tiny_llm, "audiovisual", streams)
    assert model.layout.unusable({"audio": 16, "video": 5}, 3) == ""
    short = "is shorter than one token at model."
    assert model.layout.unusable({"audio": 15, "video": 5}, 3) == f"{short}audio.compression.rate = 16"
    assert model.layout.unusable({"audio": 16, "video": 4}, 3) == f"{short}video.compression.rate = 5"
    assert model.layout.unusable({"video": 5}, 3) == ""  # decode.tasks=[video]
    fixed = 1 + 4 + len(model.tokenize("do both"))
    text = model.max_positions - fixed - 2 - 1
    assert model.layout.unusable({"audio": 16, "video": 5}, text) == ""
    message = model.layout.unusable({"audio": 16, "video": 5}, text + 1)
    assert message == f"and its transcript of {text + 1} tokens do not fit the model's {model.max_positions} positions"
    # exactly as long as allowed: the row and the end token
    longest = collate(random_examples(model, [("audiovisual", {"audio": 16, "video": 5}, "a" * text)]))
    assert model.assemble(longest, with_text=True).mask.sum() == model.max_positions - 1


# Every encoder


def clips(stream: str, lengths: Sequence[int] = (13, 9, 20)) -> list[Clip]:
    """Of so many mouth frames."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for frames in lengths:
        wave = 0.1 * torch.randn(640 * frames, generator=generator)
        mouth = torch.randint(0, 256, (frames, 96, 96), dtype=torch.uint8, generator=generator)
        out.append(Clip(None if stream == "video" else wave, None if stream == "audio" else mouth))
    return out


@pytest.mark.parametrize(
    ("kind", "stream"),
    [("whisper", "audio"), ("wavlm", "audio"), ("avhubert", "audio"), ("avhubert", "video"), ("avhubert", "fused")],
)
def test_every_encoder_can_be_averaged_and_stacked(
    tiny_llm: Path, tiny_whisper: Path, tiny_avhubert: Path, tiny_wavlm: Path, kind: str, stream: str
) -> None:
    """At any rate, 1 included; inside the model, where batches hold the encoder's inputs."""
    source = {"whisper": tiny_whisper, "wavlm": tiny_wavlm, "avhubert": tiny_avhubert}[kind]
    config = EncoderConfig(kind=kind, name=str(source))
    encoder = build_encoder(config, stream)
    given = clips(stream)
    features = [rows.half().float() for rows in encoder.encode(given)]
    counts = [encoder.frames(clip.samples, clip.video_frames) for clip in given]
    assert [len(rows) for rows in features] == counts
    for how in ("average", "stack"):
        for rate in (1, 2, 3):
            model = make_model(
                tiny_llm, stream, {stream: StreamConfig(config, CompressionConfig(how, rate))}, {stream: encoder}
            )
            inputs = [{stream: encoder.prepare(clip)} for clip in given]
            batch = collate([example(model, stream, row, text) for row, text in zip(inputs, "abc", strict=True)])
            with torch.no_grad():
                rows = model.assemble(batch, with_text=True)
                assert torch.isfinite(model(batch).cross_entropy)
            assert rows.spans.tolist() == model.prompt_lengths(batch)
            first = 1 if stream == "fused" else 2
            for b, whole in enumerate(features):
                tokens = whole[: counts[b] // rate * rate].reshape(-1, rate, encoder.width)
                joined = tokens.mean(dim=1) if how == "average" else tokens.flatten(1)
                with torch.no_grad():
                    expected = model.projectors[stream](joined)
                got = rows.embeddings[b, first : first + len(expected)]
                torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)  # float16 steps of the features
                prompt = len(model.prompts[stream])
                assert int(rows.spans[b]) == first + len(expected) + (0 if stream == "fused" else 1) + prompt


@pytest.mark.parametrize(
    ("kind", "stream"),
    [("wavlm", "audio"), ("visual", "video"), ("avhubert", "audio"), ("avhubert", "video"), ("avhubert", "fused")],
)
def test_an_encoder_casts_its_input_to_its_weights(
    tiny_avhubert: Path, tiny_wavlm: Path, tmp_path: Path, kind: str, stream: str
) -> None:
    if kind == "visual":
        save_visual(
            VisualModel(VisualConfig(pool=8, channels=[4, 6, 8], width=12, hidden=8), ["none"], ["a"]), tmp_path
        )
    source = {"wavlm": tiny_wavlm, "avhubert": tiny_avhubert, "visual": tmp_path}[kind]
    encoder = build_encoder(EncoderConfig(kind=kind, name=str(source)), stream)
    inputs = [encoder.prepare(clip) for clip in clips(stream)]
    padded, lengths = pad_sequence(inputs, batch_first=True), torch.tensor([len(row) for row in inputs])
    # with AMX, oneDNN's bf16 convolutions of 4 to 8 channels a group are wrong (torch 2.11); 48 and more are right
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        exact, rounded = encoder(padded, lengths), encoder.to(torch.bfloat16)(padded, lengths)
    assert exact.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    for a, b, length in zip(exact, rounded.float(), lengths.tolist(), strict=True):
        count = encoder.feature_count(length)
        assert (a - b)[:count].norm() < 0.05 * a[:count].norm()


# Encoders inside the model


@pytest.mark.parametrize("task", ["video", "audiovisual", "fused"])
def test_without_a_cache_the_model_sees_the_same(av_recipe: Callable[..., Path], tmp_path: Path, task: str) -> None:
    recipe = av_recipe(tmp_path, task, **{f"model.{name}.encoder.batch": 1 for name in TASKS[task]})
    outputs, alone = [], []
    for overrides in ([], ["data.cache=null"]):
        config = load_config(str(recipe), overrides)
        store = build_store(config, CPU)
        model, loaded = build_model(config, store, CPU)
        assert set(store.inside) == (set(TASKS[task]) if config.data.cache is None else set())
        rows = read_manifest(config.data.train)[:4]
        assert store.prepare(rows, title="x", shown=False) == {}
        examples = [Example(row, store.load(row), loaded.tokenize(row.text), task) for row in rows]
        batch = collate(examples)
        assert model.eval().prompt_lengths(batch) == model.assemble(batch, with_text=False).spans.tolist()
        with torch.no_grad():
            outputs.append(logits_of(model, batch))
            alone.append(logits_of(model, collate(examples[:1])))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-3, atol=2e-3)  # a float16 step of a feature
    torch.testing.assert_close(alone[0], alone[1], rtol=1e-6, atol=1e-6)  # encoded alone in both: the same steps


def lora_model(tiny_llm: Path, tiny_avhubert: Path, task: str = "audiovisual") -> SpeechLLM:
    """Both streams by AV-HuBERT, inside the model; that of the mouth (or of both) has LoRA."""
    streams, encoders = {}, {}
    for name in TASKS[task]:
        rank = 0 if name == "audio" else 3
        part = EncoderConfig(kind="avhubert", name=str(tiny_avhubert), lora=LoraConfig(rank=rank, alpha=6.0))
        streams[name] = StreamConfig(part, CompressionConfig(rate=2))
        torch.manual_seed(1)
        encoders[name] = build_encoder(part, name)
    return make_model(tiny_llm, task, streams, encoders)


def lora_batch(model: SpeechLLM, encoders: Mapping[str, Any], tasks: Sequence[str]) -> Batch:
    return collate(
        [
            example(model, task, {name: encoders[name].prepare(clip) for name in TASKS[task]}, text)
            for task, clip, text in zip(tasks, clips("fused"), ("bin", "now", "set"), strict=False)
        ]
    )


@pytest.mark.parametrize(
    "tasks", [("audiovisual",) * 3, ("audio", "video", "audiovisual"), ("audio", "audio"), ("video",)]
)
def test_a_trained_encoder_takes_gradients_and_a_frozen_one_none(
    tiny_llm: Path, tiny_avhubert: Path, tasks: Sequence[str]
) -> None:
    """Every trained parameter has a finite gradient in every batch: zero where no utterance has its stream, since the
    ranks of a training reduce them together."""
    model = lora_model(tiny_llm, tiny_avhubert).train()
    encoders = {**model._frozen, **dict(model.encoders.items())}
    model(lora_batch(model, encoders, tasks)).cross_entropy.backward()
    seen = any("video" in TASKS[task] for task in tasks)
    heard = any("audio" in TASKS[task] for task in tasks)
    for name, parameter in model.trainable().items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        if name.startswith("encoders.") or name.startswith("projectors.video"):
            assert bool(parameter.grad.any()) == seen, name
        if name.startswith("projectors.audio"):
            assert bool(parameter.grad.any()) == heard, name
    lora = [name for name in model.trainable() if name.startswith("encoders.video.")]
    assert len(lora) == 2 * 2 * 2 and all("lora_" in name for name in lora)
    assert all(p.grad is None for p in encoders["audio"].parameters())
    assert all(p.grad is None for name, p in encoders["video"].named_parameters() if "lora_" not in name)


def test_gradients_of_a_mixed_batch_are_the_sum_of_each_alone(tiny_llm: Path, tiny_avhubert: Path) -> None:
    model = lora_model(tiny_llm, tiny_avhubert)
    encoders = {**model._frozen, **dict(model.encoders.items())}
    tasks = ("audio", "video", "audiovisual")
    examples = [
        example(model, task, {name: encoders[name].prepare(clip) for name in TASKS[task]}, text)
        for task, clip, text in zip(tasks, clips("fused"), ("bin", "now", "set"), strict=True)
    ]
    parameters = list(model.trainable().values())
    whole = torch.autograd.grad(model(collate(examples)).cross_entropy, parameters)
    apart = [torch.autograd.grad(model(collate([e])).cross_entropy, parameters) for e in examples]
    for name, total, *parts in zip(model.trainable(), whole, *apart, strict=True):
        torch.testing.assert_close(total, sum(parts), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_the_trained_encoder_stays_in_eval_mode(tiny_llm: Path, tiny_avhubert: Path) -> None:
    model = lora_model(tiny_llm, tiny_avhubert).train()
    assert model.training
    modes = {name: part.training for name, part in model.encoders["video"].named_modules()}
    assert any(modes.values()) and all("lora_dropout" in name for name, training in modes.items() if training)


@pytest.mark.parametrize("task", ["audiovisual", "fused"])
def test_a_checkpoint_holds_the_adapters_of_the_encoder_alone(
    tiny_llm: Path, tiny_avhubert: Path, tmp_path: Path, task: str
) -> None:
    model = lora_model(tiny_llm, tiny_avhubert, task)
    state = model.state_dict()
    assert state.keys() == model.own_state().keys()
    kinds = {name.split(".")[0] for name in state}
    assert kinds == {"llm", "projectors", "encoders"} | ({"delimiters"} if task == "audiovisual" else set())
    assert all("lora_" in name for name in state if name.startswith(("llm.", "encoders.")))
    config = Config(run="r", model=model.config, data=DataConfig(train="t.jsonl", validation="v.jsonl"))
    publish(tmp_path / "saved", {k: v.detach().clone() for k, v in state.items()}, config, {"step": 1})
    other = lora_model(tiny_llm, tiny_avhubert, task)
    with torch.no_grad():
        for parameter in other.own_state().values():
            parameter.zero_()
    load_weights(other, tmp_path / "saved")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name])
