"""A small cluster of network namespaces whose every link has a known speed (iproute2; root).

A chip is a namespace. Its cards are veth pairs to bridges, which are the switches; both ends of a wire have a token
bucket (tc tbf), so that each direction carries its rate and no more.

    own cards       chip --- fabric            and, where a host has several chips, chip --- host switch
    shared card     chip --- host switch --- fabric
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PREFIX = "shaped"
MOST_MBIT = 500  # above, two processor cores would be the link
MTU = 4200  # what RoCE's largest packets (4,096 bytes) need; frames of 1,500 would keep a core busy
BURST_BYTES = 4300
"""Of a bucket: one full frame and not two, as a wire can't send ahead of its time."""
QUEUE_BYTES = 8 << 20
"""Of a bucket: more than the windows of all that can send into it, so that nothing is ever dropped, as on RoCE."""
WINDOW_BYTES = 128 << 10
"""Much more than a link holds, so that it is never idle. More would only stand in the queue of a shared card, and who
asks for a message there (gloo asks before it sends) would wait behind it."""
SEND_BYTES = 4 << 20  # a sender need not be woken up in the middle of a message

TCP = {
    "tcp_congestion_control": "reno",  # without losses its window only grows; bbr would probe, cubic leave early
    "tcp_slow_start_after_idle": "0",  # or every round would begin with a small window
    "tcp_no_metrics_save": "1",  # no connection learns from an earlier one
    # Windows of one size: of two that share a card in opposite directions, the larger one would hold back the other's
    # acknowledgements (Zhang, Shenker and Clark 1991).
    "tcp_rmem": f"{WINDOW_BYTES} {WINDOW_BYTES} {WINDOW_BYTES}",
    "tcp_wmem": f"{SEND_BYTES} {SEND_BYTES} {SEND_BYTES}",
}


class Unavailable(Exception):
    """This machine can't have such a network; says what it would need."""


@dataclass(frozen=True)
class Layout:
    """Hosts of equally many chips. card_mbit: a chip's card to the fabric, or its host's where it is `shared`;
    port_mbit: a chip's port on the switch of its host, where that has several chips."""

    hosts: int
    chips_per_host: int = 1
    card_mbit: int = 100
    port_mbit: int = 200
    shared: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.hosts <= 8:
            raise ValueError(f"hosts={self.hosts} must be 2 to 8")
        if not 1 <= self.chips_per_host <= 4:
            raise ValueError(f"chips_per_host={self.chips_per_host} must be 1 to 4")
        for name in ("card_mbit", "port_mbit"):
            if not 1 <= getattr(self, name) <= MOST_MBIT:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be 1 to {MOST_MBIT}: faster, the cores are the link"
                )
        if self.shared and self.chips_per_host == 1:
            raise ValueError("shared=true needs chips_per_host of 2 or more, which share the card")

    @property
    def chips(self) -> int:
        return self.hosts * self.chips_per_host

    @property
    def axes(self) -> dict[str, int]:
        return {"host": self.hosts, "chip": self.chips_per_host}

    @property
    def name(self) -> str:
        if self.chips_per_host == 1:
            return f"{self.hosts} hosts, {self.card_mbit} Mbit/s"
        cards = "one card a host" if self.shared else "one card a chip"
        chips = f"{self.hosts} hosts of {self.chips_per_host} chips, {self.port_mbit} Mbit/s inside"
        return f"{chips}, {cards}, {self.card_mbit} Mbit/s"

    def address(self, chip: int) -> str:
        host, place = divmod(chip, self.chips_per_host)
        return f"10.77.{host}.{place + 1}"


def check_available() -> None:
    """Raises Unavailable without root or iproute2."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"needs {' and '.join(missing)} of iproute2: apt-get install iproute2")
    if os.geteuid() != 0:
        raise Unavailable("needs root to make network namespaces: run it with sudo, or in a container of your own")


class Cluster:
    """The namespaces of a layout, by chip; made by `cluster`, which also removes them."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._switch = f"{PREFIX}-{os.getpid()}-switch"

    def namespace(self, chip: int) -> str:
        return f"{PREFIX}-{os.getpid()}-chip{chip}"

    def start(self, chip: int, command: list[str], **options) -> subprocess.Popen:
        """A process on a chip."""
        return subprocess.Popen(["ip", "netns", "exec", self.namespace(chip), *command], **options)

    def build(self) -> None:
        layout = self.layout
        _run("ip", "netns", "add", self._switch)
        bridges = ["fabric"] + [f"host{host}" for host in range(layout.hosts) if layout.chips_per_host > 1]
        for bridge in bridges:
            _run("ip", "-n", self._switch, "link", "add", bridge, "mtu", str(MTU), "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", bridge, "up")
        for chip in range(layout.chips):
            self._add_chip(chip)
        for host in range(layout.hosts if layout.shared else 0):
            self._wire(self._switch, f"up{host}", f"card{host}", "fabric", layout.card_mbit)
            _run("ip", "-n", self._switch, "link", "set", f"up{host}", "master", f"host{host}")

    def _add_chip(self, chip: int) -> None:
        layout, name = self.layout, self.namespace(chip)
        host = chip // layout.chips_per_host
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        settings = [f"net.ipv4.{key}={value}" for key, value in TCP.items()]
        # One address for both cards: the way decides which is taken.
        settings += ["net.ipv6.conf.all.disable_ipv6=1", "net.ipv4.conf.all.rp_filter=0"]
        _run("ip", "netns", "exec", name, "sysctl", "-qw", *settings)
        if layout.shared:
            self._wire(name, "eth0", f"chip{chip}", f"host{host}", layout.port_mbit)
        else:
            self._wire(name, "eth0", f"chip{chip}", "fabric", layout.card_mbit)
        _run("ip", "-n", name, "addr", "add", f"{layout.address(chip)}/16", "dev", "eth0")
        if layout.chips_per_host > 1 and not layout.shared:
            self._wire(name, "inside", f"inside{chip}", f"host{host}", layout.port_mbit)
            first = host * layout.chips_per_host
            for other in range(first, first + layout.chips_per_host):
                if other != chip:
                    way = [f"{layout.address(other)}/32", "dev", "inside", "src", layout.address(chip)]
                    _run("ip", "-n", name, "route", "add", *way)

    def _wire(self, name: str, device: str, port: str, bridge: str, mbit: int) -> None:
        """A veth pair, `device` in the namespace `name` and `port` on a bridge of the switches."""
        _run(
            "ip",
            "-n",
            name,
            "link",
            "add",
            device,
            "mtu",
            str(MTU),
            "type",
            "veth",
            "peer",
            "name",
            port,
            "mtu",
            str(MTU),
            "netns",
            self._switch,
        )
        _run("ip", "-n", self._switch, "link", "set", port, "master", bridge)
        for namespace, end in ((name, device), (self._switch, port)):
            bucket = ["tbf", "rate", f"{mbit}mbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)]
            _run("tc", "-n", namespace, "qdisc", "add", "dev", end, "root", *bucket)
            _run("ip", "-n", namespace, "link", "set", end, "up")


@contextmanager
def cluster(layout: Layout) -> Iterator[Cluster]:
    """Make the namespaces of a layout, and remove them whatever happens, Ctrl-C and SIGTERM included.

    Raises Unavailable where the machine can't have them. Those that an earlier, killed process of this script has left
    go too; nobody else's are touched.
    """
    check_available()
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        _remove(os.getpid(), *_dead())
        made = Cluster(layout)
        made.build()
        yield made
    finally:
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _remove(os.getpid())
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, before)


def left_behind() -> list[str]:
    """Namespaces of this script, of whatever process."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines() if line.strip()]
    return [name for name in names if name.startswith(f"{PREFIX}-")]


def _dead() -> set[int]:
    """Processes that are gone and have left namespaces."""
    pids = {int(name.split("-")[1]) for name in left_behind() if name.split("-")[1].isdecimal()}
    return {pid for pid in pids if not os.path.exists(f"/proc/{pid}")}


def _remove(*pids: int) -> None:
    for name in left_behind():
        if name.split("-")[1] in map(str, pids):
            subprocess.run(["ip", "netns", "del", name], check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise Unavailable(f"this machine refused `{' '.join(command)}`: {said}")


def _terminated(*_: object) -> None:
    sys.exit("terminated")
