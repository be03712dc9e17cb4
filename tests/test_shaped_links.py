"""The networks beside real all-reduces on shaped links: what is pure, and with -m netns small runs of the script."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts import shaped_links as script
from scripts import shaped_network
from scripts.shaped_mesh import ALGORITHMS, Line, fit, mesh
from scripts.shaped_network import Layout
from train.comm.peers import Peers
from train.comm.plan_group import PlanGroup, Turn, worker_mesh
from train.sim.flow import Flow
from train.sim.network import AlphaBeta

MIB = 1 << 20
LINES = {"between": Line(100e-6, 12e6), "inside": Line(50e-6, 48e6)}


def test_the_line_of_an_exact_link_is_found_again() -> None:
    link = Line(200e-6, 12.5e6)
    nbytes = [4, MIB, 4 * MIB]
    found = fit(nbytes, [link.seconds(size) for size in nbytes])
    assert (found.alpha_s, found.bytes_per_s) == pytest.approx((link.alpha_s, link.bytes_per_s))


@pytest.mark.parametrize(
    "nbytes, seconds, says",
    [
        ([4], [1e-4], "two sizes or more that rise"),
        ([4, 4, MIB], [1e-4, 1e-4, 0.1], "two sizes or more that rise"),
        ([4, MIB], [0.1, 0.1], "no link is like that"),
        ([MIB, 4 * MIB], [0.05, 0.4], "no link is like that"),
    ],
)
def test_what_is_no_link_is_refused(nbytes: list[int], seconds: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(nbytes, seconds)


def seconds(of: Layout, algorithm: str, nbytes: int) -> tuple[float, float]:
    made = mesh(of, LINES)
    return tuple(network.seconds(ALGORITHMS[algorithm](made), nbytes) for network in (AlphaBeta(), Flow()))


def test_a_ring_of_hosts_costs_its_closed_form() -> None:
    wanted = 6 * (100e-6 + MIB / 4 / 12e6)
    assert seconds(Layout(4), "ring", MIB) == pytest.approx((wanted, wanted))


def test_hosts_whose_chips_have_their_own_cards() -> None:
    """Inside: halves go one way and the other; between: halves of a half, twice."""
    wanted = 2 * (50e-6 + MIB / 2 / 48e6) + 2 * (100e-6 + MIB / 4 / 12e6)
    assert seconds(Layout(2, 2), "hierarchical", MIB) == pytest.approx((wanted, wanted))


def test_a_shared_card_halves_the_rate_of_two_chips_in_flow_alone() -> None:
    inside, alpha = 2 * (50e-6 + MIB / 2 / 48e6), 2 * 100e-6
    alone, shared = inside + alpha + 2 * MIB / 4 / 12e6, inside + alpha + 2 * MIB / 2 / 12e6
    assert seconds(Layout(2, 2, shared=True), "hierarchical", MIB) == pytest.approx((alone, shared))


def test_one_chip_alone_gets_the_whole_shared_card() -> None:
    wanted = 6 * max(50e-6 + MIB / 4 / 48e6, 100e-6 + MIB / 4 / 12e6)
    assert seconds(Layout(2, 2, shared=True), "ring", MIB) == pytest.approx((wanted, wanted))


@pytest.mark.parametrize("text", script.LAYOUTS)
def test_the_plan_that_is_priced_is_the_plan_that_runs(text: str) -> None:
    of = script.layout(text, 100, 200)
    for algorithm in ALGORITHMS.values():
        priced = list(algorithm(mesh(of, LINES)).rounds())
        runs = list(algorithm(worker_mesh(of.chips, of.axes)).rounds())
        assert len(priced) == len(runs)
        for one, other in zip(priced, runs, strict=True):
            assert one.reduce == other.reduce
            for mine, its in zip(one[:4], other[:4], strict=True):
                np.testing.assert_array_equal(mine, its)


def test_a_rank_asks_for_a_round_s_messages_before_it_sends_its_own() -> None:
    """Behind them, the asking would wait on a wire until they have gone: half duplex."""
    group, calls = PlanGroup.__new__(PlanGroup), []
    group._room = {}
    call = SimpleNamespace(wait=lambda: None)
    group._group = SimpleNamespace(
        **{
            name: lambda tensors, peer, tag, name=name: (calls.append((name, peer)), call)[1]
            for name in ("send", "recv")
        }
    )
    for reduce in (True, False):
        group._take_turn(Turn(((1, 0, 1),), ((2, 1, 2),), reduce), torch.zeros(8), 4)
    assert calls == [("recv", 2), ("send", 1)] * 2


def test_a_collective_that_ends_just_as_waiting_for_it_is_given_up_has_not_failed() -> None:
    """Eight hosts that share two cores met this: gloo's "Operation timed out!" of an operation that was done."""

    class Work:
        waited = 0

        def is_completed(self) -> bool:
            return self.waited > 0

        def wait(self, timeout: object = None) -> None:
            self.waited += 1
            if timeout is not None:
                raise RuntimeError("Operation timed out!")

    group, work = PlanGroup.__new__(PlanGroup), Work()
    group.backend, group._peers = "gloo", Peers("gloo", 0, 1, None, 1.0)
    group._wait("all_gather", work)
    assert work.waited == 2


def row(layout: str, nbytes: int, algorithm: str, took: float, predicted: float) -> dict:
    errors = {f"{name}_error": predicted / took - 1 for name in script.NETWORKS}
    found = {"layout": layout, "bytes": nbytes, "algorithm": algorithm, "seconds": took, "shared": layout == "shared"}
    return found | {f"{name}_s": predicted for name in script.NETWORKS} | errors


def test_errors_count_from_4_mib_up_and_pairs_where_predictions_are_apart() -> None:
    rows = [
        row("a", MIB, "ring", 1.0, 2.0),  # a small size: its error doesn't count, its order does
        row("a", MIB, "halving_doubling", 2.0, 1.0),
        row("a", 4 * MIB, "ring", 10.0, 9.5),
        row("a", 4 * MIB, "halving_doubling", 10.5, 9.0),  # within 10 % of the other: any order is right
        row("b", 4 * MIB, "ring", 10.0, 8.0),
    ]
    found = script.score(rows, "flow")
    assert (found["rows"], found["pairs"], found["wrong_pairs"]) == (3, 1, 1)
    assert (found["median"], found["worst"]) == pytest.approx((1 - 9.0 / 10.5, 0.2))


def test_aims_are_met_only_where_errors_and_order_are() -> None:
    right = [row("a", 4 * MIB, "ring", 10.0, 9.5), row("a", 4 * MIB, "halving_doubling", 20.0, 19.0)]
    wrong = [row("shared", 4 * MIB, "ring", 10.0, 9.5), row("shared", 4 * MIB, "halving_doubling", 20.0, 9.6)]
    found = {(one["where"], one["network"]): one["met"] for one in script.aims(right + wrong)}
    assert found == {
        ("all layouts", "alpha_beta"): False,
        ("all layouts", "flow"): False,
        ("no shared card", "alpha_beta"): True,
        ("no shared card", "flow"): True,
    }


def test_short_messages_go_more_often() -> None:
    assert [script.often(nbytes, 5) for nbytes in (4, 65536, MIB)] == [(4, 51), (65536, 16), (MIB, 5)]


def found_of(text: str) -> dict:
    """What `result` gives for one layout whose links and all-reduces are exact."""
    of = script.layout(text, 100, 200)
    order = {"all_reduce": [(name, 4 * MIB, 5) for name in script.algorithms(of)]}
    times = [[LINES[way].seconds(nbytes)] * 5 for way in script.ways(of) for nbytes in script.PING_PONG_BYTES]
    took = [[seconds(of, name, nbytes)[1]] * 5 for name, nbytes, _ in order["all_reduce"]]
    raw = {"ping_pong": times, "all_reduce": took, "busy": [0.5] * len(took)}
    made = script.compare(of, order, raw)
    machine = {"cores": 2, "kernel": "6.1", "load": 0.0, "repetitions": 5, "card_mbit": 100, "port_mbit": 200}
    return {"machine": machine, **made, "aims": script.aims(made["rows"])}


def test_exact_links_are_predicted_exactly_and_written_down() -> None:
    found = found_of("4x2:shared")
    assert [one["flow_error"] for one in found["rows"]] == pytest.approx([0, 0, 0], abs=1e-4)
    by_name = {one["algorithm"]: one["alpha_beta_error"] for one in found["rows"]}
    assert by_name["ring"] == pytest.approx(0, abs=1e-4) and by_name["hierarchical"] < -0.3
    page = script.document(found)
    for said in ("| flow | all layouts | 3 | 0.0% | 0.0% | 0 of ", "12.00", "one card a host, 100 Mbit/s"):
        assert said in page
    assert page.count("\n| 4 hosts of 2 chips") == 3 + 2


@pytest.mark.parametrize(
    "words, says",
    [
        (["9"], "hosts=9 must be 2 to 8"),
        (["1"], "hosts=1 must be 2 to 8"),
        (["2x5"], "chips_per_host=5 must be 1 to 4"),
        (["2:shared"], "shared=true needs chips_per_host"),
        (["2x"], "'2x' is no layout"),
        (["2x2:half"], "'2x2:half' is no layout"),
        (["2", "--card-mbit", "1000"], "card_mbit=1000 must be 1 to 500"),
        (["2", "--repetitions", "0"], "--repetitions 0 must be at least 1"),
        (["2", "--mib", "0"], "--mib [0.0] 4 bytes to 1 GiB"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture) -> None:
    assert script.main(words) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "lacks, says", [("root", "needs root"), ("tc", "needs tc of iproute2: apt-get install iproute2")]
)
def test_without_root_or_iproute2_it_refuses(
    lacks: str, says: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shaped_network.os, "geteuid", lambda: 1000 if lacks == "root" else 0)
    monkeypatch.setattr(shaped_network.shutil, "which", lambda tool: None if tool == lacks else f"/sbin/{tool}")
    assert script.main(["2"]) == 2
    assert says in capsys.readouterr().err


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    before = set(shaped_network.left_behind())
    yield
    assert set(shaped_network.left_behind()) <= before


COMMAND = [sys.executable, "scripts/shaped_links.py"]


@pytest.mark.netns
@pytest.mark.parametrize("text", ["2", "2x2", "2x2:shared"])
def test_all_reduces_are_exact_and_no_faster_than_the_wire(text: str, nothing_stays: None) -> None:
    """The workers check the sums. A card sends 12.5 MB/s and no more, whatever the machine does."""
    command = [*COMMAND, text, "--mib", "0.5", "--repetitions", "2", "--json"]
    done = subprocess.run(command, cwd=script.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["algorithm"] for one in found["rows"]] == script.algorithms(script.layout(text, 100, 200))
    for link in found["links"]:
        assert link["bytes_per_s"] < (12.5e6 if link["way"] == "between" else 25e6) * 1.02
    for one in found["rows"]:
        crosses = {"ring": 1.5 if text != "2" else 1.0, "halving_doubling": 1.0, "hierarchical": 0.5}[one["algorithm"]]
        assert one["least_s"] > crosses * 0.5 * MIB / 12.5e6 * 0.95


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_no_namespace(number: int, nothing_stays: None) -> None:
    process = subprocess.Popen([*COMMAND, "3"], cwd=script.ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    mine = f"{shaped_network.PREFIX}-{process.pid}-chip2"
    while mine not in shaped_network.left_behind():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said


@pytest.mark.netns
def test_what_a_killed_run_left_goes_with_the_next_one(nothing_stays: None) -> None:
    process = subprocess.Popen(["sleep", "0"])
    process.wait()
    name = f"{shaped_network.PREFIX}-{process.pid}-chip0"
    subprocess.run(["ip", "netns", "add", name], check=True)
    with shaped_network.cluster(Layout(2)):
        assert name not in shaped_network.left_behind()
