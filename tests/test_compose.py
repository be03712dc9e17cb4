"""Composing: every option and experiment composes; every mistake is one line that names the key and what is right."""

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from launch import compose as composing
from launch.compose import CONF, ConfigError, compose, expand, groups, known_targets, load_run_config, main
from launch.usage import first_comment
from train.config import Config

OPTIONS = {
    group: options
    for group, options in groups().items()
    if group not in ("experiment", "recipe", "mesh")  # experiments below; recipes and meshes have tests of their own
}


def comments(path: Path) -> dict[str, str]:
    """key -> the comment line above it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [(above, line) for above, line in pairwise(lines) if above.startswith("# ") and ":" in line]
    return {line.partition(":")[0]: above.removeprefix("# ") for above, line in pairs}


@pytest.mark.parametrize("number", range(max(map(len, OPTIONS.values()))))
def test_every_option_composes(number: int) -> None:
    """One of each group at once, as long as there are any."""
    words = [f"{group}={options[number]}" for group, options in OPTIONS.items() if number < len(options)]
    assert set(OPTIONS) <= set(compose(words)), words


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_experiment_composes(experiment: str) -> None:
    config = compose([f"experiment={experiment}"])
    assert config["experiment"] == experiment
    assert compose(experiment=experiment) == config
    assert set(config) == set(Config.__dataclass_fields__)


def test_the_command_line_wins_over_the_default_experiment() -> None:
    assert compose(["experiment=synthetic"], experiment="imagenet_atlas900")["experiment"] == "synthetic"


def test_every_file_says_what_it_is() -> None:
    silent = [str(path.relative_to(CONF)) for path in CONF.glob("*/*.yaml") if not first_comment(path)]
    assert not silent, f"no comment at the top of {', '.join(silent)}"


def test_comments_of_config_yaml_are_the_help_texts() -> None:
    written = comments(CONF / "config.yaml")
    plain = [item for item in Config.__dataclass_fields__.values() if item.name not in groups()]
    assert {item.name: written.get(item.name) for item in plain} == {item.name: item.metadata["help"] for item in plain}


@pytest.mark.parametrize(
    "overrides, says",
    {
        "sed=1": "sed: no such key; did you mean seed? (on the command line)",
        "+sed=1": "sed: no such key; did you mean seed?",
        "mseh=atlas900_64": "mseh: no such key; did you mean mesh?",
        "momentum=0.8": "momentum: no such key; did you mean optim.momentum?",
        "optim.momentun=0.9": "optim.momentun: no such key; did you mean optim.momentum?",
        "mesh.axis=8": "mesh.axis: no such key; did you mean mesh.axes?",
        "claim.recrod=x": "claim.recrod: no such key; did you mean claim.record?",
        "faults.loss=1": "faults.loss: no such key",
        "mesh.brings.chip=h100": "mesh.brings.chip: is for a mesh's file; here set chip= or wire_dtype=",
        "schedule.epochs=5": "schedule.epochs: no such key",
        "mesh=atlas900_1025": "mesh=atlas900_1025: no such option; did you mean atlas900_1024?",
        "experiment=digits": "experiment=digits: no such option; did you mean digits_atlas?",
        "optim=null": "optim: null is no option; there is lars, sgd",
        "seed=one": "seed: 'one' is not int (on the command line)",
        "seed=1.5": "seed: 1.5 is not int",
        "seed=true": "seed: true is not int",
        "seed.x=1": "seed: {'x': 1} is not int",
        "~seed": "seed: is missing",
        "optim.momentum=fast": "optim.momentum: 'fast' is not float (on the command line)",
        "model.zero_init_last_gamma=1": "model.zero_init_last_gamma: 1 is not true or false",
        "model.depth=51": "model.depth: 51 is not one of 18, 34, 50, 101, 152",
        "model=null": "model: null is no option",
        "mesh.axes.host=a": "mesh.axes: {'host': 'a', 'chip': 8} is not a mapping from str to int (on the command",
        "~optim._target_": "optim: has no _target_",
        "optim._target_=train.optim.sgd.SGB": "train.optim.sgd has no SGB; did you mean SGD?",
        "optim._target_=no_such_package.SGD": "optim._target_: no_such_package.SGD: no module no_such_package",
        "device=gpu": "device: 'gpu' is not one of auto, cpu, cuda",
        "target_top1=75.9": "target_top1: 75.9 must be above 0 and at most 1 (a fraction: 75.9 % is 0.759)",
        "seed=1,2": "seed: 1,2 is a choice of values: add -m",
        "run_root=${nowhere}": "nowhere",
        "seed": "'seed' is no key=value",
        "hydra.run.dir=x": "hydra.run.dir: Hydra's own settings are not used",
    }.items(),
)
def test_a_mistake_is_one_line(overrides: str, says: str, capsys: pytest.CaptureFixture) -> None:
    def job(config: dict) -> None:
        pytest.fail("ran")

    assert main(job, overrides.split(), "launch.run") == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("launch.run: ") and says in err


@pytest.mark.parametrize(
    "values, says",
    [
        ({"workers": 0}, "workers: 0 must be at least 1"),
        ({"workers": "two"}, "workers: 'two' is not int or auto"),
        ({"chip_batch_size": -1}, "chip_batch_size: -1 must be at least 1"),
        ({"seed": -1}, "seed: -1 must not be negative"),
        ({"eval_every": 0}, "eval_every: 0 must be above 0"),
        ({"eval_every": float("nan")}, "eval_every: nan is not float"),
        ({"label_smoothing": 1}, "label_smoothing: 1 must be at least 0 and below 1"),
        ({"target_top1": 0}, "target_top1: 0 must be above 0 and at most 1"),
        ({"epochs": [72, 64]}, "epochs: [72, 64] must be one number above 0, or [low, high] with low <= high"),
        ({"epochs": [1, 2, 3]}, "epochs: [1, 2, 3] must be"),
        ({"epochs": -0.5}, "epochs: -0.5 must be"),
        ({"chip_batch_size": 3, "global_batch_size": 64}, "64 is no multiple of chip_batch_size=3: set one to null"),
        ({"chip_batch_size": None, "global_batch_size": None}, "chip_batch_size: null, and so is global_batch_size"),
        ({"claim": "atlas"}, "claim: 'atlas' must be a mapping of record, neighbours"),
        ({"claim": {"record": 3, "neighbours": []}}, "claim.record: 3 is not str"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(values: dict, says: str, base: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict(base | values)
    assert says in str(caught.value)


@pytest.fixture(scope="module")
def base() -> dict:
    return compose()


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of conf/ to break."""
    copy = tmp_path / "conf"
    shutil.copytree(CONF, copy)
    monkeypatch.setattr(composing, "CONF", copy)
    return copy


@pytest.mark.parametrize(
    "text, says",
    {
        "sed: 1": "sed: no such key; did you mean seed? (in conf/experiment/mine.yaml)",
        "optim: {momentun: 0.9}": "did you mean optim.momentum? (in conf/experiment/mine.yaml)",
        "optim: {momentum: fast}": "optim.momentum: 'fast' is not float (in conf/experiment/mine.yaml)",
        "epochs: many": "epochs: 'many' is not float or a list of float or auto (in conf/experiment/mine.yaml)",
        "defaults: [override /mesh: atlas]": "mesh=atlas: no such option; did you mean",
        "defaults: [override /mash: atlas900_64]": "mash",
        "epochs: [1, 2": "mine.yaml",
    }.items(),
)
def test_a_mistake_in_an_experiment_file_names_the_file(conf: Path, text: str, says: str) -> None:
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\nchip_batch_size: 4\n")
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=mine"])
    assert says in str(caught.value) and "experiment/mine" in str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_in_an_option_names_the_file_that_holds_it(conf: Path) -> None:
    (conf / "optim" / "base.yaml").write_text("_target_: train.optim.sgd.SGD\nmomentun: 0.9\n")
    (conf / "optim" / "mine.yaml").write_text("defaults: [base, _self_]\nmomentum: 0.8\n")
    with pytest.raises(ConfigError, match=r"optim\.momentun: .*\(in conf/optim/base\.yaml\)"):
        compose(["optim=mine"])


RECORD = "experiment=imagenet_atlas900"


@pytest.mark.parametrize(
    "words",
    [
        ["++seed=3", "experiment=digits_atlas", "mesh=dgx_h100", "++optim.momentum=0.3", "++run='a=b, c'"],
        ["++mesh.axes={host: 3}", "++claim.neighbours=[a,b]", "++hang_timeout_s=1e-3", "++run=${run_root}/x"],
        ["++optim.momentum=0.3", "~optim.momentum", "~experiment"],
    ],
)
def test_what_is_composed_is_what_hydra_makes_of_it(words: list[str]) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        alone = OmegaConf.to_container(hydra.compose("config", words), resolve=True)
    for _ in "anew", "kept":
        assert composing._composed(words, words)[0] == alone


def test_a_choice_is_kept_for_the_next_job_until_its_file_changes(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    composed, alone = [], hydra.compose
    monkeypatch.setattr(hydra, "compose", lambda *args, **options: composed.append(args) or alone(*args, **options))
    first = compose([RECORD, "seed=1"])
    momentum, made = first["optim"].pop("momentum"), len(composed)  # what a job does with its own is its own
    assert compose([RECORD, "seed=2"])["optim"]["momentum"] == momentum
    assert compose([RECORD, "optim.momentum=0.5"])["optim"]["momentum"] == 0.5
    assert len(composed) == made <= 2  # the experiment, and its recipe alone
    with (conf / "experiment" / "imagenet_atlas900.yaml").open("a") as file:
        file.write("hang_timeout_s: 7\n")
    assert compose([RECORD])["hang_timeout_s"] == 7 and len(composed) > made
    composing.forget()
    assert compose([RECORD])["hang_timeout_s"] == 7


@pytest.mark.parametrize(
    "overrides, chip, wire_dtype",
    [
        ([RECORD], "Ascend 910", "fp16"),
        ([RECORD, "mesh=dgx_h100"], "NVIDIA H100-SXM5-80GB", "fp16"),  # the experiment's chip goes with its own mesh
        (["mesh=dgx_h100", "seed=3"], "NVIDIA H100-SXM5-80GB", "fp16"),
        ([RECORD, "mesh=dgx_h100", "chip=a100_80gb"], "NVIDIA A100-SXM4-80GB", "fp16"),
        ([RECORD, "chip=h100"], "NVIDIA H100-SXM5-80GB", "fp16"),
        ([RECORD, "mesh=tpu_v3"], "TPU v3", "bf16"),  # over the recipe's fp16, which the chip has not
        ([RECORD, "mesh=tpu_v3", "wire_dtype=fp32"], "TPU v3", "fp32"),
        ([RECORD, "mesh=gaudi2"], "Habana Gaudi2", "bf16"),  # its file starts from another mesh's
    ],
)
def test_a_mesh_brings_its_own_chip(overrides: list[str], chip: str, wire_dtype: str) -> None:
    config = compose(overrides)
    assert (config["chip"]["name"], config["wire_dtype"]) == (chip, wire_dtype)
    assert "brings" not in config["mesh"]


def test_an_experiment_that_chooses_mesh_and_chip_has_both(conf: Path) -> None:
    text = "# @package _global_\ndefaults: [override /mesh: dgx_h100{chip}]\nchip_batch_size: 4\n"
    (conf / "experiment" / "both.yaml").write_text(text.format(chip=", override /chip: h200"))
    (conf / "experiment" / "mesh.yaml").write_text(text.format(chip=""))
    assert compose(["experiment=both"])["chip"]["name"] == "NVIDIA H200-SXM5-141GB"
    assert compose(["experiment=both", "mesh=dgx_a100"])["chip"]["name"] == "NVIDIA A100-SXM4-80GB"
    assert compose(["experiment=mesh"])["chip"]["name"] == "NVIDIA H100-SXM5-80GB"


@pytest.mark.parametrize(
    "brings, says",
    {
        "{chip: h101}": "chip=h101: no such option; did you mean h100? (in conf/mesh/mine.yaml)",
        "{chips: h100}": "mesh.brings.chips: no such key; did you mean mesh.brings.chip? (in conf/mesh/mine.yaml)",
        "{wire_dtype: int4}": "wire_dtype: 'int4' is not one of fp32, bf16, fp16 (in conf/mesh/mine.yaml)",
    }.items(),
)
def test_a_mesh_that_brings_what_there_is_not_names_its_file(conf: Path, brings: str, says: str) -> None:
    (conf / "mesh" / "mine.yaml").write_text(f"defaults: [dgx_h100, _self_]\nbrings: {brings}\n")
    with pytest.raises(ConfigError) as caught:
        compose([RECORD, "mesh=mine"])
    assert str(caught.value) == says


def test_one_batch_size_on_the_command_line_replaces_the_other() -> None:
    chip = compose(["experiment=imagenet_atlas900", "chip_batch_size=16"])
    assert (chip["chip_batch_size"], chip["global_batch_size"]) == (16, None)
    total = compose(["experiment=digits_atlas", "global_batch_size=128"])
    assert (total["chip_batch_size"], total["global_batch_size"]) == (None, 128)


def test_sweeps_expand_as_hydra_does() -> None:
    jobs = expand(["seed=1,2", "optim=sgd,lars"], sweep=True)
    assert jobs == [[f"++seed={seed}", f"optim={optim}"] for seed in (1, 2) for optim in ("sgd", "lars")]
    assert len(expand(["seed=range(3)"], sweep=True)) == 3


def test_a_sweep_runs_every_job_and_exits_with_the_worst_status(capsys: pytest.CaptureFixture) -> None:
    ran = []

    def job(config: dict) -> int | None:
        ran.append(config["seed"])
        if config["seed"] == 2:
            raise ValueError("data.root=/x: not there;\n  give another")
        return 1 if config["seed"] == 1 else None

    assert main(job, ["-m", "seed=0,1,2,3"], "launch.run") == 2
    assert ran == [0, 1, 2, 3]
    assert "launch.run: data.root=/x: not there; give another\n" in capsys.readouterr().err
    assert main(job, ["-m", "seed=0,1"], "launch.run") == 1
    ran.clear()
    assert main(job, ["-m", "seed=0,1,x"], "launch.run") == 2
    assert not ran, "nothing runs where one job is wrong"


def test_what_the_job_raises_becomes_the_exit_status(capsys: pytest.CaptureFixture) -> None:
    def missing(config: dict) -> None:
        Path("/nowhere/images").open()

    def broken(config: dict) -> None:
        raise RuntimeError("ours")

    assert main(missing, [], "launch.run") == 2
    assert capsys.readouterr().err == "launch.run: /nowhere/images: No such file or directory\n"
    with pytest.raises(RuntimeError):  # keeps its traceback; the interpreter exits 1
        main(broken, [], "launch.run")


def test_help_lists_groups_options_keys_and_examples(capsys: pytest.CaptureFixture) -> None:
    def job(config: dict) -> None:
        """Trains the thing."""

    assert main(job, ["--help"], "launch.emulate", experiment="imagenet_atlas900") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert "Trains the thing." in text and "python -m launch.emulate --cfg" in text
    for group, options in groups().items():
        assert any(line.startswith(f"{group}: ") for line in lines)
        for option in options:
            assert any(line[2:].split(" ")[0] == option for line in lines), option
    for item in Config.__dataclass_fields__.values():
        assert item.metadata["help"][:40] in text
    assert any(line.startswith("* imagenet_atlas900") for line in lines)
    assert main(job, ["--hlep"], "launch.emulate") == 2
    assert "did you mean --help?" in capsys.readouterr().err


def test_cfg_prints_what_compose_returns(capsys: pytest.CaptureFixture) -> None:
    for words in (["--cfg", "seed=7"], ["--cfg", "job", "seed=7"]):
        assert main(lambda config: pytest.fail("ran"), words, "launch.run") == 0
        assert OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out)) == compose(["seed=7"])


def test_a_run_folder_s_configuration_is_data(tmp_path: Path) -> None:
    config = compose()
    file = tmp_path / "config.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    assert load_run_config(tmp_path) == load_run_config(file) == config

    for key, value, says in (
        ("optim._target_", "os.system", "'os.system' is not one that conf/ names"),
        ("data.root", {"_target_": "subprocess.run"}, "'subprocess.run' is not one that conf/ names"),
        ("run_root", "${oc.env:HOME}", "is no value of a finished configuration"),
        ("optim.momentum", "fast", "is not float"),
        ("sed", 1, "did you mean seed"),
    ):
        edited = OmegaConf.create(config)
        OmegaConf.update(edited, key, value, force_add=True)
        file.write_text(OmegaConf.to_yaml(edited))
        with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
            load_run_config(tmp_path)
    with pytest.raises(ConfigError, match="not found"):
        load_run_config(tmp_path / "nothing")


def test_known_targets_are_those_of_conf() -> None:
    assert {"train.optim.sgd.SGD", "train.optim.lars.LARS", "train.models.resnet.resnet"} <= known_targets()


COMPOSE_ONCE = """
import sys
from launch.compose import main
status = main(lambda config: None, sys.argv[1:], "launch.run")
print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "ray", "numpy", "torchvision"}))
sys.exit(status)
"""


@pytest.mark.parametrize("overrides, status", [("seed=3", 0), ("sed=3", 2)])
def test_composing_as_a_command_loads_neither_torch_nor_ray(overrides: str, status: int) -> None:
    command = [sys.executable, "-c", COMPOSE_ONCE, overrides]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "\n")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == (1 if status else 0)
