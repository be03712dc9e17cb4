"""The smallest real training: ResNet-20 on 8x8 digits, three emulated hosts of 8 chips, two images each."""

from copy import deepcopy
from functools import cache

import yaml

from launch.compose import compose

STEPS_PER_EPOCH = 1_437 // 48
GROUPS = ("optim", "data", "backend", "model")


def tiny(*overrides: str) -> dict:
    """Four steps, with an evaluation after the second and the last; later overrides win (their values are YAML)."""
    config = deepcopy(composed(*(text for text in overrides if text.partition("=")[0] in GROUPS)))
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in GROUPS:
            *path, last = key.split(".")
            node = config
            for name in path:
                node = node[name]
            assert last in node, key
            node[last] = yaml.safe_load(value)
    return config


@cache
def composed(*groups: str) -> dict:
    machine = ["mesh=atlas900_64", "mesh.axes.host=3", "chip_batch_size=2", "precision=fp32", "workers=1"]
    model = ["model=resnet_cifar20", "data=digits", "data.image_size=8"]
    recipe = ["optim=sgd", "schedule=polynomial", "schedule.base_lr=0.05", "schedule.warmup_epochs=0.05", "epochs=30"]
    limits = ["target_top1=1", f"eval_every={2 / STEPS_PER_EPOCH}", "eval_offset=0", "max_steps=4"]
    return compose([*machine, *model, *recipe, *limits, *groups])
