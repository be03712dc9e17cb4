"""A configuration's sums: who adds up what the workers' chips computed, in which order, in which buckets."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from train.comm.aggregation import Aggregator, SumAggregator, TreeAggregator
from train.comm.buckets import Afterwards, GradientSums, InThread
from train.comm.groups import Group
from train.comm.plan import Plan
from train.comm.wire import PlanAggregator
from train.precision import DTYPES


def aggregator(numerics: str, group: Group, shares: list[range], wire: torch.dtype | None = None) -> Aggregator:
    """`shares`: the blocks of each rank; `wire`: see SumAggregator."""
    return TreeAggregator(group, shares) if numerics == "exact" else SumAggregator(group, wire)


def gradient_sums(
    config: dict,
    parameters: Sequence[nn.Parameter],
    sizes: Sequence[int],
    plan: Plan,
    group: Group,
    shares: list[range],
    device: str,
) -> GradientSums:
    """In buckets of `sizes` tensors, beside the backward pass where processors compute; of `plan`, all at once."""
    sums = partial(aggregator, config["numerics"], group, shares)
    make = sums
    if config["gradient_sum"] == "wire":
        make = partial(sums, DTYPES[config["wire_dtype"]])
    elif config["gradient_sum"] == "plan":
        sizes, count = [len(parameters)], sum(p.numel() for p in parameters)
        make = partial(PlanAggregator, plan, config["wire_dtype"], count, device)
    overlaps = group.world_size > 1 and device == "cpu"
    return GradientSums(parameters, sizes, make, sums(), InThread() if overlaps else Afterwards())
