import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import compose
from launch.emulate import COUNTS, EXPERIMENT, emulate
from train.report import markdown_table
from train.sim import straggler
from train.sim.convergence import POINTS

ROOT = Path(__file__).parents[1]
FIELDS = """
time_to_train_s interval_s step_s steps_per_epoch epochs compute_s exposed_comm_s straggler_s input_s other_s eval_s
startup_s images_per_s images_per_s_per_chip scaling_efficiency chips active_chips global_batch_size collective network
""".split()


def run(arguments: list[str], cwd: Path, code: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments] if code else [sys.executable, "-m", "launch.emulate", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def price(*overrides: str) -> int:
    return compose.main(emulate, list(overrides), "launch.emulate", experiment=EXPERIMENT)


def test_json_is_one_object_without_torch_ray_or_files(tmp_path):
    code = (
        "import sys; from launch.emulate import main; status = main();"
        "loaded = {'torch', 'ray', 'tensorboard'} & set(sys.modules); assert not loaded, loaded; sys.exit(status)"
    )
    done = run(["format=json"], tmp_path, code)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(FIELDS) <= set(result)
    assert result["experiment"] == "imagenet_atlas900"
    assert result["claim"]["seconds"] == 59.8 and result["claim"]["label"] == "claimed"
    assert [record["seconds"] for record in result["neighbours"]] == [38.76, 70.42]
    assert list(tmp_path.iterdir()) == []


def test_the_table_keeps_claimed_and_emulated_apart(capsys):
    assert price() == 0
    head, *rows = capsys.readouterr().out.splitlines()[:5]
    claimed, emulated = (head.index(word) + len(word) for word in ("claimed", "emulated"))
    for row, seconds in zip(rows[:3], ("59.8 s", "38.8 s", "70.4 s"), strict=True):
        assert row[:claimed].endswith(seconds) and len(row) <= claimed
    assert rows[3][claimed:emulated].endswith(" s") and rows[3][claimed - 7 : claimed].strip() == ""


def test_explain_prints_every_origin(capsys):
    assert price("explain=true", "format=json") == 0
    result = json.loads(capsys.readouterr().out)
    origins = result["origins"]
    assert all(origin["kind"] in ("cited", "derived", "fitted", "assumed", "given") for origin in origins)
    assert result["expected_max"]["normal"][result["expected_max"]["chips"].index(1024)] == pytest.approx(
        3.248, abs=1e-3
    )
    names = {origin["name"] for origin in origins}
    assert {"chip.anchor[32]", "link.roce", "chip.jitter", "calibration.model_error"} <= names
    assert price("explain=true") == 0
    explained = capsys.readouterr().out.split("Where the numbers come from")[1]
    assert "MindSpore 0.2.0-alpha" in explained
    assert explained.split("The slowest of n chips")[1].split()[-8:-6] == ["gumbel", "1.621"]


def test_the_table_shows_what_shapes_a_step(capsys):
    assert price("epochs=auto", "bn_span=8", "mesh.host_images_per_s=20000") == 0
    shown = capsys.readouterr().out
    for words in (
        "epochs, 5 to 95 %                   55.3 to 56.7, from reference points",
        "the slowest chip                    3.25 normal deviations of 3.13 % of compute",
        "ms a step, 8 chips",
        "input of a host                   20,000 images/s at most",
    ):
        assert words in shown


def test_a_batch_beyond_the_convergence_table_is_said(capsys):
    assert price("epochs=auto", "global_batch_size=131072") == 0
    assert "131,072 is beyond the convergence table (1,632 to 67,840)" in capsys.readouterr().out


@pytest.mark.parametrize("collective", compose.groups()["collective"])
def test_every_collective_answers(collective, capsys):
    assert price("format=json", "mesh=atlas900_64", f"collective={collective}") == 0
    assert json.loads(capsys.readouterr().out)["collective"].partition(":")[0] == collective


@pytest.mark.parametrize("experiment", compose.groups()["experiment"])
def test_every_experiment_answers(experiment, capsys):
    assert price("format=json", f"experiment={experiment}") == 0
    assert json.loads(capsys.readouterr().out)["experiment"] == experiment


def test_weak_scaling_keeps_the_images_per_chip(capsys):
    assert price("format=json", "scaling=weak", "mesh=atlas900_4096") == 0
    assert json.loads(capsys.readouterr().out)["global_batch_size"] == 32 * 4096


def test_a_sweep_prints_one_object_a_job(capsys):
    assert price("-m", "format=json", "mesh=atlas900_256,atlas900_512") == 0
    assert [json.loads(line)["chips"] for line in capsys.readouterr().out.splitlines()] == [256, 512]


@pytest.mark.parametrize(
    "overrides, named",
    [
        (["mesh=atlas901"], "atlas901"),
        (["mesh.axes.host=-8"], "axes.host=-8"),
        (["mesh.chips=1000"], "not chips=1000"),
        (["mesh.topology.roce.gbytes_per_s=0"], "gbytes_per_s=0"),
        (["precision=fp32"], "no published rate in fp32"),
        (["claim.record=nobody"], "claim.record=nobody"),
        (["chip.jitter=-1"], "jitter=-1"),
        (["mesh.host_images_per_s=0"], "host_images_per_s=0"),
        (["epochs=never"], "epochs: 'never' is not"),
        (["epochs=auto", "model=resnet18"], "reference points are of ResNet-50"),
        (["bn_span=12"], "bn_span=12"),
        (["chip.software=latest"], "framework and a year"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(overrides, named, capsys):
    assert price(*overrides) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and named in printed.err and len(printed.err.splitlines()) == 1


def test_the_document_s_tables_are_the_model_s():
    text = (ROOT / "docs" / "step_model.md").read_text(encoding="utf-8")
    named = dict(zip(("normal", "exponential", "gumbel"), straggler.table(COUNTS).values(), strict=True))
    rows = [["distribution", *(f"{count:,}" for count in COUNTS)]]
    rows += [[name, *(f"{value:.3f}" for value in values)] for name, values in named.items()]
    assert markdown_table(rows) == text.split("<!-- straggler -->")[1].split("<!-- /straggler -->")[0].strip()
    rows = [["global batch", *(f"{point.batch:,}" for point in POINTS)]]
    rows.append(["epochs, mean", *(f"{point.mean:.1f}" for point in POINTS)])
    rows.append(["deviation", *(f"{point.stdev:.1f}" for point in POINTS)])
    rows.append(["runs", *(str(point.runs) for point in POINTS)])
    assert markdown_table(rows) == text.split("<!-- convergence -->")[1].split("<!-- /convergence -->")[0].strip()
