"""The decoders' table from made-up runs: exact differences, and no verdict without all runs."""

import json
from pathlib import Path

import pytest
import yaml

from launch.compose import compose
from scripts import study_decoder


@pytest.fixture(scope="module")
def recipe() -> dict:
    return compose(["experiment=photos_decoder", "data.root=/data/photos"])


def made(root: Path, recipe: dict, decoder: str, seed: int, top1: float, loss: float = 1.0, **changes) -> None:
    folder = root / f"{decoder}-{seed}"
    folder.mkdir(parents=True)
    config = recipe | {"seed": seed, "data": recipe["data"] | {"decode": decoder}} | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = {"status": "done", "top1": top1, "eval_loss": loss + seed / 100}
    (folder / "result.json").write_text(json.dumps(result))


def test_a_difference_below_the_limit_is_noise_and_one_above_is_not(tmp_path, recipe, capsys):
    """Of 50, 52, 57 and 52, 54, 59: variances 13, so the standard error is sqrt(26 / 3); 2.776 of it are 8.17."""
    for seed, top1 in enumerate((0.50, 0.52, 0.57)):
        made(tmp_path, recipe, "turbo", seed, top1)
        made(tmp_path, recipe, "pillow", seed, top1 + 0.02)
    values, difference, error = study_decoder.compared(study_decoder.runs_below(tmp_path), "top1")
    assert values == {"turbo": [0.50, 0.52, 0.57], "pillow": [0.52, 0.54, pytest.approx(0.59)]}
    assert (difference, error) == (pytest.approx(-0.02), pytest.approx((26e-4 / 3) ** 0.5))
    assert study_decoder.limit(3) == 2.776 and study_decoder.limit(5) == 2.306 and study_decoder.limit(50) == 2.1
    assert study_decoder.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "top-1, %: turbo - pillow = -2.00, standard error 2.94, at most 8.17 is seed noise: equal" in out
    assert "53.00 +- 3.61" in out and "50.00, 52.00, 57.00" in out
    for seed in range(3):
        (tmp_path / f"pillow-{seed}" / "result.json").write_text(
            json.dumps({"status": "done", "top1": 0.9, "eval_loss": 1.0})
        )
    assert study_decoder.main([str(tmp_path)]) == 1 and "NOT equal" in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path, recipe, capsys):
    assert study_decoder.main([str(tmp_path)]) == 2 and "at least 3 seeds" in capsys.readouterr().err
    for seed in range(3):
        made(tmp_path, recipe, "turbo", seed, 0.5)
    for seed in range(2):
        made(tmp_path, recipe, "pillow", seed, 0.5)
    assert study_decoder.main([str(tmp_path)]) == 2
    assert "no finished run of data.decode=pillow seed=2" in capsys.readouterr().err
    made(tmp_path, recipe, "pillow", 2, 0.5, label_smoothing=0.2)
    assert study_decoder.main([str(tmp_path)]) == 2 and "another label_smoothing" in capsys.readouterr().err
