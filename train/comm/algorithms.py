"""All-reduce algorithms: pure functions from a mesh to a plan; what they are made of is in `algorithms_stages`.

Hierarchical: HCCL's scheme on Ascend 910 (inside a host on its own links, between hosts among equal chips). Torus:
Mikami et al. 2018; Ying et al. 2018 and Kumar et al. 2019 (TPU). Others: at each function.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from train.comm import algorithms_stages as stages
from train.comm.algorithms_stages import Axes, Stages
from train.comm.plan import Plan
from train.mesh.mesh import Mesh


def ring(mesh: Mesh) -> Plan:
    """One ring through all chips: 2(n - 1) rounds, 2(n - 1)/n of the buffer sent by each chip."""
    axes = tuple(mesh.axes)
    return _plan("ring", mesh, stages.ring(np.array(mesh.rings(axes)[:1]), axes))


def multi_ring(mesh: Mesh) -> Plan:
    """All rings of a host at once, each with an equal share: on Ascend 910 HCCL's four; rounds and bytes as `ring`.

    No two of them share a link inside a host. With several hosts each ring goes through all hosts, and enters and
    leaves them by chips of its own as far as these suffice. ValueError where there is one ring only.
    """
    axes = tuple(mesh.axes)
    rings = mesh.rings(axes)
    if len(rings) == 1 and mesh.num_hosts > 1:
        host = np.array(_apart(mesh.topology.rings(mesh.chips_per_host)))
        first = mesh.chips_per_host * np.arange(mesh.num_hosts)
        rings = (first[:, None] + host[:, None, :]).reshape(len(host), -1)
    if len(rings) == 1 and mesh.num_chips > 1:
        raise ValueError(
            f"collective=multi_ring: the {mesh.chips_per_host} chips of a host of mesh {mesh.name} "
            f"({type(mesh.topology).__name__}) form one ring only; use collective=ring"
        )
    return _plan("multi_ring", mesh, stages.ring(np.array(rings), axes))


def _apart(rings: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """The rings of a host turned such that first and last chips are different ones, as long as there are any left."""
    turned: list[tuple[int, ...]] = []
    for ring in rings:
        turns = [ring[at:] + ring[:at] for at in range(len(ring))]
        used = {each[0] for each in turned}, {each[-1] for each in turned}
        turned.append(min(turns, key=lambda turn: (turn[0] in used[0]) + (turn[-1] in used[1])))
    return turned


def halving_doubling(mesh: Mesh) -> Plan:
    """Recursive halving and doubling over all chips: 2 log2(n) rounds, 2(n - 1)/n of the buffer sent by each chip.

    With n no power of two, p the largest below: 2 floor(log2 n) + 2 rounds, up to 2(p - 1)/p + 1 of the buffer.
    """
    axes = tuple(mesh.axes)
    return _plan("halving_doubling", mesh, stages.halving_doubling(mesh, axes))


def nhr(mesh: Mesh) -> Plan:
    """HCCL's non-uniform hierarchical ring over all chips: 2 ceil(log2 n) rounds, 2(n - 1)/n of the buffer, any n."""
    return _plan("nhr", mesh, stages.nhr(mesh, tuple(mesh.axes)))


def double_tree(mesh: Mesh, chunks: int = 32) -> Plan:
    """Two binary trees over all chips, each with half of the buffer cut into `chunks` (Sanders, Speck, Traeff 2009).

    At most 4 chunks + 4 ceil(log2 n) - 4 rounds; 2(n - 1)/n of the buffer sent by a chip on average, 2 at most. Many
    chunks suit large buffers, few suit small ones: the best number is sqrt(bytes x log2(n) / (2 alpha bandwidth)),
    which is about 30 to 60 for the gradients of ResNet-50 on 100 Gb/s.
    """
    return _plan("double_tree", mesh, stages.double_tree(mesh, tuple(mesh.axes), chunks=_whole(chunks)))


def hierarchical(mesh: Mesh) -> Plan:
    """Reduce-scatter in each host, halving-doubling between equal chips of the hosts, all-gather in each host."""
    return _hierarchical("hierarchical", mesh, stages.halving_doubling)


def hierarchical_ring(mesh: Mesh) -> Plan:
    """As `hierarchical`, with a ring between the hosts."""
    return _hierarchical("hierarchical_ring", mesh, _between_ring)


def hierarchical_nhr(mesh: Mesh) -> Plan:
    """As `hierarchical`, with `nhr` between the hosts."""
    return _hierarchical("hierarchical_nhr", mesh, stages.nhr)


def hierarchical_tree(mesh: Mesh, chunks: int = 32) -> Plan:
    """As `hierarchical`, with a `double_tree` between the hosts for each of a host's chips.

    NCCL does alike: a tree of each of its channels goes through another chip (and its network card) of a host.
    """
    return _hierarchical("hierarchical_tree", mesh, partial(stages.double_tree, chunks=_whole(chunks)))


def torus_2d(mesh: Mesh) -> Plan:
    """`torus` on a mesh of two axes: 2(x - 1) + 2(y - 1) rounds, 2(xy - 1)/(xy) of the buffer sent by each chip."""
    if len(mesh.axes) == 1 or sum(size > 1 for size in mesh.axes.values()) > 2:
        axes = ", ".join(f"{axis}: {size}" for axis, size in mesh.axes.items())
        raise ValueError(
            f"collective=torus_2d needs two axes, mesh {mesh.name} has {{{axes}}}; set mesh.axes or collective=torus"
        )
    return torus(mesh, "torus_2d")


def torus(mesh: Mesh, name: str = "torus") -> Plan:
    """Rings along one axis after another: reduce-scatters, each on what the last has left, and all-gathers back.

    Where neighbours along all axes are joined by wires of one class, k lanes, each with a k-th of the buffer, take
    the k axes in another order, so that all links are busy at once; along an axis that closes to a ring both
    directions are used (TPU: Ying et al. 2018, Kumar et al. 2019). Elsewhere one lane goes through the last axis
    first (Mikami et al. 2018): opposite orders would put most of a lane on the slower axis, or twice on one port.
    2 sum(size - 1) rounds; 2(n - 1)/n of the buffer sent by each chip.
    """
    axes = [axis for axis, size in reversed(mesh.axes.items()) if size > 1]
    wires = {_wire(mesh, axis) for axis in axes}
    several = len(wires) == 1 and wires != {None}
    lanes = [axes[turn:] + axes[:turn] for turn in range(len(axes))] if several else [axes]
    return _plan(
        name, mesh, tuple(stage for lane, order in enumerate(lanes) for stage in _torus_lane(mesh, order, lane))
    )


def auto(mesh: Mesh) -> Plan:
    """What the machine's own library takes by default (`mesh.topology.library`).

    hccl, hccl_a2, hccl_a3, hccl_950: inside a host on its links, and between hosts as HCCL's source code has it
      (alg_configurator.cc, GetDefaultAlgoLevel1V1; coll_alg_operator.cc, SelectAlgoTypeForAllReduce):
      hccl (910): from 8 hosts on always halving-doubling; below, halving-doubling at powers of two, else a ring. HCCL's
        documents (HCCL_ALGO) differ: a ring at any number of hosts that is no power of two, so also at 12 or 100.
      hccl_a2 (910B): the least of (rounds x 60 us + bytes) of ring, NHR, halving-doubling, the first of equals. Ring
        and NHR send the same, so that whatever the bytes are it is a ring up to 3 hosts, and NHR from 4 on.
      hccl_a3 (910C): as hccl, with NHR in place of halving-doubling (between super-pods as well, here one level).
      hccl_950: NHR, the only choice between hosts that its documents name.
    torus: `torus` (TPU: Ying et al. 2018).
    others, nccl among them: `hierarchical`, with NHR between hosts whose number is no power of two, where
      halving-doubling would send more. (NCCL's own choice between rings and double trees depends on the bytes; this has
      the trees' number of rounds and the rings' bytes.)
    """
    library, hosts = mesh.topology.library, mesh.num_hosts
    if library == "torus":
        return torus(mesh, "auto: torus")
    power_of_two = hosts & (hosts - 1) == 0
    few = hosts < 4 if library == "hccl_a2" else hosts < 8 and not power_of_two
    if library in ("hccl", "hccl_a2", "hccl_a3") and few:
        return _hierarchical("auto: hierarchical_ring", mesh, _between_ring)
    if library in ("hccl_a2", "hccl_a3", "hccl_950") or (library != "hccl" and not power_of_two):
        return _hierarchical("auto: hierarchical_nhr", mesh, stages.nhr)
    return _hierarchical("auto: hierarchical", mesh, stages.halving_doubling)


def _plan(name: str, mesh: Mesh, made: Stages) -> Plan:
    return Plan(name, mesh, tuple(made) if mesh.num_chips > 1 else ())


def _hierarchical(name: str, mesh: Mesh, between: Callable[[Mesh, Axes, Axes], Stages]) -> Plan:
    inside = mesh.inside_axes if mesh.chips_per_host > 1 else ()
    outside = tuple(axis for axis in mesh.axes if axis not in inside)
    first, last = _inside(mesh, inside) if inside else ((), ())
    middle = between(mesh, outside, inside) if mesh.num_hosts > 1 else ()
    return _plan(name, mesh, (*first, *middle, *last))


def _inside(mesh: Mesh, axes: Axes) -> tuple[Stages, Stages]:
    """Reduce-scatter and all-gather of a host: direct where HCCL finds a full mesh of links, else on its rings."""
    size, topology = mesh.size(axes), mesh.topology
    pairs = np.nonzero(~np.eye(size, dtype=bool))
    wires = [not link.switched for link in topology.link_classes]
    full = (topology.hops(*pairs).sum(axis=0) == 1).all() and (topology.hops(*pairs)[wires].sum(axis=0) == 1).all()
    if full and topology.library.startswith("hccl"):
        scatter, gather = stages.direct(size, axes)
    else:
        scatter, gather = stages.ring(np.array(mesh.rings(axes)), axes)
    return (scatter,), (gather,)


def _between_ring(mesh: Mesh, axes: Axes, shard_axes: Axes) -> Stages:
    return stages.ring(np.array(mesh.rings(axes)[:1]), axes, shard_axes)


def _torus_lane(mesh: Mesh, order: list[str], lane: int) -> Stages:
    done: Axes = ()
    scatters, gathers = [], []
    for axis in order:
        scatter, gather = stages.ring(_axis_rings(mesh, axis), (axis,), done, lane)
        scatters.append(scatter)
        gathers.append(gather)
        done = (*done, axis)
    return (*scatters, *reversed(gathers))


def _axis_rings(mesh: Mesh, axis: str) -> np.ndarray:
    """The rings of a host where the axis is one; both ways round where wires close it to a ring; else one way."""
    rings, size = mesh.rings((axis,)), mesh.axes[axis]
    if len(rings) == 1 and size > 2 and None not in (_wire(mesh, axis), _wire(mesh, axis, size - 1)):
        rings = (*rings, rings[0][::-1])
    return np.array(rings)


def _wire(mesh: Mesh, axis: str, steps: int = 1) -> int | None:
    """The class of the wire that joins the first chip with the one `steps` further along `axis`; None without one."""
    names = tuple(mesh.axes)
    other = steps * mesh.size(names[names.index(axis) + 1 :])
    hops = mesh.topology.hops(np.array([0]), np.array([other]))[:, 0]
    kind = int(hops.argmax())
    return kind if hops.sum() == 1 and not mesh.topology.link_classes[kind].switched else None


def _whole(chunks: int) -> int:
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"collective.chunks={chunks!r} must be a whole number of at least 1")
    return chunks
