"""The model against torchvision's, and its profile against the emulator's arithmetic."""

import pytest
import torch
import torchvision
from torch import nn

from train.models.chip_norm import allocate_chips, norm_layers
from train.models.profile import profile
from train.models.resnet import resnet
from train.sim import workload
from train.sim.workload import BLOCKS


def on_meta(make, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return make(*args, **kwargs)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("depth", sorted(BLOCKS))
def test_names_and_shapes_are_torchvisions(depth):
    models = on_meta(resnet, depth), on_meta(getattr(torchvision.models, f"resnet{depth}"))
    ours, theirs = ([(name, t.shape, t.dtype) for name, t in model.state_dict().items()] for model in models)
    assert ours == theirs


@pytest.mark.parametrize("depth", [18, 50])
def test_evaluation_logits_equal_torchvisions(depth):
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=7).double().eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("var"):
            buffer.uniform_(0.5, 1.5)
    ours = on_meta(resnet, depth, num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.to(memory_format=torch.channels_last)
    for size in (64, 33):
        images = torch.randn(1, 3, size, size, dtype=torch.float64)
        with torch.inference_mode():
            expected = theirs(images)
            torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def test_resnet50_has_53_convolutions_and_25_557_032_parameters():
    model = on_meta(resnet)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 53
    assert count(model) == 25_557_032
    assert count(model) - count(model.fc) == 23_508_032
    assert count(on_meta(resnet, num_classes=10)) == 23_508_032 + 20_490


@pytest.mark.parametrize("depth, blocks", [(18, 8), (50, 16)])
def test_zero_init_starts_every_residual_branch_at_zero(depth, blocks):
    def silent(model: nn.Module) -> int:
        return sum(not norm.weight.any() for norm in norm_layers(model))

    assert silent(resnet(depth)) == blocks
    assert silent(resnet(depth, zero_init_last_gamma=False)) == 0


def test_the_small_stem_keeps_the_image_and_pools_nothing():
    model = on_meta(resnet, 50, "small", 10)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    rows = {layer.name: layer for layer in profile(model, 32)}
    assert rows["bn1"].activations == 64 * 32 * 32
    assert rows["layer4.2.conv3"].activations == 2048 * 4 * 4
    assert count(model) == 23_508_032 + 20_490 - 64 * 3 * (7 * 7 - 3 * 3)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("depth", sorted(BLOCKS))
def test_the_models_own_profile_is_the_workload_table(depth, stem):
    model = on_meta(resnet, depth, stem, 10)
    for size in (224, 33, 32):
        assert profile(model, size) == list(workload.resnet(depth, stem, size, 10).layers)
    assert model.training


@pytest.mark.parametrize("momentum", [0.1, 0.03, 1.0])
def test_momentum_is_torchs_share_of_the_new_batch_not_mindspores_share_of_the_old(momentum):
    model = resnet(18, "small", 4, bn_momentum=momentum, bn_eps=1e-3)
    assert {norm.eps for norm in norm_layers(model)} == {1e-3} and len(norm_layers(model)) == 20
    allocate_chips(model, 1, 1)
    torch.manual_seed(3)
    images = torch.randn(2, 3, 8, 8) + 5
    with torch.no_grad():
        model(images)
        batch = model.conv1(images)
    start_mean, start_var = torch.zeros(64), torch.ones(64)
    mean, var = batch.mean((0, 2, 3)), batch.var((0, 2, 3))  # unbiased
    theirs = 1 - momentum  # what MindSpore's nn.BatchNorm2d is given for the same training
    torch.testing.assert_close(model.bn1.chip_mean[0], theirs * start_mean + (1 - theirs) * mean)
    torch.testing.assert_close(model.bn1.chip_var[0], theirs * start_var + (1 - theirs) * var)
    norm = nn.BatchNorm2d(64, momentum=momentum)
    norm(batch)
    torch.testing.assert_close(model.bn1.chip_mean[0], norm.running_mean)


def test_momentum_and_epsilon_are_torchvisions_unless_given():
    ours, theirs = norm_layers(on_meta(resnet))[0], on_meta(torchvision.models.resnet50).bn1
    assert (ours.momentum, ours.eps) == (theirs.momentum, theirs.eps) == (0.1, 1e-5)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"depth": 49}, "model.depth=49: .*18, 34, 50, 101, 152"),
        ({"num_classes": 1}, "model.num_classes=1: "),
        ({"stem": "big"}, "model.stem=big: "),
        ({"bn_momentum": 0.0}, "model.bn_momentum=0.0: the share of the new batch"),
        ({"bn_momentum": 1.1}, "model.bn_momentum=1.1: "),
        ({"bn_eps": 0.0}, "model.bn_eps=0.0: must be positive"),
    ],
)
def test_what_is_no_resnet_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        resnet(**arguments)
