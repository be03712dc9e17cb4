"""What a command's process tree does, seen from outside: its members, where they listen, whether any is left over.

Linux only: /proc, and `ss` of iproute2 where it is installed.
"""

import ipaddress
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
Process = tuple[int, int]  # its number and when it started, in clock ticks: together they are unique
LISTEN = "0A"


class Command:
    """`python -m ...` in a process group of its own, with every process it starts and every address they listen on."""

    def __init__(self, arguments: list[str], cwd: Path, ray_folder: Path) -> None:
        self._out, self._err = cwd / "stdout.txt", cwd / "stderr.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=cwd,
                env=environment(ray_folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.started: set[Process] = set()
        self.listening: set[tuple[int, str]] = set()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def wait(self, timeout_s: float = 180.0) -> int:
        try:
            return self.process.wait(timeout_s)
        finally:
            self.end()

    def end(self) -> None:
        """Whatever is still there is killed, so that a failing test leaves nothing behind."""
        if self.process.poll() is None:
            left = self.started | descendants(self.process.pid)
            self.process.kill()
            self.process.wait()
            for pid, _ in alive(left):
                os.kill(pid, 9)
        self._watcher.join()

    def left_over(self, patience_s: float = 10.0) -> list[str]:
        """The command lines of processes that outlive the command."""
        wait_for(lambda: not alive(self.started), patience_s)
        return [_command_line(pid) for pid, _ in alive(self.started)]

    def _watch(self) -> None:
        while self.process.poll() is None:
            members = descendants(self.process.pid)
            self.started |= members
            self.listening |= listening({pid for pid, _ in members} | {self.process.pid})
            time.sleep(0.4)


def environment(ray_folder: Path) -> dict[str, str]:
    """That of a command of this checkout, with Ray's files in a folder of their own and nothing else said of Ray."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return inherited | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "RAY_TMPDIR": str(ray_folder)}


def wait_for(condition: Callable[[], object], patience_s: float = 180.0) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def descendants(ancestor: int) -> set[Process]:
    parents, started = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        if status := _status(int(folder.name)):
            parents[int(folder.name)], started[int(folder.name)] = status[1], status[2]
    found, grown = {ancestor}, True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grown = bool(children)
    return {(pid, started[pid]) for pid in found - {ancestor}}


def alive(processes: set[Process]) -> set[Process]:
    return {(pid, start) for pid, start in processes if (status := _status(pid)) and status[2] == start}


def listening(pids: set[int]) -> set[tuple[int, str]]:
    """(process, IP address) of every TCP socket that is open for connections; `*` is every address."""
    return _listening_by_ss(pids) if shutil.which("ss") else _listening_by_proc(pids)


def on_loopback(address: str) -> bool:
    if address == "*":
        return False
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _listening_by_ss(pids: set[int]) -> set[tuple[int, str]]:
    found = set()
    for line in subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines():
        address = line.split()[3].rpartition(":")[0].strip("[]").partition("%")[0]
        found |= {(int(pid), address) for pid in re.findall(r"pid=(\d+)", line) if int(pid) in pids}
    return found


def _listening_by_proc(pids: set[int]) -> set[tuple[int, str]]:
    address_of = {}
    for table, family in ((Path("/proc/net/tcp"), socket.AF_INET), (Path("/proc/net/tcp6"), socket.AF_INET6)):
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == LISTEN:
                words = re.findall("." * 8, fields[1].partition(":")[0])  # 32 bits each, in this machine's byte order
                packed = b"".join(struct.pack("=I", int(word, 16)) for word in words)
                address_of[f"socket:[{fields[9]}]"] = socket.inet_ntop(family, packed)
    found = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(link)
            except OSError:  # closed meanwhile
                continue
            if name in address_of:
                found.add((pid, address_of[name]))
    return found


def _status(pid: int) -> tuple[str, int, int] | None:
    """(state, parent, start) of a process that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[1]), int(fields[19]))


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]
    except OSError:
        return ""
