"""Which releases of other packages flashsink is tested with. Others may work: they are named once, by a warning."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import warnings

# package -> (oldest, first untested), both major and minor
TESTED = {
    "torch": ((2, 11), (2, 12)),
    "triton": ((3, 6), (3, 7)),
    "transformers": ((5, 17), (5, 24)),
}


def outside(package: str) -> str:
    """The warning about an installed release outside the tested range; "" for one inside it, for a package without a
    range and for one that is not installed."""
    if package not in TESTED:
        return ""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
    oldest, untested = TESTED[package]
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and oldest <= (int(found[1]), int(found[2])) < untested:
        return ""
    return f"{version} is untested, tested are {_dotted(oldest)} and later below {_dotted(untested)}"


@functools.cache
def warn(package: str) -> None:
    """Warns, once a process, where the installed release of ``package`` is outside the tested range."""
    said = outside(package)
    if said:
        warnings.warn(f"flashsink: {package} {said}; results may be wrong or calls may fail", stacklevel=3)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
