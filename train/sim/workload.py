"""Workload tables: a model as rows of layers with FLOPs, gradients and activations, by arithmetic alone.

ResNet v1.5 (He et al. 2015, with the stride of a bottleneck in its 3x3 convolution); names are torchvision's.
FLOPs are twice the multiply-adds of convolutions and the classifier; everything else counts as none.
"""

from dataclasses import dataclass

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


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

    @property
    def forward_flops(self) -> float:
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def backward_flops(self) -> float:
        return sum(layer.backward_flops for layer in self.layers)

    @property
    def training_flops(self) -> float:
        return self.forward_flops + self.backward_flops

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def num_tensors(self) -> int:
        return sum(layer.tensors for layer in self.layers)

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


def resnet(depth: int = 50, stem: str = "imagenet", image_size: int = 224, num_classes: int = 1000) -> Workload:
    """The table of a ResNet; stem `imagenet` is 7x7 stride 2 and a 3x3 pool stride 2, `small` is 3x3 stride 1."""
    if depth not in BLOCKS:
        raise ValueError(f"model.depth={depth}: there is no such ResNet; use one of {sorted(BLOCKS)}")
    if stem not in ("imagenet", "small"):
        raise ValueError(f"model.stem={stem}: use imagenet or small")
    for key, value in {"data.image_size": image_size, "model.num_classes": num_classes}.items():
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
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
    rows.layers.append(
        Layer(
            "fc",
            "linear",
            2.0 * channels * num_classes,
            4.0 * channels * num_classes,
            (channels + 1) * num_classes,
            2,
            num_classes,
        )
    )
    return Workload(f"ResNet-{depth} ({stem} stem), {image_size} px, {num_classes} classes", tuple(rows.layers))


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
