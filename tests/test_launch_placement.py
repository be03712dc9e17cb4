import json

import pytest
from launch_samples import TINY, trained_here
from ray_nodes import CHIPS_PER_NODE, NUM_NODES

from launch.cluster import Cluster

STEPS = 2


def test_each_node_carries_its_hosts_and_the_training_is_that_of_one_worker(train_on_nodes, tmp_path):
    words = [*TINY, f"max_steps={STEPS}"]
    done = train_on_nodes(*words, "workers=4", "run=four", f"run_root={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    placed = json.loads((tmp_path / "runs/four/env.json").read_text())["placement"]
    assert [worker["hosts"] for worker in placed] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [worker["chips"] for worker in placed] == [CHIPS_PER_NODE] * NUM_NODES
    assert len({worker["node"] for worker in placed}) == NUM_NODES
    assert len({worker["pid"] for worker in placed}) == NUM_NODES

    result = json.loads((tmp_path / "runs/four/result.json").read_text())
    assert (result["workers"], result["chips"], result["steps"]) == (4, 64, STEPS)
    alone = trained_here(words, tmp_path / "alone")
    assert result["weights_sha256"] == alone["weights_sha256"]


def test_chips_that_no_node_offers_are_named(train_on_nodes, tmp_path):
    done = train_on_nodes(*TINY, "mesh=atlas900_256", "workers=4", f"run_root={tmp_path / 'runs'}")
    assert done.returncode == 2 and "lacks 256 ascend910 (there are 64)" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_cluster_lacks_what_its_nodes_lack_together():
    cluster = Cluster(None, [{"CPU": 2.0, "ascend910": 8.0}] * 2, loopback=True)
    cluster.demand([{"CPU": 1, "ascend910": 8}] * 2)
    with pytest.raises(ValueError, match=r"lacks 5 CPU \(there are 4\); use fewer workers or threads"):
        cluster.demand([{"CPU": 5}])
    with pytest.raises(ValueError, match=r"lacks 2 GPU \(there are 0\); use fewer workers, or device=cpu"):
        cluster.demand([{"CPU": 1, "GPU": 1}] * 2)
    with pytest.raises(ValueError, match=r"lacks 24 ascend910 \(there are 16\); start its nodes with --resources"):
        cluster.demand([{"CPU": 1, "ascend910": 8}] * 3)
    with pytest.raises(ValueError, match="workers=1: no node of the cluster has 1 CPU, 16 ascend910, which one worker"):
        cluster.demand([{"CPU": 1, "ascend910": 16}])
