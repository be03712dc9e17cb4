"""The study's table from made-up run folders: exact means and deviations, and nothing dropped without a word."""

import json
from pathlib import Path

import pytest
import yaml

from launch.compose import compose
from scripts import study_bn_span
from train.models.passes import plan_passes

TOP1 = {(1, 0): 0.50, (1, 1): 0.52, (1, 2): 0.57, (64, 0): 0.625}


@pytest.fixture(scope="module")
def recipe() -> dict:
    return compose(["experiment=cifar10_bn_span", "data.root=/data/cifar10"])


def made(root: Path, recipe: dict, span: int, seed: int, top1: float | None, **changes) -> Path:
    """A run of 3 epochs of 2 steps, with losses 6, 5, ... 1; without `top1` it is unfinished."""
    folder = root / f"run-{span}-{seed}"
    folder.mkdir(parents=True)
    config = recipe | {"bn_span": span, "seed": seed, "run": folder.name} | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"kind": "step", "step": n, "values": {"train/loss": 7.0 - n}} for n in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if top1 is not None:
        model = {"parameters": 175_258} | config["model"]
        result = {"status": "done", "top1": top1, "steps": 6, "steps_per_epoch": 2, "epochs": 3.0, "model": model}
        result |= {"chip_batch_size": 4, "chips": 1024, "global_batch_size": 4096, "num_eval": 10_000}
        result |= {"measured_s": 100.0 + seed, "emulated_s": 0.75, "data": {"name": "cifar10"}, "workers": 1}
        result |= {"threads": 2, "precision": "bf16", "numerics": "fast", "device": "cpu"}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def runs(tmp_path, recipe) -> Path:
    for (span, seed), top1 in TOP1.items():
        made(tmp_path, recipe, span, seed, top1)
    made(tmp_path, recipe, 64, 1, None)
    made(tmp_path, recipe, 1, 7, 0.9, experiment="another")
    return tmp_path


@pytest.mark.parametrize("span, size", [(1, 64), (16, 64), (64, 64), (256, 256), (1024, 1024)])
def test_a_pass_holds_64_chips_or_one_span(recipe, span, size):
    passes = plan_passes(recipe | {"bn_span": span}, max(span, 8), range(1024), room=0)
    assert [(p.count, p.span) for p in passes] == [(size, span)] * (1024 // size)


def test_means_and_deviations_are_exact(runs):
    """Of 50, 52 and 57: mean 53, sample variance (9 + 1 + 16) / 2 = 13."""
    found = study_bn_span.study(study_bn_span.find(runs), spans=(1, 64), seeds=(0, 1, 2))
    assert study_bn_span.spread([50.0, 52.0, 57.0]) == (53.0, pytest.approx(13**0.5))
    first, second = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in study_bn_span.table(found).splitlines()[2:]
    )
    assert first == ["4", "1", "3", "53.00 +- 3.61 %", "50.00, 52.00, 57.00"] + [
        "1.500 +- 0.000",
        "101 +- 1",
        "0.750 +- 0.000",
    ]
    assert second == ["256", "64", "1", "62.50 %", "62.50", "1.500", "100", "0.750"]


def test_what_is_missing_is_named(runs, capsys):
    assert study_bn_span.main(["--root", str(runs)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing")]
    assert len(lines) == 18 - len(TOP1)
    assert f"missing  bn_span=64 seed=1: {runs / 'run-64-1'} is unfinished" in lines
    assert "missing  bn_span=64 seed=2: there is no run" in lines
    assert not any("bn_span=1 " in line for line in lines)


def test_the_page_and_the_plot(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_bn_span, "DOCS", tmp_path / "docs")
    assert study_bn_span.main(["--root", str(runs), "--write"]) == 1
    page = (tmp_path / "docs/bn_span.md").read_text()
    assert "| 4 | 1 | 3 | 53.00 +- 3.61 % |" in page and "(bn_span.png)" in page
    assert "- bn_span=64 seed=2: there is no run" in page
    assert "Highest mean: 256 images, 62.50 %; lowest: 4 images, 53.00 %" in page
    assert "ResNet-14 for CIFAR-10" in page and "175,258 parameters" in page
    assert (tmp_path / "docs/bn_span.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_don_t_belong_together_are_refused(tmp_path, recipe, capsys):
    one = made(tmp_path, recipe, 1, 0, 0.5)
    twin = made(tmp_path / "twin", recipe, 1, 0, 0.5)
    other = made(tmp_path / "other", recipe, 4, 0, 0.5, epochs=13)
    elsewhere = made(tmp_path / "elsewhere", recipe, 4, 1, 0.5, threads=1, run_root="/there")
    for folders, problem in (
        ([one, twin], "are both bn_span=1 seed=0"),
        ([one, other], "has epochs=13"),
        ([tmp_path / "nowhere"], "not a run folder"),
        ([], "no finished run"),
    ):
        assert study_bn_span.main([*map(str, folders)]) == 2
        assert problem in capsys.readouterr().err
    assert len(study_bn_span.study([one, elsewhere]).runs) == 2
