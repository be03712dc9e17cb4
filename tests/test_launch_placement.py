"""Training on several nodes: what lies where, what is lacking, and how a worker's error comes back.

The nodes live as long as these tests: idle ones would slow every other test that starts Ray.
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_samples import make_image_tree
from launch_samples import TINY, trained_here
from processes import environment
from ray_nodes import CHIPS, NUM_NODES

from launch.cluster import Cluster, Node

STEPS = 2
ON_ONE_HOST = [*TINY, "mesh=atlas800", "workers=1"]


@pytest.fixture(scope="module")
def train_on_nodes(ray_folder: Path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """`python -m launch.run` on two Ray nodes (tests/ray_nodes.py) that ask for a token."""
    ours = environment(ray_folder) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    nodes = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("ray_nodes.py")],
        env=ours,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    address = nodes.stdout.readline().strip()

    def train(*overrides: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "launch.run", *overrides, f"cluster.address={address}"]
        return subprocess.run(command, env=ours, capture_output=True, text=True, timeout=180)

    yield train
    nodes.communicate(timeout=60)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """16 photos in ImageNet's layout, one of the training photos cut off."""
    root = make_image_tree(tmp_path_factory.mktemp("photos"), classes=2, per_class=4, size=40)
    broken = root / "train/n00000001/1_2.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    return root


def test_each_node_carries_its_hosts_and_the_training_is_that_of_one_worker(train_on_nodes, tmp_path):
    words = [*TINY, f"max_steps={STEPS}"]
    done = train_on_nodes(*words, "workers=2", "run=two", f"run_root={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    placed = json.loads((tmp_path / "runs/two/env.json").read_text())["placement"]
    assert [worker["hosts"] for worker in placed] == [[0, 3], [4, 7]]
    assert [worker["chips"] for worker in placed] == [CHIPS // NUM_NODES] * NUM_NODES
    assert len({worker["node"] for worker in placed}) == NUM_NODES
    assert len({worker["pid"] for worker in placed}) == NUM_NODES

    result = json.loads((tmp_path / "runs/two/result.json").read_text())
    assert (result["workers"], result["chips"], result["steps"]) == (2, 64, STEPS)
    alone = trained_here(words, tmp_path / "alone")
    assert result["weights_sha256"] == alone["weights_sha256"]


def test_chips_that_no_node_offers_are_named(train_on_nodes, tmp_path):
    done = train_on_nodes(*TINY, "mesh=atlas900_256", "workers=4", f"run_root={tmp_path / 'runs'}")
    assert done.returncode == 2 and "lacks 256 ascend910 (there are 64)" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_what_only_the_worker_sees_is_refused_with_nothing_written(train_on_nodes, tmp_path):
    done = train_on_nodes(*ON_ONE_HOST, "chip_batch_size=1000", f"run_root={tmp_path / 'runs'}")
    expected = "launch.run: global_batch_size=8000 (8 chips x 1000) is larger than the data set (1437 images)"
    assert done.returncode == 2 and done.stderr.startswith(expected) and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "overrides, named",
    [
        pytest.param(
            "optim=sgd schedule.base_lr=1e12 schedule.warmup_epochs=0", "DivergedError: the ", marks=pytest.mark.slow
        ),
        ("data=imagenet data.root={photos} data.image_size=32 data.repeat=2", "unreadable image {photos}/train/"),
    ],
)
def test_a_run_that_fails_ends_with_the_workers_own_error(train_on_nodes, photos, tmp_path, overrides, named):
    words = [*ON_ONE_HOST, *overrides.format(photos=photos).split(), "max_steps=20"]
    done = train_on_nodes(*words, f"run_root={tmp_path / 'runs'}", "run=failed")
    result = json.loads((tmp_path / "runs/failed/result.json").read_text())
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"launch.run: the run failed: {result['error']}"
    assert result["status"] == "failed" and result["error"].startswith(named.format(photos=photos))
    assert "Traceback" not in done.stdout + done.stderr


def test_a_cluster_lacks_what_its_nodes_lack_together():
    nodes = [Node(name, "127.0.0.1", {"CPU": 2.0, "ascend910": 8.0}) for name in "ab"]
    cluster = Cluster(None, nodes, loopback=True)
    cluster.demand([{"CPU": 1, "ascend910": 8}] * 2)
    with pytest.raises(ValueError, match=r"lacks 5 CPU \(there are 4\); use fewer workers or threads"):
        cluster.demand([{"CPU": 5}])
    with pytest.raises(ValueError, match=r"lacks 2 GPU \(there are 0\); use fewer workers, or device=cpu"):
        cluster.demand([{"CPU": 1, "GPU": 1}] * 2)
    with pytest.raises(ValueError, match=r"lacks 24 ascend910 \(there are 16\); start its nodes with --resources"):
        cluster.demand([{"CPU": 1, "ascend910": 8}] * 3)
    with pytest.raises(ValueError, match="workers=1: no node of the cluster has 1 CPU, 16 ascend910, which one worker"):
        cluster.demand([{"CPU": 1, "ascend910": 16}])


@pytest.mark.slow
def test_a_checkpoint_of_another_contract_is_refused_and_the_run_left_as_it_was(train_on_nodes, tmp_path):
    words = [*ON_ONE_HOST, f"run_root={tmp_path / 'runs'}"]
    assert train_on_nodes(*words, "run=mine", "max_steps=1").returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "runs/mine").rglob("*") if path.is_file()}
    done = train_on_nodes(*words, "resume=mine", "max_steps=2", "threads=2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the checkpoint has threads=1, this run 2" in done.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "runs/mine").rglob("*") if path.is_file()}
