"""Which nodes carry what, without Ray: shares by speed, what is waited for, what keeps nodes from training together."""

import socket
from pathlib import Path

import pytest

from launch import cluster as clusters
from launch import nodes
from launch.cluster import Cluster, Lacking, Node, exposure, settle
from launch.compose import compose
from launch.placement import ask, deal, node_speeds
from launch.run import emulated_machine

SETTINGS = {"nodes": None, "labels": {}, "wait_s": 0.0}


def some(*speeds: str | None, cpus: float = 8, chips: float = 64, gpus: float = 0) -> list[Node]:
    resources = {"CPU": cpus, "ascend910": chips} | ({"GPU": gpus} if gpus else {})
    labels = [{} if speed is None else {"speed": speed} for speed in speeds]
    return [Node(f"id{n}", f"10.0.0.{n}", resources, labels[n]) for n in range(len(speeds))]


def layout(nodes: list[Node], *words: str):
    config = compose([*words, "threads=1"])
    return ask(config, emulated_machine(config), Cluster("10.0.0.0:6379", nodes, loopback=False))


@pytest.mark.parametrize(
    "speeds, workers, blocks, expected",
    [
        ([3, 1], 2, 8, [(0, 6), (1, 2)]),
        ([1, 3], 2, 8, [(0, 2), (1, 6)]),
        ([1, 1], 2, 8, [(0, 4), (1, 4)]),
        ([2, 1], 3, 8, [(0, 3), (0, 3), (1, 2)]),
        ([4, 2, 1], 3, 8, [(0, 5), (1, 2), (2, 1)]),
        ([1000, 1], 2, 8, [(0, 7), (1, 1)]),
    ],
)
def test_blocks_are_dealt_by_speed(speeds, workers, blocks, expected):
    there = some(*[None] * len(speeds))
    assert deal(there, speeds, {"CPU": 1}, {"ascend910": 8}, workers, blocks) == expected


def test_no_other_split_ends_a_step_earlier():
    for speeds in ([3, 1], [5, 3], [7, 2], [1, 1.9]):
        for blocks in range(2, 20):
            dealt = deal(some(None, None, chips=1000), speeds, {"CPU": 1}, {"ascend910": 8}, 2, blocks)
            assert [seat for seat, _ in dealt] == [0, 1] and sum(size for _, size in dealt) == blocks
            end = max(size / speeds[seat] for seat, size in dealt)
            assert end == min(max(k / speeds[0], (blocks - k) / speeds[1]) for k in range(1, blocks))


def test_a_nodes_own_resources_bound_what_it_is_dealt():
    there = some(None, None, cpus=1, chips=32)
    assert deal(there, [9, 1], {"CPU": 1}, {"ascend910": 8}, 2, 8) == [(0, 4), (1, 4)]
    with pytest.raises(Lacking, match=r"workers=3: no node has room for worker 2 \(1 CPU, 8 ascend910\)"):
        deal(there, [9, 1], {"CPU": 1}, {"ascend910": 8}, 3, 8)
    with pytest.raises(Lacking, match=r"no node has room for block 8 \(8 ascend910\)"):
        deal(there, [9, 1], {"CPU": 1}, {"ascend910": 8}, 2, 9)


def test_nodes_that_differ_in_speed_get_shares_and_the_workers_their_nodes():
    found = layout(some("3", "1"), "workers=2")
    assert found.shares == [6, 2] and [request.hosts for request in found.requests] == [range(0, 6), range(6, 8)]
    assert [request.labels for request in found.requests] == [{"ray.io/node-id": "id0"}, {"ray.io/node-id": "id1"}]
    assert found.notes == ["shares [6, 2] follow the nodes' labels speed: 10.0.0.0 3, 10.0.0.1 1"]
    given = layout(some("3", "1"), "workers=2", "shares=[4,4]")
    assert given.shares == [4, 4] and not given.notes and given.requests[0].labels == {}
    alike = layout(some("3", "3"), "workers=2", "cluster.labels={pool: a}")
    assert alike.shares is None and [request.labels for request in alike.requests] == [{"pool": "a"}] * 2


@pytest.mark.parametrize("label", ["fast", "0", "-1", "nan", "inf", ""])
def test_a_speed_that_is_none_is_named_with_its_node(label):
    with pytest.raises(ValueError, match="node 10.0.0.1 has the label speed=.*, which must be a number above 0"):
        node_speeds(some("1", label))


def test_a_run_is_never_mixed_and_says_what_stays_unused():
    both = [*some(None, gpus=2), *some(None)]
    on_gpus = layout(both, "workers=2")
    assert on_gpus.device == "cuda" and [request.gpus for request in on_gpus.requests] == [1, 1]
    assert on_gpus.notes == ["1 node(s) without a GPU carry no worker, for a run is never mixed"]
    on_processors = layout(both, "workers=4")
    assert on_processors.device == "cpu" and {request.gpus for request in on_processors.requests} == {0}
    note = "2 GPU(s) for 4 workers: all compute on processors, for a run is never mixed; workers=2 computes on the GPUs"
    assert on_processors.notes == [note] and layout(both, "workers=2").device == "cuda"
    assert layout(both, "workers=auto").device == "cuda" and len(layout(both, "workers=auto").requests) == 2
    with pytest.raises(Lacking, match=r"lacks 4 GPU \(there are 2\)"):
        layout(both, "workers=4", "device=cuda")


def test_what_is_lacking_is_waited_for_and_said_once(monkeypatch, capsys):
    grown = iter([some(None), some(None), some(None, None)])
    monkeypatch.setattr(clusters, "look", lambda address, settings: Cluster(address, next(grown), loopback=False))
    monkeypatch.setattr(clusters, "LOOK_EVERY_S", 0.0)
    none = Cluster("h:1", [], loopback=False)
    found, decided = settle(none, SETTINGS | {"nodes": 2, "wait_s": 50.0}, lambda now: len(now.nodes))
    assert decided == len(found.nodes) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "lacks 2 of 2 nodes (there is none)" in said[0]
    assert "waiting  50 s at most" in said[0] and "lacks 1 of 2 nodes (there is 10.0.0.0)" in said[1]


def test_after_the_deadline_it_says_what_is_missing_and_other_errors_are_not_waited_for():
    with pytest.raises(
        Lacking, match=r'lacks 1 of 1 nodes with the labels {"pool": "a"} \(there is none\).*waited 0 s'
    ):
        settle(Cluster("h:1", [], False), SETTINGS | {"labels": {"pool": "a"}}, lambda now: None)

    def wrong(_: Cluster) -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        settle(Cluster("h:1", some(None), False), SETTINGS | {"wait_s": 1e9}, wrong)


def said_by(**changes: object) -> dict:
    versions = {"python": "3.11.7", "torch": "2.14.0"}
    return {
        "sees": True,
        "answers": True,
        "interface": "eth0",
        "processor": "x86_64 avx2",
        "versions": versions,
    } | changes


@pytest.mark.parametrize(
    "other, says",
    [
        ({"sees": False}, "run_root=/runs: node 10.0.0.2 does not see what is written there; name a folder on storage"),
        ({"answers": False}, "run_root=/runs: node 10.0.0.2 writes there what is not seen here"),
        ({"interface": "eth1"}, "cluster.interface=eth0: node 10.0.0.2 is not on it, but on eth1"),
        ({"versions": {"python": "3.11.7", "torch": "2.13.0"}}, "10.0.0.1 has torch 2.14.0, node 10.0.0.2 2.13.0"),
        (
            {"processor": "x86_64 avx2 avx512f"},
            "numerics=exact: node 10.0.0.1 computes with x86_64 avx2, node 10.0.0.2",
        ),
    ],
)
def test_a_node_that_can_not_take_part_is_named(other, says):
    facts = {"10.0.0.1": said_by(), "10.0.0.2": said_by(**other)}
    (problem,) = nodes.disagreements(facts, Path("/runs"), "eth0", alike=True)
    assert says in problem


def test_nodes_that_are_alike_agree_and_unlike_processors_may_train_without_exactness():
    assert nodes.disagreements({"a": said_by(), "b": said_by()}, Path("/runs"), None, alike=True) == []
    unlike = {"a": said_by(), "b": said_by(processor="aarch64 bf16")}
    assert nodes.disagreements(unlike, Path("/runs"), None, alike=False) == []


def test_a_node_reads_the_marker_and_answers_beside_it(tmp_path):
    marker, answer = tmp_path / "marker", tmp_path / "answer"
    assert not nodes.look(marker, answer, "127.0.0.1")["sees"] and not answer.exists()
    marker.write_text("x")
    said = nodes.look(marker, answer, "127.0.0.1")
    assert said["sees"] and answer.read_text() == "x" and said["interface"] == "lo"
    assert said["versions"]["ray"] == "2.60.0"


def test_traces_of_looking_are_removed_and_what_was_made_for_it_where_it_fails(tmp_path, monkeypatch):
    there = some(None, None)
    monkeypatch.setattr(nodes, "_ask", lambda asked, _: {node.id: said_by(sees=False) for node in asked})
    with pytest.raises(ValueError, match="node 10.0.0.0 does not see"):
        nodes.examine(there, tmp_path / "a" / "b", None, alike=True)
    assert list(tmp_path.iterdir()) == []

    def answering(asked, arguments):
        return {node.id: nodes.look(*arguments(node)[:2], "127.0.0.1") for node in asked}

    monkeypatch.setattr(nodes, "_ask", answering)
    assert nodes.examine(there, tmp_path / "a", None, alike=True) == {"lo"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and not list((tmp_path / "a").iterdir())


def test_interfaces_by_address_and_by_name():
    assert nodes.interface_of("127.0.0.1") == "lo" and nodes.interface_of("203.0.113.9") is None
    assert nodes.address_of("cluster.interface", "lo") == "127.0.0.1"
    there = ", ".join(name for _, name in socket.if_nameindex() if nodes._address(name))
    with pytest.raises(ValueError, match="cluster.interface=lo: a Ray started here listens on loopback only"):
        clusters._on({"interface": "lo", "expose": False})
    assert clusters._on({"interface": "lo", "expose": True}) == {"_node_ip_address": "127.0.0.1"}
    with pytest.raises(ValueError, match=f"cluster.interface=nope: this machine has no such .*; it has {there}"):
        nodes.address_of("cluster.interface", "nope")


def test_exposure_is_said_with_its_interface_and_its_token(monkeypatch):
    cluster = Cluster("10.0.0.0:6379", some(None, None), loopback=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    who = "workers listen on eth0 alone, Ray on every interface; Ray asks for a token"
    assert exposure(cluster, {"eth0"}) == f"2 node(s) at 10.0.0.0:6379, exposed: {who}"
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "WITHOUT a token" in exposure(cluster, {"eth0"})
