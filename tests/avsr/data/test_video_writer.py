"""Writing video: the same bytes for the same frames, and invalid frames."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsr.data.video import encode_video, write_video
from avsr.errors import UserError
from avsr.tools.corpora.synth.espeak import Span
from avsr.tools.corpora.synth.mouth import draw_mouth
from avsr.tools.corpora.synth.visemes import viseme_track

pytestmark = pytest.mark.integration

# Encodes the same clips again and again, with clips of other sizes in between, so that the encoder gets its memory
# back with ever other rubbish in it.
REPEAT = """
import random, sys
import numpy as np
from avsr.data.video_writer import encode_video
frames, found = np.load(sys.argv[1]), []
for length, crf in ((30, 20), (30, 23), (45, 20), (45, 23), (60, 20)):
    draw, files = random.Random(5), set()
    for turn in range(60):
        if turn >= 20:
            small = frames[:10, : 2 * draw.randrange(20, 48), : 2 * draw.randrange(20, 48)]
            encode_video(np.ascontiguousarray(small), crf=crf)
        files.add(encode_video(frames[:length], crf=crf))
    found.append(files)
found.append({encode_video(frames[:9], sound=np.sin(np.arange(9000))) for _ in range(4)})
print([len(files) for files in found], len(max(found[3])))
"""


def test_the_same_frames_give_the_same_small_file_whatever_was_in_memory(tmp_path: Path) -> None:
    sounds = ("_", "b", "I", "n", "b", "l", "u:", "eI", "t", "s", "E", "v", "@", "n", "_")
    spans = [Span(text, 0.08 * index, 0.08 * index + 0.08) for index, text in enumerate(sounds)]
    np.save(tmp_path / "frames.npy", draw_mouth(viseme_track(spans, 60), "a", "b"))
    heap = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "4000000000"}  # glibc: use memory again
    command = [sys.executable, "-c", REPEAT, str(tmp_path / "frames.npy")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **heap})
    different, size = done.stdout.rsplit(" ", 1)
    assert different == "[1, 1, 1, 1, 1, 1]"
    assert int(size) < 12_000


def test_frames_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    grey = np.full((2, 96, 96), 100, np.uint8)
    for frames in (grey[:, :95], grey.astype(np.float32), grey[0], grey[:0]):
        with pytest.raises(ValueError, match="frames: expected"):
            encode_video(frames)
    with pytest.raises(UserError, match=r"cannot write .*nowhere"):
        write_video(tmp_path / "nowhere" / "a.mp4", grey)
