"""Ascend's rank table (version "1.0": 910 and 910B) and HCCL's settings for a mesh, and the rules they must meet.

Sources: HCCL's documents, user_guide/cluster_info_config and hccl_env (HCCL_ALGO, HCCL_CONNECT_TIMEOUT,
HCCL_WHITELIST_DISABLE), and its table parser, topoinfo_ranktableParser.cc; addresses: MindCluster deployer guide.
"""

import ipaddress
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from train.comm.plan import Plan
from train.mesh.mesh import Mesh
from train.metrics import write_aside

LIBRARIES = ("hccl", "hccl_a2")
"""Whose machines read version "1.0"; the 910C (A3) reads "1.2" and the 950 "2.0"."""

DEVICES = 8
FOURS = ("0123", "4567", "0145", "0246", "0347", "1256", "1357", "2367")
"""Sets of four devices of an Ascend 910 server that the parser accepts."""

LEVEL1 = {"halving-doubling": "H-D_R", "ring": "ring", "non-uniform hierarchical ring": "NHR"}
"""The stage between servers, as plans name it -> as HCCL_ALGO does."""

TABLE_FILE, SETTINGS_FILE = "rank_table.json", "hccl.sh"
CONNECT_TIMEOUT_S = 300  # torch_npu's advice with a table; allowed are 120 to 7,200
PORTS = ("device_port", "host_port", "device_vnic_port")


def fits(mesh: Mesh) -> bool:
    return mesh.topology.library in LIBRARIES and mesh.chips_per_host <= DEVICES


def rank_table(mesh: Mesh, servers: dict[str, list[str]] | None = None) -> dict:
    """The table of a mesh: rank = chip, server by server and device by device.

    servers: server_id -> the addresses of its devices, in the order of the ranks (see `device_addresses`). By default
    made up: devices i and i + 4 of all servers share one of four subnets, as the parameter network is planned.
    ValueError where the mesh's machine reads another version, or the servers are not those of the mesh.
    """
    if not fits(mesh):
        raise ValueError(
            f'mesh {mesh.name}: rank tables of version "1.0" are for Ascend 910 and 910B, hosts of at most {DEVICES} '
            f"(its library is {mesh.topology.library}, a host has {mesh.chips_per_host} chips); use mesh=atlas900_1024"
        )
    if servers is None:
        servers = {_server(host): _devices(host, mesh.chips_per_host) for host in range(mesh.num_hosts)}
    sizes = sorted({len(addresses) for addresses in servers.values()})
    if len(servers) != mesh.num_hosts or sizes != [mesh.chips_per_host]:
        raise ValueError(
            f"{len(servers)} servers with {' or '.join(map(str, sizes))} devices are not mesh {mesh.name}: give "
            f"{mesh.num_hosts} servers of {mesh.chips_per_host} devices, or set mesh.axes.host={len(servers)}"
        )
    ranks = iter(range(mesh.num_chips))
    table = {
        "version": "1.0",
        "status": "completed",
        "server_count": str(len(servers)),
        "server_list": [
            {
                "server_id": server,
                "device": [
                    {"device_id": str(device), "device_ip": address, "rank_id": str(next(ranks))}
                    for device, address in enumerate(addresses)
                ],
            }
            for server, addresses in servers.items()
        ],
    }
    check(table)
    return table


def settings(plan: Plan, table_file: Path) -> dict[str, str]:
    """HCCL's environment, alike for all ranks; each adds its own RANK_ID and DEVICE_ID.

    The all-reduce between servers is fixed to that of the plan, so that what runs is what was priced; HCCL chooses
    where it has none like it, and in every other operation. table_file: a whole path without symbolic links.
    """
    found = {
        "RANK_TABLE_FILE": str(table_file.resolve()),
        "RANK_SIZE": str(plan.mesh.num_chips),
        "HCCL_CONNECT_TIMEOUT": str(CONNECT_TIMEOUT_S),
        "HCCL_WHITELIST_DISABLE": "1",
    }
    algorithm = level1(plan)
    return found | ({"HCCL_ALGO": f"allreduce=level0:NA;level1:{algorithm}"} if algorithm else {})


def level1(plan: Plan) -> str | None:
    """HCCL's name for what the plan does between servers; None where HCCL has none (it never leaves out level 0)."""
    mesh = plan.mesh
    if mesh.num_hosts == 1:
        return None
    sizes = [(mesh.size(stage.shard_axes), mesh.size(stage.axes)) for stage in plan.stages]
    if (mesh.chips_per_host, mesh.num_hosts) not in sizes:
        return None
    between = plan.stages[sizes.index((mesh.chips_per_host, mesh.num_hosts))]
    return LEVEL1.get(between.algorithm.removesuffix(" reduce-scatter"))


def write(folder: Path, plan: Plan, servers: dict[str, list[str]] | None = None) -> list[Path]:
    """rank_table.json and hccl.sh (to be sourced) in a folder that exists."""
    table, script = folder / TABLE_FILE, folder / SETTINGS_FILE
    write_aside(table, json.dumps(rank_table(plan.mesh, servers), indent=1) + "\n")
    lines = [f"export {key}={shlex.quote(value)}\n" for key, value in settings(plan, table).items()]
    write_aside(
        script, "# Each process also needs RANK_ID and DEVICE_ID, its own of the rank table.\n" + "".join(lines)
    )
    return [table, script]


def device_addresses(path: Path) -> list[str]:
    """The addresses of a server's devices from its /etc/hccn.conf (lines `address_0=192.168.100.101`), by device."""
    found = dict(re.findall(r"^\s*address_(\d+)\s*=\s*(\S+)\s*$", path.read_text(encoding="utf-8"), re.MULTILINE))
    devices = sorted(map(int, found))
    if not devices or devices != list(range(len(devices))):
        raise ValueError(f"{path}: has address_N for the devices {devices}; a server's own starts at 0 and has no gaps")
    return [found[str(device)] for device in devices]


def check(table: dict) -> None:
    """ValueError that names the first of the documented rules that a table breaks."""
    for key in ("status", "version"):
        _string(table, key, "the table")
    if table["version"] != "1.0":
        raise ValueError(f'version={table["version"]!r} must be "1.0": the 910C reads "1.2" and the 950 "2.0"')
    if table["status"] != "completed":
        raise ValueError(f"status={table['status']!r} must be 'completed', or HCCL waits for it for up to 30 minutes")
    servers = table.get("server_list") or []
    if not servers:
        raise ValueError("server_list is missing or empty")
    if table.get("server_count") != str(len(servers)):
        raise ValueError(f"server_count={table.get('server_count')!r} must be the string {str(len(servers))!r}")
    _distinct("server_id", [_string(server, "server_id", "a server") for server in servers])
    ranks: list[int] = []
    addresses: list[list[str]] = []
    sizes: set[int] = set()
    for server in servers:
        name, devices = server["server_id"], server.get("device") or []
        if len(name) > 64:
            raise ValueError(f"server_id={name!r} is longer than 64 characters")
        if not devices:
            raise ValueError(f"server {name}: device is missing or empty (the key has no s)")
        mine = list(_check_devices(name, devices))
        if mine != list(range(mine[0], mine[0] + len(mine))):
            raise ValueError(f"server {name}: rank_id {mine} must follow on another, not interleaved between servers")
        ranks += mine
        sizes.add(len(devices))
        addresses += [device["device_ip"].split(",") for device in devices]
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(f"rank_id must be 0 to {len(ranks) - 1}, each once; found {min(ranks)} to {max(ranks)}")
    if len(sizes) > 1:
        raise ValueError(f"servers have {sorted(sizes)} devices: on Ascend 910 all must have the same number")
    if len({len(some) for some in addresses}) > 1:
        raise ValueError("device_ip: every device must have the same number of addresses")
    _distinct("device_ip", [address for some in addresses for address in some])


def _check_devices(server: str, devices: list[dict]) -> Iterator[int]:
    """The rank of each device."""
    for device in devices:
        where = f"server {server}, device {device.get('device_id')!r}"
        number = _string(device, "device_id", f"server {server}")
        if number not in map(str, range(DEVICES)):
            raise ValueError(f"{where}: device_id must be 0 to {DEVICES - 1}")
        for address in _string(device, "device_ip", where).split(","):
            try:
                ipaddress.ip_address(address)
            except ValueError as error:
                raise ValueError(f"{where}: device_ip={address!r} is no IPv4 or IPv6 address") from error
        for port in (key for key in PORTS if key in device):
            if not (_string(device, port, where).isdecimal() and 1 <= int(device[port]) <= 65535):
                raise ValueError(f"{where}: {port}={device[port]!r} must be 1 to 65535")
        rank = _string(device, "rank_id", where)
        if not re.fullmatch(r"[0-9]+", rank):
            raise ValueError(f"{where}: rank_id={rank!r} must be decimal digits")
        yield int(rank)
    numbers = [device["device_id"] for device in devices]
    _distinct(f"server {server}: device_id", numbers)
    if len(numbers) == 4 and "".join(sorted(numbers)) not in FOURS:
        raise ValueError(f"server {server}: four devices must be one of {', '.join(FOURS)}, not {','.join(numbers)}")


def _string(found: dict, key: str, where: str) -> str:
    value = found.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {key}={value!r} must be a string that is not empty (numbers too are strings)")
    return value


def _distinct(what: str, values: list[str]) -> None:
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{what} {value} is there twice")


def _server(host: int) -> str:
    return f"10.0.{host // 250}.{host % 250 + 1}"


def _devices(host: int, count: int) -> list[str]:
    """10.1/16 to 10.4/16 are the four subnets; in each, a host has an address, or two where devices i and i + 4 are."""
    places = [2 * host + device // 4 for device in range(count)]
    return [f"10.{1 + device % 4}.{place // 250}.{place % 250 + 1}" for device, place in enumerate(places)]
