"""Four Ray nodes of 16 chips each on this machine's loopback: prints their address, ends when its input does."""

import os
import sys

CHIPS_PER_NODE = 16
NUM_NODES = 4


def main() -> None:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: loopback only
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "resources": {"ascend910": CHIPS_PER_NODE}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(NUM_NODES - 1):
        cluster.add_node(wait=False, **node)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
