"""Workload tables: a model as rows of layers with FLOPs, gradients and activations, by arithmetic alone.

ResNet v1.5 (He et al. 2015, with the stride of a bottleneck in its 3x3 convolution), names are torchvision's; and the
ResNets of the same paper's section 4.2, for CIFAR-10.
FLOPs are twice the multiply-adds of convolutions and the classifier; everything else counts as none.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
CIFAR_WIDTHS = (16, 32, 64)
CIFAR_STEMS = {"small": 1, "strided": 2}  # stride of the 3x3 convolution


@dataclass(frozen=True)
class Layer:
    """Figures for one image. `parameters` is also the number of gradient elements, in `tensors` tensors."""

    name: str
    kind: str  # conv, batch_norm, linear
    forward_flops: float
    backward_flops: float
    parameters: int
    tensors: int
    activations: int  # elements of the output


@dataclass(frozen=True)
class Workload:
    """Layers in forward order."""

    name: str
    layers: tuple[Layer, ...]

    @cached_property
    def forward_flops(self) -> float:
        return sum(layer.forward_flops for layer in self.layers)

    @cached_property
    def backward_flops(self) -> float:
        return sum(layer.backward_flops for layer in self.layers)

    @cached_property
    def training_flops(self) -> float:
        return self.forward_flops + self.backward_flops

    @cached_property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @cached_property
    def num_tensors(self) -> int:
        return sum(layer.tensors for layer in self.layers)

    @cached_property
    def smallest_norm(self) -> int:
        """Values a channel and image of the batch norm that has the fewest."""
        return min(2 * layer.activations // layer.parameters for layer in self.layers if layer.kind == "batch_norm")

    def activation_bytes(self, dtype_bytes: int) -> int:
        """Outputs of all layers for one image."""
        return dtype_bytes * sum(layer.activations for layer in self.layers)


class _Rows:
    """Collects layers while the image's size is followed through the model."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def conv(self, name: str, inputs: int, outputs: int, kernel: int, stride: int, size: int) -> int:
        """Returns the output size, with the usual padding (kernel - 1) // 2."""
        size = (size - 1) // stride + 1
        weights = inputs * outputs * kernel * kernel
        forward = 2.0 * weights * size * size
        backward = forward if not self.layers else 2 * forward  # the first layer needs no gradient of its input
        self.layers.append(Layer(name, "conv", forward, backward, weights, 1, outputs * size * size))
        return size

    def batch_norm(self, name: str, channels: int, size: int) -> None:
        self.layers.append(Layer(name, "batch_norm", 0.0, 0.0, 2 * channels, 2, channels * size * size))

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        forward = 2.0 * inputs * outputs
        self.layers.append(Layer(name, "linear", forward, 2 * forward, (inputs + 1) * outputs, 2, outputs))


@cache
def resnet(depth: int = 50, stem: str = "imagenet", image_size: int = 224, num_classes: int = 1000) -> Workload:
    """The table of a ResNet; stem `imagenet` is 7x7 stride 2 and a 3x3 pool stride 2, `small` is 3x3 stride 1."""
    if depth not in BLOCKS:
        raise ValueError(f"model.depth={depth}: there is no such ResNet; use one of {sorted(BLOCKS)}")
    if stem not in ("imagenet", "small"):
        raise ValueError(f"model.stem={stem}: use imagenet or small")
    _at_least_one(image_size, num_classes)
    rows = _Rows()
    if stem == "imagenet":
        size = rows.conv("conv1", 3, 64, 7, 2, image_size)
        rows.batch_norm("bn1", 64, size)
        size = (size - 1) // 2 + 1
    else:
        size = rows.conv("conv1", 3, 64, 3, 1, image_size)
        rows.batch_norm("bn1", 64, size)
    channels = 64
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"layer{stage + 1}.{block}"
            channels, size = (_bottleneck if depth >= 50 else _basic)(rows, name, channels, 64 << stage, stride, size)
    rows.linear("fc", channels, num_classes)
    return Workload(f"ResNet-{depth} ({stem} stem), {image_size} px, {num_classes} classes", tuple(rows.layers))


@cache
def resnet_cifar(depth: int = 20, stem: str = "small", image_size: int = 32, num_classes: int = 10) -> Workload:
    """The table of a ResNet for CIFAR-10 (He et al. 2015, section 4.2): three stages of 16, 32 and 64 channels.

    The stem is one 3x3 convolution, `small` with stride 1 as in the paper, `strided` with stride 2.
    """
    blocks = cifar_blocks(depth)
    _at_least_one(image_size, num_classes)
    rows = _Rows()
    size = rows.conv("conv1", 3, CIFAR_WIDTHS[0], 3, cifar_stem_stride(stem), image_size)
    rows.batch_norm("bn1", CIFAR_WIDTHS[0], size)
    channels = CIFAR_WIDTHS[0]
    for stage, width in enumerate(CIFAR_WIDTHS, 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            channels, size = _basic(rows, f"layer{stage}.{block}", channels, width, stride, size)
    rows.linear("fc", channels, num_classes)
    return Workload(f"CIFAR ResNet-{depth} ({stem} stem), {image_size} px, {num_classes} classes", tuple(rows.layers))


def cifar_blocks(depth: int) -> int:
    """Blocks of each of the three stages. ValueError where a CIFAR ResNet has no such depth."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        near = max(8, depth - rest)
        raise ValueError(f"model.depth={depth}: a CIFAR ResNet has 6n + 2 layers; use {near} or {near + 6}")
    return blocks


def cifar_stem_stride(stem: str) -> int:
    if stem not in CIFAR_STEMS:
        raise ValueError(f"model.stem={stem}: use {' or '.join(CIFAR_STEMS)}")
    return CIFAR_STEMS[stem]


def of_model(model: dict[str, Any], image_size: int, num_classes: int) -> Workload:
    """The table of a configuration's model node. ValueError for a model that has none."""
    target = model.get("_target_")
    if target == "train.models.resnet.resnet":
        return resnet(model["depth"], model["stem"], image_size, num_classes)
    if target == "train.models.resnet_cifar.resnet_cifar":
        return resnet_cifar(model["depth"], model["stem"], image_size, num_classes)
    raise ValueError(
        f"model._target_={target}: only train.models.resnet.resnet and train.models.resnet_cifar.resnet_cifar have a "
        "workload table; use one of their models"
    )


def _at_least_one(image_size: int, num_classes: int) -> None:
    for key, value in {"data.image_size": image_size, "model.num_classes": num_classes}.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")


def _bottleneck(rows: _Rows, name: str, inputs: int, width: int, stride: int, size: int) -> tuple[int, int]:
    rows.conv(f"{name}.conv1", inputs, width, 1, 1, size)
    rows.batch_norm(f"{name}.bn1", width, size)
    out = rows.conv(f"{name}.conv2", width, width, 3, stride, size)
    rows.batch_norm(f"{name}.bn2", width, out)
    rows.conv(f"{name}.conv3", width, 4 * width, 1, 1, out)
    rows.batch_norm(f"{name}.bn3", 4 * width, out)
    _downsample(rows, name, inputs, 4 * width, stride, size)
    return 4 * width, out


def _basic(rows: _Rows, name: str, inputs: int, width: int, stride: int, size: int) -> tuple[int, int]:
    out = rows.conv(f"{name}.conv1", inputs, width, 3, stride, size)
    rows.batch_norm(f"{name}.bn1", width, out)
    rows.conv(f"{name}.conv2", width, width, 3, 1, out)
    rows.batch_norm(f"{name}.bn2", width, out)
    _downsample(rows, name, inputs, width, stride, size)
    return width, out


def _downsample(rows: _Rows, name: str, inputs: int, outputs: int, stride: int, size: int) -> None:
    if stride > 1 or inputs != outputs:
        out = rows.conv(f"{name}.downsample.0", inputs, outputs, 1, stride, size)
        rows.batch_norm(f"{name}.downsample.1", outputs, out)
