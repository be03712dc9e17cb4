"""Network models: seconds(plan, nbytes). AlphaBeta is Hockney's closed form (1994): a message costs
alpha + bytes / bandwidth. Flow, with contention: train.sim.flow."""

from collections.abc import Iterator

import numpy as np

from train.comm.plan import Plan, Round
from train.mesh.topology import NO_SOURCE, Topology
from train.sim.calibration import Calibration


class Network:
    """What prices a plan on the links of its mesh.

    model_error: standard deviation of ln(published / predicted) of whole runs, for the interval of emulated times.
    calibration: constants from published records; of them a network itself uses comm_efficiency, the share of a
    link's rate that a collective reaches.
    """

    name: str
    all_groups = False
    """Whether all groups of a stage are priced together, instead of the first one for all."""

    def __init__(self, model_error: float = 0.0, source: str = NO_SOURCE, calibration: Calibration | None = None):
        if not 0 <= model_error < 2:
            raise ValueError(f"network.model_error={model_error} must be at least 0 and below 2 (0.1 is about 10 %)")
        self.model_error = model_error
        self.source = source
        self.calibration = calibration or Calibration()

    def seconds(self, plan: Plan, nbytes: float, all_groups: bool | None = None) -> float:
        """Time of `plan` on a buffer of `nbytes`: a round lasts until its last transfer has ended."""
        return float(sum(times * each.max() for _, times, each in self.rounds(plan, nbytes, all_groups)))

    def rounds(
        self, plan: Plan, nbytes: float, all_groups: bool | None = None
    ) -> Iterator[tuple[Round, int, np.ndarray]]:
        """(round, how many cost the same, seconds [transfers]) that `seconds` adds up; all_groups: not the model's."""
        chunk_bytes = nbytes / plan.num_chunks
        for turn, times in plan.priced_rounds(self.all_groups if all_groups is None else all_groups):
            sizes = (turn.last - turn.first) * chunk_bytes
            yield turn, times, self.transfers_s(plan.mesh.topology, turn.source, turn.destination, sizes)

    def transfers_s(
        self, topology: Topology, source: np.ndarray, destination: np.ndarray, nbytes: np.ndarray
    ) -> np.ndarray:
        """[transfers]: when each of those that start together at 0 ends, in seconds."""
        raise NotImplementedError


class AlphaBeta(Network):
    """Every transfer runs alone on its route: alpha is the sum over its hops, the bandwidth that of the slowest hop.

    Transfers share no link (a plan that makes them share is underpriced here). All groups of a stage are alike, so the
    first one is priced.
    """

    name = "alpha_beta"

    def transfers_s(
        self, topology: Topology, source: np.ndarray, destination: np.ndarray, nbytes: np.ndarray
    ) -> np.ndarray:
        hops = topology.hops(source, destination)
        beta = np.zeros(len(nbytes))
        for link, count in zip(topology.link_classes, hops, strict=True):
            beta = np.maximum(beta, (count > 0) / link.bytes_per_s)
        return latency_s(topology, hops, nbytes) + beta * nbytes / self.calibration.comm_efficiency


def latency_s(topology: Topology, hops: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """[transfers]: fixed cost of messages of `nbytes` over `hops` [classes, transfers], in seconds."""
    alpha = np.zeros(len(nbytes))
    for link, count in zip(topology.link_classes, hops, strict=True):
        alpha += count * link.message_s(nbytes)
    return alpha
