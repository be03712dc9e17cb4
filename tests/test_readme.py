"""The README: its tables are what the script writes, its commands compose, its paths exist."""

import re
import shlex

import pytest

from launch.compose import compose, expand
from scripts import readme_results

README = (readme_results.ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_tables_are_written_by_the_script():
    assert readme_results.fill(README, readme_results.tables()) == README


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["scripts/run", "scripts/test"]
    for command in COMMANDS[:2]:
        assert (readme_results.ROOT / command).stat().st_mode & 0o111


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python -m launch.") and "[" not in c and "|" not in c]
)
def test_command_composes(command):
    words = shlex.split(command)[2:]
    sweep = "-m" in words
    experiment = "imagenet_atlas900" if words[0] == "launch.emulate" else None
    for overrides in expand([word for word in words[1:] if word != "-m"], sweep):
        compose([override.lstrip("+") for override in overrides], experiment)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:train|launch|conf|scripts|tests|docs)/[\w/.]*)`", README)))
)
def test_path_exists(path):
    path = readme_results.ROOT / path.rstrip("/")
    assert path.exists() or path.with_suffix(".py").exists(), path


def test_markers_must_stand_there_once():
    with pytest.raises(ValueError, match="exactly once, found 0"):
        readme_results.fill("no markers", {"results": "|"})
