"""Interlaced video, as of television: both halves of a picture are brought to one moment."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from avsr.data.video import read_video


def fields(count: int) -> np.ndarray:
    """(2 * count, 64, 64) uint8: an edge that moves by 2 pixels every 50th of a second."""
    columns = np.arange(64)[None, None]
    edges = np.where(columns < 8 + 2 * (np.arange(2 * count)[:, None, None] % 24), 40, 200)
    return np.broadcast_to(edges, (2 * count, 64, 64)).astype(np.uint8)


def write_interlaced(path: Path, pictures: np.ndarray, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg2video", rate=25, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.bit_rate = "yuv420p", 8_000_000
        for index, grey in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(grey, format="gray").reformat(format="yuv420p", dst_color_range="MPEG")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", ["a.mkv", "a.mpg", "a.ts"])
def test_interlaced_pictures_show_one_moment(tmp_path: Path, name: str) -> None:
    """The odd lines of a picture are a 50th of a second later than the even ones: edges that move are combs."""
    moments = fields(40)
    woven = moments[::2].copy()
    woven[:, 1::2] = moments[1::2, 1::2]
    write_interlaced(tmp_path / name, woven, {"flags": "+ilme+ildct", "top": "1"})
    found = read_video(tmp_path / name).numpy().astype(int)
    assert found.shape == woven.shape
    combs = np.abs(np.diff(woven.astype(int), axis=1)).mean(axis=(1, 2))
    left = np.abs(np.diff(found, axis=1)).mean(axis=(1, 2))
    assert combs.mean() > 4 and left.max() < 2
    # each picture is of the time of one of its halves, not of the picture before or after
    errors = {k: np.abs(found[2:-2] - moments[4 + k : 76 + k : 2]).mean() for k in range(-2, 4)}
    assert min(errors[0], errors[1]) < 0.5 and min(errors[k] for k in (-2, -1, 2, 3)) > 10


def test_what_is_not_flagged_as_interlaced_is_unchanged(tmp_path: Path) -> None:
    moments = fields(20)
    woven = moments[::2].copy()
    woven[:, 1::2] = moments[1::2, 1::2]
    write_interlaced(tmp_path / "a.mkv", woven, {})
    with av.open(str(tmp_path / "a.mkv")) as container:
        plain = [frame.to_ndarray()[:64].astype(float) for frame in container.decode(video=0)]
    grey = np.clip(np.rint((np.stack(plain) - 16) * 255 / 219), 0, 255)
    assert np.array_equal(read_video(tmp_path / "a.mkv").numpy(), grey)
