"""Chaos in small: three kills from outside, of a worker, of a node and of the command, and the weights are the same."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from scripts import chaos

ROOT = Path(__file__).resolve().parent.parent


def test_three_kills_change_no_bit():
    command = [
        sys.executable,
        "scripts/chaos.py",
        "--kills",
        "3",
        "--json",
        "data.image_size=8",
        "model.depth=8",
        "max_steps=40",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["hash_equal"] is True and len(made["strikes"]) == 3
    assert set(made["kills"]) == {"worker killed", "raylet killed", "driver killed"}
    by_kind = {strike["kind"]: strike for strike in made["strikes"]}
    for kind in ("worker killed", "raylet killed"):
        assert by_kind[kind]["detected_s"] is not None and by_kind[kind]["source"] in ("memory", "checkpoint")
    assert by_kind["driver killed"]["training_again_s"] > 0


def test_a_plan_has_each_kind_as_often_and_all_its_moments():
    strikes = chaos.plan(30, 0)
    assert Counter(strike.kind for strike in strikes) == dict.fromkeys(chaos.KINDS, 5)
    assert all({s.moment for s in strikes if s.kind == kind} == set(chaos.MOMENTS) for kind in chaos.KINDS)
    assert chaos.plan(30, 0) == strikes != chaos.plan(30, 1)


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
