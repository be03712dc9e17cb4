"""What a run's faults do to the arithmetic: lost shares of the batch, flipped bits of gradients, stale statistics.

All of it follows from the run's timeline, that is from seed and step: workers need not tell each other, and a run that
is resumed, or cut into other workers, is damaged alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from train.models.chip_norm import ChipPass, chip_moments
from train.sim.timeline import SOUND, Event, Timeline

BITS = 32


@dataclass(frozen=True)
class Flip:
    """Bit `bit` of element `index` of parameter `parameter`'s gradient, on `chip` of the mesh."""

    chip: int
    parameter: int
    index: tuple[int, ...]
    bit: int

    def apply(self, summed: list[Tensor], own: list[Tensor]) -> None:
        """In place: the sum over several chips' gradients, as it is when the chip's own one has the bit inverted.

        The rest of the sum is taken as summed - own, so that no other element changes; float32.
        """
        right = np.float32(own[self.parameter][self.index].item())
        wrong = flipped(right, self.bit)
        with np.errstate(over="ignore", invalid="ignore"):
            summed[self.parameter][self.index] += float(wrong - right)


def flipped(value: np.float32, bit: int) -> np.float32:
    """The float32 with one bit inverted: 0 is the mantissa's last, 31 the sign."""
    return (np.float32(value).view(np.uint32) ^ np.uint32(1 << bit)).view(np.float32)


class Damage:
    """The part of a timeline that the arithmetic feels; without a timeline nothing."""

    def __init__(self, timeline: Timeline | None, model: nn.Module, passes: Sequence[ChipPass]) -> None:
        """`passes`: of the worker's chips."""
        self._timeline, self._span = timeline, passes[0].span
        self._worker = range(passes[0].first, _chips(passes[-1]).stop)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def lost(self, step: int) -> frozenset[int]:
        """The chips that are gone in a step (from 1; 0: before the first)."""
        return (self._timeline.at(step) if self._timeline else SOUND).lost

    def lost_of(self, step: int, chip_pass: ChipPass) -> list[int]:
        """Those of a pass, counted from its first chip."""
        return sorted(chip - chip_pass.first for chip in self.lost(step) if chip in _chips(chip_pass))

    def lost_groups(self, step: int) -> set[int]:
        """The batch-norm groups of the mesh that are gone; a group goes as a whole."""
        return {chip // self._span for chip in self.lost(step)}

    def stale_groups(self, step: int) -> list[int]:
        """The worker's groups, counted from its first, whose running statistics stand still in a step."""
        stale = self._timeline.at(step).stale if self._timeline else ()
        return sorted({(chip - self._worker.start) // self._span for chip in stale if chip in self._worker})

    def flips(self, step: int, chip_pass: ChipPass) -> Iterator[Flip]:
        """The bits that are inverted in the gradients of a pass."""
        for event in self._timeline.strikes(step) if self._timeline else ():
            if event.fault.flips and event.chips.start in _chips(chip_pass):
                yield self._flip(event)

    def words(self, event: Event) -> str:
        """What an event does, for a report."""
        if not event.fault.flips:
            return event.fault.words()
        flip = self._flip(event)
        name, index = list(self._shapes)[flip.parameter], ", ".join(map(str, flip.index))
        return f"bit {flip.bit} of its gradient of {name}[{index}] is inverted before the sum"

    def _flip(self, event: Event) -> Flip:
        """Every element is as likely as any other."""
        (where, which), bit, shapes = event.draws, event.fault.bit, list(self._shapes.values())
        sizes = [int(np.prod(shape)) for shape in shapes]
        element, parameter = int(where * sum(sizes)), 0
        while element >= sizes[parameter]:
            element, parameter = element - sizes[parameter], parameter + 1
        index = tuple(map(int, np.unravel_index(element, shapes[parameter])))
        return Flip(event.chips.start, parameter, index, int(which * BITS) if bit is None else bit)


def without(
    lost: Sequence[int], logits: Tensor, labels: Tensor, chip_pass: ChipPass
) -> tuple[Tensor, Tensor, ChipPass]:
    """A pass without its chips number `lost`: their images have no part in loss and gradients."""
    sizes = _sizes(chip_pass, len(labels))
    living = torch.ones(chip_pass.count, dtype=torch.bool)
    living[list(lost)] = False
    rows = living.repeat_interleave(torch.tensor(sizes)).to(labels.device)
    left = tuple(size for size, lives in zip(sizes, living.tolist(), strict=True) if lives)
    rest = replace(chip_pass, count=len(left), sizes=chip_pass.sizes and left)
    return logits[rows], labels[rows], rest


def group_of(chip: int, chip_pass: ChipPass, num_images: int) -> tuple[ChipPass, slice]:
    """The chips of the pass that share their batch-norm statistics with `chip`, as a pass, and their images in it."""
    first = chip - chip % chip_pass.span
    position, sizes = first - chip_pass.first, _sizes(chip_pass, num_images)
    own = sizes[position : position + chip_pass.span]
    begin = sum(sizes[:position])
    alone = ChipPass(first, chip_pass.span, chip_pass.span, chip_pass.sizes and own)
    return alone, slice(begin, begin + sum(own))


def _sizes(chip_pass: ChipPass, num_images: int) -> tuple[int, ...]:
    """Images of each chip of a pass."""
    return chip_pass.sizes or (num_images // chip_pass.count,) * chip_pass.count


@contextmanager
def frozen_statistics(model: nn.Module, groups: Sequence[int]) -> Iterator[None]:
    """The running statistics of a worker's batch-norm groups are afterwards what they were before."""
    rows = list(groups)
    kept = [moment[rows].clone() for moment in chip_moments(model)] if rows else []
    yield
    for moment, before in zip(chip_moments(model) if rows else [], kept, strict=True):
        moment[rows] = before


def _chips(chip_pass: ChipPass) -> range:
    return range(chip_pass.first, chip_pass.first + chip_pass.count)
