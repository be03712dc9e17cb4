"""Vectors as numpy sees them, whose calls cost half of torch's, and sums of them in the order given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 256 << 10
"""What is added at a time: the sum stays in a core's cache from term to term, and what has been read until it is added.
"""


def array(tensor: Tensor) -> Any:
    """Its memory as an array; a tensor of a dtype that numpy does not know (bfloat16) as it is."""
    try:
        return tensor.detach().numpy()
    except TypeError:
        return tensor.detach()


def add(left: Any, right: Any, out: Any) -> None:
    """Arrays, or tensors."""
    (torch.add if isinstance(out, Tensor) else np.add)(left, right, out=out)


def add_up(terms: Sequence[Any], *copies: Any) -> None:
    """Vectors: the sum of all of them into the first one, ((0 + 1) + 2) + ..., and from there to the copies."""
    first = terms[0]
    length = BLOCK_BYTES // first.itemsize if len(terms) > 2 or copies else max(1, len(first))
    for start in range(0, len(first), length):
        block = slice(start, start + length)
        total = first[block]
        for term in terms[1:]:
            add(total, term[block], total)
        for copy in copies:
            copy[block] = total
