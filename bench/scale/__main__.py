"""``python -m bench.scale``: the page "Scale on paper" of ``bench/README.md`` and its figure, from the model and from
``check.csv``. ``python -m bench.scale check`` first measures this machine's rows of that file."""

from __future__ import annotations

import sys

from bench.scale import check, page


def main() -> int:
    if sys.argv[1:] not in ([], ["check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if sys.argv[1:]:
        check.check()
    page.write()
    return 0


if __name__ == "__main__":  # the check starts processes that import this module anew
    sys.exit(main())
