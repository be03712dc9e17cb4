import pytest

from train.sim.workload import of_model, resnet, resnet_cifar


def test_resnet50_has_the_published_size():
    """25,557,032 parameters in 161 tensors, 4.089 G multiply-adds forward (v1.5), about 24.3 GFLOP a training step."""
    table = resnet()
    assert (table.parameters, table.num_tensors) == (25_557_032, 161)
    assert table.forward_flops == 2 * 4_089_184_256
    assert table.backward_flops / 1e9 == pytest.approx(16.12, abs=0.005)
    assert table.training_flops / 1e9 == pytest.approx(24.3, abs=0.005)


@pytest.mark.parametrize(
    "prefixes, parameters, gmacs",
    [
        (("conv1", "bn1"), 9_536, 0.118),
        (("layer1",), 215_808, 0.668),
        (("layer2",), 1_219_584, 1.028),
        (("layer3",), 7_098_368, 1.464),
        (("layer4",), 14_964_736, 0.809),
        (("fc",), 2_049_000, 0.002),
    ],
)
def test_resnet50_by_stage(prefixes, parameters, gmacs):
    layers = [layer for layer in resnet().layers if layer.name.startswith(prefixes)]
    assert sum(layer.parameters for layer in layers) == parameters
    assert sum(layer.forward_flops for layer in layers) / 2e9 == pytest.approx(gmacs, abs=0.0006)


@pytest.mark.parametrize("depth, parameters", [(18, 11_689_512), (34, 21_797_672), (152, 60_192_808)])
def test_other_depths_have_torchvision_s_parameters(depth, parameters):
    assert resnet(depth).parameters == parameters


def test_kinds_of_parameters():
    expected = {"conv": 23_454_912, "batch_norm": 53_120, "linear": 2_049_000}
    assert {kind: sum(x.parameters for x in resnet().layers if x.kind == kind) for kind in expected} == expected
    assert resnet(num_classes=1001).parameters == 25_559_081


def test_only_the_first_layer_has_no_input_gradient():
    table = resnet()
    assert table.layers[0].backward_flops == table.layers[0].forward_flops
    assert all(layer.backward_flops == 2 * layer.forward_flops for layer in table.layers[1:])


def test_small_stem_keeps_the_image_s_size():
    small = resnet(stem="small", image_size=32, num_classes=10)
    assert small.layers[0].activations == 64 * 32 * 32
    assert small.layers[0].parameters == 3 * 64 * 9
    assert next(layer for layer in small.layers if layer.name == "layer4.2.conv3").activations == 2048 * 4 * 4


def test_activation_bytes_follow_the_dtype():
    assert resnet().activation_bytes(4) == 2 * resnet().activation_bytes(2)


@pytest.mark.parametrize(
    "arguments, named",
    [({"depth": 51}, "model.depth=51"), ({"stem": "big"}, "model.stem=big"), ({"image_size": 0}, "data.image_size=0")],
)
def test_wrong_models_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        resnet(**arguments)


def test_cifar_resnets_have_exact_sizes():
    """He et al. 2015, table 6: ResNet-20 has 0.27 million parameters; by hand its multiply-adds are 40.8 million."""
    table = resnet_cifar()
    assert (table.parameters, table.num_tensors, table.forward_flops) == (272_474, 65, 2 * 40_813_184)
    half = resnet_cifar(14, "strided")
    assert (half.parameters, half.forward_flops, half.training_flops) == (175_258, 13_329_664, 39_767_808)


def test_the_smallest_batch_norm_sees_the_last_stage():
    assert resnet().smallest_norm == 7 * 7
    assert resnet(stem="small", image_size=32).smallest_norm == 4 * 4
    assert resnet(image_size=32).smallest_norm == 1
    assert resnet_cifar().smallest_norm == 8 * 8


def test_a_model_node_leads_to_its_table():
    node = {"_target_": "train.models.resnet.resnet", "depth": 18, "stem": "small"}
    assert of_model(node, 32, 10) == resnet(18, "small", 32, 10)
    node = {"_target_": "train.models.resnet_cifar.resnet_cifar", "depth": 8, "stem": "strided"}
    assert of_model(node, 32, 10) == resnet_cifar(8, "strided", 32, 10)
    with pytest.raises(ValueError, match="model._target_=torchvision.models.vit: .* use one of their models"):
        of_model({"_target_": "torchvision.models.vit"}, 32, 10)
