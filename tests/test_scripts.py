"""scripts/run and scripts/test set themselves up: tried with a make-believe Python, nothing is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Answers what the scripts ask of a Python, and writes down what they make it do. It copies itself into the venv.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *version_info\\ \\<*) [ ! -e "$FAKES/old" ] ;;
    *version_info*) echo python3.11-venv ;;
    "-c import venv, ensurepip") [ ! -e "$FAKES/no-venv" ] ;;
    "-c import pip") [ ! -e "$FAKES/no-pip" ] ;;
    "-c "*) ;;
    "-m venv --clear "*)
        echo "venv" >> "$FAKES/log"; rm -rf "${@: -1}"; mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    "-m ensurepip"*) echo "ensurepip" >> "$FAKES/log" ;;
    "-m pip install"*) echo "install ${@: -1}" >> "$FAKES/log"; [ ! -e "$FAKES/no-network" ] ;;
    *) printf '%s|' "$@" >> "$FAKES/log"; echo >> "$FAKES/log" ;;
esac
"""


class Clone:
    """A fresh clone with nothing on PATH but the tools the scripts may use, and the Pythons that a test adds."""

    def __init__(self, folder: Path):
        self.root = folder / "the clone"
        self.fakes = folder / "fakes"
        self.path = folder / "bin"
        for made in (self.root, self.fakes, self.path):
            made.mkdir()
        for name in ("pyproject.toml", "scripts", ".ci"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, self.root / name)
        for tool in ("bash", "env", "cat", "cksum", "cp", "dirname", "mkdir", "rm"):
            (self.path / tool).symlink_to(shutil.which(tool))

    def add_python(self, name: str = "python3") -> None:
        (self.path / name).write_text(FAKE_PYTHON)
        (self.path / name).chmod(0o755)

    def flag(self, name: str, on: bool = True) -> None:
        (self.fakes / name).touch() if on else (self.fakes / name).unlink()

    def call(self, script: str, *words: str, cwd: Path = Path("/")) -> tuple[int, list[str], str]:
        """(exit status, what Python was told to do, stderr)"""
        (self.fakes / "log").unlink(missing_ok=True)
        environment = {"PATH": str(self.path), "FAKES": str(self.fakes), "HOME": str(self.root)}
        command = [self.root / script, *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        log = (self.fakes / "log").read_text().splitlines() if (self.fakes / "log").exists() else []
        return done.returncode, log, done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_first_run_makes_the_venv_and_installs_then_it_only_runs(clone: Clone) -> None:
    clone.add_python()
    status, log, said = clone.call("scripts/run", "seed=1", "data.root=a b")
    assert (status, log) == (0, ["venv", f"install {clone.root}", "-m|launch.run|seed=1|data.root=a b|"])
    assert "installing into" in said
    assert clone.call("scripts/run") == (0, ["-m|launch.run|"], "")


def test_tests_install_their_extra_which_serves_the_run_too(clone: Clone) -> None:
    clone.add_python("python3.12")
    assert clone.call("scripts/run")[1][:2] == ["venv", f"install {clone.root}"]
    assert clone.call("scripts/test", "-k", "a or b")[1] == [f"install {clone.root}[test]", "-m|pytest|-k|a or b|"]
    assert clone.call(".ci/run") == (0, ["-m|pytest|"], "")
    assert clone.call("scripts/run") == (0, ["-m|launch.run|"], "")


def test_a_changed_pyproject_and_a_moved_clone_install_again(clone: Clone) -> None:
    clone.add_python()
    clone.call("scripts/test")
    with (clone.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert clone.call("scripts/run")[1] == [f"install {clone.root}", "-m|launch.run|"]
    assert clone.call("scripts/test")[1] == [f"install {clone.root}[test]", "-m|pytest|"]
    clone.root = clone.root.rename(clone.root.with_name("elsewhere"))
    assert clone.call("scripts/run")[1] == [f"install {clone.root}", "-m|launch.run|"]


def test_an_interrupted_install_is_redone(clone: Clone) -> None:
    clone.add_python()
    clone.flag("no-network")
    status, log, _ = clone.call("scripts/run")
    assert status == 1 and log == ["venv", f"install {clone.root}"]
    clone.flag("no-network", on=False)
    assert clone.call("scripts/run")[1] == [f"install {clone.root}", "-m|launch.run|"]


def test_a_venv_made_by_hand_is_used(clone: Clone) -> None:
    clone.add_python()
    (clone.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(clone.path / "python3", clone.root / ".venv" / "bin" / "python")
    (clone.path / "python3").unlink()
    clone.flag("no-pip")
    assert clone.call("scripts/run")[1] == ["ensurepip", f"install {clone.root}", "-m|launch.run|"]


def test_a_broken_venv_is_made_again(clone: Clone) -> None:
    clone.add_python()
    (clone.root / ".venv" / "bin").mkdir(parents=True)
    (clone.root / ".venv" / "bin" / "python").symlink_to("/nowhere/python3")
    assert clone.call("scripts/run")[1] == ["venv", f"install {clone.root}", "-m|launch.run|"]


@pytest.mark.parametrize("script", ["scripts/run", "scripts/test", ".ci/run"])
def test_without_python_one_line_names_the_package(clone: Clone, script: str) -> None:
    status, log, said = clone.call(script)
    assert (status, log) == (2, []) and said.count("\n") == 1
    assert "no Python 3.11 or newer" in said and "apt install python3 python3-venv" in said
    assert not (clone.root / ".venv").exists()


def test_an_old_python_counts_as_none(clone: Clone) -> None:
    clone.add_python()
    clone.flag("old")
    status, log, said = clone.call("scripts/run")
    assert (status, log) == (2, []) and "no Python 3.11 or newer" in said


def test_without_venv_one_line_names_the_package(clone: Clone) -> None:
    clone.add_python()
    clone.flag("no-venv")
    status, log, said = clone.call("scripts/run")
    assert (status, log) == (2, []) and said.count("\n") == 1
    assert "python3-venv" in said and "apt install python3.11-venv" in said
