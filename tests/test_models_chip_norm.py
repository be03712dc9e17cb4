"""Batch norm per chip is what separate chips, each with torch's own batch norm, compute."""

import pytest
import torch
from torch import Tensor, nn

from train.models.chip_norm import ChipBatchNorm2d, ChipPass, allocate_chips, chip_moments, evaluation_moments

CHIPS, IMAGES = 8, 3
CLOSE = {"rtol": 0, "atol": 1e-12}


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
