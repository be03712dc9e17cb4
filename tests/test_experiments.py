"""Every experiment of conf/ trains two steps with its own model, optimizer and schedule, on a small mesh."""

import json
import math
from pathlib import Path

import pytest
import torch
from data_samples import make_image_tree
from launch_samples import trained_here

from launch import compose

STEPS = 2
ON_8_CHIPS = ["mesh=atlas800", "workers=1", f"max_steps={STEPS}"]
OVERRIDES = {
    "digits_atlas": ["chip_batch_size=2"],
    "cifar10_atlas": ["data.root={photos}", "chip_batch_size=2", "data.repeat=2"],
    "cifar10_bn_span": ["data.root={photos}", "chip_batch_size=2", "data.repeat=2"],
    "photos_decoder": ["data.root={photos}/train", "chip_batch_size=2", "data.repeat=2"],
    "imagenet_atlas900": ["data.root={photos}", "global_batch_size=16", "data.image_size=32", "data.repeat=2"],
    "fast_16_epochs": [
        "data.root={photos}",
        "global_batch_size=16",
        "data.image_size=32",
        "data.eval_size=48",
        "data.repeat=2",
        "data.train_sizes=[[0,24],[1,32]]",
        "schedule.warmup_epochs=0.5",
        "schedule.base_lr=0.01",
    ],
    "synthetic": ["chip_batch_size=2", "data.image_size=32", "data.num_train=64", "data.num_eval=16"],
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_image_tree(tmp_path_factory.mktemp("photos"), classes=2, per_class=8, size=72)


@pytest.fixture(autouse=True)
def threads():
    """A worker sets torch's threads for its process, which is this one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("experiment", compose.groups()["experiment"])
def test_two_steps(experiment, photos, tmp_path):
    words = [word.format(photos=photos) for word in OVERRIDES[experiment]]
    result = trained_here([f"experiment={experiment}", *ON_8_CHIPS, *words], tmp_path)
    assert (result["status"], result["steps"]) == ("done", STEPS)
    assert 0 <= result["top1"] <= 1 and math.isfinite(result["eval_loss"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == STEPS and all(math.isfinite(row["values"]["train/loss"]) for row in steps)
    assert rows[-1]["emulated_s"] == result["emulated_s"] > 0
