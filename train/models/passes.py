"""A worker's chips in passes: those whose images go through the network at once.

In exact numerics every block is a pass of its own. In fast numerics a pass is any number of batch-norm spans, so that
memory follows the images of a pass and not the size of a block.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from train.models.chip_norm import ChipPass
from train.precision import Precision
from train.sim.workload import Workload

MEMORY_PER_PASS = 4 << 30
"""Bytes of activations that chips_per_pass=auto aims at on a CPU, where larger passes are no faster."""
GPU_SHARE_PER_PASS = 1 / 3
"""The same on a GPU, as a share of its memory: gradients of activations and convolutions' workspace need the rest."""


Sizes = Sequence[tuple[int, Workload]]
"""From which epoch on the training images are as in which table."""


def check_batch_norm(config: dict, sizes: Sizes, chip_batch: int) -> None:
    """Every batch norm needs two values per channel."""
    if chip_batch * config["bn_span"] * min(workload.smallest_norm for _, workload in sizes) < 2:
        data = config["data"]
        pixels = f"train_sizes={data['train_sizes']}" if data.get("train_sizes") else f"image_size={data['image_size']}"
        raise ValueError(
            f"chip_batch_size={chip_batch} with data.{pixels} leaves the last batch norms one value per "
            f"channel; raise chip_batch_size, data.{pixels.partition('=')[0]} or bn_span"
        )


def largest(sizes: Sizes) -> Workload:
    """The table that needs most memory."""
    return max((workload for _, workload in sizes), key=lambda workload: workload.activation_bytes(1))


def images_per_pass(workload: Workload, precision: Precision, device: str) -> int:
    """How many images' activations a worker's memory holds at once."""
    memory = MEMORY_PER_PASS
    if device.startswith("cuda"):
        memory = int(torch.cuda.get_device_properties(device).total_memory * GPU_SHARE_PER_PASS)
    return memory // workload.activation_bytes(precision.dtype.itemsize)


def plan_passes(config: dict, chips_per_block: int, chips: range, room: int) -> list[ChipPass]:
    """A worker's chips in passes: one block each in `exact`; in `fast` any spans, auto: of at most `room` chips."""
    per_pass, span = config["chips_per_pass"], config["bn_span"]
    if config["numerics"] == "exact":
        if per_pass not in ("auto", chips_per_block):
            raise ValueError(
                f"chips_per_pass={per_pass}: numerics=exact computes one block of {chips_per_block} chips a pass; "
                "leave it at auto, or use numerics=fast"
            )
        per_pass = chips_per_block
    if per_pass == "auto":
        parts = even_passes(chips, room, span)
    elif per_pass % span and span % per_pass:
        raise ValueError(f"chips_per_pass={per_pass}: must be a multiple of bn_span={span}")
    else:
        parts = passes(chips, max(per_pass, span))  # a span is never cut
    return [ChipPass(part.start, len(part), span) for part in parts]


def moments_of(moments: torch.Tensor, passes: list[ChipPass], span: int) -> torch.Tensor:
    """The rows of all chips' statistics [groups, channels] that belong to a worker's passes."""
    return moments[passes[0].first // span : (passes[-1].first + passes[-1].count) // span]


def passes(chips: range, most: int) -> list[range]:
    """`chips` in passes of `most`, the last one with what is left."""
    return [range(first, min(first + most, chips.stop)) for first in range(chips.start, chips.stop, most)]


def even_passes(chips: range, most: int, span: int) -> list[range]:
    """`chips` in the fewest passes of at most `most` chips (but a span at least).

    Passes of one size where that takes at most twice as many of them: the size then follows the memory and not the
    number of chips, and every further shape costs a compilation. Else their sizes differ by one span.
    """
    spans = len(chips) // span
    fewest = -(-spans // max(most // span, 1))
    number = next((n for n in range(fewest, min(2 * fewest, spans) + 1) if spans % n == 0), fewest)
    ends = [chips.start + span * (spans * i // number) for i in range(number + 1)]
    return [range(first, last) for first, last in pairwise(ends)]
