"""Sums of vectors in the order given, whatever numpy knows of their dtype."""

import numpy as np
import pytest
import torch

from train.comm import arrays
from train.comm.arrays import add_up, array
from train.comm.turns import SUMMED


@pytest.mark.parametrize("dtype", SUMMED)
@pytest.mark.parametrize("count", [2, 4])
def test_sums_have_the_bits_of_one_addition_after_the_other_by_torch(dtype, count):
    """A few blocks and a bit of each, of many magnitudes."""
    length = 2 * arrays.BLOCK_BYTES // dtype.itemsize + 5
    terms = torch.randn(count, length, generator=torch.manual_seed(0)) * 10.0 ** torch.arange(count)[:, None]
    terms = terms.clamp(-100, 100).to(dtype)
    expected = terms[0].clone()
    for term in terms[1:]:
        expected += term
    others, copy = terms[1:].clone(), torch.zeros(length, dtype=dtype)
    add_up([array(term) for term in terms], array(copy))
    for ours, theirs in (terms[0], expected), (copy, expected), (terms[1:], others):
        assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


def test_an_array_is_the_tensors_memory():
    tensor = torch.zeros(3, requires_grad=True)
    array(tensor)[1] = 2
    assert isinstance(array(tensor), np.ndarray) and tensor.tolist() == [0, 2, 0]
    unknown = torch.zeros(3, dtype=torch.bfloat16)
    array(unknown)[1] = 2
    assert unknown.tolist() == [0, 2, 0]
