import math

import pytest
from emulator_samples import record_config

from train.emulator import build
from train.records import load

PARTS = ("compute_s", "exposed_comm_s", "straggler_s", "input_s", "other_s", "eval_s", "startup_s")


@pytest.fixture(scope="module")
def record():
    return build(record_config())


def test_the_record_s_run(record):
    result = record.run()
    assert (result["chips"], result["active_chips"], result["global_batch_size"]) == (1024, 1024, 32768)
    assert (result["steps_per_epoch"], result["epochs"], result["steps"], result["evaluations"]) == (39, 68, 2652, 17)
    assert (result["collective"], result["network"], result["label"]) == ("hierarchical", "alpha_beta", "emulated")
    assert sum(result[part] for part in PARTS) == pytest.approx(result["time_to_train_s"], rel=1e-12)
    assert result["interval_s"][0] < result["time_to_train_s"] < result["interval_s"][1]
    assert result["images_per_s"] == pytest.approx(32768 / result["step_s"])
    assert result["compute_s"] == pytest.approx(2652 * 32 / 1787)


def test_every_part_of_the_record_by_hand(record):
    step = record.step(32768)
    assert step.straggler_s == pytest.approx(0.0313 * 32 / 1787 * 3.2485, rel=1e-3)
    assert 0 < step.exposed_comm_s < 0.3e-3  # the last two buckets; the large one is hidden
    assert step.step_s == pytest.approx(19.95e-3, abs=0.01e-3)


def test_jitter_gives_back_the_rates_it_was_derived_from():
    """MindSpore 0.2.0-alpha: 13,689 images/s on 8 chips, 27,090 on 16, batch 32."""
    for chips, rate in ((8, 13_689), (16, 27_090)):
        made = build(record_config("mesh=atlas800", f"mesh.axes.host={chips // 8}", f"global_batch_size={32 * chips}"))
        assert made.run()["images_per_s"] == pytest.approx(rate, rel=0.002)


def test_model_error_is_the_distance_to_the_smaller_ascend_records(record):
    """No 1,024-chip record has a part in it (conf/network/alpha_beta.yaml holds the same arithmetic)."""
    errors = []
    for row in load():
        if row.chip.startswith("Ascend 910") and 8 < row.chips < 1024:
            size = f"mesh.axes.host={row.chips // 8}", f"global_batch_size={row.global_batch}"
            made = build(record_config(*size, f"epochs={row.epochs}")).run()
            errors.append(math.log(made["time_to_train_s"] / row.seconds))
    assert len(errors) == 5
    assert record.network.model_error == pytest.approx(math.sqrt(sum(e * e for e in errors) / 5), abs=0.001)


def test_strong_scaling_keeps_the_batch_and_counts_idle_chips():
    made = build(record_config("mesh.axes.host=8192"))
    result = made.run()
    assert (result["chips"], result["active_chips"], result["global_batch_size"]) == (65536, 32768, 32768)
    assert any("32,768 of 65,536 chips get no image" in note for note in made.notes)
    assert made.plan.mesh.num_chips == 32768


def test_a_recipe_by_chip_batch_stops_at_the_largest_reference_point():
    made = build(record_config("chip_batch_size=32", "mesh.axes.host=1024"))
    assert made.global_batch_size == 67_840
    assert any("largest reference point" in note for note in made.notes)
    weak = build(record_config("chip_batch_size=32", "mesh.axes.host=1024", "scaling=weak"))
    assert weak.global_batch_size == 32 * 8192
    assert any("beyond the convergence table" in note for note in weak.notes)


def test_one_host_is_its_own_measure():
    made = build(record_config("mesh=atlas800", "global_batch_size=256")).run()
    assert made["scaling_efficiency"] == 1.0


def test_small_images_are_marked_as_extrapolated():
    made = build(record_config("data=synthetic", "data.image_size=112"))
    assert any("extrapolated" in note for note in made.notes)
    assert made.step(1024).compute_s < build(record_config()).step(1024).compute_s


def test_wire_dtype_doubles_the_bytes_and_nothing_else():
    half, full = (build(record_config(f"wire_dtype={dtype}")).step(32768) for dtype in ("fp16", "fp32"))
    assert full.exposed_comm_s > half.exposed_comm_s
    assert (full.compute_s, full.straggler_s) == (half.compute_s, half.straggler_s)


def test_opened_data_sizes_go_before_published_ones(record):
    assert (record.num_train, record.num_eval) == (1_281_167, 50_000)
    made = build(record_config(), num_train=64, num_eval=10, num_classes=5)
    assert (made.num_train, made.num_eval, made.steps_per_epoch) == (64, 10, 1)
    assert made.workload.layers[-1].activations == 5


def test_evaluation_of_the_record_is_milliseconds(record):
    """49 images a chip in passes of 32 and 17: two fixed times and 49 images, forward only (8.18 of 24.3 GFLOP)."""
    fixed, per_image = record.chip.affine("fp16")
    assert record.eval_s(50_000) == pytest.approx((2 * fixed + 49 * per_image) * 8.178 / 24.299, rel=0.02)


def test_every_number_has_an_origin_and_assumptions_are_noted(record):
    origins = record.origins()
    assert all(origin.origin for origin in origins)
    for name in [origin.name for origin in origins if origin.origin.startswith("assumed")]:
        assert any(note.startswith(name) for note in record.notes)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"chip_batch_size": 31}, "global_batch_size=32768 is not chip_batch_size=31 x 1024 chips"),
        ({"global_batch_size": None}, "both null"),
        ({"global_batch_size": -1}, "global_batch_size=-1"),
        ({"scaling": "weak"}, "give chip_batch_size"),
        ({"model": {"_target_": "torchvision.models.vit"}}, "only train.models.resnet.resnet and .* have a work"),
        ({"wire_dtype": "int4"}, "wire_dtype=int4"),
    ],
)
def test_wrong_configurations_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        build({**record_config(), **changes})


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="no published rate in fp32"):
        build(record_config(), precision="fp32")
