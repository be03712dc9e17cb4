"""A published log as a run: what is read, what is refused, and the run on another machine's clock."""

import json
from pathlib import Path

import pytest

from launch.compose import load_run_config
from launch.emulate import answer
from scripts import import_mlperf
from train.mlperf_import import parse
from train.report import report

SECONDS, EPOCHS, EVERY = 38.8, 56, 4
PCL = Path(__file__).resolve().parents[1] / "docs/mlperf/pcl_1024_result_0.txt"


def line(seconds: float, key: str, value=None, kind: str = "POINT_IN_TIME", **metadata) -> str:
    event = {"namespace": "", "time_ms": round(1_621_000_000_000 + 1000 * seconds), "event_type": kind}
    return f":::MLLOG {json.dumps(event | {'key': key, 'value': value, 'metadata': {'lineno': 1, **metadata}})}"


def log(**changes) -> list[str]:
    """Like PCL's of MLPerf v1.0: 56 epochs of 39 steps of 32,768 images in 38.8 s, an evaluation every 4 epochs."""
    stated = {
        "submission_benchmark": "resnet",
        "submission_org": "Made up",
        "submission_platform": "by a test",
        "global_batch_size": 32_768,
        "train_samples": 1_281_167,
        "eval_samples": 50_000,
        "opt_name": "lars",
        "lars_opt_base_learning_rate": 24.952061,
        "lars_opt_momentum": 0.933205,
        "lars_opt_learning_rate_warmup_epochs": 8,
        **changes,
    }
    lines = ["launcher: starting", *(line(-9, key, value) for key, value in stated.items() if value is not None)]
    lines += [line(-5, "init_start", kind="INTERVAL_START"), line(0, "run_start", kind="INTERVAL_START")]
    for epoch in range(EVERY, EPOCHS + 1, EVERY):
        at = 0.4 + (SECONDS - 0.5) * epoch / EPOCHS
        span = {"first_epoch_num": epoch - EVERY + 1, "epoch_count": EVERY}
        lines += [line(at - 0.02, "block_stop", kind="INTERVAL_END", **span)]
        lines += [f"0: {line(at, 'eval_accuracy', round(0.7601 * (epoch / EPOCHS) ** 0.5, 4), epoch_num=epoch)}"]
    return [*lines, line(SECONDS, "run_stop", kind="INTERVAL_END", status="success")]


def test_what_a_log_says():
    found = parse(log())
    assert (found.seconds, found.status, found.global_batch_size) == (SECONDS, "success", 32_768)
    assert (found.epochs, found.eval_every, found.eval_offset) == (56, 4, 0)
    assert len(found.rows) == 14 and found.rows[0]["step"] == 4 * 39 and found.rows[-1]["step"] == 56 * 39
    assert found.rows[-1]["values"] == {"eval/top1": 0.7601}
    assert found.rows[-1]["published_s"] == pytest.approx(38.7, abs=1e-3)
    assert not {"measured_s", "emulated_s"} & set(found.rows[0])


def test_the_epoch_may_stand_in_the_block_alone():
    lines = [text.replace('"epoch_num"', '"other"') for text in log(train_samples=None)]
    assert [row["epoch"] for row in parse(lines).rows] == list(range(4, 57, 4))


def test_the_figures_that_pcl_published():
    """Their own file: steps of 39 an epoch, an evaluation of two whole batches, the clock in milliseconds."""
    found = parse(PCL.read_text().splitlines())
    assert (found.seconds, found.status, found.global_batch_size) == (38.753, "success", 32_768)
    assert (found.num_train, found.num_eval) == (39 * 32_768, 2 * 32_768)
    assert (found.epochs, found.eval_every, found.eval_offset, found.rows[-1]["step"]) == (56, 4, 0, 56 * 39)
    assert [(row["published_s"], row["values"]["eval/top1"]) for row in (found.rows[0], *found.rows[-2:])] == [
        (3.115, 0.06602),
        (35.854, 0.75688),
        (38.56, 0.76024),
    ]
    assert found.settings["submission_platform"] == "Ascend 910 ProA" and "cache_clear" not in found.settings


def test_lines_without_a_kind():
    """As Google's of v0.7 are: no event_type, and the block's end after its evaluation."""
    lines = [text.replace('"event_type": "POINT_IN_TIME", ', "") for text in log()]
    assert not [text for text in lines if "POINT_IN_TIME" in text]
    found = parse(lines)
    assert (found.global_batch_size, found.settings["lars_opt_momentum"]) == (32_768, 0.933205)
    assert found.rows == parse(log()).rows


def test_the_format_of_v0_6():
    """As Fujitsu's of 2,048 V100: Unix seconds, key and JSON, first evaluation after 2 epochs, then every 4."""

    def older(at: float, key: str, value=None, **metadata) -> str:
        return f":::MLL {at:.3f} {key}: {json.dumps({'value': value, 'metadata': metadata})}"

    start = 1_560_722_680.0
    evals = [(2.25, 0.1, 2), (5.5, 0.2, 6), (8.75, 0.7598, 10)]
    lines = [older(start - 9, "submission_benchmark", "resnet"), older(start - 2, "global_batch_size", 86_016)]
    lines += ['WARNING: Log validation: Key "run_final" is not in known resnet keys.', older(start, "run_start")]
    lines += [older(start + at, "eval_accuracy", top1, epoch_num=epoch) for at, top1, epoch in evals]
    found = parse([*lines, older(start + 8.76, "run_stop", status="success")])
    assert found.seconds == pytest.approx(8.76, abs=1e-6) and found.status == "success"
    assert [row["epoch"] for row in found.rows] == [2, 6, 10] and (found.eval_every, found.eval_offset) == (4, 2)
    assert found.rows[0]["published_s"] == pytest.approx(2.25, abs=1e-6) and found.rows[0]["step"] == 2 * 14
    with pytest.raises(ValueError, match="line 1: :::MLLOG is not followed"):
        parse([":::MLL 1.5 key: {half"])


@pytest.mark.parametrize(
    "lines, says",
    [
        (["nothing"], "no line has :::MLLOG; give a result_N.txt of MLPerf training v0.6"),
        ([":::MLLv0.5 resnet 1 key"], "line 1: the format of MLPerf training v0.5; v0.6 and later"),
        ([":::MLLOG {half"], "line 1: :::MLLOG is not followed by an event"),
        (log()[:-1], "run_stop is missing"),
        ([text for text in log() if "eval_acc" not in text], "eval_accuracy is missing"),
        (log(global_batch_size=None), "global_batch_size=None must be a whole number"),
        (log(submission_benchmark="bert"), "submission_benchmark='bert': only resnet"),
        ([text.replace("0.7601", "76.01") for text in log()], "eval_accuracy=76.01 must be a fraction"),
        (
            [*log(), *(text for text in log() if "eval_acc" in text)],
            "an evaluation after epoch 4: epochs must",
        ),
    ],
)
def test_what_is_no_log_of_a_run_is_refused(lines, says):
    with pytest.raises(ValueError, match=says):
        parse(lines)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlperf")
    (folder / "result_0.txt").write_text("\n".join(log()) + "\n")
    assert import_mlperf.main([str(folder / "result_0.txt"), "--out", str(folder / "pcl")]) == 0
    return folder / "pcl"


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_the_folder_is_published_alone(imported):
    config = load_run_config(imported)
    assert (config["global_batch_size"], config["epochs"], config["eval_every"]) == (32_768, 56, 4)
    assert (config["schedule"]["base_lr"], config["optim"]["momentum"]) == (24.952061, 0.933205)
    assert json.loads((imported / "published.json").read_text())["label"] == "published"
    assert [path.name for path in (imported / "tb").iterdir()] == ["published"]
    shown = scalars(imported / "tb" / "published")
    assert shown["clock/eval_top1"][-1] == (38_700, pytest.approx(0.7601))
    assert not [tag for tag in shown if "emulated" in tag or "measured" in tag]
    with pytest.raises(ValueError, match="a published result, imported"):
        report([imported])


def test_it_is_re_timed_with_its_accuracy_unchanged(imported, tmp_path, capsys):
    out = tmp_path / "on-dgx"
    assert answer([f"run={imported}", "mesh=dgx_a100", "format=json", f"out={out}"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["steps"], result["evaluations"], result["epochs"]) == (56 * 39, 14, 56)
    assert result["before"] == {"label": "published", "time_to_target_s": 38.7, "seconds": SECONDS}
    parts = "compute_s exposed_comm_s straggler_s input_s other_s eval_s startup_s".split()
    assert sum(result[part] for part in parts) == pytest.approx(result["time_to_train_s"])
    assert result["time_to_target_s"] == result["time_to_train_s"] == result["curve"][-1]["emulated_s"]
    published, emulated = scalars(imported / "tb" / "published"), scalars(out / "tb" / "emulated")
    assert emulated["eval/top1"] == published["eval/top1"]
    assert emulated["clock/eval_top1"][-1][0] == round(1000 * result["time_to_train_s"])
    assert [path.name for path in (out / "tb").iterdir()] == ["emulated"]


def test_pcls_run_on_another_mesh_has_the_documented_time(tmp_path, capsys):
    """docs/whatif.md shows this; the accuracy is the published one, evaluation for evaluation."""
    assert import_mlperf.main([str(PCL), "--out", str(tmp_path / "pcl")]) == 0
    capsys.readouterr()
    assert answer([f"run={tmp_path / 'pcl'}", "mesh=atlas900_1024", "format=json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["before"] == {"label": "published", "time_to_target_s": 38.56, "seconds": 38.753}
    published = [row["values"]["eval/top1"] for row in parse(PCL.read_text().splitlines()).rows]
    assert [point["top1"] for point in result["curve"]] == published
    assert (result["steps"], result["chips"], result["reached"]) == (2184, 1024, True)


def test_its_machine_has_to_be_given(imported, capsys):
    assert answer([f"run={imported}"]) == 2
    assert "give mesh=" in capsys.readouterr().err


def test_a_file_that_is_no_log_is_one_line(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("hello\n")
    assert import_mlperf.main([str(tmp_path / "x.txt")]) == 2
    assert import_mlperf.main([str(tmp_path / "missing.txt")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "no line has :::MLLOG" in said[0] and "missing.txt: No such file" in said[1]
