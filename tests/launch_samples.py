"""Small runs for the tests of launch/: what is overridden, and what one worker in this process makes of it."""

from pathlib import Path

from launch import compose

TINY = ["model=resnet_cifar20", "data.image_size=8", "chip_batch_size=2", "mesh=atlas900_64"]


def trained_here(overrides: list[str], run_dir: Path) -> dict:
    """The result of the same run by one worker in this process, without Ray."""
    from train.build import WorkerContext, run_worker

    return run_worker(compose.compose(overrides), WorkerContext(), run_dir)
