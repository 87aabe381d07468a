"""One evaluation by many ranks: what rank 0 does for all, and how their rows come together.

Every rank appends its rows to a file of its own next to that of rank 0, so a kill loses none of them. The next start,
with any number of ranks, puts all into the file of rank 0. The run folder must be the same one for all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from avsr.errors import UserError, visible
from avsr.evaluation.results import UNFINISHED, row_key
from avsr.runtime.rows import Row, Rows

Found = TypeVar("Found")
Keyed = dict[Hashable, Row]


def place() -> tuple[int, int]:
    """This process among those that work together: (rank, number of ranks); (0, 1) if it is alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(call: Callable[[], Found]) -> Found:
    """What ``call`` returns on rank 0, which alone calls it. Collective.

    Raises:
        UserError: ``call`` has raised it; the same on every rank, so that none waits for another.
    """
    if not dist.is_initialized():
        return call()
    found: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            found[0] = call()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, src=0)
    result, failure = found
    if failure:
        raise UserError(failure)
    return result  # type: ignore[no-any-return]


def open_rows(path: Path, made: Row | None) -> tuple[Rows, Collection[Hashable]]:
    """The rows of this rank, and the keys of those that an evaluation left that was made by the same, of whatever
    rank. Collective.

    Args:
        path: the file of rank 0, which also gets what the others have left.
        made: what :func:`~avsr.evaluation.results.made_by` returns; with None nothing that is there counts.

    Raises:
        UserError: a file cannot be read or written.
    """
    own: list[Rows] = []

    def gather() -> list[Hashable]:
        others = _of_others(path)
        if made is None:
            for left in (path, *others):
                left.unlink(missing_ok=True)
            others = []
        kept = Rows(path, row_key, made)
        own.append(kept)
        for left in others:
            for key, row in Rows(left, row_key, made).held.items():
                if key not in kept.held:  # a stop may have come between these two lines
                    kept.add(row)
            left.unlink()
        return list(kept.held)

    done = set(from_first(gather))
    rank, _ = place()
    if rank:
        own.append(Rows(_of_rank(path, rank), row_key, made))
    return own[0], done


def whole(expected: Iterable[Hashable], own: Keyed) -> Keyed:
    """On rank 0 the rows of all ranks by their keys, elsewhere nothing. Collective.

    Args:
        expected: all keys.
        own: what this rank has decoded, on rank 0 with what was there.

    Raises:
        UserError: on rank 0, that a row is missing or there twice: the ranks have not read the same.
    """
    rank, ranks = place()
    parts: list[Any] = [own] * ranks
    if ranks > 1:
        dist.gather_object(own, parts if rank == 0 else None)
    return {} if rank else merged(expected, parts)


def merged(expected: Iterable[Hashable], parts: Iterable[Mapping[Hashable, Row]]) -> Keyed:
    """The rows of ``parts`` by their keys, which are those of ``expected``.

    Raises:
        UserError: a row is missing, is of something else or there twice.
    """
    found: Keyed = {}
    wanted = set(expected)
    for number, part in enumerate(parts):
        if twice := next((key for key in part if key in found), None):
            _refuse(f"rank {number} has decoded {twice}, and so has a rank before it")
        if other := next((key for key in part if number and key not in wanted), None):
            _refuse(f"rank {number} has decoded {other}, which rank 0 does not know")
        found.update(part)
    if gap := next((key for key in wanted if key not in found), None):
        _refuse(f"no rank has decoded {gap}")
    return found


def drop_others(path: Path) -> None:
    """Deletes the files of the other ranks next to ``path``, that of rank 0."""
    for left in _of_others(path):
        left.unlink(missing_ok=True)


def _refuse(problem: str) -> None:
    raise UserError(f"{visible(problem)}: the ranks do not see the same manifests and results; repeat the command")


def _of_rank(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.name.removesuffix(UNFINISHED)}.rank{rank}{UNFINISHED}")


def _of_others(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name.removesuffix(UNFINISHED)}.rank*{UNFINISHED}"))
