"""Flow: transfers as fluid flows that share links max-min fairly (Bertsekas and Gallager, Data Networks, 1992, 6.5.2).

The transfers of a round start together; each waits for the latency of its way, then sends its bytes at the rate that
progressive filling gives it, until its last byte. A flow that ends leaves its share to the others.
"""

import numpy as np

from train.mesh.topology import Topology
from train.sim.network import Network, latency_s

EQUAL = 1 + 1e-9  # shares and ends closer than this are one, so that rounding makes no events of its own


class Flow(Network):
    """Contention included: all groups of a stage are priced together, since they may share links.

    A round lasts until its last flow ends. Where no two transfers of a round share a link it costs what AlphaBeta says,
    otherwise never less.
    """

    name = "flow"
    all_groups = True

    def transfers_s(
        self, topology: Topology, source: np.ndarray, destination: np.ndarray, nbytes: np.ndarray
    ) -> np.ndarray:
        return finish_s(topology, source, destination, nbytes, self.calibration.comm_efficiency)


def finish_s(
    topology: Topology, source: np.ndarray, destination: np.ndarray, nbytes: np.ndarray, efficiency: float = 1.0
) -> np.ndarray:
    """[transfers]: when each of the transfers that start together at 0 ends, in seconds.

    efficiency: share of every link's rate that can be used.
    """
    nbytes = np.asarray(nbytes, dtype=float)
    flow, kind, link = topology.paths(source, destination)
    start = latency_s(topology, topology.hops(source, destination), nbytes)
    moving = nbytes[flow] > 0
    flow, kind = flow[moving], kind[moving]
    numbers, link = np.unique(link[moving], return_inverse=True)
    rates = np.array([each.bytes_per_s for each in topology.link_classes]) * efficiency
    capacity = np.empty(len(numbers))
    capacity[link] = rates[kind]
    slowest = np.full(len(nbytes), np.inf)
    np.minimum.at(slowest, flow, capacity[link])
    finish = start + nbytes / slowest
    contended = np.zeros(len(nbytes), dtype=bool)
    contended[flow[np.bincount(link)[link] > 1]] = True
    if contended.any():
        some = np.flatnonzero(contended)
        on = contended[flow]
        flow = np.searchsorted(some, flow[on])
        finish[some] = _drain(flow, link[on], capacity, start[some], nbytes[some])
    return finish


def _drain(
    flow: np.ndarray, link: np.ndarray, capacity: np.ndarray, start: np.ndarray, nbytes: np.ndarray
) -> np.ndarray:
    """[flows]: ends of flows over the links of the entries (flow, link); from event to event at constant rates."""
    left, finish = nbytes.copy(), np.full(len(nbytes), np.inf)
    now = start.min()
    while len(unfinished := np.flatnonzero(finish == np.inf)):
        waiting = start[unfinished] > now
        next_start = start[unfinished[waiting]].min(initial=np.inf)
        sending = unfinished[~waiting]
        if not len(sending):
            now = next_start
            continue
        sends = np.zeros(len(nbytes), dtype=bool)
        sends[sending] = True
        on = sends[flow]
        rate = max_min_rates(flow[on], link[on], capacity, len(nbytes))[sending]
        ends = now + left[sending] / rate
        event = min(next_start, ends.min())
        left[sending] -= rate * (event - now)
        now = event
        finish[sending[ends <= now * EQUAL]] = now
    return finish


def max_min_rates(flow: np.ndarray, link: np.ndarray, capacity: np.ndarray, num_flows: int) -> np.ndarray:
    """[flows]: max-min fair rates of flows over the links of the entries (flow, link); flows without an entry get 0.

    capacity: [links], of each. Progressive filling, all bottlenecks at once: a link whose equal share is the least
    that any of its flows finds on its way fills before all others of those flows, so they end up with that share.
    """
    rate, spare = np.zeros(num_flows), capacity.astype(float)
    while len(flow):
        share = spare[link] / np.bincount(link, minlength=len(spare))[link]
        least = np.full(num_flows, np.inf)
        np.minimum.at(least, flow, share)
        bottleneck = np.ones(len(spare), dtype=bool)
        bottleneck[link[share > least[flow] * EQUAL]] = False
        filled = np.zeros(num_flows, dtype=bool)
        filled[flow[bottleneck[link]]] = True
        rate[filled] = least[filled]
        out = filled[flow]
        spare -= np.bincount(link[out], weights=rate[flow[out]], minlength=len(spare))
        np.maximum(spare, 0, out=spare)
        flow, link = flow[~out], link[~out]
    return rate
