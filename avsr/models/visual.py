"""A small visual encoder that trains from scratch in minutes: mouth frames in, 25 features per second out.

``avsr pretrain`` writes the folder (``model.safetensors`` and ``config.json``) that :class:`VisualEncoder` loads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from avsr.config import EncoderConfig
from avsr.data.clip import Clip, center_crop
from avsr.data.rates import FRAMES_PER_SECOND
from avsr.errors import UserError
from avsr.models.encoder import SpeechEncoder
from avsr.models.sources import loading, resolve
from avsr.runtime.folders import write_durably
from avsr.runtime.tensors import refuse_nonfinite, save_file

CROP = 88  # pixels of the central square of a mouth frame that is read, as in AV-HuBERT
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "avsr-visual-1"

_MOST_LAYERS = 64
_SPAN = 5  # frames that the first convolution sees


@dataclass
class VisualConfig:
    """Sizes of the model.

    Attributes:
        pool: pixels averaged in each direction, so that frames have 88 / pool pixels. 4 is enough for drawn mouths.
        channels: of the first convolution and of the two residual stages after it.
        width: features per frame before the temporal layers.
        hidden: width of the recurrent layers in each direction; the encoder's width is twice that.
        layers: number of recurrent layers.
        dropout: probability in training.
    """

    pool: int = 4
    channels: list[int] = field(default_factory=lambda: [16, 32, 64])
    width: int = 160
    hidden: int = 128
    layers: int = 2
    dropout: float = 0.2


class Logits(NamedTuple):
    """Outputs of the heads: ``visemes`` (N, V) over the batch's valid frames, row by row; the others (B, T, 1 + U)."""

    visemes: Tensor
    units: Tensor
    ctc: Tensor


class VisualModel(nn.Module):
    """Convolutions over five frames, over each frame and over time, then a bidirectional GRU.

    Padding is excluded from the convolutions and from the statistics of batch normalization, is zero for the temporal
    layers and is packed away for the GRU: a clip gives the same features alone and in any batch.

    Args:
        config: the sizes.
        visemes: names of the viseme head's classes.
        units: words, visemes or phonemes, the classes of the unit heads from 1 on. Class 0 is "none of them"; for the
            CTC head it is the blank.
    """

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: VisualConfig, visemes: Sequence[str], units: Sequence[str]) -> None:
        super().__init__()
        self.config, self.visemes, self.units = config, tuple(visemes), tuple(units)
        self.side = CROP // config.pool
        self.width = 2 * config.hidden
        first, second, third = config.channels
        # with one gray channel a 3-D convolution is a 2-D one whose channels are the frames
        self.stem = nn.Sequential(_conv(_SPAN, first, 5, 2), nn.BatchNorm2d(first), nn.ReLU())
        self.trunk = nn.Sequential(_ResidualFrame(first, second), _ResidualFrame(second, third))
        edge = self.side
        for _ in range(3):
            edge = -(-edge // 2)
        self.project = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(third * edge * edge, config.width), nn.LayerNorm(config.width)
        )
        self.temporal = nn.ModuleList(_ResidualTime(config.width, config.dropout) for _ in range(2))
        self.recurrent = nn.GRU(
            config.width,
            config.hidden,
            config.layers,
            batch_first=True,
            bidirectional=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.viseme_head = nn.Linear(config.width, len(visemes))
        self.unit_head = nn.Linear(self.width, 1 + len(units))
        self.ctc_head = nn.Linear(self.width, 1 + len(units))
        self.register_buffer("feature_mean", torch.zeros(self.width))
        self.register_buffer("feature_scale", torch.ones(self.width))

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, side * side) gray values and (B,) valid frames -> (B, T, width), standardized; padding gives 0."""
        valid = _valid(inputs, lengths)
        hidden = self._context(self._frames(inputs, lengths), valid)
        return (hidden - self.feature_mean) * self.feature_scale * valid[..., None]

    def logits(self, inputs: Tensor, lengths: Tensor) -> Logits:
        """The heads over the same input as :meth:`forward`; their values at padding are meaningless."""
        frames = self._frames(inputs, lengths)
        hidden = self.dropout(self._context(frames, _valid(inputs, lengths)))
        return Logits(self.viseme_head(frames), self.unit_head(hidden), self.ctc_head(hidden))

    def _frames(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(N, config.width) of the N valid frames, row by row."""
        valid = _valid(inputs, lengths)
        grey = _standardise(inputs, valid).to(self.feature_mean.dtype).unflatten(-1, (self.side, self.side))
        around = nn.functional.pad(grey, (0, 0, 0, 0, _SPAN // 2, _SPAN // 2)).unfold(1, _SPAN, 1)
        stacked = around[valid].permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.project(self.trunk(self.stem(stacked)).flatten(1))
        return features

    def _context(self, frames: Tensor, valid: Tensor) -> Tensor:
        """(N, config.width) -> (B, T, width)."""
        hidden = frames.new_zeros(*valid.shape, frames.shape[-1])
        hidden[valid] = frames
        for layer in self.temporal:
            hidden = layer(hidden, valid)
        packed = pack_padded_sequence(hidden, valid.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=valid.shape[1])
        return out


class VisualEncoder(SpeechEncoder):
    """A frozen :class:`VisualModel`, always in eval mode: the statistics of batch normalization are frozen too."""

    frames_per_second = FRAMES_PER_SECOND
    needs = frozenset({"video"})

    def __init__(self, config: EncoderConfig, stream: str = "video", device: torch.device | str = "cpu") -> None:
        super().__init__()
        folder = resolve(str(config.name))
        if not isinstance(folder, Path):
            raise UserError(f"model.{stream}.encoder.name: {config.name} is not a folder written by 'avsr pretrain'")
        try:
            self.model = load_visual(folder)
        except UserError as error:
            raise UserError(f"model.{stream}.encoder.name: {error}") from error
        self.model.to(device).requires_grad_(False)
        self.batch = config.batch
        self.width = self.model.width
        self.identity = f"visual {hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:16]}"
        self.eval()

    def frames(self, samples: int, video_frames: int) -> int:
        """Encoder frames of a clip: its video frames."""
        return video_frames

    def prepare(self, clip: Clip) -> Tensor:
        """(T, side * side) float32: the central 88 x 88 pixels, averaged down.

        Raises:
            UserError: no video, or frames below 88 pixels.
        """
        if clip.mouth is None:
            raise UserError("the visual encoder needs video, and the clip has none")
        side = self.model.side
        return center_crop(shrink(clip.mouth, self.model.config.pool), side, side).flatten(1)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, K) zero-padded and (B,) int64 -> (B, T, D)."""
        out: Tensor = self.model(inputs, lengths)
        return out


def shrink(mouth: Tensor, pool: int) -> Tensor:
    """(T, H, W) uint8 -> (T, H // pool, W // pool) float32 in 0..255, each pixel the mean of pool x pool.

    A border narrower than a whole square is dropped equally on both sides, so the center stays the center.

    Raises:
        UserError: an empty clip, or frames below 88 pixels.
    """
    if mouth.dim() != 3 or len(mouth) == 0 or min(mouth.shape[1:]) < CROP:
        raise UserError(f"expected mouth frames (T, H, W) of at least {CROP} x {CROP}, got {tuple(mouth.shape)}")
    height, width = (CROP + (size - CROP) // (2 * pool) * 2 * pool for size in mouth.shape[1:])
    return avg_pool2d(center_crop(mouth, height, width).float(), pool)


def save_visual(model: VisualModel, folder: Path) -> None:
    """Writes ``config.json`` and ``model.safetensors``, each atomically.

    Raises:
        UserError: the folder cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = {"format": FORMAT, "model": asdict(model.config), "visemes": model.visemes, "units": model.units}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / WEIGHTS)
        write_durably(folder / CONFIG, text.encode())
    except OSError as error:
        raise UserError(f"cannot write the visual model to {folder}: {error}") from error


def load_visual(folder: Path) -> VisualModel:
    """The model of a folder, in eval mode.

    Raises:
        UserError: a file is missing, damaged or of another format, a weight is not finite, or the two do not fit
            together.
    """
    model = _from_config(folder / CONFIG)
    path = folder / WEIGHTS
    with loading(f"{path}: not a readable checkpoint"):
        state = load_file(str(path))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}  # on the meta device
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(own.keys() | found.keys()):
        if own.get(name) != found.get(name):
            raise UserError(
                f"{path} does not fit {CONFIG}: "
                f"{name} is {found.get(name, 'missing')}, expected {own.get(name, 'none')}"
            )
    refuse_nonfinite(state.items(), str(path))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _from_config(path: Path) -> VisualModel:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise UserError(f"{path}: expected the format {FORMAT!r} of a visual model, got {found!r}")
        config = VisualConfig(**content["model"])
        check_visual(config, f"{path}: model.")
        if config.layers > _MOST_LAYERS:
            raise UserError(f"{path}: model.layers: expected at most {_MOST_LAYERS}, got {config.layers}")
        with torch.device("meta"):  # the sizes are untrusted until the weights are checked against them
            return VisualModel(config, content["visemes"], content["units"])
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: not the config of a visual model: {error}") from error


def check_visual(config: VisualConfig, prefix: str = "") -> None:
    """Refuses impossible sizes.

    Raises:
        UserError: the message names the key, after ``prefix``.
    """
    if config.pool < 1 or CROP % config.pool or CROP // config.pool < 8:
        raise UserError(f"{prefix}pool: expected 1, 2, 4, 8 or 11, got {config.pool}")
    if len(config.channels) != 3 or min(config.channels) < 1:
        raise UserError(f"{prefix}channels: expected three numbers above 0, got {config.channels}")
    for key in ("width", "hidden", "layers"):
        if getattr(config, key) < 1:
            raise UserError(f"{prefix}{key}: expected at least 1, got {getattr(config, key)}")
    if not 0.0 <= config.dropout < 1.0:
        raise UserError(f"{prefix}dropout: expected 0 <= dropout < 1, got {config.dropout}")


class _ResidualFrame(nn.Module):
    """Two 3x3 convolutions over each frame, the first of stride 2, with a 1x1 shortcut of stride 2."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_conv(inside, outside, 3, 2), nn.BatchNorm2d(outside))
        self.second = nn.Sequential(_conv(outside, outside, 3, 1), nn.BatchNorm2d(outside))
        self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, 2, bias=False), nn.BatchNorm2d(outside))

    def forward(self, frames: Tensor) -> Tensor:
        return relu(self.second(relu(self.first(frames))) + self.short(frames))


class _ResidualTime(nn.Module):
    """A convolution over five frames that reads zeros outside the clip; its output there is meaningless."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 5, padding=2)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, valid: Tensor) -> Tensor:
        inside = self.norm(hidden) * valid[..., None]
        change = self.dropout(relu(self.conv(inside.transpose(1, 2)))).transpose(1, 2)
        return hidden + change


def _conv(inside: int, outside: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)


def _valid(inputs: Tensor, lengths: Tensor) -> Tensor:
    """(B, T) bool: the frames before each row's length."""
    return torch.arange(inputs.shape[1], device=inputs.device) < lengths.to(inputs.device)[:, None]


def _standardise(inputs: Tensor, valid: Tensor) -> Tensor:
    """(B, T, K) with mean 0 and deviation 1 over each clip's pixels; padding is 0, and so is all of a blank clip."""
    padding = ~valid[..., None]
    count = (valid.sum(1) * inputs.shape[-1]).clamp(min=1)[:, None, None]
    mean = inputs.masked_fill(padding, 0.0).sum((1, 2), keepdim=True) / count
    centred = (inputs - mean).masked_fill(padding, 0.0)
    deviation = (centred.square().sum((1, 2), keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=1.0)
