"""Four emulated chips in one process compute what four real processes of torch's DistributedDataParallel compute.

Smaller cases of scripts/emulated_equals_real.py: ResNet-18 without its last stage, few steps. Each law is also broken
on purpose, and must be seen to break.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from scripts import emulated_equals_real as script
from scripts import emulated_equals_real_sides as sides
from scripts.emulated_equals_real import compare_runs, compare_steps
from scripts.emulated_equals_real_sides import CHIPS, Case, Emulated, Processes, Worst
from train.models.chip_norm import ChipPass, allocate_chips, norm_layers

PAIRS = Case((2,) * CHIPS, steps=3, stages=3, image_size=8)
UNEQUAL = replace(PAIRS, sizes=(2, 3, 5, 8))
ONE_STEP = replace(PAIRS, steps=1)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores are the processes'
    with Processes() as processes:
        yield processes
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [PAIRS, UNEQUAL, replace(UNEQUAL, dtype="float32")], ids=str)
def test_gradients_losses_and_statistics_are_those_of_real_processes(processes: Processes, case: Case):
    errors = compare_steps(processes, case)
    assert errors.passed, errors
    assert min(errors.gradients.error, errors.statistics.error) > 0, "the sides are not two computations"


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_weights_of_free_runs_stay_those_of_real_processes(processes: Processes, optimizer: str):
    errors = compare_runs(processes, replace(PAIRS, sizes=(8,) * CHIPS, optimizer=optimizer))
    assert errors.bound == 1e-10 and errors.passed, errors
    assert 0 < errors.whole[0] <= errors.worst[0]


def test_statistics_over_several_chips_are_seen(processes: Processes):
    errors = compare_steps(processes, ONE_STEP, lambda emulated: allocate_chips(emulated.model, CHIPS, span=2))
    assert errors.gradients.error > 0.1 and errors.losses.error > 1e-3 and errors.statistics.error > 0.01
    assert not errors.passed


def test_the_other_momentum_of_statistics_is_seen(processes: Processes):
    """MindSpore's 0.9 is torch's 0.1: what it changes is the running statistics, and those alone."""

    def spoil(emulated: Emulated) -> None:
        for norm in norm_layers(emulated.model):
            norm.momentum = 0.9

    errors = compare_steps(processes, ONE_STEP, spoil)
    assert errors.statistics.error > 0.1 and max(errors.gradients.error, errors.losses.error) < 1e-12
    assert not errors.passed


def test_a_mean_over_images_instead_of_chips_is_seen(processes: Processes, monkeypatch: pytest.MonkeyPatch):
    """What accumulating gradients over one large batch computes: the same where all chips have as many images."""

    def over_images(logits: Tensor, labels: Tensor, chip_pass: ChipPass, label_smoothing: float) -> Tensor:
        loss = functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)
        return loss * CHIPS / sum(case.sizes)

    monkeypatch.setattr(sides, "chip_losses", over_images)
    case = ONE_STEP
    assert compare_steps(processes, case).passed
    case = replace(UNEQUAL, steps=1)
    assert compare_steps(processes, case).gradients.error > 0.1


def test_another_momentum_of_the_optimizer_is_seen(processes: Processes):
    def spoil(emulated: Emulated) -> None:
        for settings in emulated.optimizer.param_groups:
            settings["momentum"] = 0.8

    errors = compare_runs(processes, replace(PAIRS, steps=2), spoil)
    assert errors.worst[0] < 1e-10, "the first step has no momentum yet"
    assert errors.worst[1] > 1e-3 and not errors.passed


def test_an_error_in_a_process_is_told():
    with Processes() as processes, pytest.raises(RuntimeError, match="(?s)process [0-3]:\n.*no_such_method"):
        processes.call("no_such_method")


def test_relative_errors():
    ones = torch.ones(4)
    assert sides.relative(ones + torch.tensor([0.2, 0.0, 0.0, 0.0]), ones) == pytest.approx(0.1)
    assert sides.relative(torch.zeros(4), torch.zeros(4)) == 0
    assert sides.relative(ones, torch.zeros(4)) == sides.relative(ones * math.nan, ones) == math.inf


def test_kinks_are_relus_open_on_one_side():
    theirs = torch.tensor([2.0, 0.0, 2.0, 0.0, 2.0, 2.0, 0.0, 0.0])  # root mean square: sqrt(2)
    assert sides.kink(theirs * 1.01, theirs) == 0
    assert sides.kink(theirs + torch.eye(8)[1] * 1e-6, theirs) == pytest.approx(1e-6 / 2**0.5)


@pytest.mark.parametrize(("error", "status"), [(9e-13, 0), (1.1e-12, 1), (math.inf, 1)])
def test_the_command_says_whether_all_bounds_hold(error, status, monkeypatch, capsys):
    monkeypatch.setattr(script, "Processes", contextlib.nullcontext)
    found = Worst(error, "conv1.weight")
    monkeypatch.setattr(script, "compare_steps", lambda _, case: script.StepErrors(case, statistics=found))
    zeros = [0.0] * sides.STEPS
    monkeypatch.setattr(script, "compare_runs", lambda _, case: script.FreeErrors(case, zeros, zeros))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["emulated_equals_real.py", *options])
        assert script.main() == status
    table, _, printed = capsys.readouterr().out.rpartition("\n{")
    assert f"{error:.1e}" in table
    assert json.loads("{" + printed)["passed"] == (status == 0)
