"""How the ranks of a run meet: at a store that rank 0, or torchrun's agent, opens on a port."""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from ssl_xcit.runtime.errors import UserError

SAY_AFTER_S = 10.0  # of waiting; then again when twice as much has passed
FOREIGN_S = 10.0  # rank 0 signs in as soon as its store is open
POLL_S = 0.05


def meet(
    address: str, port: int, rank: int, world_size: int, job: str, alone: str, timeout_s: float
) -> dist.Store:
    """The store of the ranks of `job`, when all of them have signed in there.

    `alone`: the variables that make this process wait, to be named to the user. While it waits it
    says for whom. Raises UserError if the port is taken, by another job too, the address cannot be
    resolved, or ranks are missing after `timeout_s` seconds.
    """
    place = f"{address}:{port}"
    advice = f"start all ranks with one launcher, or run one process with: env -u {alone} COMMAND"
    other_port = _other_port(alone)
    say, end = _Sayer(), time.monotonic() + timeout_s
    store = _open(address, port, rank, world_size, end, say, advice, other_port)
    store = dist.PrefixStore(f"ssl_xcit/{job}", store)
    store.set(f"rank {rank}", b"")
    present = store.add("ranks", 1)
    if present > world_size:
        raise UserError(f"{world_size} other ranks have met at {place}: {other_port}")
    if present == world_size:
        store.set("all", b"")

    def missing() -> str:
        away = [str(r) for r in range(world_size) if not store.check([f"rank {r}"])]
        some = ", ".join(away[:8]) + (", ..." if len(away) > 8 else "")
        return f"rank{'s' * (len(away) > 1)} {some} of {world_size} at {place}"

    began = time.monotonic()
    while not store.check(["all"]):
        time.sleep(POLL_S)
        now = time.monotonic()
        if not _by_agent() and now - began > FOREIGN_S and not store.check(["rank 0"]):
            raise UserError(f"at {place} answers another job: {other_port}")
        if now > end:
            raise UserError(f"waited {timeout_s:g} s in vain for {missing()}: {advice}")
        if rank == 0:
            say(lambda: f"waiting for {missing()}; {advice}")
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _open(
    address: str,
    port: int,
    rank: int,
    world_size: int,
    end: float,
    say: "_Sayer",
    advice: str,
    other_port: str,
) -> dist.TCPStore:
    """Open the store, or reach it."""
    opens, place, began = rank == 0 and not _by_agent(), f"{address}:{port}", time.monotonic()
    try:  # here, since torch tries again until its time is up
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise UserError(
            f"cannot resolve {address}, where rank 0 is to be ({error.strerror}): set MASTER_ADDR "
            "to its name or address"
        ) from error
    while not opens and not _listens(address, port):  # torch would log each vain try at length
        if time.monotonic() > end:
            waited = f"{time.monotonic() - began:.0f} s"
            raise UserError(f"waited {waited} in vain for rank 0 at {place}: {advice}")
        say(lambda: f"rank {rank} of {world_size} waits for rank 0 at {place}; {advice}")
        time.sleep(0.2)
    timeout, found = timedelta(seconds=FOREIGN_S), []

    def connect() -> None:
        try:
            store = dist.TCPStore(address, port, world_size, opens, timeout, wait_for_workers=False)
            found.append(store)
        except dist.DistError as error:
            found.append(error)

    # In a thread, since torch waits for ever for a program that listens and says nothing
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(FOREIGN_S)
    if found and isinstance(found[0], dist.Store):
        return found[0]
    if "EADDRINUSE" in str(found):
        raise UserError(
            f"port {port} of {address} is taken, by another job or program: {other_port}"
        )
    if opens:
        reason = str(found[0] if found else "timed out").partition("\n")[0]
        raise UserError(f"cannot open {place} for the other ranks: {reason}")
    raise UserError(f"at {place} answers something else than rank 0: {other_port}")


def _by_agent() -> bool:
    """Whether torchrun's agent has opened the store, maybe long before rank 0 comes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def _other_port(alone: str) -> str:
    """What to do about a port, by who has chosen it."""
    if "RANK" not in alone:
        return "submit or start the step again, which has another port"
    return "choose another MASTER_PORT (torchrun --standalone finds a free one)"


class _Sayer:
    """Prints what is waited for, ever more rarely."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.next = SAY_AFTER_S

    def __call__(self, text: Callable[[], str]) -> None:
        waited = time.monotonic() - self.began
        if waited >= self.next:
            self.next = 2 * waited
            print(f"{text()} (for {waited:.0f} s)", flush=True)
