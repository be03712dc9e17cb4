"""Ray nodes on this machine's loopback, 64 chips shared among them: prints their address, ends when its input does.

python tests/ray_nodes.py [how many, by default 2]
"""

import os
import sys

CHIPS = 64
NUM_NODES = 2


def main(num_nodes: int = NUM_NODES) -> None:
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when Ray is imported: loopback only
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "resources": {"ascend910": CHIPS // num_nodes}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(num_nodes - 1):
        cluster.add_node(wait=False, **node)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
