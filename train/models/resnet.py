"""ResNet 18 to 152, v1.5 (stride in the 3x3 convolution of a bottleneck), with batch norm per emulated chip.

He et al. 2015 (arXiv 1512.03385); v1.5 as in MLPerf and torchvision, whose names of parameters this model shares: each
loads the other's weights.

ReLU and the residual sum make new tensors: on a CPU torch's bfloat16 kernels take two to three times as long in place
(25.7 million values, one core: ReLU 24 ms in place and 9 ms not, a sum 20 and 12 ms; float32 has no such difference).
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from train.models.chip_norm import ChipBatchNorm2d, ChipPass, fork, has_kernels, norm_layers
from train.models.conv import Conv2d
from train.models.layout import channels_last, is_pixels_first, pixels_first
from train.sim.workload import BLOCKS

STAGE_WIDTHS = (64, 128, 256, 512)


class MaxPool2d(nn.MaxPool2d):
    """torch's, of images in any layout, which stays."""

    def forward(self, images: Tensor) -> Tensor:
        if has_kernels(images):
            from train.models.max_pool_cuda import max_pool

            return max_pool(images, self.kernel_size, self.stride, self.padding)
        pooled = super().forward(channels_last(images))
        return pixels_first(pooled) if is_pixels_first(images) else pooled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the identity."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, chip_pass: ChipPass) -> None:
        super().__init__()
        self.conv1 = Conv2d(inputs, width, 3, stride)
        self.bn1 = ChipBatchNorm2d(width, chip_pass)
        self.conv2 = Conv2d(width, width, 3)
        self.bn2 = ChipBatchNorm2d(width, chip_pass)
        self.downsample = shortcut(inputs, width * self.expansion, stride, chip_pass)

    def forward(self, x: Tensor) -> Tensor:
        into, past = fork(x)
        y = self.bn1(self.conv1(into), relu=True)
        return self.bn2(self.conv2(y), residual=self.downsample(past), relu=True)

    @property
    def last_norm(self) -> ChipBatchNorm2d:
        return self.bn2


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and the identity."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, chip_pass: ChipPass) -> None:
        super().__init__()
        self.conv1 = Conv2d(inputs, width, 1)
        self.bn1 = ChipBatchNorm2d(width, chip_pass)
        self.conv2 = Conv2d(width, width, 3, stride)
        self.bn2 = ChipBatchNorm2d(width, chip_pass)
        self.conv3 = Conv2d(width, width * self.expansion, 1)
        self.bn3 = ChipBatchNorm2d(width * self.expansion, chip_pass)
        self.downsample = shortcut(inputs, width * self.expansion, stride, chip_pass)

    def forward(self, x: Tensor) -> Tensor:
        into, past = fork(x)
        y = self.bn1(self.conv1(into), relu=True)
        y = self.bn2(self.conv2(y), relu=True)
        return self.bn3(self.conv3(y), residual=self.downsample(past), relu=True)

    @property
    def last_norm(self) -> ChipBatchNorm2d:
        return self.bn3


def shortcut(inputs: int, outputs: int, stride: int, chip_pass: ChipPass) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(Conv2d(inputs, outputs, 1, stride), ChipBatchNorm2d(outputs, chip_pass))


def add_stages(
    model: nn.Module, block: type[BasicBlock | Bottleneck], inputs: int, widths: Sequence[int], blocks: Sequence[int]
) -> None:
    """Give the model its layer1, layer2 ..., each of so many blocks; all but the first halve the image."""
    for stage, (width, number) in enumerate(zip(widths, blocks, strict=True), 1):
        layers = []
        for i in range(number):
            layers.append(block(inputs, width, 2 if stage > 1 and i == 0 else 1, model.chip_pass))
            inputs = width * block.expansion
        setattr(model, f"layer{stage}", nn.Sequential(*layers))


def initialise(model: nn.Module, zero_init_last_gamma: bool) -> None:
    """He-normal convolutions (fan out); if wanted, every residual branch at zero (Goyal et al. 2017, section 5.1)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif zero_init_last_gamma and isinstance(module, BasicBlock | Bottleneck):
            nn.init.zeros_(module.last_norm.weight)


class ResNet(nn.Module):
    """[images, 3, height, width] -> logits [images, num_classes]; `chip_pass` says whose images a pass holds."""

    def __init__(self, depth: int, num_classes: int, stem: str, chip_pass: ChipPass) -> None:
        super().__init__()
        self.chip_pass = chip_pass
        block = Bottleneck if depth >= 50 else BasicBlock
        small = stem == "small"
        self.conv1 = Conv2d(3, 64, 3) if small else Conv2d(3, 64, 7, 2)
        self.bn1 = ChipBatchNorm2d(64, chip_pass)
        self.maxpool = nn.Identity() if small else MaxPool2d(3, 2, 1)
        add_stages(self, block, 64, STAGE_WIDTHS, BLOCKS[depth])
        self.fc = nn.Linear(STAGE_WIDTHS[-1] * block.expansion, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.chip_pass.through(self._layers, images, self.training)

    def _layers(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(images), relu=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def resnet(
    depth: Literal[18, 34, 50, 101, 152] = 50,
    stem: Literal["imagenet", "small"] = "imagenet",
    num_classes: int = 1000,
    zero_init_last_gamma: bool = True,
    bn_momentum: float = 0.1,
    bn_eps: float = 1e-5,
) -> ResNet:
    """A ResNet with He-normal convolutions (fan out); `stem=small`, for small images, is one 3x3 convolution.

    `zero_init_last_gamma` starts every residual branch at zero (Goyal et al. 2017, section 5.1). `bn_momentum` is
    torch's, the new batch's share of the running statistics: MindSpore's and TensorFlow's `momentum` is 1 minus it.
    """
    if depth not in BLOCKS:
        raise ValueError(f"model.depth={depth}: there is no such ResNet; use one of {sorted(BLOCKS)}")
    if stem not in ("imagenet", "small"):
        raise ValueError(f"model.stem={stem}: use imagenet or small")
    if num_classes < 2:
        raise ValueError(f"model.num_classes={num_classes}: at least 2 classes are needed")
    if not 0 < bn_momentum <= 1:
        raise ValueError(f"model.bn_momentum={bn_momentum}: the share of the new batch lies above 0 and up to 1")
    if bn_eps <= 0:
        raise ValueError(f"model.bn_eps={bn_eps}: must be positive")
    model = ResNet(depth, num_classes, stem, ChipPass())
    for norm in norm_layers(model):
        norm.momentum, norm.eps = bn_momentum, bn_eps
    initialise(model, zero_init_last_gamma)
    return model
