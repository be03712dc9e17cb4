"""Machines and configurations that the emulator's tests share."""

from copy import deepcopy
from functools import cache

from launch.compose import compose
from train.mesh.mesh import Mesh
from train.mesh.topology import Atlas900, LinkClass


def record_config(*overrides: str) -> dict:
    """The record's experiment without fitted constants, composed once; the caller's own to change."""
    return deepcopy(_composed(overrides))


@cache
def _composed(overrides: tuple[str, ...]) -> dict:
    return compose(["experiment=imagenet_atlas900", "network=alpha_beta", "collective=hierarchical", *overrides])


def atlas(hosts: int, chips: int = 8) -> Mesh:
    """Atlas 900 with HCCL's constants."""
    copy = {"gbytes_per_s": 19.3, "latency_us": 1.5, "small_latency_us": 0.6, "small_kib": 512}
    links = LinkClass("hccs", **copy), LinkClass("pcie", **copy), LinkClass("roce", 12.0, 7.0, switched=True)
    return Mesh("test", {"host": hosts, "chip": chips}, Atlas900(*links))
