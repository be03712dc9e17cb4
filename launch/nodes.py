"""The nodes of a joined cluster, looked at before training: they see run_root, are alike, and are on one network.

`look` runs on every node; `disagreements` is pure. A cluster on loopback is this machine and needs none of it.
"""

import fcntl
import platform
import secrets
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LOOK_TIMEOUT_S = 60.0
SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface (netdevice(7))."""

ARITHMETIC_FLAGS = {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16"}
"""What torch's kernels are chosen by: other flags, other sums."""

PACKAGES = ("torch", "numpy", "ray")


def look(marker: Path, answer: Path, address: str) -> dict:
    """What a node says of itself. It reads the `marker` that the driver wrote and writes its `answer` beside it."""
    seen = False
    with suppress(OSError):
        answer.write_text(marker.read_text())
        seen = True
    return {
        "sees": seen,
        "interface": interface_of(address),
        "processor": " ".join([platform.machine(), *sorted(ARITHMETIC_FLAGS & _cpu_flags())]),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def examine(nodes: list[Any], run_root: Path, interface: str | None, alike: bool) -> set[str]:
    """The names of the interfaces that the nodes' addresses are on; ValueError names a node that can't take part.

    alike: whether their processors must be. run_root is made where it was missing, for it is what the nodes are asked
    about; the traces in it are removed.
    """
    made = [path for path in (run_root, *run_root.parents) if not path.exists()]
    name = secrets.token_hex(8)
    marker = run_root / f".seen-{name}"
    answers = {node.id: run_root / f".seen-{name}-{number}" for number, node in enumerate(nodes)}
    try:
        run_root.mkdir(parents=True, exist_ok=True)
        marker.write_text(name)
        facts = _ask(nodes, lambda node: (marker, answers[node.id], node.address))
        for node in nodes:
            facts[node.id]["answers"] = answers[node.id].exists() and answers[node.id].read_text() == name
        problems = disagreements({node.address: facts[node.id] for node in nodes}, run_root, interface, alike)
    finally:
        for path in (marker, *answers.values()):
            path.unlink(missing_ok=True)
    if problems:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise ValueError(problems[0])
    return {said["interface"] or "an interface not found" for said in facts.values()}


def disagreements(facts: dict[str, dict], run_root: Path, interface: str | None, alike: bool) -> list[str]:
    """What keeps nodes from training together, the most important first; `facts` by the nodes' addresses."""
    problems = []
    for address, said in facts.items():
        if not (said["sees"] and said["answers"]):
            what = "does not see what is written there" if not said["sees"] else "writes there what is not seen here"
            remedy = "name a folder on storage that all nodes share"
            problems.append(f"run_root={run_root}: node {address} {what}; {remedy}")
        if interface and said["interface"] != interface:
            problems.append(
                f"cluster.interface={interface}: node {address} is not on it, but on {said['interface']}; start its "
                f"Ray with --node-ip-address of {interface}, or name another interface"
            )
    first, *others = facts
    for other in others:
        for name, here in facts[first]["versions"].items():
            there = facts[other]["versions"][name]
            if here != there:
                problems.append(f"node {first} has {name} {here}, node {other} {there}: install the same on all nodes")
        here, there = facts[first]["processor"], facts[other]["processor"]
        if alike and here != there:
            problems.append(
                f"numerics=exact: node {first} computes with {here}, node {other} with {there}, whose sums differ; use "
                "nodes of one kind (cluster.labels), or numerics=fast"
            )
    return problems


def _ask(nodes: list[Any], arguments: Callable[[Any], tuple]) -> dict[str, dict]:
    """`look` on every node, by the nodes' ids."""
    import ray
    from ray.exceptions import RayError

    remote = ray.remote(look)
    asked = {
        node.id: remote.options(num_cpus=0, label_selector={"ray.io/node-id": node.id}).remote(*arguments(node))
        for node in nodes
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=LOOK_TIMEOUT_S)
    facts = {}
    for node in nodes:
        try:
            facts[node.id] = ray.get(asked[node.id], timeout=0)
        except RayError as error:
            reason = str(getattr(error, "cause", error)).strip().partition("\n")[0] or "no answer"
            problem = f"node {node.address} can't take part ({reason}); is this program installed there?"
            raise ValueError(f"cluster: {problem}") from None
    return facts


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address; None where none has it."""
    return next((name for _, name in socket.if_nameindex() if _address(name) == address), None)


def address_of(key: str, interface: str) -> str:
    """The IPv4 address of an interface of this machine; ValueError names the interfaces there are."""
    address = _address(interface)
    if address is None:
        there = ", ".join(name for _, name in socket.if_nameindex() if _address(name))
        raise ValueError(f"{key}={interface}: this machine has no such interface with an IPv4 address; it has {there}")
    return address


def own_address(interface: str | None) -> str:
    """This machine's address on an interface, or else the one from which the kernel would send to the world."""
    if interface:
        return address_of("cluster.interface", interface)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; an address for documentation (RFC 5737)
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


def _address(interface: str) -> str | None:
    request = struct.pack("256s", interface.encode()[:15])  # the kernel's limit of a name
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
    return None


def _cpu_flags() -> set[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split())
    return set()


def _version(name: str) -> str:
    with suppress(PackageNotFoundError):
        return version(name)
    return "none"
