"""Recipes: each composes with any experiment and sets what its source says; each trains two steps, much reduced."""

import math
import shutil

import pytest
import torch
from launch_samples import TINY, trained_here

from launch import compose as composing
from launch.compose import ConfigError, compose, groups
from train import emulator
from train.build import Worker, WorkerContext
from train.config import Config

RECIPES = [name for name in groups()["recipe"] if name != "none"]
BATCH = {"claim_2019": 32_768, "pcl_2021": 32_768, "mlperf_4096": 4_096, "sgd_256": 256}
OTHERS = [("pcl_2021", name) for name in groups()["experiment"] if name not in ("imagenet_atlas900", "cifar10_atlas")]
WHOLE = ("model", "optim", "schedule", "epochs", "target_top1", "label_smoothing", "precision", "loss_scale")


def test_these_are_the_recipes() -> None:
    assert set(RECIPES) == set(BATCH)


@pytest.fixture(scope="module")
def on_imagenet() -> dict[str, dict]:
    return {recipe: compose([f"recipe={recipe}"], experiment="imagenet_atlas900") for recipe in RECIPES}


@pytest.mark.parametrize("recipe, experiment", [*((recipe, "cifar10_atlas") for recipe in RECIPES), *OTHERS])
def test_a_recipe_is_the_same_in_every_experiment(recipe: str, experiment: str, on_imagenet: dict) -> None:
    config, first = compose([f"recipe={recipe}", f"experiment={experiment}"]), on_imagenet[recipe]
    assert (config["recipe"], config["experiment"]) == (recipe, experiment)
    assert set(config) == set(Config.__dataclass_fields__)
    assert {key: config[key] for key in WHOLE} == {key: first[key] for key in WHOLE}
    assert (config["global_batch_size"], config["chip_batch_size"]) == (BATCH[recipe], None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_all_recipes_set_the_same_keys(recipe: str) -> None:
    expected = composing._set_by("recipe/claim_2019")
    assert composing._set_by(f"recipe/{recipe}") == expected and {"model", "optim", "schedule"} <= expected


def test_experiments_keep_the_rest_and_the_command_line_wins() -> None:
    words = ["recipe=sgd_256", "optim.nesterov=false", "epochs=3", "chip_batch_size=2", "model=resnet18"]
    config, plain = compose(words), compose()
    kept = ("mesh", "chip", "collective", "network", "data", "claim", "bn_span", "numerics", "workers")
    assert {key: config[key] for key in kept} == {key: plain[key] for key in kept}
    assert (config["optim"]["nesterov"], config["epochs"], config["model"]["depth"]) == (False, 3, 18)
    assert (config["chip_batch_size"], config["global_batch_size"]) == (2, None)


def test_the_record_s_experiment_has_the_claim_s_recipe(on_imagenet: dict) -> None:
    config = compose([], experiment="imagenet_atlas900")
    assert config == on_imagenet["claim_2019"] and config["recipe"] == "claim_2019"
    assert (config["global_batch_size"], config["epochs"], config["target_top1"]) == (32_768, [64, 72], 0.759)
    assert config["optim"]["_target_"] == "train.optim.lars.LARS"
    assert (config["optim"]["momentum"], config["optim"]["weight_decay"]) == (0.94, 2.5e-5)
    assert (config["schedule"]["base_lr"], config["schedule"]["warmup_epochs"]) == (21.2, 16)
    assert compose(["recipe=none"])["recipe"] == "none"


def test_pcl_2021_is_what_was_published(on_imagenet: dict) -> None:
    config = on_imagenet["pcl_2021"]
    made = emulator.build(config)
    assert (made.steps_per_epoch, made.epochs, made.run()["steps"]) == (39, 56, 56 * 39)
    assert made.workload.parameters == 25_559_081
    assert made.num_train - 39 * 32_768 == 3_215  # dropped
    lars = {
        "momentum": 0.933205,
        "weight_decay": 1e-4,
        "coefficient": 0.001,
        "epsilon": 0,
        "momentum_form": "lr_outside",
    }
    assert {key: config["optim"][key] for key in lars} == lars
    rate = emulator.make(config["schedule"], epochs=config["epochs"])
    assert [rate(epoch) for epoch in (0, 8, 32, 56)] == pytest.approx([0, 24.952061, 24.952061 / 4 + 0.000075, 0.0001])
    assert config["schedule"]["decay_epochs"] * 39 == 1_872
    settings = (config["loss_scale"], config["precision"], config["label_smoothing"], config["data"]["image_size"])
    assert settings == (1024, "fp16", 0.1, 224)


def test_mlperf_4096_decays_to_its_13_137th_step(on_imagenet: dict) -> None:
    config, steps = on_imagenet["mlperf_4096"], 1_281_167 // 4_096
    rate = emulator.make(config["schedule"], epochs=42)
    assert steps == 312 and rate(5) == 10.0
    assert rate(13_137 / steps) == pytest.approx(0.0001, abs=1e-6) and rate(13_000 / steps) > 0.0001 + 1e-3


def test_sgd_256_falls_to_a_tenth_three_times(on_imagenet: dict) -> None:
    config = on_imagenet["sgd_256"]
    rate = emulator.make(config["schedule"], epochs=config["epochs"])
    assert [rate(epoch) for epoch in (5, 29.9, 30, 60, 80)] == pytest.approx([0.1, 0.1, 0.01, 0.001, 0.0001])
    assert config["optim"]["nesterov"] and config["label_smoothing"] == 0


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "claim_2019"])  # imagenet_atlas900 trains it
def test_two_steps(recipe: str, tmp_path) -> None:
    threads = torch.get_num_threads()
    small = [word for word in TINY if not word.startswith(("chip_batch_size", "mesh"))]
    small += ["mesh=atlas800", "workers=1", "global_batch_size=16", "max_steps=2", "precision=fp32"]
    try:
        result = trained_here([f"recipe={recipe}", *small], tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert (result["status"], result["steps"]) == ("done", 2) and math.isfinite(result["eval_loss"])


def test_a_batch_that_the_data_cannot_fill_is_refused() -> None:
    named = r"global_batch_size=32768 \(64 chips x 512\) .* \(1437 images\): lower .*global_batch_size where a recipe"
    with pytest.raises(ValueError, match=named) as refused:
        Worker(compose(["recipe=pcl_2021"]), WorkerContext())
    assert "\n" not in str(refused.value)


def test_a_batch_that_does_not_divide_among_the_chips_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch_size=256 does not divide among 96 chips; take a multiple of 96"):
        Worker(compose(["recipe=sgd_256", "mesh.axes.host=12"]), WorkerContext())


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("recipe/mine", "optim: {momentun: 0.9}", r"did you mean optim\.momentum\? \(in conf/recipe/mine\.yaml\)"),
        ("recipe/mine", "sed: 1", r"sed: no such key; .* \(in conf/recipe/mine\.yaml\)"),
        ("experiment/mine", "recipe: pcl_2020", r"recipe=pcl_2020: .*pcl_2021.* \(in conf/experiment/mine\.yaml\)"),
    ],
)
def test_a_mistake_names_the_file(file: str, text: str, says: str, tmp_path, monkeypatch) -> None:
    shutil.copytree(composing.CONF, tmp_path / "conf")
    monkeypatch.setattr(composing, "CONF", tmp_path / "conf")
    (tmp_path / "conf" / f"{file}.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError, match=says):
        compose([file.replace("/", "=")])


def test_a_recipe_may_start_from_another(tmp_path, monkeypatch, on_imagenet) -> None:
    shutil.copytree(composing.CONF, tmp_path / "conf")
    monkeypatch.setattr(composing, "CONF", tmp_path / "conf")
    text = "# @package _global_\ndefaults: [pcl_2021, _self_]\nepochs: 10\n"
    (tmp_path / "conf" / "recipe" / "mine.yaml").write_text(text)
    mine = compose(["recipe=mine"], experiment="imagenet_atlas900")
    assert mine == on_imagenet["pcl_2021"] | {"recipe": "mine", "epochs": 10}


def test_a_choice_of_recipes_is_a_sweep() -> None:
    assert composing.expand(["recipe=pcl_2021,sgd_256"], sweep=True) == [["recipe=pcl_2021"], ["recipe=sgd_256"]]


def test_an_unknown_recipe_is_named_with_the_nearest(capsys) -> None:
    assert composing.main(pytest.fail, ["recipe=pcl_2020"], "launch.run") == 2
    assert capsys.readouterr().err == "launch.run: recipe=pcl_2020: no such option; did you mean pcl_2021?\n"
