"""Wrong input that needs no Ray to be seen is refused in one line, with exit 2, before anything is written."""

import json
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch import compose, run, run_folder
from train.build import Worker, WorkerContext


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """The one line that launch.run says of overrides that it refuses without starting or joining Ray."""

    @contextmanager
    def no_ray(*_):
        raise AssertionError("Ray was started")
        yield

    def refused(*overrides: str) -> str:
        monkeypatch.setattr(run, "join", no_ray)
        root = tmp_path / "runs"
        assert compose.main(run.train, [f"run_root={root}", *overrides], "launch.run") == 2
        assert not root.exists()
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.startswith("launch.run: ") and printed.err.count("\n") == 1
        return printed.err.removeprefix("launch.run: ")

    return refused


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("mesh=atlas900_65", "mesh=atlas900_65: no such option; did you mean atlas900_64?"),
        ("workers=9", "workers=9 is more than the 8 hosts of mesh Atlas 900"),
        ("workers=-2", "workers: -2 must be at least 1"),
        ("threads=0", "threads: 0 must be at least 1"),
        ("chip_batch_size=-1", "chip_batch_size: -1 must be at least 1"),
        ("max_steps=-1", "max_steps: -1 must be at least 1"),
        ("seed=-1", "seed: -1 must not be negative"),
        ("epochs=-1", "epochs: -1 must be one number above 0"),
        ("eval_every=-1", "eval_every: -1 must be above 0"),
        ("mesh.axes.host=-8", "axes.host=-8 must be a whole number of at least 1"),
        ("data.image_size=-8", "data.image_size=-8 must be at least 1"),
        ("experiment=imagenet_atlas900", "data.root=null: name the folder of the images"),
        ("experiment=cifar10_atlas data.root=/no/such/folder", "data.root=/no/such/folder: does not exist"),
        ("claim.record=huawei-2018", "claim.record=huawei-2018: no published record has this id"),
        ("run=../elsewhere", "run=../elsewhere: a run's name is letters, digits"),
        ("run=reference", "run=reference: a run's name is"),
        ("resume=none", "resume=none: there is no"),
    ],
)
def test_refused_before_ray_starts(refused, overrides, named):
    assert named in refused(*overrides.split())


def test_a_run_root_that_is_a_file_and_a_name_that_is_taken(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "file: is a file; name a folder" in refused(f"run_root={tmp_path / 'file'}")
    (tmp_path / "others/mine").mkdir(parents=True)
    assert "exists; take another name, or continue it" in refused(f"run_root={tmp_path / 'others'}", "run=mine")
    assert "mine has no checkpoints" in refused(f"run_root={tmp_path / 'others'}", "resume=mine")


@pytest.mark.parametrize(
    "address, named",
    [
        ("auto", "cluster.address=auto: neither RAY_ADDRESS nor"),
        ("head", "cluster.address=head: must be host:port of a Ray head"),
        ("127.0.0.1:1", "cluster.address=127.0.0.1:1: no Ray head answers there"),
    ],
)
def test_a_cluster_that_is_not_there(address, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    words = [f"cluster.address={address}", f"run_root={tmp_path / 'runs'}"]
    assert compose.main(run.train, words, "launch.run") == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_command_says_it_in_one_line_without_torch_or_ray(tmp_path):
    code = (
        "import sys; from launch.run import main; status = main();"
        "loaded = {'torch', 'ray', 'tensorboard'} & set(sys.modules); assert not loaded, loaded; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "experiment=cifar10_atlas", "data.root=photos", "run_root=runs"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True
    )
    problem = f"data.root={tmp_path / 'photos'}: does not exist: set data.root to the folder of the images"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"launch.run: {problem}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("chip_batch_size=1000", "global_batch_size=64000 (64 chips x 1000) is larger than the data set (1437 images)"),
        ("global_batch_size=100", "global_batch_size=100 does not divide among 64 chips"),
        ("chip_batch_size=1 data.image_size=32 model.stem=imagenet", "the last batch norms one value per channel"),
        ("bn_span=3", "bn_span=3: must divide the 8 chips of a host, or be whole hosts"),
        ("chips_per_pass=3", "chips_per_pass=3: numerics=exact computes one block of 8 chips a pass"),
        ("schedule.base_lr=-1", "schedule.base_lr=-1"),
        ("optim=sgd optim.momentum=-1", "optim.momentum=-1"),
        ("data=synthetic data.num_train=-5", "data.num_train=-5: must be at least 1"),
        ("experiment=imagenet_atlas900 data.root={empty}", "is not an image folder, it has no class folders: expected"),
        ("experiment=imagenet_atlas900 data.root={half}", "val/ is missing: expected train/<class>/*.jpg"),
        ("experiment=cifar10_atlas data.root={empty}", "no CIFAR-10 there: expected"),
        ("backend=nccl", "backend=nccl moves GPU memory only, and device=cpu"),
    ],
)
def test_a_worker_refuses_to_be_built(overrides, named, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half/train/cat").mkdir(parents=True)
    words = overrides.format(empty=tmp_path / "empty", half=tmp_path / "half").split()
    with pytest.raises(ValueError, match=r".") as refusal:
        Worker(compose.compose(["model=resnet18", "model.stem=small", *words]), WorkerContext())
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_loss_that_is_no_number_after_the_last_step_is_null(tmp_path):
    run_folder.write_json(tmp_path / "result.json", {"eval_loss": math.nan, "first_step": {"Ray": math.inf, "x": 1.0}})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"eval_loss": None, "first_step": {"Ray": None, "x": 1.0}}
