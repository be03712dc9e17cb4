"""scripts/cluster_shapes.py: the same weights on one node, on four raylets and on two hosts with own addresses."""

import os
import shutil
import subprocess
import sys

import pytest
from processes import ROOT


@pytest.mark.slow
@pytest.mark.skipif(bool(os.getuid()) or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_the_weights_do_not_depend_on_where_the_workers_lie():
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts/cluster_shapes.py",
            "model=resnet_cifar20",
            "data.image_size=8",
            "max_steps=2",
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["one node", "4 nodes", "2 hosts", "2 hosts, speeds 3 and 1"]
    assert len({row[-1] for row in rows}) == 1
    assert "10.77.0.1" in rows[2][2] and "10.77.0.2" in rows[2][2]
    assert rows[3][1] == "0-5; 6-7", "three quarters of the mesh on the host that says it is three times as fast"
