"""Ascend's rank table, version "1.0", and HCCL's settings, held against the documented rules; the script."""

import copy
import ipaddress
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import rank_table, submit
from scripts import rank_table as script
from train.comm import algorithms
from train.mesh.mesh import Mesh
from train.mesh.topology import Atlas900, LinkClass

LINK = LinkClass("any", 10, 1)


def mesh(hosts: int) -> Mesh:
    return Mesh("Atlas 900", {"host": hosts, "chip": 8}, Atlas900(LINK, LINK, LINK))


def devices(table: dict) -> list[dict]:
    return [device for server in table["server_list"] for device in server["device"]]


@pytest.mark.parametrize("hosts", [1, 32, 128])
def test_the_table_of_a_mesh(hosts: int) -> None:
    table = rank_table.rank_table(mesh(hosts))
    assert (table["version"], table["status"], table["server_count"]) == ("1.0", "completed", str(hosts))
    assert [device["rank_id"] for device in devices(table)] == [str(rank) for rank in range(8 * hosts)]
    assert [device["device_id"] for device in devices(table)] == [str(rank % 8) for rank in range(8 * hosts)]
    assert len({device["device_ip"] for device in devices(table)}) == 8 * hosts
    assert len({server["server_id"] for server in table["server_list"]}) == hosts


def test_every_value_is_a_string() -> None:
    def leaves(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return [value] if inner is None else [leaf for item in inner for leaf in leaves(item)]

    assert {type(leaf) for leaf in leaves(rank_table.rank_table(mesh(32)))} == {str}


def test_devices_i_and_i_plus_4_share_one_of_four_subnets_on_all_servers() -> None:
    table = rank_table.rank_table(mesh(512))
    networks = [ipaddress.ip_network(f"{device['device_ip']}/16", strict=False) for device in devices(table)]
    assert len(set(networks)) == 4
    for rank, network in enumerate(networks):
        assert network == networks[rank % 4]


BROKEN: dict[str, tuple[Callable[[dict], object], str]] = {
    "a number": (lambda t: devices(t)[0].update(rank_id=0), "rank_id=0 must be a string"),
    "another version": (lambda t: t.update(version="1.2"), "version='1.2'"),
    "not completed": (lambda t: t.update(status="initializing"), "status='initializing'"),
    "a wrong count": (lambda t: t.update(server_count="3"), "server_count='3'"),
    "no servers": (lambda t: t.update(server_list=[]), "server_list is missing or empty"),
    "a long id": (lambda t: t["server_list"][0].update(server_id="a" * 65), "longer than 64"),
    "one server twice": (
        lambda t: t["server_list"][1].update(server_id="10.0.0.1"),
        "server_id 10.0.0.1 is there twice",
    ),
    "devices": (lambda t: t["server_list"][0].update(devices=t["server_list"][0].pop("device")), "the key has no s"),
    "a ninth device": (lambda t: devices(t)[7].update(device_id="8"), "device_id must be 0 to 7"),
    "a device twice": (lambda t: devices(t)[1].update(device_id="0"), "device_id 0 is there twice"),
    "no address": (lambda t: devices(t)[0].pop("device_ip"), "device_ip=None must be a string"),
    "half an address": (lambda t: devices(t)[0].update(device_ip="10.1.0"), "no IPv4 or IPv6 address"),
    "an address twice": (lambda t: devices(t)[9].update(device_ip="10.1.0.1"), "device_ip 10.1.0.1 is there twice"),
    "two addresses": (lambda t: devices(t)[9].update(device_ip="10.9.0.1,10.9.0.2"), "the same number of addresses"),
    "a port": (lambda t: devices(t)[0].update(device_port="70000"), "device_port='70000' must be 1 to 65535"),
    "a gap": (lambda t: devices(t)[15].update(rank_id="16"), "must follow on another"),
    "not from 0": (lambda t: [d.update(rank_id=str(n + 1)) for n, d in enumerate(devices(t))], "must be 0 to 15"),
    "a rank in words": (lambda t: devices(t)[0].update(rank_id="-1"), "must be decimal digits"),
    "interleaved": (
        lambda t: [d.update(rank_id=str(n % 8 * 2 + n // 8)) for n, d in enumerate(devices(t))],
        "not interleaved between servers",
    ),
    "unequal servers": (lambda t: t["server_list"][1]["device"].pop(), "all must have the same number"),
    "a set of four": (
        lambda t: [server.update(device=server["device"][2:6]) for server in t["server_list"]],
        "2,3,4,5",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_table_that_breaks_a_rule_is_refused(broken: str) -> None:
    table = copy.deepcopy(rank_table.rank_table(mesh(2)))
    rank_table.check(table)
    change, says = BROKEN[broken]
    change(table)
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        rank_table.check(table)


def test_four_devices_of_one_square_are_accepted() -> None:
    table = rank_table.rank_table(mesh(1).first_chips(4))
    assert [device["device_id"] for device in devices(table)] == list("0123")


@pytest.mark.parametrize(
    "collective, algorithm",
    [("auto", "H-D_R"), ("hierarchical", "H-D_R"), ("hierarchical_ring", "ring"), ("hierarchical_nhr", "NHR")]
    + [(flat, None) for flat in ("ring", "multi_ring", "halving_doubling", "double_tree", "hierarchical_tree")],
)
def test_the_all_reduce_between_servers_is_the_plan_s(collective: str, algorithm: str | None) -> None:
    found = rank_table.settings(getattr(algorithms, collective)(mesh(32)), Path("/a/rank_table.json"))
    wanted = f"allreduce=level0:NA;level1:{algorithm}" if algorithm else None
    assert found.get("HCCL_ALGO") == wanted
    assert 120 <= int(found["HCCL_CONNECT_TIMEOUT"]) <= 7200
    assert found["RANK_SIZE"] == "256"


def test_one_server_has_no_algorithm_between_servers() -> None:
    assert rank_table.level1(algorithms.hierarchical(mesh(1))) is None


def test_few_hosts_that_are_no_power_of_two_take_hccl_s_ring() -> None:
    assert rank_table.level1(algorithms.auto(mesh(6))) == "ring"


def test_addresses_of_real_servers_come_from_hccn_conf(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = []
    for server in range(2):
        path = tmp_path / f"hccn{server}.conf"
        lines = [f"address_{device}=192.168.{100 + device % 4}.{10 * server + 1 + device // 4}" for device in range(8)]
        path.write_text("\n".join(["arp_0=1", *lines[::-1], "netmask_0=255.255.255.0", ""]))
        given += ["--hccn", f"172.16.0.{server + 1}={path}"]
    out = tmp_path / "it's out"
    assert script.main(["mesh=atlas900_1024", "mesh.axes.host=2", "--out", str(out), *given]) == 0
    table = json.loads((out / "rank_table.json").read_text())
    assert [server["server_id"] for server in table["server_list"]] == ["172.16.0.1", "172.16.0.2"]
    assert devices(table)[8 + 5]["device_ip"] == "192.168.101.12"
    sourced = subprocess.run(["sh", "-c", '. "$0"; env', out / "hccl.sh"], capture_output=True, text=True, check=True)
    assert f"RANK_TABLE_FILE={out.resolve() / 'rank_table.json'}\n" in sourced.stdout
    assert "HCCL_ALGO=allreduce=level0:NA;level1:H-D_R\n" in sourced.stdout
    assert script.main(["--check", str(out / "rank_table.json")]) == 0
    assert "meets the rules (2 servers)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["mesh=dgx_h100"], 'rank tables of version "1.0" are for Ascend 910 and 910B'),
        (["mesh=cloudmatrix384"], "its library is hccl_a3"),
        (["mesh=atlas900_256", "--hccn", "a"], "--hccn a: give SERVER_ID=FILE"),
        (["mesh=atlas900_256", "--hccn", "a={hccn}"], "1 servers with 2 devices are not mesh"),
        (["mesh=atlas900_256", "--hccn", "a=/no/such"], "/no/such: No such file"),
        (["mesh=atlas900_257"], "mesh=atlas900_257: no such option"),
        (["--check", "{hccn}"], "does not end in .json"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hccn = tmp_path / "hccn.conf"
    hccn.write_text("address_0=192.168.100.1\naddress_1=192.168.101.1\n")
    assert script.main([word.format(hccn=hccn) for word in words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("name, written", [("atlas800", True), ("dgx_a100", False)])
def test_a_job_of_an_ascend_mesh_has_its_table(
    name: str, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit.KINDS["local"], "start", lambda job: None)
    words = [f"mesh={name}", "chip_batch_size=4", "workers=1", f"run_root={tmp_path}", "job=one", "format=json"]
    monkeypatch.setattr(submit.KINDS["local"], "state", lambda job: submit.State("RUNNING"))
    monkeypatch.setattr(sys, "argv", ["submit", *words])
    assert submit.main() == 0
    folder = tmp_path / "jobs" / "one"
    assert (folder / "rank_table.json").exists() == (folder / "hccl.sh").exists() == written
    if written:
        rank_table.check(json.loads((folder / "rank_table.json").read_text()))
