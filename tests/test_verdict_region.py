"""The region and the odds: the run's own formula, known probabilities, and the line of a claimed time."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from launch.compose import compose
from launch.emulate import EXPERIMENT
from launch.verdict_odds import ASSUMPTIONS, changed, price, with_each_changed
from train import emulator
from train.sim.convergence import POINTS, Epochs, epochs_at
from train.sim.region import Priced, odds, priced
from train.sim.run import quantile

PLAIN = Priced(
    step_s=0.02,
    eval_s=0.5,
    startup_s=1.0,
    steps_per_epoch=40,
    global_batch_size=1024,
    chips=32,
    epochs=10,
    eval_every=4,
    sigma=0.1,
)


@pytest.fixture(scope="module")
def config() -> dict:
    return compose([], EXPERIMENT)


@pytest.fixture(scope="module")
def changes(config) -> dict:
    return {(one.about, one.name): one for one in with_each_changed(config, price(config), 59.8)}


def test_a_run_by_hand():
    # 400 steps of 20 ms, evaluations after 4, 8 and 10 epochs, 1 s of start-up
    assert PLAIN.seconds(10) == pytest.approx(8 + 3 * 0.5 + 1)
    assert PLAIN.images_per_s_per_chip == pytest.approx(1600)


def test_the_line_of_a_time_is_where_a_run_takes_that_time():
    for epochs in (5, 10, 33.3):
        for seconds in (8.0, 20.0, 59.8):
            rate = PLAIN.needed_rate(epochs, seconds)
            if math.isinf(rate):
                continue
            there = PLAIN.but(step_s=PLAIN.global_batch_size / rate / PLAIN.chips)
            assert there.seconds(epochs) == pytest.approx(seconds)
    assert PLAIN.needed_rate(100, 13) == math.inf  # 25 evaluations and the start-up take 13.5 s


@pytest.mark.parametrize("sigma", [0.02, 0.11, 0.3])
def test_odds_of_one_time_are_the_log_normal_distribution(sigma):
    for seconds in (8.0, 10.0, 13.0):
        known = NormalDist(math.log(10), sigma).cdf(math.log(seconds))
        assert odds(np.array([10.0]), sigma, seconds) == pytest.approx(known, abs=1e-12)


def test_odds_without_error_are_the_share_of_the_epochs():
    run = PLAIN.but(sigma=0.0, epochs=[8, 12], eval_s=0.0, startup_s=0.0, steps_per_epoch=4000)
    assert run.odds(run.seconds(9)) == pytest.approx(0.25, abs=1 / 400)
    assert PLAIN.but(sigma=0.0).odds(10.5) == 1 and PLAIN.but(sigma=0.0).odds(10.4) == 0


def test_odds_and_quantiles_are_inverse():
    times = PLAIN.but(epochs=[8, 12]).times
    for q in (0.05, 0.3, 0.5, 0.95):
        assert odds(times, 0.1, quantile(times, 0.1, q)) == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize("overrides", [[], ["epochs=auto"], ["epochs=60"], ["network=alpha_beta", "eval_offset=2"]])
def test_the_clock_is_the_emulators_own(overrides):
    made = emulator.build(compose(overrides, EXPERIMENT))
    run, result = priced(made), made.run()
    assert run.median_s == pytest.approx(result["time_to_train_s"], rel=1e-12)
    assert run.interval_s == pytest.approx(result["interval_s"], rel=1e-12)
    assert run.images_per_s_per_chip == pytest.approx(result["images_per_s_per_chip"], rel=1e-12)


def test_epochs_are_spread_as_given():
    assert PLAIN.but(epochs=[64, 72]).epochs_interval == (64, 72)
    low, high = PLAIN.but(epochs=Epochs(32_768, 56.0, 0.447)).epochs_interval
    assert (low, high) == pytest.approx((56 - 1.645 * 0.447, 56 + 1.645 * 0.447), abs=0.01)


def test_every_assumption_is_one_change_of_this_machine(changes, config):
    assert len(changes) == len(ASSUMPTIONS)
    plain = price(config)
    for (about, name), one in changes.items():
        assert one.run is not None, f"{about}: {name}: {one.left_out}"
        assert 0 <= one.odds <= 1 and one.odds == one.run.odds(59.8)
        if about == "epochs":
            assert one.run.but(epochs=0) == plain.but(epochs=0), f"{name} changes more than the epochs"
        elif about in ("chip", "network"):
            assert (one.run.epochs, one.run.global_batch_size) == (plain.epochs, plain.global_batch_size)


def test_odds_move_the_way_that_each_change_must_move_them(changes, config):
    plain = price(config).odds(59.8)
    odds_of = {name: one.odds for (_, name), one in changes.items()}
    assert odds_of["72 (1,024 TPU v3 in 2019, MLPerf v0.6)"] < plain < odds_of["64"]
    assert odds_of["the reference points' epochs at this batch"] > odds_of["64"]
    for faster in (
        "no waiting for the slowest chip",
        "links at their full rate",
        "all of the backward pass hides communication",
        "no evaluation on it",
        "no start-up on it",
    ):
        assert odds_of[faster] > plain, faster
    for slower in (
        "nothing hides communication",
        "fp32 on the wire",
        "a ring between hosts",
        "half the rate between hosts",
    ):
        assert odds_of[slower] < plain, slower


def test_reference_epochs_are_the_points_own(changes):
    batches = {name: one.run for (about, name), one in changes.items() if about == "batch"}
    assert batches["16,384, its reference epochs"].epochs.mean == epochs_at(16_384).mean
    known = {point.batch: point.mean for point in POINTS}
    assert batches["65,536, its reference epochs"].epochs.mean == known[65_536]


def test_what_a_machine_lacks_is_left_out_and_said():
    other = compose(["mesh=dgx_h100", "mesh.axes.host=128", "network=alpha_beta"], EXPERIMENT)
    left_out = {one.name: one.left_out for one in with_each_changed(other, price(other), 59.8) if one.run is None}
    assert "mesh.topology.roce" in left_out["half the rate between hosts"]
    assert "network.calibration" in left_out["links at their full rate"]
    assert "MindSpore 0.2" in left_out["rate of MindSpore 0.2 alone (batch 32)"]


def test_a_change_leaves_the_configuration_alone(config):
    before = config["mesh"]["topology"]["roce"]["gbytes_per_s"]
    halved = changed(config, {"mesh.topology.roce.gbytes_per_s": lambda rate: rate / 2})
    assert halved["mesh"]["topology"]["roce"]["gbytes_per_s"] == before / 2
    assert config["mesh"]["topology"]["roce"]["gbytes_per_s"] == before
    with pytest.raises(ValueError, match="mesh.topology.nothing"):
        changed(config, {"mesh.topology.nothing.gbytes_per_s": 1})
