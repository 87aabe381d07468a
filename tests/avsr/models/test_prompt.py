"""The layout of a row, against rows that are written out by hand."""

from __future__ import annotations

import pytest

from avsr.config import CompressionConfig, DelimiterConfig, EncoderConfig, ModelConfig, PromptConfig, StreamConfig
from avsr.models.prompt import PromptLayout

RATES = {"audio": 3, "video": 2, "fused": 4}
PROMPT = "ab"  # a token a letter
ROWS = {
    ("audio", "table", False): "BOS <audio> a0 a1 </audio> a b",
    ("video", "table", False): "BOS <video> v0 v1 v2 </video> a b",
    ("audiovisual", "table", False): "BOS <audio> a0 a1 </audio> <video> v0 v1 v2 </video> a b",
    ("audiovisual", "table", True): "BOS a b <audio> a0 a1 </audio> <video> v0 v1 v2 </video>",
    ("audiovisual", "none", False): "BOS a0 a1 v0 v1 v2 a b",
    ("fused", "table", False): "BOS f0 a b",
}


def layout(task: str, init: str = "table", first: bool = False, positions: int = 64) -> PromptLayout:
    streams = {
        name: StreamConfig(EncoderConfig(name="unused"), CompressionConfig(rate=rate)) for name, rate in RATES.items()
    }
    prompts = PromptConfig(audio=PROMPT, video=PROMPT, audiovisual=PROMPT, first=first)
    config = ModelConfig(task=task, prompts=prompts, delimiters=DelimiterConfig(init=init), **streams)
    return PromptLayout.of(config, len, positions)


@pytest.mark.parametrize(("task", "init", "first"), ROWS, ids=str)
def test_a_row_is_its_pieces(task: str, init: str, first: bool) -> None:
    """7 audio frames at rate 3 are 2 tokens, 6 video frames at 2 are 3, 7 fused frames at 4 are 1."""
    row = ROWS[task, init, first].split()
    built = layout(task, init, first)
    frames = {"audio": 7, "video": 6, "fused": 7}
    pieces = built.pieces(task, {name: built.speech_tokens(name, frames[name]) for name in built.rates})
    assert [name for piece in pieces for name in piece.names(list(PROMPT))] == row
    assert [len(piece.names(list(PROMPT))) for piece in pieces] == [piece.length for piece in pieces]
    assert built.prompt_length(task, frames) == len(row)


@pytest.mark.parametrize("task", ["audio", "video", "audiovisual"])
def test_a_model_of_both_streams_lays_out_each_alone(task: str) -> None:
    both = layout("audiovisual")
    assert both.prompt_length(task, {"audio": 7, "video": 6}) == len(ROWS[task, "table", False].split())


def test_what_does_not_fit_is_named() -> None:
    built = layout("audiovisual", positions=64)
    frames = {"audio": 7, "video": 6}
    room = 64 - built.prompt_length("audiovisual", frames) - 1  # the end token
    assert built.unusable(frames, room) == ""
    assert f"of {room + 1} tokens do not fit the model's 64 positions" in built.unusable(frames, room + 1)
    assert "model.audio.compression.rate = 3" in built.unusable({"audio": 2, "video": 6}, 1)
    assert "model.video.compression.rate = 2" in built.unusable({"audio": 7, "video": 1}, 1)
