"""``python -m bench.families``: the sweep, which goes on where it stopped, and its table.

Rows go to ``families.jsonl`` in the folder ``--out``, the table beside them to ``families.md``. A class that has a row
of this transformers version is not judged again, even if flashsink has changed since, unless ``--again`` is given.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from bench.families import report, store, work
from bench.families.build import MAPPINGS, Entry, entries


def main() -> int:
    options = _parser().parse_args()
    work.prepare()
    import transformers

    chosen = [e for e in entries() if re.search(options.classes, e.name) and options.mapping in ("all", e.group)]
    if options.verbose:
        for entry in chosen[: options.limit]:
            _show(entry, options.cells, options.compile)
        return 0
    path = options.out / "families.jsonl"
    now = store.source_hash()
    if not options.report:
        done = store.read(path)
        todo = [e for e in chosen if _wanted(done.get(f"{e.name}, {transformers.__version__}"), now, options.again)]
        todo = todo[: options.limit]
        print(f"{len(chosen)} classes, {len(todo)} to do", flush=True)
        count: Counter[str] = Counter()
        for number, (entry, row) in enumerate(work.rows(todo, options.workers, options.timeout, options.compile), 1):
            key = {"class": entry.name, "group": entry.group, "transformers": transformers.__version__, "source": now}
            store.append(path, key | row)
            count[row["verdict"]] += 1
            print(f"{number}/{len(todo)} {entry.name}: {row['verdict']} {row['reason'][:100]}", flush=True)
        print(dict(count))
        store.compact(path)
    rows = [row for row in store.read(path).values() if row["transformers"] == transformers.__version__]
    table = report.markdown(rows, sum(row["source"] != now for row in rows))
    (options.out / "families.md").write_text(table, encoding="utf-8")
    return 0


def _wanted(row: store.Row | None, now: str, again: bool) -> bool:
    return row is None or (again and row["source"] != now)


def _show(entry: Entry, only: str, compile: bool) -> None:
    """One class in detail."""
    from bench.families import build, judge

    try:
        result = judge.judge(entry, only=only, compile=compile)
    except build.LeftOut as error:
        print(f"{entry.name}: left out: {error}")
        return
    kind, reason = store.of_class(result.verdicts)
    print(f"{entry.name} ({entry.group}): {kind} {reason}")
    print(
        f"  observed: {result.observed or 'nothing'}; not checked: {', '.join(sorted(result.unchecked)) or 'nothing'}"
    )
    for verdict, reasons in store.row_of(result)["cells"].items():
        for why, names in reasons.items():
            print(f"  {verdict:8s} {', '.join(names)}{': ' * bool(why)}{why}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.families", description=__doc__)
    parser.add_argument("--classes", default="", metavar="REGEX", help="names of classes, default all")
    parser.add_argument("--cells", default="", metavar="REGEX", help="with --verbose: only these cells")
    parser.add_argument("--mapping", default="all", choices=[*MAPPINGS, "all"])
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many classes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results", metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one class")
    parser.add_argument("--again", action="store_true", help="also classes whose row is of other sources of flashsink")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile")
    parser.add_argument("--report", action="store_true", help="only write the table")
    parser.add_argument("--verbose", action="store_true", help="print every cell, write nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
