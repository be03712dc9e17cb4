"""The mesh of a published record: hosts and links as its system and interconnect texts state them.

Texts are those of MLPerf's system descriptions ("4xXE8545x4A100-SXM-40GB", "8x ConnectX-6 IB HDR 200Gb/Sec"). What a
text leaves open is taken from the catalog's machine of that chip, or assumed; `Hosts.notes` says so.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from train.mesh.mesh import Mesh
from train.mesh.topologies import MeshedHosts, SwitchedHosts, Torus
from train.mesh.topology import LinkClass
from train.records import Record

# Chips of one host where the text names its model: DGX-2 16; ABCI, C4140, XE8545 and R750xa 4; HLS-1H 4 Gaudi.
HOST_MODELS = (
    (r"dgx-?2", 16),
    (r"abci|c4140|xe8545|r750xa|hls-1h\b|s822lc", 4),
    (r"dgx|nd96|p3\.16|p4d|ascend|hls|420gh|xe9680", 8),
)
# Chips of one host in the text: "4xR750xax4A100", "G5500V7x10L40", "R4900G5x1A100", "8xA100_80GB".
CHIPS_IN_TEXT = r"(?:^|[x_ -])(\d{1,2})x?(?=(?:A|H|V|L|T|P|RTX)\d)"
# Hosts in the text: "_n8_", "-N4", "16-nodes", "4xC4140", "8 nodes".
HOSTS_IN_TEXT = r"(?:_n|[-_]N)(\d+)(?=[_\s(-]|$)|(\d+)-nodes?\b|\b(\d+) nodes?\b"
HOST_COUNT = r"(?:^|\s|-)(\d+)x(?=[A-Z][A-Z0-9a-z]*x?\d)"
# Network cards of a host: "8x ConnectX-6 IB HDR 200Gb/Sec", "2x Cornelis ... 100Gb/Sec", "EDR x2".
CARDS = r"(\d+)x (?:ConnectX|Cornelis|Mellanox|BF3|InfiniBand)[^;,]*?(\d+) ?Gb"
RATES_GBIT = (("ndr", 400), ("hdr", 200), ("edr", 100), ("fdr", 56), ("e810", 100), ("omni-path", 100))

MOST_CARDS, MOST_CHIPS = 10, 72  # of one host: PCIe cards; any chips (GB200 NVL72)
PCIE_GBYTES = 24.0
PCIE_SOURCE = "derived: twice the 12 GB/s that NVIDIA/nccl's tuning code (src/graph) has for PCIe 3.0 x16"
NETWORK_LATENCY_US = 2.7
LATENCY_SOURCE = "NVIDIA/nccl, tuning code in src/graph: 2.7 us a hop"
CATALOG = {  # model word of a chip -> machine of the catalog whose links it has where the text says nothing else
    "p100": "dgx1_p100",
    "v100": "dgx1_v100",
    "a100": "dgx_a100",
    "h100": "dgx_h100",
    "h200": "dgx_h200",
    "gaudi": "gaudi",
    "gaudi2": "gaudi2",
    "gc200": "ipu_pod",
    "bow": "ipu_pod",
    "v2": "tpu_v2",
    "v3": "tpu_v3",
    "v4": "tpu_v4",
    "910": "atlas900_1024",
}
NEEDED = sorted({*CATALOG.values(), "dgx2_v100", "abci", "xeon"})
"""Machines of the catalog that `mesh_of` wants."""


@dataclass(frozen=True)
class Hosts:
    """How a record's chips stand in hosts. `cards_gbit`: all network cards of one host together, where stated."""

    count: int
    chips: int
    cards_gbit: float | None
    notes: tuple[str, ...]


def hosts_of(record: Record, words: set[str]) -> Hosts:
    """Hosts by the texts, or else the largest usual host (8, 4, 2) that goes into the chips."""
    text, chips, notes = f"{record.system} {record.chip}", record.chips, []
    each = _stated(CHIPS_IN_TEXT, text)
    count = _stated(HOSTS_IN_TEXT, text)
    if count is None and (each is None or each < chips):
        count = _stated(HOST_COUNT, text)
        count = count if count != chips else None
    size = None
    if count and count <= chips <= count * MOST_CHIPS and chips % count == 0:
        size = chips // count
    if size is None and each and chips % each == 0:
        size = each
    if size is None:
        model = next((n for pattern, n in HOST_MODELS if re.search(pattern, text.lower())), None)
        if model and (model >= chips or chips % model == 0):
            size = min(model, chips)
    if size is None:
        # PCIe servers hold up to ten cards; more, or SXM boards and what has a network, come in eights.
        whole = 8 if "sxm" in record.chip.lower() or _cards(record) else MOST_CARDS
        if chips <= whole:
            size = chips
        else:
            size = next((n for n in (8, 4, 2) if chips % n == 0), chips if chips <= 24 else 1)
            notes.append(f"assumed: hosts of {size} chips")
    return Hosts(chips // size, size, _cards_gbit(record), tuple(notes))


def mesh_of(record: Record, words: set[str], catalog: Mapping[str, Mesh]) -> tuple[Mesh, str, list[str]]:
    """(mesh, wire dtype, what was assumed). words: of the chip's name; catalog: meshes of conf/mesh by name."""
    known = next((name for word, name in CATALOG.items() if word in words), None)
    if known and known.startswith("tpu"):
        return _torus(record, catalog[known]), "bf16", []
    if known == "ipu_pod":
        link = catalog[known].topology.link_classes[0]
        shape = [max(1, record.chips // 2), min(2, record.chips)]
        return Mesh(record.system, _axes(shape), Torus(shape, link, chips_per_host=shape[1])), "fp16", []
    hosts = hosts_of(record, words)
    axes, notes = {"host": hosts.count, "chip": hosts.chips}, list(hosts.notes)
    if known == "atlas900_1024":
        whole = catalog[known].topology
        hccs, _, roce = whole.link_classes
        part = MeshedHosts(hosts.chips, hccs, roce, library=whole.library)
        return Mesh(record.system, axes, whole if hosts.chips == whole.chips_per_host else part), "fp16", notes
    if known in ("gaudi", "gaudi2"):
        inside, between = catalog[known].topology.link_classes[:2]
        return Mesh(record.system, axes, MeshedHosts(hosts.chips, inside, between)), "bf16", notes
    if "xeon" in words or "phi" in words:
        between = _network(record, hosts, notes)
        inside = catalog["xeon"].topology.link_classes[0]
        return Mesh(record.system, axes, SwitchedHosts(hosts.chips, inside, between)), "fp32", notes
    topology = _gpu_hosts(record, words, hosts, known, catalog, notes)
    return Mesh(record.system, axes, topology), "fp32" if "p100" in words else "fp16", notes


def _gpu_hosts(record: Record, words: set[str], hosts: Hosts, known: str | None, catalog: Mapping, notes: list[str]):
    """NVSwitch, cube mesh, NVLink full mesh or PCIe inside; network cards between."""
    text = f"{record.chip} {record.interconnect}".lower()
    nvlink = known is not None and "pcie" not in record.chip.lower() and ("sxm" in text or "nvlink" in text)
    nvlink = nvlink or (known in ("dgx1_v100", "dgx1_p100") and "pcie" not in text)
    if nvlink:
        if hosts.chips == 16:
            known = "dgx2_v100"
        model = catalog[known].topology
        default = model.link_classes[-1].bytes_per_s * 8e-9 * model.chips_per_host
        between = _network(record, hosts, notes, default * hosts.chips / model.chips_per_host)
        if hosts.chips == model.chips_per_host and known.startswith("dgx1"):
            return type(model)(model.link_classes[0], between, model.link_classes[1], model.links_per_chip)
        if hosts.chips == 4 and known in ("dgx1_v100", "dgx_a100"):  # a full mesh of direct links
            links = catalog["abci"].topology.link_classes[0] if known == "dgx1_v100" else _bridged(model)
            return MeshedHosts(4, links, between)
        if known.startswith("dgx1"):
            if hosts.chips > 1:
                notes.append(f"assumed: hosts of {hosts.chips} {record.chip} on switches")
            return SwitchedHosts(hosts.chips, model.link_classes[0].bundle(model.links_per_chip), between)
        return SwitchedHosts(hosts.chips, model.link_classes[0], between)
    pcie = LinkClass("pcie", PCIE_GBYTES, 1.0, source=PCIE_SOURCE)
    return SwitchedHosts(hosts.chips, pcie, _network(record, hosts, notes))


def _bridged(model) -> LinkClass:
    """The links of one pair of four A100 without switches: a third of a chip's."""
    total = model.link_classes[0]
    source = f"derived: a chip's links shared by three neighbours; {total.source}"
    return LinkClass("nvlink", total.bytes_per_s / 3e9, total.latency_s * 1e6, source=source)


def _network(record: Record, hosts: Hosts, notes: list[str], default_gbit: float = 100.0) -> LinkClass:
    """A chip's share of its host's network cards."""
    gbit, source = hosts.cards_gbit, f"the record's interconnect; {LATENCY_SOURCE}"
    if gbit is None:
        gbit, source = default_gbit, f"assumed: {default_gbit:g} Gb/s a host; {LATENCY_SOURCE}"
        if hosts.count > 1:
            notes.append(f"assumed: {default_gbit:g} Gb/s of network a host")
    return LinkClass("network", gbit / 8 / hosts.chips, NETWORK_LATENCY_US, source=source)


def _torus(record: Record, pod: Mesh) -> Mesh:
    """A slice of a pod, as near to a square (or a cube) as its prime factors allow."""
    shape = [1] * len(pod.topology.shape)
    for factor in _primes(record.chips):
        shape[shape.index(min(shape))] *= factor
    shape.sort(reverse=True)
    link = pod.topology.link_classes[0]
    return Mesh(record.system, _axes(shape), Torus(shape, link, chips_per_host=shape[-1]))


def _primes(number: int) -> list[int]:
    """Largest first."""
    found, factor = [], 2
    while factor * factor <= number:
        while number % factor == 0:
            found.append(factor)
            number //= factor
        factor += 1
    return sorted([*found, number] if number > 1 else found, reverse=True)


def _axes(shape: list[int]) -> dict[str, int]:
    return dict(zip("zyx"[-len(shape) :], shape, strict=True))


def _stated(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    value = next((int(group) for group in found.groups() if group), None) if found else None
    return value or None


def _cards(record: Record) -> bool:
    text = record.interconnect.lower()
    return any(name in text for name, _ in RATES_GBIT) or "ethernet" in text or "connectx" in text


def _cards_gbit(record: Record) -> float | None:
    """All cards of one host, in Gb/s (one where no number is stated); None where the text has none."""
    text = record.interconnect.split("Compute:")[-1]
    found = re.search(CARDS, text)
    if found:
        return float(found[1]) * float(found[2])
    found = re.search(r"(?<![\dx])(\d+) ?Gb(?:/s|E)? Ethernet|(\d+)GbE|(\d+) Gb/s Ethernet", text)
    rate = next((float(group) for group in found.groups() if group), None) if found else None
    if rate and rate >= 10:  # a 1 Gb port is the one for management
        return rate
    name = next((gbit for word, gbit in RATES_GBIT if word in text.lower()), None)
    if name is None:
        return None
    cards = re.search(r"(?:EDR|HDR|NDR|Gb/s) x(\d+)", text)
    if cards is None and "dgx" in record.system.lower():
        return None  # the catalog has its cards
    return float(name) * (int(cards[1]) if cards else 1)
