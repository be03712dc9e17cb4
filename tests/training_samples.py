"""The smallest real training: ResNet-18 on 8x8 digits, three emulated hosts of 8 chips, two images each."""

from launch.compose import compose

STEPS_PER_EPOCH = 1_437 // 48


def tiny(*overrides: str) -> dict:
    """Four steps, with an evaluation after the second and the last; later overrides win."""
    machine = ["mesh=atlas900_64", "mesh.axes.host=3", "chip_batch_size=2", "precision=fp32", "workers=1"]
    model = ["model=resnet18", "model.stem=small", "data.image_size=8"]
    recipe = ["schedule.base_lr=0.05", "schedule.warmup_epochs=0.05", "max_steps=4"]
    return compose([*machine, *model, *recipe, f"eval_every={2 / STEPS_PER_EPOCH}", "eval_offset=0", *overrides])
