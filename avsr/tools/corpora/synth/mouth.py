"""Draws a talking mouth from a track of its shape: 96x96 grey at 25 fps, the lips around the middle.

Everything is a formula of the pixel's position with soft edges. The name of the speaker sets the geometry and the
skin; the name of the clip sets the light, the sharpness, the noise and how the head moves. It is a drawing in which
visemes can be told apart; results on it say nothing about real lips.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from avsr.data.rates import FRAMES_PER_SECOND
from avsr.tools.corpora.synth.visemes import PARAMETERS

SIZE = 96  # pixels; all lengths in pixels below are of this picture
_MARGIN = 8  # pixels of skin around the picture, for the head to move
_CHUNK = 8  # frames drawn at a time: their arrays fit in a CPU's cache


@dataclass(frozen=True)
class _Speaker:
    """Pixels, or grey levels from 0 to 255."""

    half_width: float  # of the mouth at rest
    upper: float  # thickness of the lips
    lower: float
    bow: float  # depth of the notch in the upper lip, 0..1
    droop: float  # of the corners
    gape: float  # gap between the lips at opening 1
    tooth: float  # height of the upper teeth
    skin: float
    lip: float  # share of the skin's level
    teeth: float
    tongue: float
    jaw: float  # from the mouth down to the end of the chin
    face: np.ndarray  # (SIZE + 2 * _MARGIN,) * 2 float32: the skin without the mouth, 1 is plain


@dataclass(frozen=True)
class _Clip:
    gain: float
    slope: tuple[float, float]  # change of light across the picture, right and down
    soft: float  # pixels of an edge's softness
    noise: float  # standard deviation, grey levels
    head: np.ndarray  # (T, 4) float32: right, down (pixels), angle (radians), size


def draw_mouth(track: np.ndarray, speaker: str, clip: str) -> np.ndarray:
    """Draws a clip.

    Args:
        track: (T, len(PARAMETERS)) of ``viseme_track``.
        speaker: a name; the same name is the same face.
        clip: a name; the same name is the same light, motion and noise.

    Returns:
        (T, 96, 96) uint8; the same for the same input in any process.

    Raises:
        ValueError: a track of another shape.
    """
    if track.ndim != 2 or track.shape[1] != len(PARAMETERS) or not len(track):
        raise ValueError(f"track: expected (T, {len(PARAMETERS)}) with T above 0, got {track.shape}")
    face = _draw_speaker(_generator("speaker", speaker))
    generator = _generator("clip", clip)
    scene = _draw_clip(generator, len(track))
    frames = np.empty((len(track), SIZE, SIZE), np.uint8)
    for first in range(0, len(track), _CHUNK):
        part = slice(first, first + _CHUNK)
        picture = _picture(track[part].astype(np.float32), scene.head[part], face, scene)
        picture += scene.noise * generator.standard_normal(picture.shape, np.float32)
        frames[part] = np.clip(picture, 0, 255)
    return frames


def _generator(kind: str, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{kind} {name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def _draw_speaker(generator: np.random.Generator) -> _Speaker:
    draw = generator.uniform
    skin = draw(110, 195)
    return _Speaker(
        half_width=draw(24.5, 29.0),
        upper=draw(5.5, 8.5),
        lower=draw(7.0, 10.5),
        bow=draw(0.1, 0.4),
        droop=draw(-1.5, 2.0),
        gape=draw(18.5, 21.5),
        tooth=draw(5.0, 7.0),
        skin=skin,
        lip=draw(0.42, 0.66),
        teeth=draw(195, 235),
        tongue=draw(0.5, 0.65) * skin,
        jaw=draw(34, 40),
        face=_draw_face(generator),
    )


def _draw_face(generator: np.random.Generator) -> np.ndarray:
    """Skin of uneven tone, the shadow of the nose, the furrows next to the mouth and perhaps a beard."""
    size = SIZE + 2 * _MARGIN
    y, x = np.mgrid[:size, :size].astype(np.float32) - np.float32(size / 2 - 0.5)
    face = 1 + 0.035 * _patches(generator, size, 9) + 0.02 * _patches(generator, size, 28)
    face += 0.01 * generator.standard_normal((size, size), np.float32)
    nose, wing = generator.uniform(34, 40), generator.uniform(7, 10)
    depth, spread = generator.uniform(0.05, 0.16), generator.uniform(30, 35)
    for side in (-1, 1):
        face -= 0.5 * np.exp(-(((x - side * wing) / 3.6) ** 2) - ((y + nose) / 2.6) ** 2)
        furrow = side * x - spread + 0.004 * (y - 8) ** 2  # from next to the nose to next to the corners
        face -= depth * np.exp(-((furrow / 3.5) ** 2) - ((y + 14) / 16) ** 2)
    face -= 0.07 * np.exp(-((x / 3.5) ** 2) - ((y + 0.5 * nose + 6) / 8) ** 2)  # the groove under the nose
    if generator.uniform() < 0.3:
        hair = np.clip((np.hypot(x / 1.2, y + 2) - 17) / 12, 0, 1) * np.clip((y + 20 + 0.15 * np.abs(x)) / 18, 0, 1)
        strands = 0.85 + 0.35 * generator.uniform(-1, 1, (size, size)) + 0.15 * _patches(generator, size, 28)
        face -= generator.uniform(0.12, 0.35) * hair * strands
    return np.clip(face, 0.2, 1.3).astype(np.float32)


def _patches(generator: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(size, size) of smooth noise: one random number a cell, interpolated between them."""
    place = np.linspace(0, cells - 1, size)[:, None]
    blend = np.maximum(1 - np.abs(place - np.arange(cells)[None]), 0)
    return np.asarray(blend @ generator.standard_normal((cells, cells)) @ blend.T, np.float32)


def _draw_clip(generator: np.random.Generator, frames: int) -> _Clip:
    draw = generator.uniform
    seconds = np.arange(frames) / FRAMES_PER_SECOND
    still = (draw(-3, 3), draw(-3, 3), draw(-0.07, 0.07), draw(0.95, 1.05))
    sway = (1.2, 1.0, 0.022, 0.012)
    head = np.empty((frames, 4), np.float32)
    for column, (middle, range_) in enumerate(zip(still, sway, strict=True)):
        waves = [draw(0.3, 1.0) * np.sin(2 * np.pi * (draw(0.15, 1.0) * seconds + draw(0, 1))) for _ in range(2)]
        head[:, column] = middle + range_ * sum(waves)
    return _Clip(
        gain=draw(0.85, 1.15),
        slope=(draw(-0.2, 0.2), draw(-0.15, 0.15)),
        soft=draw(0.55, 0.85),
        noise=draw(0.8, 2.5),
        head=head,
    )


class _Edge:
    """0 below, 1 above zero pixels, soft between."""

    def __init__(self, soft: float) -> None:
        self._slope = np.float32(-1.6 / soft)

    def __call__(self, distance: np.ndarray) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(np.clip(distance * self._slope, -30, 30))))


def _picture(track: np.ndarray, head: np.ndarray, who: _Speaker, scene: _Clip) -> np.ndarray:
    """(T, 96, 96) float32 grey levels of some frames, without the noise."""
    right, down, angle, size = (column[:, None, None] for column in head.T)
    ruler = np.arange(SIZE, dtype=np.float32) - np.float32(SIZE / 2 - 0.5)
    across, along = ruler[None, None, :], ruler[None, :, None]
    turn, rise = np.cos(angle) / size, np.sin(angle) / size
    x = (across - right) * turn + (along - down) * rise
    y = (along - down) * turn - (across - right) * rise
    edge = _Edge(scene.soft)
    shape = {name: column[:, None, None] for name, column in zip(PARAMETERS, track.T, strict=True)}
    curves = _curves(shape, x, who)

    picture = who.skin * _skin(who.face, head)
    # below the chin there is only the neck in the shade; the chin falls with the jaw
    chin = who.jaw + 0.45 * curves.gap - 0.008 * x**2
    picture *= 1 - 0.45 * edge((y - chin) * 0.35)
    picture *= 1 - 0.25 * np.maximum(1 - np.abs(y - curves.end - 3.5) / 4.5, 0) * curves.across_lips
    _paint_lips(picture, y, shape, curves, who, edge)
    _paint_inside(picture, x, y, shape, curves, who, edge)
    picture *= scene.gain * (1 + scene.slope[0] * across / SIZE + scene.slope[1] * along / SIZE)
    return np.asarray(picture, np.float32)


class _Curves(NamedTuple):
    """The outlines of the lips at every pixel's column, as rows below the middle of the mouth; pixels."""

    gap: np.ndarray  # in the middle
    inner: np.ndarray  # half width of the gap
    corner: np.ndarray  # 0 at the corners, 1 and more toward the middle, below 0 outside
    across_lips: np.ndarray  # 1 in the middle, 0 at the corners
    across_gap: np.ndarray
    top: np.ndarray
    inner_top: np.ndarray
    inner_end: np.ndarray
    end: np.ndarray


def _curves(shape: dict[str, np.ndarray], x: np.ndarray, who: _Speaker) -> _Curves:
    opening, width, rounding, tuck = (shape[name] for name in ("opening", "width", "rounding", "tuck"))
    gap = np.maximum(opening, 0) * who.gape
    press = np.maximum(-opening, 0)
    half = who.half_width * (1 + 0.16 * width - 0.13 * rounding - 0.05 * np.maximum(opening, 0))
    inner = half * (0.86 - 0.24 * rounding)
    across_lips = np.maximum(1 - (x / half) ** 2, 0)
    across_gap = np.maximum(1 - (x / inner) ** 2, 0)
    roundness = np.clip(0.35 + 0.65 * rounding + 0.3 * opening, 0, 1)
    arch = across_gap + roundness * (np.sqrt(across_gap) - across_gap)
    plump = np.sqrt(across_lips)
    line = (who.droop - 1.8 * width) * (1 - across_lips) - 2.2 * tuck * across_lips
    inner_top = line - 0.32 * gap * arch
    inner_end = line + (0.68 - 0.2 * tuck) * gap * arch
    notch = 1 - who.bow * np.maximum(1 - (x / 5.5) ** 2, 0)
    upper = who.upper * (1 + 0.3 * rounding - 1.1 * press) * plump * notch
    lower = who.lower * (1 + 0.3 * rounding - 1.1 * press - 0.45 * tuck) * plump
    outer = 0.5 * (arch + plump) * gap
    top = np.minimum(line - 0.32 * outer, inner_top) - upper
    end = np.maximum(line + 0.68 * outer, inner_end) + lower
    corner = (1 - np.abs(x) / half) * 12
    return _Curves(gap, inner, corner, across_lips, across_gap, top, inner_top, inner_end, end)


def _paint_lips(
    picture: np.ndarray, y: np.ndarray, shape: dict[str, np.ndarray], at: _Curves, who: _Speaker, edge: _Edge
) -> None:
    lips = edge(y - at.top) * edge(at.end - y) * edge(at.corner)
    middle = (y - 0.5 * (at.inner_end + at.end)) / np.maximum(0.5 * (at.end - at.inner_end), 1)
    shine = np.maximum(1 - middle**2, 0) * at.across_lips * (0.16 + 0.14 * shape["rounding"])
    level = who.skin * who.lip * (1 - 0.12 * edge(at.inner_top - y) + shine)
    picture += lips * (level - picture)


def _paint_inside(
    picture: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    shape: dict[str, np.ndarray],
    at: _Curves,
    who: _Speaker,
    edge: _Edge,
) -> None:
    """The dark inside with the tongue, the upper teeth before it; then a tongue between the teeth, over the lip."""
    teeth, tongue = shape["teeth"], shape["tongue"]
    hole = edge(y - at.inner_top) * edge(at.inner_end - y) * edge(at.corner)
    above = y - at.inner_end + tongue * at.gap * (0.25 + 0.6 * at.across_gap)
    depth = 14 + who.tongue * edge(above) * np.minimum(tongue * 2, 1)
    row = edge(at.inner_top + who.tooth * (0.4 + 0.6 * teeth) - y) * edge((at.inner * 0.92 - np.abs(x)) * 0.6)
    enamel = who.teeth * (0.55 + 0.45 * at.across_gap) * (0.94 + 0.06 * np.cos(x * np.float32(2 * np.pi / 6)))
    depth += np.minimum(1.5 * teeth, 1) * row * (enamel - depth)
    picture += hole * (depth - picture)
    out = 1 - (x / (0.5 * at.inner)) ** 2 - ((y - at.inner_end + 1) / (0.35 * at.gap + 3.0)) ** 2
    picture += np.minimum(1.2 * shape["tip"], 1) * edge(3 * out) * (1.25 * who.tongue - picture)


def _skin(face: np.ndarray, head: np.ndarray) -> np.ndarray:
    """The face shifted with the head by fractions of pixels, (T, 96, 96) float32."""
    skin = np.empty((len(head), SIZE, SIZE), np.float32)
    for picture, (right, down, _, _) in zip(skin, head, strict=True):
        x, y = np.clip(_MARGIN - np.array((right, down)), 0, 2 * _MARGIN - 1.001)
        i, j = int(x), int(y)
        u, v = np.float32(x - i), np.float32(y - j)
        rows = (1 - v) * face[j : j + SIZE] + v * face[j + 1 : j + 1 + SIZE]
        picture[:] = (1 - u) * rows[:, i : i + SIZE] + u * rows[:, i + 1 : i + 1 + SIZE]
    return skin
