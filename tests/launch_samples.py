"""Small runs for the tests of launch/, what one worker in this process makes of them, and make-believe programs."""

from pathlib import Path

from launch import compose

TINY = ["model=resnet_cifar20", "data.image_size=8", "chip_batch_size=2", "mesh=atlas900_64"]
HOSTILE = ["$(touch x)", "`touch x`", "; touch x", "'; touch x '", '"; touch x "', "a\ntouch x", "|touch x", "\\"]
"""Strings that must reach a program as they are."""


def trained_here(overrides: list[str], run_dir: Path) -> dict:
    """The result of the same run by one worker in this process, without Ray."""
    from train.build import WorkerContext, run_worker

    return run_worker(compose.compose(overrides), WorkerContext(), run_dir)


def fake(folder: Path, name: str, does: str) -> None:
    """A program of that name in a folder of PATH."""
    (folder / name).write_text(f"#!/bin/bash\n{does}\n")
    (folder / name).chmod(0o755)
