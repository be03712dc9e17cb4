"""Network models: seconds(plan, nbytes). AlphaBeta is Hockney's closed form (1994): a message costs
alpha + bytes / bandwidth."""

import numpy as np

from train.comm.plan import Plan


class AlphaBeta:
    """Every transfer runs alone on its route: alpha is the sum over its hops, the bandwidth that of the slowest hop.

    A round lasts as long as its slowest transfer; transfers share no link (a plan that makes them share is
    underpriced here). All groups of a stage are alike, so the first one is priced.
    model_error: standard deviation of ln(published / predicted) of whole runs, for the interval of emulated times.
    """

    name = "alpha_beta"

    def __init__(self, model_error: float = 0.0, source: str = "assumed: no source given"):
        if not 0 <= model_error < 2:
            raise ValueError(f"network.model_error={model_error} must be at least 0 and below 2 (0.1 is about 10 %)")
        self.model_error = model_error
        self.source = source

    def seconds(self, plan: Plan, nbytes: float, all_groups: bool = False) -> float:
        total, chunk_bytes = 0.0, nbytes / plan.num_chunks
        for turn in plan.rounds(all_groups):
            sizes = (turn.last - turn.first) * chunk_bytes
            total += self._transfers_s(plan, turn.source, turn.destination, sizes).max()
        return float(total)

    def _transfers_s(self, plan: Plan, source: np.ndarray, destination: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
        topology = plan.mesh.topology
        hops = topology.hops(source, destination)
        alpha, beta = np.zeros(len(nbytes)), np.zeros(len(nbytes))
        for link, count in zip(topology.link_classes, hops, strict=True):
            alpha += count * link.message_s(nbytes)
            beta = np.maximum(beta, (count > 0) / link.bytes_per_s)
        return alpha + beta * nbytes
