"""Where the tokens of a row are: computed from numbers alone, without a model.

A row is ``BOS <audio> A </audio> <video> V </video> PROMPT TEXT`` with the streams and the prompt of its task; a fused
stream has no delimiter tokens, nor has any with ``model.delimiters.init: none``; with ``model.prompts.first`` the
prompt follows BOS. The end token is only predicted, never read. The *prompt length* of a row counts everything before
its text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from avsr.config import TASKS, ModelConfig, parts_of
from avsr.models.compression import compressed_length

NO_LIMIT = 1 << 30
KINDS = ("bos", "delimiters", "speech", "prompt", "text")  # of tokens


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a row.

    Attributes:
        kind: "bos", "opening" or "closing" (a delimiter), "speech" or "prompt".
        length: number of tokens.
        stream: of delimiters and speech.
    """

    kind: str
    length: int
    stream: str = ""

    @property
    def number(self) -> int:
        """Of the tokens' kind in :data:`KINDS`."""
        return KINDS.index("delimiters" if self.kind in ("opening", "closing") else self.kind)

    def names(self, prompt: Sequence[str]) -> list[str]:
        """A name for every token; those of the prompt are given."""
        match self.kind:
            case "bos":
                return ["BOS"]
            case "opening":
                return [f"<{self.stream}>"]
            case "closing":
                return [f"</{self.stream}>"]
            case "speech":
                return [f"{self.stream[0]}{i}" for i in range(self.length)]
        return list(prompt)


@dataclass(frozen=True)
class PromptLayout:
    """The order of the pieces of a row, and their lengths.

    Attributes:
        task: the model's.
        prompts: number of prompt tokens by task, for every task that the model can do.
        rates: encoder frames of a speech token, by stream.
        delimited: the streams that are framed by delimiter tokens, in the order of the parameter that holds these.
        prompt_first: the prompt follows BOS instead of the speech.
        max_positions: tokens that the language model can read.
    """

    task: str
    prompts: Mapping[str, int]
    rates: Mapping[str, int]
    delimited: tuple[str, ...]
    prompt_first: bool = False
    max_positions: int = NO_LIMIT

    @classmethod
    def of(cls, config: ModelConfig, count_tokens: Callable[[str], int], max_positions: int = NO_LIMIT) -> PromptLayout:
        """The layout of a model; ``count_tokens`` gives the number of tokens of a text without specials."""
        return cls(
            config.task,
            {task: count_tokens(prompt_text(config, task)) for task in parts_of(config.task)},
            {name: stream.compression.rate for name, stream in config.streams.items()},
            tuple(name for name in config.streams if name != "fused" and config.delimiters.init != "none"),
            config.prompts.first,
            max_positions,
        )

    def speech_tokens(self, stream: str, frames: int) -> int:
        """Speech tokens of so many encoder frames."""
        return compressed_length(frames, self.rates[stream])

    def pieces(self, task: str, speech_tokens: Mapping[str, int]) -> list[Piece]:
        """Everything before the text of a row for ``task``, in order, from the number of speech tokens by stream."""
        speech = []
        for stream in TASKS[task]:
            tokens = Piece("speech", speech_tokens[stream], stream)
            framed = stream in self.delimited
            speech += [Piece("opening", 1, stream), tokens, Piece("closing", 1, stream)] if framed else [tokens]
        bos, prompt = Piece("bos", 1), Piece("prompt", self.prompts[task])
        return [bos, prompt, *speech] if self.prompt_first else [bos, *speech, prompt]

    def prompt_length(self, task: str, frames: Mapping[str, int]) -> int:
        """Number of tokens before the text of a row for ``task``, from the number of encoder frames by stream."""
        tokens = {stream: self.speech_tokens(stream, frames[stream]) for stream in TASKS[task]}
        return sum(piece.length for piece in self.pieces(task, tokens))

    def unusable(self, frames: Mapping[str, int], text_tokens: int) -> str:
        """Why an utterance of so many encoder frames by stream and text tokens cannot be used, or ""."""
        for stream, count in frames.items():
            if self.speech_tokens(stream, count) < 1:
                return f"is shorter than one token at model.{stream}.compression.rate = {self.rates[stream]}"
        longest = {stream: frames.get(stream, 0) for stream in TASKS[self.task]}
        if self.prompt_length(self.task, longest) + text_tokens + 1 > self.max_positions:
            return f"and its transcript of {text_tokens} tokens do not fit the model's {self.max_positions} positions"
        return ""


def prompt_text(config: ModelConfig, task: str) -> str:
    """What the prompt of ``task`` says."""
    return str(getattr(config.prompts, "audiovisual" if task == "fused" else task))
