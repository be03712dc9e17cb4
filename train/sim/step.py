"""One training step on the emulated machine: compute, communication that overlaps the backward pass, the slowest chip.

Gradients are reduced in buckets, in the order the backward pass makes them. One lane computes, one communicates; a
bucket starts when its last gradient is ready and the bucket before it is done. What outlasts the backward pass is
exposed.

    compute  |  forward  |      backward       |
    comm                        | bucket 1 |  | 2 || 3 |
                                                |<---->| exposed
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    recovery_s: float = 0.0
    """From a fault that struck in this step: see train/sim/toll."""

    @property
    def step_s(self) -> float:
        parts = self.compute_s + self.exposed_comm_s + self.straggler_s + self.input_s + self.other_s
        return parts + self.recovery_s


@dataclass(frozen=True)
class Bucket:
    """Gradients reduced together: how many tensors and numbers, and after which share of the step's compute the last
    of them is ready."""

    tensors: int
    parameters: int
    ready: float


def buckets(workload: Workload, ends: Sequence[int]) -> list[Bucket]:
    """Cuts the gradients where `ends` tensors have come out of the backward pass; a layer's tensors stay together.

    These are priced, and summed between real workers (train/comm/buckets).
    """
    made, parameters, tensors, cut, flops = [], 0, 0, 0, workload.forward_flops
    cuts = [end for end in ends if end < workload.num_tensors]
    for layer in reversed(workload.layers):
        while cuts and tensors >= cuts[0]:
            cuts.pop(0)
            made.append(Bucket(tensors - cut, parameters, flops / workload.training_flops))
            parameters, cut = 0, tensors
        flops += layer.backward_flops
        parameters += layer.parameters
        tensors += layer.tensors
    made.append(Bucket(tensors - cut, parameters, 1.0))
    return [bucket for bucket in made if bucket.parameters]


def ready_s(cut: Sequence[Bucket], lane_s: float, overlap: float) -> list[float]:
    """Seconds from the start of the step at which each bucket may start, where the chip is busy for `lane_s`."""
    return [lane_s - overlap * (lane_s - bucket.ready * lane_s) for bucket in cut]


def reduce_ends_s(ready: Sequence[float], durations: Sequence[float]) -> list[float]:
    """When each bucket's all-reduce ends, one after another, none before it is ready."""
    ends, end = [], 0.0
    for start, duration in zip(ready, durations, strict=True):
        end = max(end, start) + duration
        ends.append(end)
    return ends


def exposed_s(ready: Sequence[float], durations: Sequence[float], compute_s: float) -> float:
    """How long the last bucket ends after the compute; `ready` are seconds from the start of the step."""
    return max(0.0, max(reduce_ends_s(ready, durations), default=0.0) - compute_s)


def norm_messages(workload: Workload) -> list[int]:
    """Numbers that a step sums over chips that share batch-norm statistics: two a channel, forward and backward."""
    return 2 * [layer.parameters for layer in workload.layers if layer.kind == "batch_norm"]


def update_bytes(optimizer: str, parameters: int) -> int:
    """Bytes of memory that an update in fp32 moves.

    SGD with momentum reads weight, gradient and momentum and writes the first and the last; LARS reads weight and
    gradient once more for their norms.
    """
    numbers = {"none": 0, "sgd": 5, "lars": 7}
    return 4 * numbers[optimizer] * parameters


def step_time(
    compute_s: float,
    workload: Workload,
    bucket_ends: Sequence[int],
    wire_bytes: int,
    all_reduce_s: Callable[[float], float],
    num_chips: int,
    *,
    inside_s: Callable[[float], float] | None = None,
    straggler_s: float = 0.0,
    overlap: float = 1.0,
    floor_s: float = 0.0,
    norm_s: float = 0.0,
    update_s: float = 0.0,
    input_s: float = 0.0,
) -> StepTime:
    """Compute time is spread over the layers by their FLOPs.

    inside_s: the all-reduce of the run that gave the chip's rate, whose exposed part is in compute_s already.
    straggler_s: the wait for the slowest chip. overlap: share of the backward pass behind which
    communication can hide (0: it all waits for the last gradient). floor_s: what launching the step's kernels
    takes at least. norm_s: sums of batch-norm statistics, which nothing hides. update_s: of the optimizer, as far as it
    is not in compute_s. input_s: what a host needs to feed its chips; it works ahead, so only what is longer than the
    rest of the step counts.
    """
    lane = max(compute_s, floor_s)
    cut = buckets(workload, bucket_ends)
    ready = ready_s(cut, lane, overlap)

    def exposed_by(reduce_s: Callable[[float], float]) -> float:
        return exposed_s(ready, [reduce_s(bucket.parameters * wire_bytes) for bucket in cut], lane)

    exposed = exposed_by(all_reduce_s) if num_chips > 1 else 0.0
    if inside_s and exposed:
        exposed = max(0.0, exposed - exposed_by(inside_s))
    exposed += norm_s
    other = lane - compute_s + update_s
    busy = compute_s + exposed + straggler_s + other
    return StepTime(compute_s, exposed, straggler_s, max(0.0, input_s - busy), other)
