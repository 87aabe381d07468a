"""How the ranks of a training find each other. Each says for whom it waits; what cannot work ends with a message."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from avsr.errors import UserError

logger = logging.getLogger("avsr")
ATTEMPT, NOTICE, POLL = 5.0, 30.0, 0.2  # seconds: of one connection, between two messages, between two looks
FAREWELL = 5.0  # seconds that rank 0, which keeps the store, waits until the others have read why all leave
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_ALONE = "if this process is to train alone, unset them: env " + " ".join(f"-u {name}" for name in _NAMES) + " avsr ..."


class Place(NamedTuple):
    """This process among those of the training, by the environment that its launcher made."""

    rank: int = 0
    ranks: int = 1
    local: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that a launcher assigned; alone without ``RANK``.

    Raises:
        UserError: a variable is missing or makes no sense.
    """
    if "RANK" not in environment:
        if environment.get("WORLD_SIZE", "1") != "1":
            count = environment["WORLD_SIZE"]
            logger.warning("WORLD_SIZE=%s is set but RANK is not: this process trains alone", count)
        return Place()
    rank, ranks = (_number(environment, name, "1" if name == "WORLD_SIZE" else "") for name in _NAMES[:2])
    if not 0 <= rank < ranks and "WORLD_SIZE" in environment:
        raise UserError(f"RANK={rank} and WORLD_SIZE={ranks}: expected a rank below the world size; {_ALONE}")
    missing = [name for name in _NAMES if not environment.get(name)]
    if missing and (ranks > 1 or "WORLD_SIZE" not in environment):
        raise UserError(
            f"RANK={rank} is set in the environment, but not {', '.join(missing)}: start many processes with deepspeed "
            f"--module avsr.train or torchrun; {_ALONE}"
        )
    local = _number(environment, "LOCAL_RANK", "0")
    if ranks == 1:
        return Place(local=local)
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port}: expected a port from 1 to 65535")
    return Place(rank, ranks, local, environment["MASTER_ADDR"], port)


def settle_environment(place: Place) -> None:
    """Completes the environment of a process that trains alone, for DeepSpeed."""
    if place.ranks > 1:
        return
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK=str(place.local), MASTER_ADDR=place.host)
    os.environ["MASTER_PORT"] = str(_free_port())


def meet(place: Place, patience: float, alive: Callable[[], None] = lambda: None) -> dist.Store:
    """Waits until all ranks are there. Collective.

    Args:
        place: of this process.
        patience: seconds to wait; 0 = forever.
        alive: called while it waits.

    Returns:
        The store for their process group.

    Raises:
        UserError: the port is taken, or not all ranks came in time; all that did come get the same message.
    """
    if place.ranks == 1:
        return dist.HashStore()
    until = time.monotonic() + (patience or math.inf)
    if place.rank == 0:
        logger.warning("waiting for %d ranks at %s", place.ranks, place.address)
    store = _open(place, until, alive)
    try:
        _gather(place, store, until, alive)
    except dist.DistError as error:
        raise UserError(f"rank 0 at {place.address} has gone while rank {place.rank} waited for the others") from error
    return dist.PrefixStore("group", store)


def connect(place: Place) -> dist.Store:
    """A connection of its own to the store that :func:`meet` returned, which other threads may use."""
    return dist.PrefixStore("watch", _scoped(_client(place, ATTEMPT)))


def _open(place: Place, until: float, alive: Callable[[], None]) -> dist.Store:
    """The store, which rank 0 keeps unless its launcher does."""
    notice = time.monotonic() + NOTICE / 6
    while True:
        alive()
        left = min(ATTEMPT, until - time.monotonic())
        try:
            if place.rank == 0 and not _kept_by_launcher():
                return _scoped(_server(place, max(left, 1.0)))
            return _scoped(_client(place, max(left, 1.0)))
        except (dist.DistError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "listen" in reason:
            raise UserError(
                f"MASTER_PORT={place.port} cannot be used on this host, perhaps another training uses it: set another "
                f"(deepspeed --master_port N): {reason}"
            )
        now = time.monotonic()
        if now >= until:
            found = f"rank {place.rank} of {place.ranks} found no rank 0 at {place.address} ({reason})"
            raise UserError(f"{found}; {_ALONE}")
        if now >= notice:
            logger.warning("rank %d of %d: waiting for rank 0 at %s", place.rank, place.ranks, place.address)
            notice = now + NOTICE
        time.sleep(POLL)


def _gather(place: Place, store: dist.Store, until: float, alive: Callable[[], None]) -> None:
    if store.add(f"here/{place.rank}", 1) > 1:
        raise UserError(f"another process has RANK={place.rank} of those that meet at {place.address}")
    if place.rank == 0:
        store.set("ranks", str(place.ranks))
    store.add("here", 1)
    notice = time.monotonic() + (NOTICE if place.rank else NOTICE / 6)
    while True:
        alive()
        if store.check(["ranks"]) and int(store.get("ranks")) != place.ranks:
            said = store.get("ranks").decode()
            differ = f"WORLD_SIZE={place.ranks} on rank {place.rank}, but {said} on rank 0 at {place.address}"
            store.compare_set("failed", "", differ)
        if store.check(["failed"]):
            _leave_together(place, store)
        if store.add("here", 0) == place.ranks:
            return
        now = time.monotonic()
        if now >= until:
            late = f"{_waiting(place, store)} for too long (training.timeout); {_ALONE}"
            store.compare_set("failed", "", late)
        elif now >= notice:
            logger.warning("%s", _waiting(place, store))
            notice = now + NOTICE
        time.sleep(POLL)


def _leave_together(place: Place, store: dist.Store) -> None:
    """Raises what has failed as a ``UserError``; on rank 0, which keeps the store, when the others have read it."""
    text, until = store.get("failed").decode(), time.monotonic() + FAREWELL
    store.add("left", 1)
    while place.rank == 0 and store.add("left", 0) < store.add("here", 0) and time.monotonic() < until:
        time.sleep(POLL)
    raise UserError(text)


def _waiting(place: Place, store: dist.Store) -> str:
    missing = [rank for rank in range(place.ranks) if not store.check([f"here/{rank}"])]
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return f"rank {place.rank} of {place.ranks} at {place.address}: waiting for {len(missing)} ranks ({shown})"


def _server(place: Place, seconds: float) -> dist.TCPStore:
    patience = timedelta(seconds=seconds)
    return dist.TCPStore(place.host, place.port, place.ranks, True, patience, wait_for_workers=False, multi_tenant=True)


def _client(place: Place, seconds: float) -> dist.TCPStore:
    return dist.TCPStore(place.host, place.port, place.ranks, False, timedelta(seconds=seconds), wait_for_workers=False)


def _kept_by_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)


def _scoped(store: dist.TCPStore) -> dist.Store:
    """Without what an earlier attempt left: torchrun keeps its store while it starts the ranks again."""
    return dist.PrefixStore(f"avsr/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    value = environment.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}={value!r} in the environment is no number; {_ALONE}") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
