"""The GPU's kernels against torch's batch norm in float64: in Triton's interpreter, and on a GPU where there is one."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional

SHAPES = {  # groups, images of each, channels, height = width
    "an odd number of channels": (2, 3, 24, 4),
    "several tiles": (2, 2, 160, 9),
    "even tiles": (2, 2, 64, 8),
}
GPU_SHAPES = {
    "one pixel": (3, 4, 512, 1),
    "the stem's": (2, 4, 64, 112),
    "many chips": (256, 2, 128, 4),
    "the last": (4, 8, 2048, 7),
}


@pytest.fixture
def kernels(request, monkeypatch):
    """The module and where it computes; interpreted with few programs, so that each has several tiles to add up."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA")
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if interprets != (request.param == "cpu"):
        pytest.skip(f"Triton {'interprets' if interprets else 'compiles'} its kernels here (TRITON_INTERPRET)")
    from train.models import chip_norm_cuda

    if interprets:
        monkeypatch.setattr(chip_norm_cuda, "PROGRAMS", 4)
    return chip_norm_cuda, request.param


def devices(*of_cpu):
    cpu = [pytest.param("cpu", name, id=f"interpreted, {name}") for name in of_cpu]
    gpu = [pytest.param("cuda", name, id=f"gpu, {name}", marks=pytest.mark.gpu) for name in (*SHAPES, *GPU_SHAPES)]
    return pytest.mark.parametrize(("kernels", "shape"), cpu + gpu, indirect=["kernels"])


def tensors(groups: int, images: int, channels: int, size: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Images far from zero mean, a residual, weight and bias, and the gradient of the output."""
    generator = torch.Generator().manual_seed(channels + size)
    shape = groups * images, channels, size, size
    like = {"dtype": dtype, "memory_format": torch.channels_last}
    images, residual, gradient = (torch.randn(shape, generator=generator).to(**like) for _ in range(3))
    weight, bias = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    images = (images * 3 + torch.arange(channels).view(-1, 1, 1) % 7).to(**like)
    return [tensor.to(device) for tensor in (images, residual, weight, bias, gradient)]


def without_doubt(given: list[Tensor], groups: int, residual: bool) -> list[Tensor]:
    """With no gradient where the output is so close to 0 that rounding decides what ReLU does."""
    output = expected(given, groups, residual, False)[0].detach()
    *rest, gradient = given
    return [*rest, gradient * (output.abs() > 1e-4).to(gradient)]


def expected(given: list[Tensor], groups: int, residual: bool, relu: bool) -> list[Tensor]:
    """Output, means, biased variances, gradients of images, weight, bias and residual, by torch in float64."""
    images, other, weight, bias, gradient = (tensor.double().cpu().requires_grad_() for tensor in given)
    parts = images.chunk(groups)
    output = torch.cat([functional.batch_norm(part, None, None, weight, bias, True, 0.0, 1e-5) for part in parts])
    output = output + other if residual else output
    output = torch.relu(output) if relu else output
    of = [images, weight, bias, *([other] if residual else [])]
    moments = [torch.stack([function(part) for part in parts]) for function in (mean, variance)]
    return [output, *moments, *torch.autograd.grad(output, of, gradient)]


def mean(part: Tensor) -> Tensor:
    return part.mean((0, 2, 3))


def variance(part: Tensor) -> Tensor:
    return part.var((0, 2, 3), unbiased=False)


def computed(kernels, given: list[Tensor], groups: int, residual: bool, relu: bool) -> list[Tensor]:
    images, other, weight, bias, gradient = given
    of = [tensor.detach().requires_grad_() for tensor in (images, weight, bias, *([other] if residual else []))]
    result = kernels.normalise(of[0], of[1], of[2], 1e-5, groups, of[3] if residual else None, relu)
    return [*result, *torch.autograd.grad(result[0], of, gradient)]


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double().cpu() - wanted).norm() / wanted.norm()).item()


@devices(*SHAPES)
def test_kernels_compute_torchs_batch_norm_of_each_group(kernels, shape):
    kernels, device = kernels
    groups, *sizes = (SHAPES | GPU_SHAPES)[shape]
    for residual, relu in ((False, False), (True, True)) if device == "cpu" else product_of_flags():
        given = without_doubt(tensors(groups, *sizes, torch.float32, device), groups, residual)
        found, wanted = computed(kernels, given, groups, residual, relu), expected(given, groups, residual, relu)
        errors = list(map(error, found, wanted))
        assert max(errors[:4]) < 3e-6, (residual, relu, errors)
        assert max(errors[4:]) < 3e-5, (residual, relu, errors)  # sums whose terms cancel


@devices("an odd number of channels")
def test_half_precision_rounds_images_and_their_gradients_alone(kernels, shape):
    kernels, device = kernels
    groups, *sizes = (SHAPES | GPU_SHAPES)[shape]
    given = tensors(groups, *sizes, torch.bfloat16, device)
    for relu in (False, True):
        found, wanted = computed(kernels, given, groups, False, relu), expected(given, groups, False, relu)
        half, full = torch.bfloat16, torch.float32
        assert [tensor.dtype for tensor in found] == [half, full, full, half, full, full]
        errors = list(map(error, found, wanted))
        # bfloat16 keeps 8 bits; what ReLU lets through is decided before the rounding
        assert max(errors) < 2**-8 and max(errors[1:3]) < 1e-6 and max(errors[4:]) < 1e-5


@devices("an odd number of channels", "even tiles")
def test_the_gradients_of_a_forked_residual_sum_are_added(kernels, shape):
    """To the bit as autograd adds them; in half precision on a GPU alone, for the interpreter does not round."""
    kernels, device = kernels
    groups, *sizes = (SHAPES | GPU_SHAPES)[shape]
    for dtype in (torch.float32, torch.bfloat16)[: 2 if device == "cuda" else 1]:
        images, residual, weight, bias, gradient = tensors(groups, *sizes, dtype, device)
        found, wanted = [], []
        for gradients, twice in ((found, kernels.fork), (wanted, lambda output: (output * 1, output * 1))):
            of = [tensor.detach().requires_grad_() for tensor in (images, weight, bias, residual)]
            output, *_ = kernels.normalise(*of[:3], 1e-5, groups, of[3], relu=True)
            gradients += torch.autograd.grad(twice(output), of, [gradient, gradient.flip(0)])
        assert all(map(torch.equal, found, wanted))


@devices("an odd number of channels")
def test_a_fork_of_anything_else_is_the_tensor_itself(kernels, shape):
    kernels, device = kernels
    groups, *sizes = (SHAPES | GPU_SHAPES)[shape]
    images, residual, weight, bias, _ = tensors(groups, *sizes, torch.float32, device)
    images.requires_grad_()
    for relu, other in ((True, None), (False, residual)):
        output, *_ = kernels.normalise(images, weight, bias, 1e-5, groups, other, relu)
        assert all(end is output for end in kernels.fork(output))
    assert all(end is images for end in kernels.fork(images))


@devices()
def test_another_call_gives_the_same_bits(kernels, shape):
    kernels, device = kernels
    groups, *sizes = (SHAPES | GPU_SHAPES)[shape]
    given = tensors(groups, *sizes, torch.float32, device)
    first, second = (computed(kernels, given, groups, True, True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # inf - inf, in the interpreter
@devices("an odd number of channels")
def test_groups_do_not_feel_each_other(kernels, shape):
    """Another chip's images, even infinite ones, change no bit of the first chip's."""
    kernels, device = kernels
    groups, images, channels, size = (SHAPES | GPU_SHAPES)[shape]
    given = tensors(groups, images, channels, size, torch.float32, device)
    before = kernels.normalise(*(given[i] for i in (0, 2, 3)), 1e-5, groups)
    given[0][images:] = torch.inf
    after = kernels.normalise(*(given[i] for i in (0, 2, 3)), 1e-5, groups)
    assert torch.equal(before[0][:images], after[0][:images]) and after[0][images:].isnan().all()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before[1:], after[1:], strict=True))


def product_of_flags():
    return [(residual, relu) for residual in (False, True) for relu in (False, True)]
