"""scripts/calibrate.py: it times the layers of the model, and its files say through the emulator what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import emulate
from scripts import calibrate
from scripts.calibrate_worker import Bench, Layer, distinct_layers
from train import emulator
from train.precision import choose_precision
from train.sim import workload
from train.sim.step import update_bytes

ROOT = Path(__file__).resolve().parent.parent
RESNET = {"_target_": "train.models.resnet.resnet", "stem": "imagenet"}
SOURCE = "measured: 1 process"


@pytest.mark.parametrize("depth, image_size", [(50, 224), (50, 64), (18, 96)])
def test_the_layers_are_those_of_the_workload_table(depth, image_size):
    table, batch = workload.resnet(depth, image_size=image_size), 3
    found = distinct_layers(RESNET | {"depth": depth}, 1000, image_size, batch)
    assert sum(layer.flops * count for layer, count in found.items()) == pytest.approx(batch * table.training_flops)

    def count(kind):
        return sum(number for layer, number in found.items() if layer.kind == kind)

    assert count("convolution") == sum(layer.kind == "conv" for layer in table.layers)
    norms = [layer for layer in table.layers if layer.kind == "batch_norm"]
    assert count("batch norm") == len(norms)
    moved = sum(layer.num_bytes(4) * number for layer, number in found.items() if layer.kind == "batch norm")
    assert moved == 8 * 4 * batch * sum(layer.activations for layer in norms)
    blocks = sum(workload.BLOCKS[depth])
    assert count("sum") == blocks and count("max pool") == count("classifier") == 1
    assert count("relu") == 1 + (3 if depth >= 50 else 2) * blocks


def test_every_kind_of_layer_of_a_small_network_can_be_timed():
    found = distinct_layers(RESNET | {"depth": 18}, 10, 32, 2)
    first = {}
    for layer in found:
        first.setdefault(layer.kind, layer)
    assert first["convolution"] == Layer("convolution", (2, 3, 32, 32), 64, 7, 2) and first["convolution"].first
    bench = Bench(choose_precision("fp32", "cpu"), 1 << 16)
    assert {kind for kind, layer in first.items() if bench.seconds(layer) > 0} == {
        "convolution",
        "batch norm",
        "relu",
        "max pool",
        "sum",
        "classifier",
    }
    assert bench.matmul_s(64)[0] == 2 * 64**3 and bench.copy_s()[0] == 2 * (64 << 20)


def test_fresh_numbers_have_the_layout_of_the_training():
    images = Bench(choose_precision("fp32", "cpu"), 1 << 10)._fresh((2, 3, 4, 4))
    assert images.is_contiguous(memory_format=torch.channels_last) and len(images.unique()) > 90


def test_a_class_is_the_median_of_rounds_and_the_mean_of_processes():
    def table(*seconds):
        return [{"kind": "relu", "count": 3, "flops": 0.0, "bytes": 8.0, "seconds": list(seconds)}]

    found = calibrate.classes([table(1.0, 9.0, 2.0), table(4.0, 4.0, 4.0)])
    assert found == {"relu": {"layers": 3, "seconds": 9.0, "flops": 0.0, "bytes": 24.0}}
    assert calibrate.jitter([table(1.0, 3.0), table(1.0, 3.0)]) == pytest.approx((4 / 3) ** 0.5 / 2)
    assert calibrate.jitter([table(1.0)]) == 0.0


def test_bytes_at_the_copy_s_rate():
    found = calibrate.by_copy(parameters=1000, image_size=10, batch=2, copy_per_s=4000.0)
    assert found["gradients"]["seconds"] == 3.0  # 3 x 4 bytes x 1000
    assert found["input"]["seconds"] == pytest.approx(2 * 4 * 2 * 300 / 4000)


def test_the_line_of_all_reduces_is_found_again():
    points = [(nbytes, 2 * 30e-6 + nbytes / 1.5e9) for nbytes in (1 << 16, 1 << 20, 1 << 25)]
    assert calibrate.line(points) == pytest.approx((30e-6, 1.5e9))
    with pytest.raises(ValueError, match="the machine is too busy"):
        calibrate.line([(1 << 16, 1.0), (1 << 25, 0.5)])


def test_two_batches_give_a_line_unless_noise_has_it_fall():
    def batches(seconds):
        return [anchor["batch"] for anchor in calibrate.anchors(seconds, 1.0, "fp32", SOURCE)]

    assert batches({16: 3.0, 8: 1.6}) == [8, 16]
    assert batches({16: 3.0, 8: 1.4}) == [16]  # the fixed time would be -0.2 s
    assert batches({16: 3.0, 8: 3.1}) == [16]
    (anchor,) = calibrate.anchors({4: 2.0}, 0.25, "fp32", SOURCE)
    assert anchor["images_per_s"] == 0.5  # four images with a quarter of the FLOPs each


@pytest.fixture
def files(tmp_path):
    """Two workers with 1.6 s for 8 images and 3 s for 16, 10 GB/s of memory, and a link of 20 us and 0.5 GB/s."""
    found = {"precision": "fp32", "matmul_per_s": 4e11, "copy_per_s": 1e10, "matmul_size": 2048, "jitter": 0.02}
    made = calibrate.anchors({8: 1.6, 16: 3.0}, 1.0, "fp32", SOURCE)
    chip = calibrate.chip_node("this machine, 1 thread(s)", found, made, SOURCE)
    calibrate.write_node(tmp_path / "chip" / "two_workers.yaml", chip, "a chip")
    mesh = tmp_path / "mesh" / "two_workers.yaml"
    calibrate.write_node(mesh, calibrate.mesh_node(2, "two_workers", 20e-6, 0.5e9, SOURCE), "a mesh")
    return mesh


def test_the_files_predict_what_was_measured_part_by_part(files):
    machine = emulator.build(calibrate.config_of(2, 224, 16, 4, str(files)))
    step, parameters = machine.step(32), workload.resnet().parameters
    assert step.compute_s == pytest.approx(3.0)
    assert step.exposed_comm_s == pytest.approx(2 * 20e-6 + 4 * parameters / 0.5e9)
    assert step.straggler_s == pytest.approx(0.02 * 3.0 / 3.141592653589793**0.5)  # E[max of 2] is 1 / sqrt(pi)
    assert step.other_s == pytest.approx(update_bytes("sgd", parameters) / 1e10)
    assert step.input_s == 0.0
    small = emulator.build(calibrate.config_of(2, 64, 32, 4, str(files))).step(64)
    work = workload.resnet(image_size=64).training_flops / workload.resnet().training_flops
    assert small.compute_s == pytest.approx(0.2 + 32 * 0.175 * work)  # the line: 0.2 s and 0.175 s an image


def test_the_command_that_is_printed_works_and_its_numbers_count_as_measured(files, capsys):
    assert emulate.answer([f"mesh={files}", "chip_batch_size=16", "format=json", "explain=true"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["chips"], said["chip"], said["network"]) == (2, "this machine, 1 thread(s)", "alpha_beta")
    kinds = {origin["name"]: origin["kind"] for origin in said["origins"]}
    for name in ("chip.anchor[16]", "chip.tflops", "chip.hbm_gbytes_per_s", "chip.jitter", "link.loopback"):
        assert kinds[name] == "measured", name


def test_the_real_steps_are_the_trainer_s_with_a_chip_for_each_worker():
    config = calibrate.config_of(2, 224, 16, 4)
    assert (config["workers"], config["mesh"]["axes"]) == (2, {"host": 2, "chip": 1})
    assert config["chip"]["bucket_ends"] == []  # summed when the backward pass has ended, as the files say
    assert config["optim"]["_target_"] == "train.optim.sgd.SGD" and config["model"]["depth"] == 50
    assert config["max_steps"] == 5 and config["data"]["num_eval"] == 1


CASE = {
    "workers": 1,
    "image_size": 224,
    "chip_batch": 16,
    "predicted_s": 3.3,
    "measured_s": 2.9,
    "error": 3.3 / 2.9 - 1,
    "layers_predicted_s": 2.9,
    "layers_error": 0.0,
    "classes": {"convolution": {"layers": 53, "seconds": 2.0, "flops": 1e11, "bytes": 0.0}},
}
RESULT = {
    "device": "a CPU",
    "cores": 2,
    "date": "2026-01-01 12:00",
    "rounds": 4,
    "quick": False,
    "link": {"latency_s": 1e-5, "bytes_per_s": 1e9},
    "machine": {"one_worker": {"threads": 2, "precision": "fp32", "matmul_per_s": 1e11, "copy_per_s": 1e10}},
    "files": {},
    "cases": [CASE, CASE | {"image_size": 64}],
}


def test_a_miss_is_named_on_the_page_and_in_the_report():
    text = calibrate.page(calibrate.PAGE.read_text(encoding="utf-8"), RESULT)
    assert "not measured yet" not in text and text.count("MISSED") == 1  # at 64 pixels there is no aim
    assert "| 1 worker, 16 images of 224 px | 3.300 s | 2.900 s | +13.8 % | 2.900 s | +0.0 % | **MISSED**" in text
    assert "| convolution | 2.0000 s, 50 % of matmul |" in text
    assert calibrate.page(text, RESULT) == text
    assert calibrate.report(RESULT).count("MISSED") == 1
    fine = RESULT | {"cases": [CASE | {"error": 0.05}]}
    assert "MISSED" not in calibrate.report(fine) and "within the aim" in calibrate.report(fine)


@pytest.mark.parametrize(
    "wrong", [["--chip-batch", "1"], ["--threads", "0"], ["--rounds", "-1"], ["--quick", "--docs"]]
)
def test_bad_numbers_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as refused:
        calibrate.main(wrong)
    assert refused.value.code == 2 and "--" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_calibration_writes_files_that_the_emulator_reads(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "calibrate.py", "--quick", "--json", "--run-root", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [case["workers"] for case in result["cases"]] == [1, 2]
    for case in result["cases"]:
        assert case["error"] == pytest.approx(case["predicted_s"] / case["measured_s"] - 1)
        assert case["predicted_s"] == pytest.approx(sum(case["predicted_parts"].values()))
        assert case["measured_s"] > 0 and len(case["measured_steps_s"]) == 1
    for name, files in result["files"].items():
        machine = emulator.build(calibrate.config_of(1 + (name == "two_workers"), 32, 4, 1, files["mesh"]))
        assert machine.step(4 * machine.mesh.num_chips).step_s == pytest.approx(
            result["cases"][name == "two_workers"]["predicted_s"]
        )
    (folder,) = (tmp_path / "calibration").iterdir()
    assert json.loads((folder / "calibration.json").read_text()) == result
