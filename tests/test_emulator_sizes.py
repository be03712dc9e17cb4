"""Training images that grow with the epochs, on the emulated clock: every step is priced at its own size."""

import pytest
from data_samples import make_image_tree

from launch.compose import compose
from train import emulator, emulator_faults
from train.build import Worker, WorkerContext
from train.sim.workload import resnet

PARTS = ("compute_s", "exposed_comm_s", "straggler_s", "input_s", "other_s", "eval_s", "startup_s")
FAST = ("experiment=fast_16_epochs",)  # 160 px, from epoch 12 on 192 px; evaluation at 256 px


def build(*words: str, **sizes) -> emulator.Emulator:
    return emulator.build(compose([*FAST, *words]), **sizes)


@pytest.fixture(scope="module")
def fast() -> emulator.Emulator:
    return build()


def at(pixels: int, *words: str) -> emulator.Emulator:
    return build(f"data.image_size={pixels}", "data.train_sizes=null", "data.eval_size=null", *words)


def test_every_epoch_is_priced_at_its_size(fast):
    small, large, evaluation = (at(pixels) for pixels in (160, 192, 256))
    spe, run = fast.steps_per_epoch, fast.run_time()
    assert (spe, run.steps, run.evaluations) == (312, 16 * 312, 16)
    each = {one: made.step(4096) for one, made in {"small": small, "large": large}.items()}
    assert [fast.course().at(step) for step in (1, 12 * spe, 12 * spe + 1, 16 * spe)] == [
        each["small"], each["small"], each["large"], each["large"],
    ]  # fmt: skip
    assert each["large"].compute_s > 1.2 * each["small"].compute_s
    assert run.compute_s == pytest.approx(spe * (12 * each["small"].compute_s + 4 * each["large"].compute_s), rel=1e-12)
    assert run.eval_s == 16 * evaluation.eval_s(50_000)
    assert small.run_time().time_to_train_s < run.time_to_train_s < at(256).run_time().time_to_train_s


def test_the_tables_are_those_of_the_sizes(fast):
    assert [(first, table.forward_flops) for first, table in fast.sizes] == [
        (0, resnet(image_size=160).forward_flops),
        (12, resnet(image_size=192).forward_flops),
    ]
    assert fast.eval_workload.forward_flops == resnet(image_size=256).forward_flops
    assert fast.notes[0] == "steps are priced at 160 px from epoch 0, at 192 px from epoch 12; evaluations at 256 px"


@pytest.mark.parametrize("words", [(), ("faults=slow_chip",), ("faults=dead_chip",), ("epochs=[10,18]",)])
def test_the_seven_parts_are_the_whole(words):
    told = build(*words).run()
    assert sum(told[part] for part in PARTS) == pytest.approx(told["time_to_train_s"], rel=1e-12)
    assert told["images_per_s"] == pytest.approx(4096 / told["step_s"])
    low, high = told["interval_s"]
    assert low < told["time_to_train_s"] < high
    if not words:
        train_s = told["time_to_train_s"] - told["eval_s"] - told["startup_s"]
        assert told["step_s"] * told["steps"] == pytest.approx(train_s, rel=1e-12)


def test_a_list_of_one_size_is_that_size_to_the_last_bit():
    listed, plain = build("data.train_sizes=[[0,192]]", "data.eval_size=192"), at(192)
    given, expected = ({key: value for key, value in made.run().items() if key != "notes"} for made in (listed, plain))
    assert given == expected


def test_a_slow_chip_is_waited_for_at_the_size_of_the_step():
    """Twice as slow from epoch 11 to 13: the wait is one step's compute, at 160 and then at 192 px."""
    made = build("faults=slow_chip", "faults.at_epochs=11", "faults.for_steps=624")
    spe, steps = made.steps_per_epoch, 16 * made.steps_per_epoch
    toll, sound = emulator_faults.toll(made, steps), build().course()
    waits = [toll.step(step).straggler_s for step in (11 * spe, 11 * spe + 1, 12 * spe + 1, 13 * spe + 1)]
    each = [sound.at(step) for step in (1, steps)]
    assert waits == [each[0].straggler_s, each[0].compute_s, each[1].compute_s, each[1].straggler_s]
    assert made.run()["time_to_train_s"] > build().run()["time_to_train_s"]


def test_a_training_run_s_clock_has_the_same_course(tmp_path):
    photos = make_image_tree(tmp_path, classes=2, per_class=8, size=40)
    sizes = ["data.image_size=32", "data.eval_size=48", "data.train_sizes=[[0,24],[1,32]]"]
    words = ["mesh=atlas800", "global_batch_size=16", "workers=1", f"data.root={photos}", "data.workers=0", "epochs=3"]
    worker = Worker(compose([*FAST, *words, *sizes, "schedule.warmup_epochs=0.5"]), WorkerContext())
    clock, made = worker.trainer.clock, worker.emulator
    assert made.steps_per_epoch == 1 and clock.course == made.course()
    for _ in range(3):
        clock.advance_step()
    known = {"num_train": 16, "num_eval": 16, "num_classes": 2}
    small, large = (
        emulator.build(worker.config | {"data": worker.config["data"] | size | {"train_sizes": None}}, **known).step(16)
        for size in ({"image_size": 24}, {"image_size": 32})
    )
    assert clock.seconds == pytest.approx(clock.startup_s + small.step_s + 2 * large.step_s, rel=1e-12)
    assert clock.step == large
