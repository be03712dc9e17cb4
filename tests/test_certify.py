"""The certificate: as a command with Ray, and what makes it fail."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT, environment
from rank_processes import run_ranks
from torch.distributed import PrefixStore
from training_samples import tiny

from scripts.certify import (
    LAYOUTS,
    Layout,
    RunFailed,
    Trained,
    certify,
    choose,
    complaints,
    main,
    plan,
    relative_difference,
    split,
)
from train.build import WorkerContext, run_worker
from train.comm import tree
from train.metrics import read_rows

KEYS = ["mode", "hashes", "all_equal", "steps", "chips", "block", "loss_first", "loss_last"]
SMALL = """model=resnet_cifar20 mesh=atlas900_64 mesh.axes.host=5 chip_batch_size=2 precision=fp32 optim=sgd
data=synthetic data.image_size=8 data.num_classes=4 data.num_train=80 data.num_eval=8 schedule.warmup_epochs=0
schedule.base_lr=0.05 epochs=100""".split()
ORDER_OF_WORKERS = """
import train.comm.tree as tree
def in_turn(nodes, first, size, num_blocks, add):
    values = [nodes[node] for node in sorted(nodes, reverse=True)]
    for value in values[1:]:
        values[0] = add(values[0], value)
    return values[0]
tree._combine = in_turn
"""


def script(ray_folder: Path, *words: str, hooks: Path | None = None) -> tuple[int, dict, str]:
    """(exit status, the JSON object, stderr)"""
    env = environment(ray_folder)
    if hooks is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(hooks), env["PYTHONPATH"]])
    command = [sys.executable, ROOT / "scripts/certify.py", *SMALL, *words, "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_command_certifies_two_layouts(ray_folder):
    chosen = ["--layouts", "1 worker", "--layouts", "3 workers"]
    status, made, said = script(ray_folder, "max_steps=4", *chosen)
    assert status == 0, said
    assert list(made) == KEYS and list(made["hashes"]) == ["1 worker", "3 workers"]
    assert len({*made["hashes"].values()}) == 1 and made["all_equal"] is True
    assert (made["mode"], made["steps"], made["chips"], made["block"]) == ("exact", 4, 40, 8)
    assert made["loss_last"] < made["loss_first"]


@pytest.mark.slow
def test_the_command_certifies_all_layouts(ray_folder):
    status, made, said = script(ray_folder)
    assert status == 0, said
    assert list(made["hashes"]) == [layout.name for layout in LAYOUTS] and made["all_equal"] is True
    assert (made["steps"], made["chips"]) == (30, 40)


@pytest.mark.slow
def test_the_command_fails_where_workers_sum_in_another_order(ray_folder, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(ORDER_OF_WORKERS)
    chosen = ["--layouts", "1 worker", "--layouts", "3 workers"]
    status, made, said = script(ray_folder, "max_steps=4", *chosen, hooks=tmp_path)
    assert status == 1 and made["all_equal"] is False
    assert "certify: the weights differ, and numerics=exact promises the same bits" in said


@pytest.mark.slow
def test_fast_numerics_are_certified_by_how_far_apart_they_are(ray_folder):
    chosen = ["--layouts", "1 worker", "--layouts", "3 workers"]
    status, made, said = script(ray_folder, "numerics=fast", "max_steps=3", "data.image_size=16", *chosen)
    assert status == 0, said
    assert list(made) == [*KEYS, "largest_relative_difference"]
    assert 0 <= made["largest_relative_difference"] < 0.5


def test_the_difference_of_weights_is_relative_to_each_tensors_norm():
    first = {"a.weight": torch.tensor([3.0, 4.0]), "a.running_var": torch.tensor([1.0])}
    other = {"a.weight": torch.tensor([3.0, 4.5]), "a.running_var": torch.tensor([9.0])}
    assert relative_difference(other, first) == pytest.approx(0.1)


def on_two(rank: int, world_size: int, store, folder: Path) -> list[Trained]:
    right = trained(folder / "right", rank, PrefixStore("right", store))
    exec(ORDER_OF_WORKERS, {})  # in a process of its own
    return [right, trained(folder / "wrong", rank, PrefixStore("wrong", store))]


def trained(folder: Path, rank: int = 0, store=None, *overrides: str) -> Trained:
    folder.mkdir(exist_ok=True)
    context = WorkerContext(rank=rank, world_size=1 if store is None else 2, store=store)
    shares = "shares=null" if store is None else "shares=[1,2]"
    words = ["data.image_size=16", "model.zero_init_last_gamma=false", "max_steps=2", "workers=auto", shares]
    result = run_worker(tiny(*words, "schedule.warmup_epochs=0", *overrides), context, folder)
    losses = [row["values"]["train/loss"] for row in read_rows(folder) if row["kind"] == "step"]
    return Trained(result["weights_sha256"], result["steps"], result["epochs"], 24, 8, losses)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Trained]:
    """By one worker, by two as it should be, by two that sum in the order of the workers' nodes, of another seed."""
    folder = tmp_path_factory.mktemp("runs")
    (right, wrong), _ = run_ranks(2, on_two, folder)
    found = {"one": trained(folder / "one"), "right": right, "wrong": wrong}
    return found | {"seed": trained(folder / "seed", 0, None, "seed=1")}


def certified(runs: dict[str, Trained], *names: str) -> dict:
    said: list[str] = []
    made = certify("exact", [Layout(name, 1) for name in names], lambda layout: runs[layout.name], said.append)
    assert len(said) == len(names)
    return made


def test_unequal_workers_are_certified(runs):
    made = certified(runs, "one", "right")
    assert made["all_equal"] is True and made["hashes"]["one"] == made["hashes"]["right"]


def test_a_changed_order_of_the_sum_makes_the_certificate_fail(runs):
    assert tree._combine.__name__ == "_combine"
    made = certified(runs, "one", "right", "wrong")
    assert made["all_equal"] is False and made["hashes"]["wrong"] != made["hashes"]["one"]
    assert "the weights differ, and numerics=exact promises the same bits" in complaints(made)


def test_another_seed_has_another_hash(runs):
    assert certified(runs, "one", "seed")["all_equal"] is False


def test_a_failed_run_and_a_loss_that_does_not_fall_make_no_certificate():
    def run(layout: Layout) -> Trained:
        if layout.interrupt:
            raise RunFailed("worker 1 died")
        return Trained("abc", 30, 6.0, 64, 8, [2.0, 1.0] if layout.workers == 1 else [2.0, 2.5])

    said: list[str] = []
    made = certify("exact", [LAYOUTS[0], LAYOUTS[5]], run, said.append)
    assert made["hashes"] == {"1 worker": "abc", "killed and resumed": None} and made["all_equal"] is False
    assert complaints(made) == ["did not finish: killed and resumed"]
    assert said[1] == "killed and resumed: worker 1 died"
    made = certify("exact", [LAYOUTS[1]], run, said.append)
    assert complaints(made) == ["the loss did not fall (from 2 to 2.5): raise max_steps or mind the recipe"]
    assert complaints(made | {"loss_last": float("nan")}) != []


def test_the_run_is_at_least_30_steps_over_2_epochs_and_overrides_win():
    words, config = plan(SMALL)
    assert (config["max_steps"], config["target_top1"], config["device"], config["epochs"]) == (30, 1, "cpu", 100)
    assert plan([*SMALL, "data.num_train=8000"])[1]["max_steps"] == 200
    assert plan([*SMALL, "data.num_train=8000", "max_steps=7"])[1]["max_steps"] == 7
    assert plan(["experiment=synthetic"])[1]["epochs"] == 2  # the experiment has 1


@pytest.mark.parametrize("num_blocks, shares", [(5, [1, 2, 1, 1]), (8, [1, 4, 1, 2]), (128, [1, 84, 1, 42])])
def test_unequal_shares_go_round(num_blocks, shares):
    unequal = next(layout for layout in LAYOUTS if layout.unequal)
    assert split(unequal, num_blocks) == {"workers": 4, "shares": shares} and sum(shares) == num_blocks


@pytest.mark.parametrize(
    "words, named",
    [
        (["workers=2"], "workers: every layout has its own; leave it out"),
        (["nonsense=2"], "nonsense: no such key"),
        (["mesh.axes.host=3"], "'4 workers' needs 4 blocks, and the mesh has 3: use a larger mesh, a smaller bn_span"),
        (["bn_span=40"], "'2 workers' needs 2 blocks, and the mesh has 1: use"),
        (["numerics=fast", "gradient_sum=plan"], "workers=2: "),
        (["--layouts", "5 workers"], "--layouts 5 workers: give one of '1 worker', "),
        (["--layouts", "killed"], "--layouts killed: one alone certifies nothing"),
    ],
)
def test_what_cannot_be_certified_is_refused_in_one_line(words, named, capsys):
    assert main([*SMALL, *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"certify: {named}"), err


def test_sigterm_ends_it_where_ctrl_c_is_ignored_too(capsys):
    """As in the background of a script. What it starts would inherit that SIGTERM is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert main(["--layouts", "killed"]) == 2
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_four_blocks_have_no_unequal_shares():
    assert [layout.name for layout in choose(None, 4)] == [layout.name for layout in LAYOUTS if not layout.unequal]
    with pytest.raises(ValueError, match="'4 unequal' needs 5 blocks, and the mesh has 4"):
        choose(["4 u", "1"], 4)
