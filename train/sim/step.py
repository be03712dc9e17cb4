"""One training step on the emulated machine: compute, communication that overlaps the backward pass, the slowest chip.

Gradients are reduced in buckets, in the order the backward pass makes them. One lane computes, one communicates; a
bucket starts when its last gradient is ready and the bucket before it is done. What outlasts the backward pass is
exposed.

    compute  |  forward  |      backward       |
    comm                        | bucket 1 |  | 2 || 3 |
                                                |<---->| exposed
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from train.sim.workload import Workload

WIRE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; the parts add up."""

    compute_s: float
    exposed_comm_s: float
    straggler_s: float
    input_s: float
    other_s: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_comm_s + self.straggler_s + self.input_s + self.other_s


@dataclass(frozen=True)
class Bucket:
    """Gradients reduced together: their number, and the share of the step's compute after which the last is ready."""

    parameters: int
    ready: float


def buckets(workload: Workload, ends: Sequence[int]) -> list[Bucket]:
    """Cuts the gradients where `ends` tensors have come out of the backward pass; a layer's tensors stay together."""
    made, parameters, tensors, flops = [], 0, 0, workload.forward_flops
    cuts = [end for end in ends if end < workload.num_tensors]
    for layer in reversed(workload.layers):
        while cuts and tensors >= cuts[0]:
            cuts.pop(0)
            made.append(Bucket(parameters, flops / workload.training_flops))
            parameters = 0
        flops += layer.backward_flops
        parameters += layer.parameters
        tensors += layer.tensors
    made.append(Bucket(parameters, 1.0))
    return [bucket for bucket in made if bucket.parameters]


def exposed_s(ready: Sequence[float], durations: Sequence[float], compute_s: float) -> float:
    """How long the last bucket ends after the compute; `ready` are seconds from the start of the step."""
    end = 0.0
    for start, duration in zip(ready, durations, strict=True):
        end = max(end, start) + duration
    return max(0.0, end - compute_s)


def expected_max_normal(count: int) -> float:
    """Mean of the largest of `count` independent standard normal numbers: 9 - integral of its distribution up to 9."""
    if count <= 1:
        return 0.0
    grid = np.linspace(-9.0, 9.0, 3601)
    upper = np.minimum([0.5 * math.erfc(x / math.sqrt(2)) for x in grid], 1 - 1e-16)
    return float(9.0 - np.trapezoid(np.exp(count * np.log1p(-upper)), grid))


def step_time(
    compute_s: float,
    workload: Workload,
    bucket_ends: Sequence[int],
    wire_bytes: int,
    all_reduce_s: Callable[[float], float],
    jitter: float,
    num_chips: int,
) -> StepTime:
    """jitter: a chip's step-time deviation as a fraction of compute; the step waits for the slowest of `num_chips`.

    Compute time is spread over the layers by their FLOPs. Host input is taken to keep up, and the optimizer to be
    inside the chip's published rate.
    """
    cut = buckets(workload, bucket_ends)
    durations = [all_reduce_s(bucket.parameters * wire_bytes) if num_chips > 1 else 0.0 for bucket in cut]
    exposed = exposed_s([bucket.ready * compute_s for bucket in cut], durations, compute_s)
    return StepTime(compute_s, exposed, jitter * compute_s * expected_max_normal(num_chips), 0.0, 0.0)
