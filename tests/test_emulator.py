import math
from dataclasses import fields

import pytest
from emulator_samples import record_config

from train.emulator import build
from train.emulator_origins import kind
from train.emulator_recipe import check_training
from train.records import load
from train.sim.calibration import Calibration
from train.sim.straggler import expected_max

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


def calibrated(*overrides: str, **constants) -> dict:
    """The record's configuration with a calibration in its network, and a chip that states no jitter or start-up."""
    config = record_config(*overrides)
    config["chip"] = {**config["chip"], "jitter": None, "startup_s": None}
    config["network"]["calibration"] = {"_target_": "train.sim.calibration.Calibration", **constants}
    return config


def test_a_chip_that_states_no_jitter_takes_the_calibration_s():
    assert build(calibrated()).step(32768).straggler_s == 0.0
    for name in ("normal", "exponential", "gumbel"):
        made = build(calibrated(jitter=0.02, straggler=name)).step(32768)
        assert made.straggler_s == pytest.approx(0.02 * made.compute_s * expected_max(name, 1024))
    stated = build({**record_config(), "network": calibrated(jitter=0.5)["network"]})
    assert stated.jitter == 0.0313 and stated.startup_s == 0.4


def test_the_wait_inside_the_published_rate_is_not_charged_again():
    config = calibrated(jitter=0.02)
    config["chip"]["anchors"] = [{**anchor, "chips": 8} for anchor in config["chip"]["anchors"]]
    made = build(config)
    alone = 32 / 1787 / (1 + 0.02 * expected_max("normal", 8))
    assert made.step(32768).compute_s == pytest.approx(alone)
    assert made.step(32768).straggler_s == pytest.approx(0.02 * alone * expected_max("normal", 1024))
    one_host = build({**config, "mesh": record_config("mesh=atlas800")["mesh"]})
    assert one_host.step(256).step_s == pytest.approx(32 / 1787)  # the published rate itself, nothing on top


def test_an_anchor_of_one_host_holds_that_host_s_all_reduce():
    """Measured on 16 chips of one host, used on hosts of 8: one host's communication is inside, not that of two."""
    exposed = {}
    for hosts in (None, 1, 2):
        config = calibrated(overlap=0.0)
        stated = {} if hosts is None else {"hosts": hosts}
        config["chip"]["anchors"] = [{**anchor, "chips": 16, **stated} for anchor in config["chip"]["anchors"]]
        exposed[hosts] = build(config).step(32768).exposed_comm_s
    assert build(calibrated(overlap=0.0)).step(32768).exposed_comm_s > exposed[None] == exposed[1] > exposed[2] > 0


def test_the_first_epoch_s_extra_is_shared_by_the_hosts():
    made = build(calibrated(startup_s=0.5, first_epoch_s=64.0))
    assert made.startup_s == pytest.approx(0.5 + 64.0 / 128)
    assert made.run_time().startup_s == made.startup_s


def test_each_constant_moves_the_step_as_its_formula_says():
    plain = build(calibrated()).step(32768)
    assert build(calibrated(overlap=0.0)).step(32768).exposed_comm_s > 5 * plain.exposed_comm_s
    assert build(calibrated(launch_floor_s=0.03)).step(32768).other_s == pytest.approx(0.03 - 32 / 1787)
    evaluation = build(calibrated()).eval_s(50_000)
    assert build(calibrated(eval_s=0.1)).eval_s(50_000) == pytest.approx(evaluation + 0.1)
    slow = build(calibrated(comm_efficiency=0.5, overlap=0.0)).step(32768).exposed_comm_s
    assert slow > 1.5 * build(calibrated(overlap=0.0)).step(32768).exposed_comm_s
    assert build(calibrated(model_error=0.05)).model_error == 0.05


def test_another_software_s_time_is_scaled_and_said():
    config = calibrated(software={"mindspore 2019": 1.2, "mindspore 2021": 1.0})
    anchor = config["chip"]["anchors"][0]
    config["chip"] |= {"anchors": [{**anchor, "software": "mindspore 2021"}], "software": "mindspore 2019"}
    made = build(config)
    assert made.step(32768).compute_s == pytest.approx(1.2 * 32 / 1787)
    assert any("no rate in mindspore 2019: that in mindspore 2021" in note for note in made.notes)
    assert made.run()["software"] == "mindspore 2019"
    config["chip"]["software"] = "tensorflow 2021"
    made = build(config)
    assert made.software_factor == 1.0 and any("no factor for tensorflow 2021" in note for note in made.notes)


def test_software_that_nobody_named_is_said():
    made = build(record_config("+chip.software=mindspore 2021"))
    assert any("do not name theirs" in note for note in made.notes)


def test_shared_batch_norm_costs_two_sums_a_layer():
    """Eight chips of a host: 106 sums of at most 16 KiB in 6 rounds of one or two short copies (0.6 us) each."""
    alone, shared = (build({**record_config(), "bn_span": span}) for span in (1, 8))
    assert alone.norm_s == 0.0
    assert 106 * 6 * 0.6e-6 < shared.norm_s < 106 * 6 * 2 * 0.8e-6
    gained = shared.step(32768).exposed_comm_s - alone.step(32768).exposed_comm_s
    assert gained == pytest.approx(shared.norm_s)
    spans = [build({**record_config(), "bn_span": span}).norm_s for span in (2, 4, 8, 16, 1024)]
    assert spans == sorted(spans)
    for span in (3, 12, 2048):
        with pytest.raises(ValueError, match=f"bn_span={span}: must divide the 8 chips of a host, or be whole hosts"):
            build({**record_config(), "bn_span": span})
    idle = build({**record_config(), "bn_span": 1024, "global_batch_size": 12})
    assert 0 < idle.norm_s < shared.norm_s * 8


def test_efficiency_is_against_a_host_that_sums_its_own_statistics_alone():
    plain, shared = (build({**record_config(), "bn_span": span}).run() for span in (1, 1024))
    assert shared["bn_sync_s"] > 0 and shared["scaling_efficiency"] < plain["scaling_efficiency"]


def test_a_host_s_input_bounds_the_rate():
    made = build(record_config("mesh.host_images_per_s=10000")).run()
    assert made["images_per_s"] == pytest.approx(10_000 * 128)
    assert sum(made[part] for part in PARTS) == pytest.approx(made["time_to_train_s"], rel=1e-12)
    assert build(record_config("mesh.host_images_per_s=20000")).run()["input_s"] == 0.0


def test_an_update_beyond_the_one_inside_the_rate_is_charged():
    config = record_config("chip.hbm_gbytes_per_s=1228")
    assert build(config).update_s == 0.0
    config["chip"]["anchors"] = [{**anchor, "optimizer": "sgd"} for anchor in config["chip"]["anchors"]]
    made = build(config)
    assert made.update_s == pytest.approx(8 * 25_557_032 / 1228e9)  # LARS reads 8 bytes a parameter more
    assert made.step(32768).other_s == made.update_s
    config["chip"]["hbm_gbytes_per_s"] = None
    assert build(config).update_s == 0.0
    assert any("no memory rate" in note for note in build(config).notes)


@pytest.mark.parametrize(
    "batch, epochs, named",
    [(32_768, 56.0, None), (16_384, 47.3, None), (1024, 34.9, "is below"), (86_016, 101.3, "is beyond")],
)
def test_epochs_of_the_reference_points(batch, epochs, named):
    made = build({**record_config(), "epochs": "auto", "global_batch_size": batch})
    result = made.run()
    assert result["epochs"] == pytest.approx(epochs, abs=0.05)
    assert result["epochs_interval"][0] < result["epochs"] < result["epochs_interval"][1]
    assert result["epochs_from"] == "reference points"
    said = [note for note in made.notes if "convergence table" in note]
    assert (len(said) == 1 and named in said[0]) if named else not said


def test_the_spread_of_the_epochs_widens_the_interval():
    auto = [{**calibrated(epochs_error=error), "epochs": "auto"} for error in (0.0, 0.1)]
    narrow, wide = (build(config).run()["interval_s"] for config in auto)
    assert wide[0] < narrow[0] and narrow[1] < wide[1]


def test_reference_points_are_of_one_model_data_set_and_target():
    for key, other in (("data", "data=cifar10"), ("model", "model=resnet18")):
        with pytest.raises(ValueError, match="reference points are of ResNet-50 on ImageNet"):
            build({**record_config(), "epochs": "auto", key: record_config(other)[key]})
    made = build({**record_config(), "epochs": "auto", "target_top1": 0.749})
    assert any("75.9 % top-1, the target is 74.9 %" in note for note in made.notes)


def test_training_refuses_epochs_auto_and_says_what_to_give():
    with pytest.raises(ValueError, match="epochs=auto only prices a run.*32,768: epochs=56"):
        check_training({**record_config(), "epochs": "auto"})


def test_every_constant_of_a_calibration_is_explained():
    constants = dict(half_batch=17.0, launch_floor_s=0.001, jitter=0.01, straggler="gumbel", comm_efficiency=0.8)
    constants |= dict(overlap=0.7, eval_s=0.01, startup_s=0.3, first_epoch_s=10.0, model_error=0.06, epochs_error=0.02)
    assert set(constants) | {"software", "source", "fitted_on"} == {item.name for item in fields(Calibration)}
    source = {name: "fitted: on nothing, a test" for name in constants}
    config = {**calibrated(**constants, source=source), "epochs": "auto"}
    config["chip"]["anchors"] = config["chip"]["anchors"][:1]
    made = build(config)
    shown = {origin.name: origin for origin in made.origins()}
    for name in constants:
        assert kind(shown[f"calibration.{name}"]) == "fitted"
    assert made.run()["calibration"] == constants
    assert "network.model_error" not in shown


def test_a_constant_that_has_no_part_in_the_run_is_not_shown():
    """The record's chip states jitter and start-up and has a line of its own; its epochs are given."""
    network = calibrated(half_batch=17.0, jitter=0.01, startup_s=1.0, first_epoch_s=1.0, epochs_error=0.1)["network"]
    made = build({**record_config(), "network": network})
    assert made.run()["calibration"] == {} and made.run_time() == build(record_config()).run_time()
    assert not [origin for origin in made.origins() if origin.name.startswith("calibration")]


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
    assert {kind(origin) for origin in origins} == {"cited", "derived", "assumed", "given"}
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
