"""The parameter groups that large-batch recipes tell apart: matrices decay, batch norm and biases do not.

MLPerf's ResNet reference leaves batch norm and bias out of both weight decay and LARS scaling; You et al. 2017
(arXiv 1708.03888).
"""

from collections.abc import Iterable

from torch import nn


def split_by_decay(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(convolution kernels and matrices, vectors): the first decay and are scaled by LARS, the second are not."""
    parameters = list(parameters)
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
