"""Knows at once when another rank is gone: one connection between every two ranks, on which only farewells are sent.

The kernel ends a process's connections with it, however it died, so a rank that is killed is noticed in milliseconds
by all others, each by itself; a machine that falls silent within about 4 s (TCP keepalive). A rank that dies before it
has come can't be told from one that is late: `timeout_s` bounds that.
"""

import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from train.comm.groups import PeerLost

LOST, GAVE_UP, LEFT = "is gone (killed, crashed or unreachable)", "gave up", "has left the group"
BYE, ABORT = b"b", b"a"
GRACE_S = 0.5
"""How long after a transport's error the connections are given to say whose fault it was."""
SLICE_S = 0.05
"""How long a rank waits before it looks whether its peers are still there."""


class Peers:
    """The other ranks of a group: where they run and whether they are still there."""

    def __init__(
        self,
        backend: str,
        rank: int,
        world_size: int,
        store: Any,
        timeout_s: float,
        within: "Peers | None" = None,
    ) -> None:
        """Returns once all ranks have connected; PeerLost when one is missing after `timeout_s` or the store's own
        timeout, or dies meanwhile.

        `store`: a c10d store, new or under a new prefix for every group; one rank alone needs none.
        `within`: those of the group that this one is a part of; who is lost there is lost here.
        """
        self.backend, self.rank, self.world_size, self.timeout_s = backend, rank, world_size, timeout_s
        self._within = within
        self.address = _own_address(store)
        self.nodes = [node_name()]
        self._gone: dict[int, str] = {}
        self._to_blame: tuple[int, str] | None = None
        self._closed = ""
        self._changed = threading.Condition()
        self._interrupt: Callable[[], None] = _nothing
        self._sockets: dict[int, socket.socket] = {}
        self._watcher: threading.Thread | None = None
        if world_size > 1:
            self._store = store
            try:
                self._connect(store)
            except BaseException as error:
                if isinstance(error, PeerLost) and error.peer is not None:
                    self._to_blame = error.peer, LOST
                self.abort()
                raise
            self._watcher = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._watcher.start()

    def on_loss(self, interrupt: Callable[[], None]) -> None:
        """`interrupt` is called in another thread when a rank is lost; it ends what this rank waits for."""
        with self._changed:
            self._interrupt, lost = interrupt, self._to_blame
        if lost:
            interrupt()

    @contextmanager
    def during(self, operation: str) -> Iterator[None]:
        """Errors inside, which are the transport's, become a PeerLost that names the rank and the operation."""
        self.check(operation)
        try:
            yield
        except PeerLost:
            raise
        except RuntimeError as error:
            end = time.monotonic() + GRACE_S
            while time.monotonic() < end and not self._closed and not self._gone:
                self.check(operation, error)
                time.sleep(0.002)
            self.check(operation, error)
            for peer in self._gone:
                raise self._error(operation, peer, LEFT) from error
            raise PeerLost(f"{self._here(operation)}: {' '.join(str(error).split())}") from error

    def check(self, operation: str, cause: Exception | None = None) -> None:
        """PeerLost where a rank is lost, or this one has left."""
        if self._within is not None:
            self._within.check_lost(operation, cause, GRACE_S if self._to_blame else 0.0)
        self.check_lost(operation, cause)
        if self._closed:
            raise PeerLost(f"{self._here(operation)}: this rank has {self._closed} the group") from cause

    def check_lost(self, operation: str, cause: Exception | None = None, patience_s: float = 0.0) -> None:
        """PeerLost where a rank is lost; one that is about to be noticed is waited for."""
        if patience_s and not self._to_blame:
            with self._changed:
                self._changed.wait_for(lambda: self._to_blame, patience_s)
        if self._to_blame:
            raise self._error(operation, *self._to_blame) from cause

    def check_waiting(self, operation: str, peer: int, since: float) -> None:
        """The same for one that waits for `peer`, since `since` (of time.monotonic)."""
        self.check(operation)
        if peer in self._gone:
            raise self._error(operation, peer, self._gone[peer])
        if time.monotonic() - since > self.timeout_s:
            raise PeerLost(f"{self._here(operation)}: peer rank {peer} has not come within {self.timeout_s:g} s", peer)

    def wait_for_key(self, key: str, operation: str, peer: int) -> bytes:
        """What `peer` puts into the store under `key`."""
        since = time.monotonic()
        while not self._store.check([key]):
            self.check_waiting(operation, peer, since)
            time.sleep(0.001)
        return self._store.get(key)

    def made(self, make: Callable[[], Any], operation: str) -> Any:
        """`make()`, in a thread of its own that is left behind when a rank dies before it is done."""
        if self.world_size == 1:
            return make()
        future: Future = Future()

        def run() -> None:
            try:
                future.set_result(make())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, name=operation, daemon=True).start()
        with self.during(operation):
            while not future.done():
                with suppress(TimeoutError):
                    return future.result(SLICE_S)
                self.check(operation)
            return future.result()

    def abort(self) -> None:
        """Tell every rank that this one gives up; whoever waits for it gets an error."""
        self._leave(ABORT, "given up")

    def close(self) -> None:
        """Leave in good order: only who still waits for this rank gets an error."""
        self._leave(BYE, "left")

    def _leave(self, word: bytes, closed: str) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = closed
            self._changed.notify_all()
        blame = self._to_blame[0] if self._to_blame else self.rank
        for peer_socket in self._sockets.values():
            with suppress(OSError):
                peer_socket.send(word + str(blame).encode())
                peer_socket.shutdown(socket.SHUT_WR)
            with suppress(OSError):  # what ends the watcher's waiting; the word itself still goes out
                peer_socket.shutdown(socket.SHUT_RD)
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        self._interrupt = _nothing  # a cycle less: the group's memory and sockets go with its last user
        self._drop()

    def _drop(self) -> None:
        for peer_socket in self._sockets.values():
            peer_socket.close()
        self._sockets = {}

    def _connect(self, store: Any) -> None:
        """Every rank connects to the lower ones, which know it by the token that only the store's users can read."""
        patience_s = min(self.timeout_s, store.timeout.total_seconds())
        deadline = time.monotonic() + patience_s
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        token = secrets.token_hex(16)
        hosts = {}
        with socket.create_server((self.address, 0), family=family, backlog=self.world_size) as listener:
            listener.settimeout(SLICE_S)
            own = {"address": self.address, "port": listener.getsockname()[1], "token": token, "node": self.nodes[0]}
            store.set(f"peer{self.rank}", json.dumps(own))
            hosts[self.rank] = own
            while len(self._sockets) < self.world_size - 1 or len(hosts) < self.world_size:
                if self._within is not None:
                    self._within.check_lost("connect")
                for peer in set(range(self.world_size)) - set(hosts):
                    if store.check([f"peer{peer}"]):
                        hosts[peer] = json.loads(store.get(f"peer{peer}"))
                        if peer < self.rank:
                            self._call(peer, hosts[peer])
                if len(self._sockets) < self.world_size - 1:
                    self._answer(listener, token)
                self._check_arrivals(deadline, patience_s, set(range(self.world_size)) - set(hosts))
        self.nodes = [hosts[peer]["node"] for peer in range(self.world_size)]

    def _call(self, peer: int, host: dict) -> None:
        try:
            made = socket.create_connection((host["address"], host["port"]), timeout=self.timeout_s)
            made.sendall(f"{host['token']}{self.rank:8d}".encode())
        except OSError as error:
            raise self._error("connect", peer, LOST) from error
        self._keep(peer, made)

    def _answer(self, listener: socket.socket, token: str) -> None:
        with suppress(TimeoutError):
            made, _ = listener.accept()
            made.settimeout(1.0)
            try:
                hello = made.recv(len(token) + 8, socket.MSG_WAITALL)
            except OSError:
                hello = b""
            if secrets.compare_digest(hello[: len(token)], token.encode()):
                self._keep(int(hello[len(token) :]), made)
            else:
                made.close()

    def _keep(self, peer: int, made: socket.socket) -> None:
        made.settimeout(None)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3):
            if hasattr(socket, option):
                made.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._sockets[peer] = made

    def _check_arrivals(self, deadline: float, patience_s: float, missing: set[int]) -> None:
        for peer, peer_socket in self._sockets.items():
            if peer not in self._gone and select.select([peer_socket], [], [], 0)[0]:
                to_blame, reason, harmless = self._farewell(peer, peer_socket)
                if not harmless:
                    raise self._error("connect", to_blame, reason)
                self._gone[peer] = reason  # it had all its connections, and needs this group no longer
        if time.monotonic() > deadline:
            missing = missing or set(range(self.world_size)) - set(self._sockets) - {self.rank}
            raise PeerLost(
                f"{self._here('connect')}: peer rank {min(missing)} has not come within {patience_s:g} s",
                min(missing),
            )

    def _watch(self) -> None:
        """Waits for farewells until this rank leaves."""
        waiting = select.poll()
        by_number = {end.fileno(): peer for peer, end in self._sockets.items() if peer not in self._gone}
        for number in by_number:
            waiting.register(number, select.POLLIN)
        while by_number:
            for number, _ in waiting.poll():
                if self._closed:
                    return
                peer = by_number.pop(number)
                waiting.unregister(number)
                to_blame, reason, harmless = self._farewell(peer, self._sockets[peer])
                with self._changed:
                    self._gone[peer] = reason
                    if not harmless and self._to_blame is None:
                        self._to_blame = to_blame, reason
                    self._changed.notify_all()
                if not harmless:
                    self._interrupt()

    def _farewell(self, peer: int, peer_socket: socket.socket) -> tuple[int, str, bool]:
        """(whom to blame, why, whether it left in good order); a rank gives up because of another's loss, or by itself.

        An end without a word is a death.
        """
        try:
            word = peer_socket.recv(64)
        except OSError:
            word = b""
        if word[:1] == ABORT:
            to_blame = int(word[1:])
            return to_blame, GAVE_UP if to_blame == peer else LOST, False
        return (peer, LEFT, True) if word[:1] == BYE else (peer, LOST, False)

    def _error(self, operation: str, peer: int, why: str) -> PeerLost:
        return PeerLost(f"{self._here(operation)}: peer rank {peer} {why}", peer)

    def _here(self, operation: str) -> str:
        return f"rank {self.rank} of {self.world_size}, {operation} (backend={self.backend})"


def node_name() -> str:
    """Equal for processes that can share memory by each other's process numbers: one boot, one set of numbers."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _own_address(store: Any) -> str:
    """The address of this machine on the way to the store's host: loopback where that is on loopback."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host, port = getattr(store, "host", ""), getattr(store, "port", 0)
    if not host:  # a store in files or in this process: nobody is elsewhere
        return "127.0.0.1"
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing: it asks the kernel for the way
        return probe.getsockname()[0]


def seconds(value: float) -> timedelta:
    return timedelta(seconds=value)


def _nothing() -> None: ...
