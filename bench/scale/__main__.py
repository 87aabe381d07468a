"""``python -m bench.scale``: the section "Scale on paper" of ``bench/README.md`` and its figure, from the model and
``bench/results/check.csv``. ``python -m bench.scale check`` first measures this machine's rows of that file."""

from __future__ import annotations

import sys

from bench.scale import check, page


def main() -> int:
    if sys.argv[1:] not in ([], ["check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if sys.argv[1:]:
        check.check()
    page.update()
    return 0


if __name__ == "__main__":  # the check's processes import this module again
    sys.exit(main())
