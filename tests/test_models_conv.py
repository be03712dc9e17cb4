"""Our convolution is torch's, whichever way it is computed."""

import pytest
import torch
from torch import nn

from train.models.conv import Conv2d


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_results_and_gradients_are_torchs(kernel, stride):
    """Every size from 1x1 to 9x9, oblong ones too: on both sides of the limits of the products."""
    torch.manual_seed(0)
    theirs = nn.Conv2d(5, 4, kernel, stride, padding=kernel // 2, bias=False).double()
    ours = Conv2d(5, 4, kernel, stride).double().to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    for height in range(1, 10):
        for width in range(1, 10):
            images = torch.randn(3, 5, height, width, dtype=torch.float64)
            results = []
            for layer in (ours, theirs):
                inputs = images.clone(memory_format=torch.channels_last).requires_grad_()
                output = layer(inputs)
                gradient = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
                results.append((output, *torch.autograd.grad(output, (inputs, layer.weight), gradient)))
            for our, their in zip(*results, strict=True):
                torch.testing.assert_close(our, their, rtol=0, atol=1e-12, msg=f"{height}x{width}")


@pytest.mark.parametrize("kernel, size", [(1, 4), (3, 2), (3, 1), (3, 8)])
def test_results_are_channels_last_and_of_the_autocast_dtype(kernel, size):
    layer = Conv2d(16, 8, kernel).to(memory_format=torch.channels_last)
    images = torch.randn(2, 16, size, size).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)
