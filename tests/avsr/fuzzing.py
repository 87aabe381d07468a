"""What the fuzz tests share: the property, its limits, and changes that know what they change.

The property: whatever a file holds, reading it works or raises ``UserError``, within 5 s and 400 MB.
"""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from avsr.errors import UserError

SECONDS, MEGABYTES = 5.0, 400
FEW, MANY = 40, 600
CASES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
_ROOM = 1 << 30  # bytes of addresses that a case may take; threads and arenas of malloc count too

# Raw JSON that no value of Python gives
_RAW = {
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@objects@": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "@digits@": "9" * 5_000,
    "@huge@": "1e999",
    "@half@": r'"\ud800"',
    "@nan@": "NaN",
    "@open@": '["',
}
TEXTS = ["", " ", "\0", "\n", "../../x", "/etc/passwd", "a/../../b", "\x1b[2J", "é\u202e", "a" * 300, "long/" * 2_000]
NUMBERS = [0, 1, -1, 0.5, 2**31, 2**53 + 1, 2**63, 10**400, -(10**30), 1e308, 1e-320]
HOSTILE = [*TEXTS, *NUMBERS, *_RAW, None, True, [], {}, [[]], [None], {"a": {"b": []}}, [1, "a"], {"": 0}]
_COUNTS = [0, 1, 2, 3, 127, 128, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1]


def fuzz(count: int, cases: st.SearchStrategy[Any], check: Callable[[Any], Any], always: Iterable[Any] = ()) -> None:
    """Holds ``check`` to the property in ``count`` cases, and in those of ``always``; the few of the short run are the
    same every time."""
    for case in always:
        try:
            with bounded():
                check(case)
        except Exception as error:
            error.add_note(f"the case: {str(case)[:500]!r}")
            raise

    @settings(
        max_examples=count,
        derandomize=count <= FEW,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def every(case: Any) -> None:
        with bounded():
            check(case)

    every()


def fuzz_file(
    count: int, path: Path, cases: st.SearchStrategy[bytes], read: Callable[[], Any], always: Iterable[bytes] = ()
) -> None:
    """``fuzz`` with a check that writes the case to ``path`` and calls ``read``."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        read()

    fuzz(count, cases, check, always)


def fuzz_json(count: int, path: Path, value: Any, read: Callable[[], Any], *more: bytes) -> None:
    """Fuzzes a file with ``value`` as JSON: changed, damaged, with everything hostile in each part, and ``more``."""
    fuzz_file(count, path, json_file(value), read, [*each_changed(value), *more])


@contextmanager
def bounded(*, strict: bool = True) -> Iterator[None]:
    """The property. Unless ``strict`` a library may ask for memory that it then does not use, and be refused."""
    addresses = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    peak, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + _ROOM, hard))
    try:
        yield
    except UserError as error:
        cause = error.__cause__
        assert not strict or not isinstance(cause, MemoryError) and "allocate" not in str(cause), (
            f"took all memory: {cause!r}"
        )
        assert str(error).strip() and "Traceback" not in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < MEGABYTES << 10


def to_text(value: Any) -> str:
    """JSON of a value with the marks of ``HOSTILE`` replaced by what they stand for."""
    text = json.dumps(value)
    for mark, raw in _RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, deleted, doubled or renamed."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(whole))
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "double", "rename"]))
        if kind == "replace" or holder is whole:
            holder[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
        elif kind == "delete":
            del holder[key]
        elif isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[draw(st.sampled_from([text for text in TEXTS if kind == "rename"] or [f"{key}2"]))] = holder.pop(key)
    return whole[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in enumerate(value) if isinstance(value, list) else value.items():
        yield value, key
        if isinstance(inner, list | dict):
            yield from _places(inner)


def damaged(data: bytes, header: int = 128) -> st.SearchStrategy[bytes]:
    """Bytes with one to four edits, half of them in the first ``header``: flips, numbers of every width, cuts, what is
    put in or doubled, ends."""
    place = st.one_of(st.integers(0, min(header, len(data))), st.integers(0, len(data)))
    width = st.sampled_from([(size, order) for size in (1, 2, 3, 4, 8) for order in ("little", "big")])
    edit = st.one_of(
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("number"), place, st.sampled_from(_COUNTS), width),
        st.tuples(st.just("cut"), place, st.integers(1, 64)),
        st.tuples(st.just("put"), place, st.one_of(st.binary(max_size=16), st.just(b"\0" * 5_000))),
        st.tuples(st.just("double"), place, st.integers(1, 300)),
        st.tuples(st.just("end"), place),
    )
    return st.lists(edit, min_size=1, max_size=4).map(lambda edits: _edited(data, edits))


def _edited(data: bytes, edits: list[Any]) -> bytes:
    for kind, at, *rest in edits:
        if kind == "set":
            data = data[:at] + rest[0] + data[at + len(rest[0]) :]
        elif kind == "number":
            size, order = rest[1]
            data = data[:at] + (rest[0] % (1 << 8 * size)).to_bytes(size, order) + data[at + size :]
        elif kind == "cut":
            data = data[:at] + data[at + rest[0] :]
        elif kind == "put":
            data = data[:at] + rest[0] + data[at:]
        elif kind == "double":
            data = data[: at + rest[0]] + data[at:]
        else:
            data = data[:at]
    return data


def each_changed(value: Any) -> Iterator[bytes]:
    """JSON with each part of a value in turn replaced by everything hostile."""
    for number, _ in enumerate(_places([value])):
        for hostile in HOSTILE:
            whole = [copy.deepcopy(value)]
            holder, key = list(_places(whole))[number]
            holder[key] = hostile
            yield to_text(whole[0]).encode() + b"\n"


def lines_of(*rows: Any) -> st.SearchStrategy[bytes]:
    """Files with a JSON value a line: one with a changed row, or with damaged bytes."""
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    changes = st.lists(st.one_of(*(changed(row) for row in rows)), min_size=1, max_size=3)
    return st.one_of(changes.map(lambda found: "".join(to_text(row) + "\n" for row in found).encode()), damaged(whole))


def json_file(value: Any) -> st.SearchStrategy[bytes]:
    """JSON files, changed or damaged."""
    return st.one_of(changed(value).map(lambda found: to_text(found).encode()), damaged(json.dumps(value).encode()))
