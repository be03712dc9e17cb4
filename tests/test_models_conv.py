"""Our convolution is torch's, whichever way it is computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from train.models.conv import CHANNELS_PER_PIXEL, MAX_PIXELS_SCATTERED, Conv2d, convolve_in_blocks


def compare(inputs: int, kernel: int, stride: int, height: int, width: int) -> None:
    """Result and both gradients in float64, without and with channels last."""
    theirs = nn.Conv2d(inputs, 4, kernel, stride, padding=kernel // 2, bias=False).double()
    ours = Conv2d(inputs, 4, kernel, stride).double().to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(3, inputs, height, width, dtype=torch.float64)
    for layout in (torch.channels_last, torch.contiguous_format):
        results = []
        for layer in (ours, theirs):
            leaf = images.clone(memory_format=layout).requires_grad_()
            output = layer(leaf)
            gradient = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
            results.append((output, *torch.autograd.grad(output, (leaf, layer.weight), gradient)))
        for our, their in zip(*results, strict=True):
            torch.testing.assert_close(our, their, rtol=0, atol=1e-11, msg=f"{inputs}x{height}x{width}")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_results_and_gradients_are_torchs(kernel, stride):
    """Small sizes, oblong ones too. Few channels: a 3x3 kernel is a convolution, a 1x1 one always a product."""
    torch.manual_seed(0)
    for height in (1, 2, 3, 8):
        for width in (1, 2, 5, 9):
            compare(5, kernel, stride, height, width)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (2, 2), (3, 4), (4, 4), (5, 4), (5, 7)])
def test_results_and_gradients_of_3x3_products_are_torchs(size, stride):
    """On both sides of the size up to which the images' gradient is a product too."""
    torch.manual_seed(0)
    assert 4 * 4 <= MAX_PIXELS_SCATTERED < 5 * 4
    layer = Conv2d(CHANNELS_PER_PIXEL * size[0] * size[1], 4, 3, stride)
    assert layer._is_product(torch.empty(1, layer.in_channels, *size))
    compare(layer.in_channels, 3, stride, *size)


@pytest.mark.parametrize(
    "inputs, kernel, stride, size, is_product",
    [
        (512, 3, 1, 7, True),
        (512, 3, 2, 14, True),
        (256, 3, 1, 14, False),
        (256, 3, 1, 8, False),
        (256, 3, 1, 4, True),
        (128, 3, 1, 4, False),
        (64, 1, 1, 56, True),
        (3, 7, 2, 224, False),
    ],
)
def test_the_way_follows_from_the_shape(inputs, kernel, stride, size, is_product):
    for images in (1, 2):
        on_cpu = torch.empty(images, inputs, size, size)
        assert Conv2d(inputs, 8, kernel, stride)._is_product(on_cpu) == is_product
        assert not Conv2d(inputs, 8, kernel, stride)._is_product(on_cpu.to("meta"))


@pytest.mark.parametrize("inputs, kernel, size", [(16, 1, 4), (64, 3, 2), (16, 3, 1), (16, 3, 8)])
def test_results_are_channels_last_and_of_the_autocast_dtype(inputs, kernel, size):
    layer = Conv2d(inputs, 8, kernel).to(memory_format=torch.channels_last)
    images = torch.randn(2, inputs, size, size).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.stride() == layer.weight.stride()
    double = layer.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert double(images.double()).dtype == torch.float64


def test_images_without_a_gradient_get_none():
    """Those of a network's first layer; and evaluation."""
    layer, images = Conv2d(3, 4, 1), torch.randn(2, 3, 4, 4)
    layer(images).sum().backward()
    assert layer.weight.grad is not None and images.grad is None
    with torch.inference_mode():
        torch.testing.assert_close(layer(images), nn.functional.conv2d(images, layer.weight))


def test_a_1x1_product_of_stride_1_keeps_no_copy_of_its_images():
    images = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda nothing: None):
        layer = Conv2d(8, 4, 1)
        layer(images)
    assert kept and set(kept) == {images.data_ptr(), layer.weight.data_ptr()}


@pytest.mark.parametrize("kernel", [3, 7, 11])
@pytest.mark.parametrize("size", [(2, 2), (4, 10), (16, 14)], ids=str)
def test_blocks_of_pixels_give_what_a_stride_of_two_gives(kernel, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64, generator=generator).requires_grad_()
    found = convolve_in_blocks(images, weight, torch.float64)
    wanted = functional.conv2d(images, weight, stride=2, padding=kernel // 2)
    gradient = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad(output, weight, gradient)[0] for output in (found, wanted)]
    torch.testing.assert_close([found, gradients[0]], [wanted, gradients[1]], rtol=0, atol=1e-11)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_on_a_gpu_the_stem_is_in_blocks_in_half_precision():
    """What autocast rounds, and nothing else: as torch's convolution of the rounded images and weights."""
    torch.manual_seed(0)
    stem = Conv2d(3, 64, 7, 2).cuda()
    images = torch.randn(4, 3, 64, 48, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert stem._is_in_blocks(images) and not stem._is_in_blocks(images[..., :47])
        found = stem(images)
    assert not stem._is_in_blocks(images) and not Conv2d(64, 64, 3, 2)._is_in_blocks(images.bfloat16())
    rounded = [tensor.bfloat16().double().cpu() for tensor in (images, stem.weight)]
    wanted = functional.conv2d(*rounded, stride=2, padding=3)
    assert found.dtype == torch.bfloat16 and (found.double().cpu() - wanted).norm() / wanted.norm() < 2**-8
