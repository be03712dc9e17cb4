"""The CIFAR ResNets: the paper's sizes, the emulator's arithmetic, and what is refused."""

import pytest
import torch
from torch import nn

from launch.compose import compose
from train.models.chip_norm import allocate_chips, norm_layers
from train.models.profile import profile
from train.models.resnet_cifar import resnet_cifar
from train.sim import workload

OPTION_B = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # two 1x1 convolutions with their batch norms, where A has none


def on_meta(*args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return resnet_cifar(*args, **kwargs)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("depth, parameters", [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_parameters_are_the_papers_and_the_shortcuts(depth, parameters):
    """Table 6 of the paper: 0.27, 0.46, 0.66 and 0.85 million, with the shortcuts that have no parameters."""
    assert count(on_meta(depth)) == parameters + OPTION_B
    assert OPTION_B == 2_752


@pytest.mark.parametrize("stem", ["small", "strided"])
@pytest.mark.parametrize("depth", [8, 14, 20])
def test_the_models_own_profile_is_the_workload_table(depth, stem):
    model = on_meta(depth, stem)
    for size in (32, 33, 8):
        assert profile(model, size) == list(workload.resnet_cifar(depth, stem, size).layers)


def test_layers_are_what_the_name_says():
    model = on_meta(14)
    weighted = [m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
    assert len(weighted) + 1 == 14  # and the classifier
    assert [len(getattr(model, f"layer{stage}")) for stage in (1, 2, 3)] == [2, 2, 2]


def test_zero_init_starts_every_residual_branch_at_zero():
    for zero, silent in ((True, 6), (False, 0)):
        norms = norm_layers(resnet_cifar(14, zero_init_last_gamma=zero))
        assert sum(not norm.weight.any() for norm in norms) == silent


def test_every_chip_normalises_its_own_images():
    model = resnet_cifar(8, zero_init_last_gamma=False)
    images = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    allocate_chips(model, 2, 1)
    model.chip_pass.count = 2
    together = model(images)
    allocate_chips(model, 1, 1)
    model.chip_pass.count = 1
    torch.testing.assert_close(together, torch.cat([model(images[:4]), model(images[4:])]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"depth": 18}, r"model.depth=18: a CIFAR ResNet has 6n \+ 2 layers; use 14 or 20"),
        ({"depth": 2}, "use 8 or 14"),
        ({"stem": "imagenet"}, "model.stem=imagenet: use small or strided"),
        ({"num_classes": 1}, "model.num_classes=1"),
    ],
)
def test_wrong_models_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        resnet_cifar(**arguments)


@pytest.mark.parametrize("option, gflop", [("resnet_cifar20", 0.0816), ("resnet_cifar14_strided", 0.0133)])
def test_the_options_say_what_they_cost(option, gflop):
    model = compose([f"model={option}", "data.image_size=32"])["model"]
    table = workload.of_model(model, 32, 10)
    assert table.forward_flops / 1e9 == pytest.approx(gflop, abs=5e-5) and table.forward_flops < 1e8
    assert count(on_meta(model["depth"], model["stem"])) == table.parameters
