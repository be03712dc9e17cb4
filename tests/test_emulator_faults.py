"""Faults on the emulated record: `launch.emulate faults=...` and what its numbers are made of."""

import json
from dataclasses import replace

import pytest
import yaml
from emulator_samples import record_config

from launch import compose
from launch.emulate import answer
from train import emulator, emulator_faults
from train.sim.faults import Condition

PARTS = "compute_s exposed_comm_s straggler_s input_s other_s eval_s startup_s".split()
OPTIONS = [name for name in compose.groups()["faults"] if name != "none"]


SEVERAL = {"published_rates": 3, "several": 2}


def build(option: str = "none", *, seed: int = 0, runs_checkpoint_steps: int | None = None, **changes):
    """The record's machine with an option of `faults=`, changed; most options' files are nodes as they stand."""
    faults = yaml.safe_load((compose.CONF / "faults" / f"{option}.yaml").read_text())
    if "defaults" in faults:
        faults = record_config(f"faults={option}")["faults"]
    config = {"faults": faults | changes, "seed": seed, "checkpoint_steps": runs_checkpoint_steps}
    return emulator.build(record_config() | config)


@pytest.fixture(scope="module")
def sound():
    return build()


def priced(capsys, *words: str) -> dict:
    assert answer([*words, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_a_price_whose_parts_are_the_run(option, sound):
    result, undisturbed = build(option).run(), sound.run()
    assert sum(result[part] for part in PARTS) == pytest.approx(result["time_to_train_s"], rel=1e-12)
    faults = result["faults"]
    assert result["time_to_train_s"] == pytest.approx(undisturbed["time_to_train_s"] + faults["cost_s"], rel=1e-9)
    assert (faults["cost_s"] > 0) == (option not in ("flipped_bit", "stale_batch_norm", "published_rates"))
    assert result["interval_s"][0] < result["time_to_train_s"] < result["interval_s"][1]
    assert sum("fault: " in note for note in result["notes"]) == SEVERAL.get(option, 1)


def test_without_faults_nothing_is_said_of_them(sound):
    assert "faults" not in sound.run() and sound.faults == ()
    assert emulator_faults.of_training(sound, record_config()) is None


def test_a_dead_chip_with_a_spare_costs_detection_restart_and_repeated_steps(sound):
    step_s = sound.step(32_768).step_s
    given = {"at_epochs": 2, "detect_s": 3, "restart_s": 4}
    anew, saved = build("dead_chip", **given), build("dead_chip", **given | {"checkpoint_steps": 39})
    assert anew.run()["faults"]["cost_s"] == pytest.approx(7 + 79 * step_s, rel=1e-9)
    assert emulator_faults.toll(saved, 100).cost_s(100) == pytest.approx(7 + step_s, rel=1e-9)
    own = emulator_faults.toll(build("dead_chip", at_epochs=2, runs_checkpoint_steps=40), 100)
    assert own.cost_s(100) == pytest.approx(25 + 39 * step_s, rel=1e-9)


def test_without_a_host_each_chip_keeps_its_images_and_the_collective_has_fewer_hosts(sound):
    lost, config = emulator_faults.price(build("lost_host"), Condition(lost=8)), record_config()
    config["mesh"] |= {"axes": {"host": 127, "chip": 8}, "chips": None}
    assert lost.at(1) == emulator.build(config | {"global_batch_size": 32_512}).step(32_512) != sound.step(32_768)


def test_slow_links_and_chips_of_a_while_are_those_that_stand(sound):
    """Broken from the first step to the last, on a schedule or as a property of the machine: one price."""
    for option in ("slow_chip", "slow_link"):
        stands, scheduled = build(option), build(option, at_steps=1)
        assert stands.step(32_768) != sound.step(32_768) == scheduled.step(32_768)
        assert scheduled.run()["time_to_train_s"] == pytest.approx(stands.run()["time_to_train_s"], rel=1e-9)
        longer = stands.step(32_768).step_s - sound.step(32_768).step_s
        short = emulator_faults.toll(build(option, at_steps=5, for_steps=10), 100)
        assert short.cost_s(100) == pytest.approx(10 * longer, rel=1e-9)


def test_a_rate_widens_the_interval_and_tells_the_mean(sound):
    rare = build("dead_chip", at_epochs=None, per_step=4e-5)
    result = rare.run()
    faults, steps = result["faults"], result["steps"]
    assert faults["expected_events"] == pytest.approx(4e-5 * steps)
    step_s = sound.step(32_768).step_s
    assert faults["expected_cost_s"] == pytest.approx(4e-5 * steps * (25 + step_s * (steps + 1) / 2), rel=0.01)
    plain = sound.run()["interval_s"]
    low, high = result["interval_s"]
    assert low == pytest.approx(plain[0], rel=0.02) and high > 1.2 * plain[1]


def test_published_rates_are_per_chip_and_hour():
    """256, 46 and 6 of 419 interruptions on 16,384 chips in 54 days."""
    hours = 16_384 * 54 * 24
    rates = [fault.per_chip_hour for fault in build("published_rates").faults]
    assert rates == pytest.approx([256 / hours, 46 / hours, 6 / hours], rel=2e-3)


def test_the_same_seed_has_the_same_faults_and_another_has_others():
    made = [build("flipped_bit", at_epochs=None, per_step=0.01, seed=seed) for seed in (0, 0, 1)]
    events = [emulator_faults.toll(one, 1000).report(1000)["events"] for one in made]
    assert events[0] == events[1] != events[2]


def test_a_sweep_prices_a_machine_with_each_fault(capsys):
    assert answer(["-m", "faults=none,lost_host"]) == 0
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if line.split()[1:2] and line.split()[1] in (*OPTIONS, "none")]
    assert [row.split()[1] for row in rows] == ["none", "lost_host"]
    assert len({row.split()[4] for row in rows}) == 2
    assert "added by faults" in text


@pytest.mark.parametrize(
    "words, named",
    [
        (["faults=dead_chip", "faults.chip=1024"], "faults.chip=1024: the mesh's chips with work are 0 to 1023"),
        (["faults=dead_chip", "faults.per_step=0.1"], "dead chip has at_epochs and per_step; give one of them"),
        (["faults=several", "faults.of.slow_chip.factor=0.5"], "faults.factor=0.5: SlowChip"),
        (["faults=several", "faults.of.slow_chip.fcator=2"], "faults.of.slow_chip.fcator: no such key; did you mean"),
        (["faults=slow_link", "faults.link=nvlink", "faults.at_steps=3"], "faults.link=nvlink: mesh Atlas 900 has no"),
    ],
)
def test_wrong_faults_are_one_line(capsys, words, named):
    assert answer(words) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_what_can_be_priced_but_not_trained_is_refused():
    config = compose.compose(["experiment=digits_atlas", "faults=dead_chip", "faults.recovery=shrink"])

    def train(**changes):
        return emulator_faults.of_training(emulator.build(config | changes), config | changes)

    with pytest.raises(ValueError, match=r"chip 14 is lost in step 11, and bn_span=2 chips share .*faults=lost_host"):
        train(bn_span=2)
    with pytest.raises(ValueError, match="chip 0 is lost in step 11, and bn_rule=chip_0 evaluates with its statistics"):
        train(bn_rule="chip_0", faults=config["faults"] | {"chip": 0})
    assert train(bn_rule="chip_0").timeline.at(11).condition == Condition(lost=1)
    host = {"_target_": "train.sim.faults.LostHost", "at_steps": 3, "recovery": "shrink"}
    assert train(bn_span=2, faults=host).timeline.at(100).condition == Condition(lost=8)
    assert len(train(max_steps=2, faults=host).timeline.events) == 0


def test_standing_faults_of_a_run_are_those_of_its_clock(sound):
    made = build("slow_chip")
    toll = emulator_faults.toll(made, 100)
    assert toll.step(50) == made.step(32_768) == replace(sound.step(32_768), straggler_s=toll.step(50).straggler_s)
    assert toll.cost_s(100) == pytest.approx(100 * (made.step(32_768).step_s - sound.step(32_768).step_s))


def test_the_document_has_the_prices_of_its_command():
    text = (compose.CONF.parent / "docs" / "faults.md").read_text(encoding="utf-8")
    config, rows = compose.compose(["experiment=imagenet_atlas900"]), {}
    for option in ("none", "slow_chip", "slow_link", "dead_chip", "lost_host"):
        node = yaml.safe_load((compose.CONF / "faults" / f"{option}.yaml").read_text(encoding="utf-8"))
        rows[option] = emulator.build(config | {"faults": node}).run()
    rows["the same"] = emulator.build(config | {"faults": FOUND_LATE}).run()
    for name, result in rows.items():
        row = next(line for line in text.splitlines() if line.startswith((f"| {name} |", f"| `{name}`:", f"| {name},")))
        low, high = result["interval_s"]
        assert row.split("|")[2:4] == [f" {result['time_to_train_s']:,.1f} s ", f" {low:,.0f} to {high:,.0f} s "], name
    rates = emulator.build(config | {"faults": record_config("faults=published_rates")["faults"]}).run()["faults"]
    assert f"meets {rates['expected_events']:.5f} faults, which cost {rates['expected_cost_s']:.3f} s" in text


FOUND_LATE = {"_target_": "train.sim.faults.DeadChip", "at_epochs": 2, "detect_s": 1836}
