"""Writes a run's weights as torchvision's ResNet takes them: the names, the shapes, and the statistics of evaluation.

    python scripts/export_weights.py RUN [--out FILE] [--averages]

    model = torchvision.models.resnet50(num_classes=...)
    model.load_state_dict(torch.load(FILE, weights_only=True))

The newest checkpoint that is as it was written is taken. Exit status 2 where the model is not one of torchvision's.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from launch.compose import load_run_config
from train import checkpoint
from train.checkpoint_files import newest_sound


def weights(run_dir: Path, averages: bool, say) -> tuple[dict[str, Tensor], dict]:
    """(Weights by torchvision's names, the run's model); ValueError names what is lacking."""
    model = load_run_config(run_dir)["model"]
    if not model["_target_"].endswith("resnet.resnet") or model["stem"] != "imagenet":
        stem = f", model.stem={model['stem']}" if "stem" in model else ""
        raise ValueError(f"{run_dir}: model {model['_target_']}{stem}: torchvision has no such ResNet")
    path = newest_sound(run_dir / "checkpoints", say)
    if path is None:
        raise ValueError(f"{run_dir}: no checkpoint to take weights from")
    state = checkpoint.load(path)
    found = state["averages"] if averages else state["model"]
    if found is None:
        raise ValueError(f"{path}: no averaged weights: the run has ema_decay=null; leave --averages out")
    return {name: tensor.contiguous() for name, tensor in found.items()}, model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, help="where to; by default weights.pt in the run's folder")
    parser.add_argument("--averages", action="store_true", help="the averaged weights (ema_decay), not the raw ones")
    wanted = parser.parse_args(argv)
    out = wanted.out or wanted.run / "weights.pt"
    try:
        state, model = weights(wanted.run, wanted.averages, lambda problem: print(problem, file=sys.stderr))
        aside = out.with_name(f".{out.name}.{os.getpid()}")
        torch.save(state, aside)
        aside.replace(out)
    except (ValueError, OSError) as error:
        print(f"export_weights: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    classes = len(state["fc.bias"])
    print(f"{out}: load into torchvision.models.resnet{model['depth']}(num_classes={classes})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
