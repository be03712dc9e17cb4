"""Gradients added as the emulated wire would add them: a plan run on tensors, every sum rounded to the wire's dtype.

The third interpreter of a plan (beside numpy arrays and the clock's prices). torch adds two numbers of 16 bits in
float32 and rounds to nearest even, which is their correctly rounded sum (24 >= 2 * 11 + 2 digits: Figueroa 1995).
The gradients are one buffer in the order of the model's parameters. Cutting it into the chip's buckets would move the
borders of the plan's chunks, that is at which chip an element's sum begins; not how many sums it goes through.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from train.comm.aggregation import copied, shapes_of, unflatten
from train.comm.plan import Plan
from train.precision import DTYPES

MAX_BUFFER_BYTES = 4 << 30
BLOCK_ELEMENTS = 1 << 24
"""Elements of all chips that are worked on at once: what the copies of a round are kept to."""


def sum_on_plan(plan: Plan, vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """[chips, length] -> [length]: the sum as `plan` leaves it on chip 0, every sum on the way rounded to `dtype`.

    After an all-reduce that scatters and gathers (each of `algorithms` does) every chip holds these bits: each chunk is
    finished on one chip and then copied. `vectors` are rounded to `dtype` first and are not changed.
    """
    chips, length = vectors.shape
    assert chips == plan.mesh.num_chips, f"{chips} vectors for {plan.mesh.num_chips} chips"
    width = -(-length // plan.num_chunks)
    if length < plan.num_chunks * width:
        vectors = functional.pad(vectors, (0, plan.num_chunks * width - length))
    chunks = vectors.view(chips, plan.num_chunks, width)
    result = torch.empty(chunks.shape[1:], dtype=dtype, device=vectors.device)
    columns = max(1, BLOCK_ELEMENTS // (chips * plan.num_chunks))
    for first in range(0, width, columns):
        block = chunks[:, :, first : first + columns].to(dtype, copy=True, memory_format=torch.contiguous_format)
        run_on_tensors(plan, block)
        result[:, first : first + columns] = block[0]
    return result.view(-1)[:length]


def run_on_tensors(plan: Plan, chunks: Tensor) -> None:
    """Run `plan` in place on [chips, num_chunks, columns], contiguous; sums are rounded to the tensor's dtype."""
    rows = chunks.view(-1, chunks.shape[2])
    for turn in plan.rounds():
        sources, destinations, chunk = turn.by_chunk()
        source = torch.from_numpy(sources * plan.num_chunks + chunk).to(rows.device)
        destination = destinations * plan.num_chunks + chunk
        sent = rows.index_select(0, source)  # before anything of this round has arrived
        for arriving in _one_a_row(destination):
            taken = torch.from_numpy(destination[arriving]).to(rows.device)
            incoming = sent if len(arriving) == len(sent) else sent[torch.from_numpy(arriving).to(rows.device)]
            if turn.reduce:
                incoming = rows.index_select(0, taken).add_(incoming)
            rows.index_copy_(0, taken, incoming)


def _one_a_row(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Indices of `rows` in turns of different rows: what arrives twice in one place is added in the order given."""
    left = np.arange(len(rows))
    while len(left):
        first = np.sort(np.unique(rows[left], return_index=True)[1])
        yield left[first]
        left = np.delete(left, first)


class PlanAggregator:
    """The sum over all chips as the plan's all-reduce leaves it; see `train.comm.aggregation.Aggregator`.

    One worker adds one chip's contribution at a time, chip after chip.
    """

    def __init__(self, plan: Plan, wire_dtype: str, num_gradients: int, device: str = "cpu") -> None:
        """Holds chips * num_gradients * bytes of `wire_dtype`; ValueError above MAX_BUFFER_BYTES."""
        dtype, chips = DTYPES[wire_dtype], plan.mesh.num_chips
        length = -(-num_gradients // plan.num_chunks) * plan.num_chunks
        if (nbytes := chips * length * dtype.itemsize) > MAX_BUFFER_BYTES:
            raise ValueError(
                f"gradient_sum=plan keeps every chip's gradients: {chips:,} chips x {num_gradients:,} x "
                f"{dtype.itemsize} bytes = {nbytes / 2**30:.1f} GiB, more than {MAX_BUFFER_BYTES >> 30}; the network "
                "is too large for it: take fewer chips, a smaller model or gradient_sum=fp32"
            )
        self._plan, self._dtype = plan, dtype
        self._rows = torch.zeros(chips, length, dtype=dtype, device=device)
        self._like: list[Tensor] = []
        self._added = 0

    def prepare(self, like: list[Tensor]) -> None:
        self._like = shapes_of(like)

    def add(self, block: int, tensors: list[Tensor]) -> None:
        """`block` is not needed: the contributions of a step are those of chips 0, 1, 2 ..."""
        if not self._like:
            self.prepare(tensors)
        copied(tensors, unflatten(self._rows[self._added], self._like))
        self._added += 1

    def total(self) -> list[Tensor]:
        assert self._added == len(self._rows), f"{self._added} contributions of {len(self._rows)} chips"
        self._added = 0
        return unflatten(sum_on_plan(self._plan, self._rows, self._dtype).to(self._like[0].dtype), self._like)
