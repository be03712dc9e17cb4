"""`python -m launch.verdict` as a command: what it prints, writes and refuses; the page in docs/ is current."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import compose
from launch.emulate import EXPERIMENT
from launch.verdict import judged, verdict
from launch.verdict_text import as_markdown, as_text
from scripts import verdict_page

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found():
    return judged(compose.compose([], EXPERIMENT))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The command, run once; its folder is `out` of the working folder that comes with it."""
    cwd = tmp_path_factory.mktemp("verdict")
    code = (
        "import sys; from launch.verdict import main; status = main();"
        "loaded = {'torch', 'ray'} & set(sys.modules); assert not loaded, loaded; sys.exit(status)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, "format=json", "run_root=out"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return process, cwd


@pytest.fixture(scope="module")
def folder(done):
    return done[1] / "out/verdict"


def ask(*overrides: str) -> int:
    return compose.main(verdict, list(overrides), "launch.verdict", experiment=EXPERIMENT)


def test_json_is_one_object_without_torch_or_ray(done, folder):
    process, cwd = done
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["claim"]["label"] == "claimed" and result["claim"]["seconds"] == 59.8
    assert result["emulated"]["label"] == "emulated" and 0 < result["emulated"]["odds"] < 1
    assert sum(result["audit"]["counts"].values()) == len(result["audit"]["claims"])
    assert json.loads((folder / "verdict.json").read_text(encoding="utf-8")) == result
    assert [path.name for path in cwd.iterdir()] == ["out"]
    assert sorted(path.name for path in folder.iterdir()) == ["tb", "verdict.json", "verdict.md", "verdict.png"]


def test_the_text_begins_with_the_verdict_in_one_line(found):
    text = as_text(found, explain=False)
    first = text.splitlines()[0]
    low, high = found.run.interval_s
    assert first.startswith("Verdict: 59.8 s is ") and f"{low:.1f} to {high:.1f} s" in first
    within = low <= 59.8 <= high
    assert ("is within what" in first) == within
    assert "no figure of a system" in text and "sources" not in first
    explained = as_text(found, explain=True)
    assert explained.startswith(text[:200]) and "100 * (1 - ours / theirs)" in explained and "ctoutiao.com" in explained


def test_labels_keep_columns_of_their_own(found):
    """A number of one label never stands under the head of another."""
    lines = as_markdown(found).splitlines()
    heads = [line for line, rule in zip(lines, lines[1:], strict=False) if rule.startswith("|---")]
    assert len(heads) == 6
    cells = [[cell.strip() for cell in head.strip("|").split("|")] for head in heads]
    for row in cells:
        for cell in row:
            assert not ("claimed" in cell and "emulated" in cell), cell
    assert "measured" not in " ".join(heads)
    for one in found.audit:
        plain = one.as_dict()
        assert plain["claimed"]["label"] == "claimed"
        assert (plain["emulated"] or {}).get("label", "emulated") == "emulated"
        assert plain["recomputed"] is None or plain["emulated"] is None


def test_the_verdict_follows_from_the_interval(found):
    low, high = found.run.interval_s
    for seconds, words in ((low - 1, "less than"), ((low + high) / 2, "within"), (high + 1, "more than")):
        claim = type(found.claim)(**{**vars(found.claim), "seconds": seconds})
        assert type(found)(**{**vars(found), "claim": claim}).where == words


def test_the_plane_holds_runs_and_reference_points(found):
    runs = {one.record.id: one for one in found.published}
    assert len(runs) == 6
    pcl = runs["mlperf-v1.0-PCL-CloudBrainII_1024_mindspore_close"]
    assert pcl.images_per_s_per_chip == pytest.approx(1_281_167 / 0.6816 / 1024)
    at = {batch: (epochs, run) for batch, epochs, _, run in found.reference}
    assert at[32_768][0] == 56 and at[32_768][1].step_s == found.run.step_s
    assert {13_056, 32_768, 49_152} <= set(at)
    needed = dict(found.needed)
    assert needed[64] == pytest.approx(1348, abs=2)  # 39 steps of 32 images an epoch, 16 evaluations, 0.57 s besides


def test_picture_and_tensorboard_page(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = (folder / "verdict.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    assert board.Tags()["images"] == ["verdict/picture"]
    image = board.Images("verdict/picture")[0]
    assert image.encoded_image_string == picture and (image.width, image.height) == (1600, 840)
    (text,) = board.Tensors("verdict/text_summary")
    assert text.tensor_proto.string_val[0].decode() == (folder / "verdict.md").read_text(encoding="utf-8")


def test_writing_again_leaves_one_page(found, folder):
    from train.tensorboard import write_page

    write_page(folder / "tb", {"verdict": "again"}, {"verdict/picture": folder / "verdict.png"})
    assert len(list((folder / "tb").iterdir())) == 1


def test_another_machine_and_claim(found):
    other = judged(compose.compose(["mesh=tpu_v3", "epochs=72", "claim.record=ying-2018"], EXPERIMENT))
    assert other.line.startswith("132 s is ") and "1,024 x TPU v3" in other.line
    assert 0 < other.odds < 1 and any(one.left_out for one in other.changed)
    assert [one.verdict for one in other.audit] == [one.verdict for one in found.audit]  # the articles' own machine


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["claim.record=nobody"], "claim.record=nobody"),
        (["epoch=72"], "epoch"),
        (["run_root={file}"], "run_root"),
        (["faults=dead_chip"], "faults: a dead chip strikes during a run"),
    ],
)
def test_wrong_input_makes_one_line_and_status_2(overrides, named, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert ask(f"run_root={tmp_path}", *(word.format(file=file) for word in overrides)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error


def test_the_page_is_current(found):
    page = verdict_page.PAGE.read_text(encoding="utf-8")
    assert page == verdict_page.HEAD + as_markdown(found), "run python scripts/verdict_page.py"
    assert verdict_page.PAGE.with_suffix(".png").is_file()
