"""The ResNets for CIFAR-10 of He et al. 2015 (arXiv 1512.03385, section 4.2), with batch norm per emulated chip.

6n + 2 layers: a 3x3 convolution, three stages of n basic blocks with 16, 32 and 64 channels, a classifier. The blocks
are those of the large ResNets, so the shortcuts between stages are 1x1 convolutions (the paper's option B), not the
zeros of its option A: 2,752 parameters more, at any depth.
"""

from typing import Literal

from torch import Tensor, nn

from train.models.chip_norm import ChipBatchNorm2d, ChipPass
from train.models.conv import Conv2d
from train.models.resnet import BasicBlock, add_stages, initialise
from train.sim.workload import CIFAR_WIDTHS, cifar_blocks, cifar_stem_stride


class CifarResNet(nn.Module):
    """[images, 3, height, width] -> logits [images, num_classes]; `chip_pass` says whose images a pass holds."""

    def __init__(self, depth: int, num_classes: int, stem: str, chip_pass: ChipPass) -> None:
        super().__init__()
        self.chip_pass = chip_pass
        inputs = CIFAR_WIDTHS[0]
        self.conv1 = Conv2d(3, inputs, 3, cifar_stem_stride(stem))
        self.bn1 = ChipBatchNorm2d(inputs, chip_pass)
        add_stages(self, BasicBlock, inputs, CIFAR_WIDTHS, [cifar_blocks(depth)] * len(CIFAR_WIDTHS))
        self.fc = nn.Linear(CIFAR_WIDTHS[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.chip_pass.through(self._layers, images, self.training)

    def _layers(self, images: Tensor) -> Tensor:
        x = self.bn1(self.conv1(images), relu=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def resnet_cifar(
    depth: int = 20,
    stem: Literal["small", "strided"] = "small",
    num_classes: int = 10,
    zero_init_last_gamma: bool = True,
) -> CifarResNet:
    """A CIFAR ResNet of 6n + 2 layers with He-normal convolutions (fan out).

    `stem=small` is the paper's 3x3 convolution; `strided` gives it stride 2, for a quarter of the work and memory.

    `zero_init_last_gamma` starts every residual branch at zero (Goyal et al. 2017, section 5.1).
    """
    if num_classes < 2:
        raise ValueError(f"model.num_classes={num_classes}: at least 2 classes are needed")
    model = CifarResNet(depth, num_classes, stem, ChipPass())
    initialise(model, zero_init_last_gamma)
    return model
