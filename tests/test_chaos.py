"""Chaos in small: kills from outside, of a worker, of a node and of the command, and the weights are the same."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts import chaos
from scripts.chaos_strikes import KINDS, MOMENTS, plan

ROOT = Path(__file__).resolve().parent.parent


def chaos_in_small(kills: int) -> dict:
    """What the command says of that many kills of a small run, one of each kind in turn."""
    small = ["data.image_size=8", "model.depth=8", "max_steps=40"]
    command = [sys.executable, "scripts/chaos.py", "--kills", str(kills), "--json", *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["hash_equal"] is True and len(made["strikes"]) == kills
    assert set(made["kills"]) == set(KINDS[:kills])
    return made


@pytest.mark.slow  # test_launch_run kills a worker by default
def test_a_killed_worker_changes_no_bit():
    (strike,) = chaos_in_small(1)["strikes"]
    assert strike["detected_s"] is not None and strike["source"] in ("memory", "checkpoint")


@pytest.mark.slow
def test_one_kill_of_each_kind_changes_no_bit():
    by_kind = {strike["kind"]: strike for strike in chaos_in_small(len(KINDS))["strikes"]}
    for kind in ("worker killed", "raylet killed"):
        assert by_kind[kind]["detected_s"] is not None and by_kind[kind]["source"] in ("memory", "checkpoint")
    assert by_kind["driver killed"]["training_again_s"] > 0


def test_a_plan_has_each_kind_as_often_and_all_its_moments():
    strikes = plan(30, 0)
    assert Counter(strike.kind for strike in strikes) == dict.fromkeys(KINDS, 5)
    assert all({s.moment for s in strikes if s.kind == kind} == set(MOMENTS) for kind in KINDS)
    assert plan(30, 0) == strikes != plan(30, 1)


@pytest.mark.parametrize(
    "words, named",
    [
        (["--kills", "0"], "--kills 0: must be at least 1"),
        (["numerics=fast"], "numerics: fast: only numerics=exact promises the same bits"),
        (["workers=2"], "workers: chaos has its own; leave it out"),
        (["max_steps=10"], "max_steps: 10: chaos needs at least 40"),
    ],
)
def test_wrong_input_is_one_line(words, named, capsys):
    assert chaos.main(words) == 2
    assert capsys.readouterr().err == f"chaos: {named}\n"
