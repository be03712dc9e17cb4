"""Batch norm per chip is what separate chips, each with torch's own batch norm, compute."""

import pytest
import torch
from torch import Tensor, nn

from scripts.bench_chip_norm import layer_row, network
from train.models import chip_norm
from train.models.chip_norm import (
    MAX_PIXELS_INTERLEAVED,
    ChipBatchNorm2d,
    ChipPass,
    allocate_chips,
    chip_moments,
    evaluation_moments,
    normalise,
)
from train.models.layout import chip_after_chip, interleaved, is_pixels_first
from train.models.resnet import resnet
from train.models.resnet_cifar import resnet_cifar

CHIPS, IMAGES = 8, 3
CLOSE = {"rtol": 0, "atol": 1e-12}
FORMS = pytest.mark.parametrize("beside", [False, True], ids=["loop", "beside"])


def layers(norm) -> nn.Sequential:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), norm(5), nn.ReLU(), nn.Conv2d(5, 4, 3), norm(4)).double()
    for layer in (model[1], model[4]):
        layer.weight.data.uniform_(0.5, 1.5)
        layer.bias.data.normal_()
    return model


def emulated(span: int = 1) -> tuple[nn.Sequential, ChipPass]:
    chip_pass = ChipPass(0, CHIPS)
    model = layers(lambda channels: ChipBatchNorm2d(channels, chip_pass))
    allocate_chips(model, CHIPS, span)
    return model, chip_pass


def batch(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(CHIPS * IMAGES, 3, 8, 8, dtype=torch.float64, generator=generator)


def run(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Output, input gradient and weight gradients of a loss that weighs every output element differently."""
    images = images.clone().requires_grad_()
    output = model(images)
    weights = torch.linspace(-1, 1, output[0].numel(), dtype=torch.float64).view(output[0].shape)
    gradients = torch.autograd.grad((output * weights).square().sum(), [images, *model.parameters()])
    return [output.detach(), *gradients]


@pytest.mark.parametrize("span", [1, 2, 4, 8])
def test_chips_of_one_pass_are_separate_models_with_torchs_batch_norm(span):
    """Two steps, so that the running statistics are averages of two batches."""
    model, _ = emulated(span)
    separate = [layers(nn.BatchNorm2d) for _ in range(CHIPS // span)]
    for seed in (1, 2):
        output, inputs, *weights = run(model, batch(seed))
        parts = [run(one, part) for one, part in zip(separate, batch(seed).chunk(CHIPS // span), strict=True)]
        torch.testing.assert_close(output, torch.cat([part[0] for part in parts]), **CLOSE)
        torch.testing.assert_close(inputs, torch.cat([part[1] for part in parts]), **CLOSE)
        for number, gradient in enumerate(weights, start=2):
            total = torch.stack([part[number] for part in parts]).sum(0)
            torch.testing.assert_close(gradient, total, rtol=1e-12, atol=1e-12)
    for index in (1, 4):
        for ours, theirs in (("chip_mean", "running_mean"), ("chip_var", "running_var")):
            expected = torch.stack([getattr(one[index], theirs) for one in separate])
            torch.testing.assert_close(getattr(model[index], ours), expected, **CLOSE)


@pytest.mark.parametrize("span", [1, 2, 4])
def test_two_passes_in_turn_equal_one_pass(span):
    whole, _ = emulated(span)
    halves, chip_pass = emulated(span)
    expected, results = run(whole, batch()), []
    for first, images in zip((0, 4), batch().chunk(2), strict=True):
        chip_pass.first, chip_pass.count = first, 4
        results.append(run(halves, images))
    for number, one in enumerate(expected):
        first, second = (result[number] for result in results)
        together = torch.cat([first, second]) if number < 2 else first + second
        torch.testing.assert_close(together, one, rtol=1e-12, atol=1e-12)
    for one, other in zip(chip_moments(whole), chip_moments(halves), strict=True):
        assert torch.equal(one, other)


def test_a_chips_statistics_see_its_own_images_only():
    model, _ = emulated()
    changed, _ = emulated()
    images = batch()
    with torch.no_grad():
        one = model(images)
        images[2 * IMAGES : 3 * IMAGES].square_()
        other = changed(images)
    for before, after in zip(chip_moments(model), chip_moments(changed), strict=True):
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [chip != 2 for chip in range(CHIPS)]
    same = [torch.equal(a, b) for a, b in zip(one.chunk(CHIPS), other.chunk(CHIPS), strict=True)]
    assert same == [chip != 2 for chip in range(CHIPS)]


def test_evaluation_uses_the_running_statistics_alone():
    model, _ = emulated()
    plain = layers(nn.BatchNorm2d).eval()
    for index in (1, 4):
        for name in ("running_mean", "running_var"):
            value = torch.rand(len(getattr(plain[index], name)), dtype=torch.float64) + 0.5
            getattr(plain[index], name).copy_(value)
    model.load_state_dict(plain.state_dict())
    before = [moment.clone() for moment in chip_moments(model)]
    with torch.no_grad():
        output = model.eval()(batch())
        torch.testing.assert_close(output, plain(batch()), **CLOSE)
        assert torch.equal(output[:1], model(batch()[:1]))
    assert all(map(torch.equal, before, chip_moments(model)))


def test_moments_are_the_layers_own_tensors_and_are_not_saved():
    model, _ = emulated(span=2)
    assert [tuple(moment.shape) for moment in chip_moments(model)] == [(4, 5), (4, 5), (4, 4), (4, 4)]
    assert [tuple(moment.shape) for moment in evaluation_moments(model)] == [(5,), (5,), (4,), (4,)]
    chip_moments(model)[1].fill_(3)
    evaluation_moments(model)[0].fill_(2)
    assert bool((model[1].chip_var == 3).all()) and bool((model[1].running_mean == 2).all())
    assert model.state_dict().keys() == layers(nn.BatchNorm2d).state_dict().keys()


def pass_of(
    channels: int, size: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images with channels last (mean and spread differ by channel), the output's gradient, weight, bias."""
    generator = torch.Generator().manual_seed(1)
    images, gradient = torch.randn(2, sum(sizes), channels, size, size, dtype=torch.float64, generator=generator)
    images = images * torch.linspace(0.1, 3, channels).view(-1, 1, 1) + torch.linspace(-2, 2, channels).view(-1, 1, 1)
    weight, bias = torch.linspace(0.5, 1.5, channels), torch.linspace(-1, 1, channels)
    images, gradient = (tensor.to(dtype, memory_format=torch.channels_last) for tensor in (images, gradient))
    # as under autocast, parameters stay in float32
    wide = torch.promote_types(dtype, torch.float32)
    return images, gradient, weight.to(wide), bias.to(wide)


def separate(images: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """Output, gradients of images, weight and bias, each group's mean and variance by torch's batch norm."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (images, weight, bias)]
    moments = [(torch.zeros_like(weight), torch.ones_like(weight)) for _ in sizes]
    parts = zip(leaves[0].split(sizes), moments, strict=True)
    output = torch.cat([nn.functional.batch_norm(x, *moment, *leaves[1:], True, 1.0) for x, moment in parts])
    means, variances = zip(*moments, strict=True)
    return [output, *torch.autograd.grad(output, leaves, gradient), torch.stack(means), torch.stack(variances)]


def ours(
    images: Tensor, gradient: Tensor, weight: Tensor, bias: Tensor, sizes: tuple[int, ...], beside: bool = False
) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in (images, weight, bias)]
    groups = len(sizes)
    given = interleaved(leaves[0], groups) if beside else leaves[0]
    output, mean, var = normalise(given, *leaves[1:], 1e-5, sizes, beside)
    output = chip_after_chip(output, groups) if beside else output
    values = torch.tensor(sizes, dtype=var.dtype).unsqueeze(1) * images.shape[2] * images.shape[3]
    return [output, *torch.autograd.grad(output, leaves, gradient), mean, var * values / (values - 1)]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative to each tensor's norm."""
    pairs = [(one.detach().double(), other.detach().double()) for one, other in zip(found, expected, strict=True)]
    return [float((one - other).norm() / other.norm()) for one, other in pairs]


@FORMS
@pytest.mark.parametrize(("channels", "size"), [(64, 1), (40, 2), (16, 7), (3, 16)])
@pytest.mark.parametrize("images", [2, 8])
def test_each_form_is_torchs_batch_norm_chip_by_chip(beside, channels, size, images):
    """In bfloat16 it is no further from the exact result of the same input than torch's own."""
    sizes = (images,) * 5
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        inputs = pass_of(channels, size, sizes, dtype)
        assert max(errors(ours(*inputs, sizes, beside), separate(*inputs, sizes))) < limit
    inputs = pass_of(channels, size, sizes, torch.bfloat16)
    exact = separate(*(tensor.double() for tensor in inputs), sizes)
    found, theirs = errors(ours(*inputs, sizes, beside), exact), errors(separate(*inputs, sizes), exact)
    assert all(mine <= 1.02 * their + 1e-5 for mine, their in zip(found, theirs, strict=True))


@FORMS
def test_gradients_are_those_of_finite_differences(beside):
    images, _, *parameters = pass_of(2, 2, (2, 2))
    leaves = [leaf.requires_grad_() for leaf in (images, *parameters)]
    assert torch.autograd.gradcheck(lambda *inputs: normalise(*inputs, 1e-5, (2, 2), beside)[0], leaves)


@pytest.mark.parametrize(
    "make, size",
    [
        (lambda: resnet(zero_init_last_gamma=False), 64),
        (lambda: resnet(18, "small", zero_init_last_gamma=False), 9),
        (lambda: resnet_cifar(14, "strided", zero_init_last_gamma=False), 32),
    ],
)
def test_interleaved_images_train_as_those_in_chip_order(make, size, monkeypatch):
    """Through every layer of the models; in between, images are stored pixels first; the logits are in chip order."""
    torch.manual_seed(0)
    model = make().double().to(memory_format=torch.channels_last)
    allocate_chips(model, 6, 2)
    model.chip_pass.first, model.chip_pass.count = 2, 4
    images, seen = torch.randn(12, 3, size, size, dtype=torch.float64), []
    model.layer2.register_forward_hook(lambda layer, given, result: seen.append(is_pixels_first(result)))
    found = []
    for limit in (0, MAX_PIXELS_INTERLEAVED):
        monkeypatch.setattr(chip_norm, "MAX_PIXELS_INTERLEAVED", limit)
        logits = model(images)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
        gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        found.append([logits, *gradients, *(moment.clone() for moment in chip_moments(model))])
        for moment in chip_moments(model):
            moment.zero_()
    plain, beside = found
    plain, beside = plain[: -len(chip_moments(model))], beside[: -len(chip_moments(model))]
    assert seen == [False, True] and max(errors(beside, plain)) < 1e-7
    assert not model.chip_pass.interleaved


@pytest.mark.parametrize("reason", ["one group", "large images", "unequal chips", "evaluation"])
def test_images_stay_in_chip_order(reason):
    chip_pass = {"one group": ChipPass(0, 4, 4), "unequal chips": ChipPass(0, 2, 1, (1, 3))}.get(reason, ChipPass(0, 2))
    side, orders = 65 if reason == "large images" else 64, []
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, side, side)

    def layers(given: Tensor) -> Tensor:
        orders.append(given[:, 0, 0, 0].tolist())
        return given

    for training in (True, False) if reason == "evaluation" else (True,):
        assert torch.equal(chip_pass.through(layers, images, training), images)
    assert orders == ([[0, 2, 1, 3]] if reason == "evaluation" else []) + [[0, 1, 2, 3]]


def test_autocast_rounds_no_statistics():
    sizes = (2, 2, 2)
    images, gradient, weight, bias = pass_of(8, 2, sizes, torch.float32)
    for beside in (False, True):
        plain = ours(images, gradient, weight, bias, sizes, beside)
        with torch.autocast("cpu", torch.bfloat16):
            cast = ours(images, gradient, weight, bias, sizes, beside)
        assert all(map(torch.equal, plain, cast))


@pytest.mark.parametrize("layout", ["channels first", "strided", "expanded gradient"])
def test_other_memory_formats_are_still_right(layout):
    sizes = (2, 2, 2)
    images, gradient, weight, bias = pass_of(5, 4, sizes)
    if layout == "channels first":
        images = images.contiguous()
    elif layout == "strided":
        images = pass_of(5, 8, sizes)[0][:, :, ::2, 1::2]
    else:
        gradient = gradient[:, :, :1, :1].expand_as(images)
    inputs = (images, gradient, weight, bias, sizes)
    for beside in (False, True):
        assert max(errors(ours(*inputs, beside), separate(*inputs))) < 1e-12


@pytest.mark.parametrize("span", [1, 2])
def test_chips_of_different_sizes(span):
    """Also the running statistics, whose unbiased variance depends on a group's own number of images."""
    sizes = (2, 5, 3, 2)
    groups = tuple(sum(sizes[i : i + span]) for i in range(0, 4, span))
    images, gradient, weight, bias = pass_of(6, 3, groups)
    norm = ChipBatchNorm2d(6, ChipPass(0, 4, span, sizes), momentum=1.0).double()
    allocate_chips(norm, 4, span)
    output, *_, means, variances = separate(images, gradient, torch.ones_like(weight), torch.zeros_like(bias), groups)
    assert max(errors([norm(images), norm.chip_mean, norm.chip_var], [output, means, variances])) < 1e-12
    norm.chip_pass.sizes = (2, 5, 3)
    with pytest.raises(ValueError, match=r"ChipPass.sizes=\(2, 5, 3\): need 4 chips with 12 images"):
        norm(images)


def test_running_statistics_stay_float32_under_autocast_and_change_in_place():
    norm = ChipBatchNorm2d(16, ChipPass(2, 4))
    allocate_chips(norm, 8, 1)
    mean, var = norm.chip_mean, norm.chip_var
    images = pass_of(16, 2, (3,) * 4, torch.bfloat16)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(images).dtype is torch.bfloat16
    assert norm.chip_mean is mean and norm.chip_var is var and mean.dtype is var.dtype is torch.float32
    assert [bool(row.any()) for row in mean] == [False, False, True, True, True, True, False, False]
    expected = nn.BatchNorm2d(16)
    expected(images[3:6].float())
    torch.testing.assert_close(var[3], expected.running_var, rtol=1e-5, atol=1e-5)


def test_one_value_for_a_channel_is_refused():
    norm = ChipBatchNorm2d(4, ChipPass(0, 3))
    allocate_chips(norm, 3, 1)
    with pytest.raises(ValueError, match="chip_batch_size=1: .*images are 1 x 1; use at least 2"):
        norm(torch.zeros(3, 4, 1, 1))
    assert norm(torch.zeros(3, 4, 2, 1)).shape == (3, 4, 2, 1)
    with pytest.raises(ValueError, match="a pass of 7 images can't be 3 equal groups"):
        norm(torch.zeros(7, 4, 2, 2))


def test_the_benchmarks_three_networks_differ_in_their_batch_norm_only():
    """One chip with the whole batch is one plain batch norm: the tax compares like with like."""
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        plain, loop, ours = (network(kind, 1, "cpu").double()(images) for kind in ("plain", "loop", "ours"))
    assert torch.equal(plain, loop) and max(errors([ours], [plain])) < 1e-10


def test_the_benchmark_times_every_form():
    row = layer_row(8, 1, 3, 2, 1)
    assert row["ms"].keys() == {"plain", "plain loop", "loop", "beside"} and row["values"] == 16
