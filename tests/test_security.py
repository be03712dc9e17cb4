"""Hostile input: names that would leave the run root, words that a shell would run, files and configurations with code.

Each is refused in one line, or is only data; none of them makes the file that its code would have made.
"""

import json
import os
import pickle
import re
import tarfile
from pathlib import Path

import pytest
from launch_samples import HOSTILE
from training_samples import tiny

from launch import compose, run_folder, submit
from launch.jobs_ray import UPLOADED
from train import checkpoint, checkpoint_files
from train.build import Worker, WorkerContext
from train.config import ConfigError
from train.tensorboard import write_reference_runs

NAMES = [
    "../up",
    "a/b",
    "/etc",
    "..",
    ".",
    "-rf",
    "a b",
    "a;b",
    "$(touch sprung)",
    "`touch sprung`",
    "a\nb",
    "jobs",
    "",
]
FOREIGN = {
    "another program's function": "model: {_target_: os.system, command: touch sprung}\n",
    "a function inside a node": "backend: {_target_: subprocess.run, args: [touch, sprung]}\n",
    "a value out of the environment": "run_root: ${oc.env:SECRET_OF_TESTS}\n",
    "an object of Python": "seed: !!python/object/apply:os.system [touch sprung]\n",
    "no mapping at all": "[1, 2, 3]\n",
}


@pytest.fixture(autouse=True)
def nothing_is_sprung(tmp_path, monkeypatch):
    """Whatever would run, would run here."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("sprung"))


class Spring:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return os.system, ("touch sprung",)


@pytest.mark.parametrize("key", ["run", "resume"])
@pytest.mark.parametrize("name", NAMES)
def test_a_runs_name_cannot_leave_the_run_root(name, key, tmp_path):
    config = tiny() | {"run_root": str(tmp_path / "runs"), key: name}
    with pytest.raises(ValueError, match=f"^{key}="):
        run_folder.locate(config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_configuration_is_data(text, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_TESTS", "s3cret")
    own = compose.compose([])
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in own.items() if not text.startswith(f"{key}:")
    ]
    (tmp_path / "config.yaml").write_text(text if text.startswith("[") else "".join(lines) + text)
    with pytest.raises(ConfigError) as refused:
        compose.load_run_config(tmp_path)
    assert "\n" not in str(refused.value) and "s3cret" not in str(refused.value)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_value_is_never_run(hostile, tmp_path):
    """Neither by composing nor by looking for the folder that it names."""
    config = compose.compose(["data=cifar10", f"data.root={submit._quoted(hostile)}"])
    assert config["data"]["root"] == hostile
    with pytest.raises(ValueError, match="data.root="):
        Worker(config | {"run_root": str(tmp_path)}, WorkerContext())


def test_a_checkpoint_with_code_is_refused_with_its_checksum_right(tmp_path):
    folder = checkpoint_files.take_over(tmp_path)
    path = checkpoint.save(folder, 1, {})
    path.write_bytes(pickle.dumps(Spring()))
    checkpoint_files.checksum_path(path).write_text(f"{checkpoint_files.sha256(path)}  {path.name}\n")
    assert checkpoint_files.newest_sound(tmp_path, pytest.fail) == path
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        Worker(tiny(), WorkerContext()).restore(path)


def test_an_archive_is_read_where_it_lies(tmp_path):
    """Members that name other folders are no images of a class, or are read and never unpacked."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "data" / f"{split}.tar", "w") as tar:
            (tmp_path / "payload").write_bytes(b"#!/bin/sh\ntouch sprung\n")
            tar.add(tmp_path / "payload", arcname="../../sprung")
    with pytest.raises(ValueError, match="data.root: .*no images in class folders"):
        Worker(tiny("data=cifar10", f"data.root={tmp_path / 'data'}"), WorkerContext())


def test_a_records_id_cannot_leave_the_run_root(tmp_path):
    class Record:
        id = "../../up"

    with pytest.raises(ValueError, match="must be usable as the name of a folder"):
        write_reference_runs(tmp_path / "runs", [Record()])
    assert list(tmp_path.iterdir()) == []


def test_no_secret_of_the_environment_lies_in_what_a_run_writes(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "SECRET_OF_TESTS"):
        monkeypatch.setenv(name, "s3cret-value")
    folder = tmp_path / "runs" / "mine"
    run_folder.create(folder, tiny(), run_folder.environment(), resumed=False).close()
    Worker(tiny("max_steps=1"), WorkerContext()).train(folder)
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if b"s3cret" in path.read_bytes()]


def test_what_is_uploaded_to_a_cluster_is_the_program_alone():
    assert UPLOADED == ("train", "launch", "conf", "pyproject.toml")


def test_the_program_has_no_shell_and_no_pickle():
    """No call takes a string for a shell or code, none reads objects: the source has none of these words."""
    words = r"shell=True|os\.system|os\.popen|(?<![\w.])(eval|exec)\(|pickle\.load|weights_only=False|yaml\.load\("
    root = Path(compose.__file__).parents[1]
    for path in [*root.glob("train/**/*.py"), *root.glob("launch/**/*.py"), *root.glob("scripts/*.py")]:
        assert not re.search(words, path.read_text(encoding="utf-8")), path
