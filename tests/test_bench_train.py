"""The training benchmark: its arithmetic, its bare loop, and one small run on torch, torchvision and numpy alone."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import bench_train as bench

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "scripts" / "bench_train.py"
FOREIGN = ("hydra", "omegaconf", "ray", "sklearn", "tensorboard", "matplotlib")


@pytest.mark.parametrize("name", ["bare_loop", "reference"])
def test_the_bare_loop_is_one_short_function_with_nothing_of_ours(name):
    tree = ast.parse(PATH.with_name("bench_train_sides.py").read_text(encoding="utf-8"))
    (function,) = [item for item in tree.body if isinstance(item, ast.FunctionDef) and item.name == name]
    assert function.end_lineno - function.lineno < 60
    imported = [alias.name for item in ast.walk(function) if isinstance(item, ast.Import) for alias in item.names]
    imported += [item.module for item in ast.walk(function) if isinstance(item, ast.ImportFrom)]
    assert {module.split(".")[0] for module in imported} == {"torch", "torchvision"}


def test_ratios_are_those_of_each_round_and_the_bare_loop_its_faster_form():
    seconds = {
        "reference": [8.0, 16.0, 8.0],  # of 32 images
        "bare_loop": [1.0, 2.0, 1.0],
        "compiled": [0.8, 1.6, 0.8],
        "harness": [0.5, 1.0, 0.5],  # the second round fell into a slow time for all
        "matmul": [0.5, 0.25, 0.5],
    }
    row = bench.step_row(seconds, batch=16, image_flops=1e10, product_flops=2e10)
    assert (row["reference_images_per_s"], row["harness_images_per_s"]) == (4.0, 32.0)
    assert (row["bare_loop"], row["bare_loop_images_per_s"]) == ("compiled", pytest.approx(20.0))
    assert row["bare_loop_forms_images_per_s"]["eager"] == 16.0
    assert (row["ratio_to_reference"], row["ratio_to_bare_loop"]) == (8.0, pytest.approx(1.6))
    assert row["matmul_gflops_per_s"] == 80.0  # its best round
    assert (row["matmul_limit_images_per_s"], row["matmul_limit_share"]) == (8.0, 4.0)
    del seconds["compiled"]
    assert bench.step_row(seconds, 16, 1e10, 2e10)["bare_loop"] == "eager"


def test_a_gpu_that_is_not_there_is_refused_before_anything_starts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_train.py", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert capsys.readouterr().err.splitlines()[-1].startswith("bench_train.py: error: device=cuda: torch sees no GPU")


def test_a_small_run_needs_torch_torchvision_and_numpy_alone(tmp_path):
    """Every side trains, in processes that can't import the rest."""
    for name in FOREIGN:
        (tmp_path / f"{name}.py").write_text("raise ModuleNotFoundError('blocked')\n", encoding="utf-8")
    command = [sys.executable, PATH, "--json", "--quick", "--only", "step", "--threads", "1"]
    small = ["--depth", "18", "--image-size", "32", "--chip-batch", "2"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([*command, *small], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"][0]["chip_batch"] == result["chip_batch"] == 2
    for key in ("reference_images_per_s", "bare_loop_images_per_s", "harness_images_per_s", "matmul_limit_share"):
        assert result[key] > 0, key
    ratio = result["harness_images_per_s"] / result["reference_images_per_s"]
    assert result["ratio_to_reference"] == pytest.approx(ratio)
    assert result["bare_loop"] == "eager"
