"""Numbers of text tokens of a manifest, counted once for each tokenizer where the manifest has an index."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avsr.data.index import Index
from avsr.data.utterances import Utterances
from avsr.errors import UserError
from avsr.runtime.folders import write_flushed
from avsr.runtime.locks import hold
from avsr.runtime.progress import ProgressBar

logger = logging.getLogger("avsr")
Tokenize = Callable[[str], list[int]]
Counts = np.ndarray[Any, Any]
_TOGETHER = 4096  # texts that are tokenised at once


def count_tokens(utterances: Utterances, index: Index | None, tokenize: Tokenize, *, shown: bool = True) -> Counts:
    """(N,) int32 tokens of the texts of ``utterances``, without special tokens.

    Args:
        utterances: rows of a manifest.
        index: of the manifest, if it has one; keeps the counts of a ``tokenize`` that has an ``identity``, a text that
            names everything its results depend on. One that has ``counts`` (texts to numbers of tokens) counts many
            at once.
        tokenize: text to token ids.
        shown: whether a progress bar shows that an index is filled.
    """
    identity = getattr(tokenize, "identity", "")
    if index is None or not identity:
        return _counted(utterances, tokenize, False)
    path = index.file(f"tokens-{{}}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.npy")
    held = _held(path, len(index.table))
    if held is None:
        held = _made(path, Utterances(index.table, utterances.manifest, utterances.root), tokenize, shown)
    return np.asarray(held[utterances.rows])


def _made(path: Path, everything: Utterances, tokenize: Tokenize, shown: bool) -> Counts:
    try:
        with hold(path.parent, path.name, wait=True):
            held = _held(path, len(everything))  # of a process that was faster
            if held is not None:
                return held
            counts = _counted(everything, tokenize, shown)
            content = io.BytesIO()
            np.save(content, counts, allow_pickle=False)
            write_flushed(path, content.getvalue())
            return counts
    except (OSError, UserError) as error:  # as of an index that others have made, and that only they may write
        logger.warning("the numbers of tokens are not kept: %s: %s", path, getattr(error, "strerror", None) or error)
        return _counted(everything, tokenize, shown)


def _held(path: Path, count: int) -> Counts | None:
    try:
        found: Counts = np.load(path, mmap_mode="r", allow_pickle=False)
        return found if found.dtype == np.int32 and found.shape == (count,) else None
    except (OSError, ValueError, EOFError):
        return None


def _counted(utterances: Utterances, tokenize: Tokenize, shown: bool) -> Counts:
    many: Callable[[Sequence[str]], list[int]] = getattr(
        tokenize, "counts", lambda texts: [len(tokenize(text)) for text in texts]
    )
    counts = np.zeros(len(utterances), dtype=np.int32)
    with ProgressBar("count tokens", len(utterances), shown=shown) as bar:
        for first in range(0, len(utterances), _TOGETHER):
            texts = utterances[first : first + _TOGETHER].column("text").to_pylist()
            counts[first : first + len(texts)] = many(texts)
            bar.advance(len(texts))
    return counts
