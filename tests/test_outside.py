"""mesh=FILE.yaml and chip=FILE.yaml: files outside conf/, with the chip that a mesh brings beside it."""

from pathlib import Path

import pytest
import yaml

from launch.compose import CONF, ConfigError, compose

MESH = "_target_: train.mesh.mesh.Mesh"


@pytest.fixture
def mesh(tmp_path: Path) -> Path:
    """A mesh file that brings chip `mine`, and that chip's file in the folder beside."""
    for group, changes in (("mesh", {"brings": {"chip": "mine", "wire_dtype": "fp32"}}), ("chip", {"name": "my chip"})):
        node = yaml.safe_load((CONF / group / "localhost.yaml").read_text(encoding="utf-8")) | changes
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(yaml.safe_dump(node), encoding="utf-8")
    return tmp_path / "mesh" / "mine.yaml"


def test_a_mesh_s_file_brings_the_chip_beside_it(mesh):
    config = compose([f"mesh={mesh}", "mesh.axes.host=4"])
    assert config["chip"]["name"] == "my chip" and config["wire_dtype"] == "fp32"
    assert config["mesh"]["axes"] == {"host": 4, "chip": 1} and "brings" not in config["mesh"]


def test_the_command_line_goes_before_what_the_file_brings(mesh):
    assert compose([f"mesh={mesh}", "chip=h100"])["chip"]["name"] == compose(["chip=h100"])["chip"]["name"]
    other = mesh.parent.parent / "chip" / "other.yaml"
    other.write_text((mesh.parent.parent / "chip" / "mine.yaml").read_text().replace("my chip", "other"))
    assert compose([f"mesh={mesh}", f"chip={other}"])["chip"]["name"] == "other"


def test_a_file_may_be_named_as_an_option_is_and_is_never_taken_for_it(mesh):
    same = mesh.with_name("localhost.yaml")
    same.write_text(mesh.read_text().replace("this host", "another"))
    assert compose([f"mesh={same}"])["mesh"]["name"] == "another"
    assert compose(["mesh=localhost"])["mesh"]["name"] == "this host"


def test_a_path_may_be_relative(mesh, monkeypatch):
    monkeypatch.chdir(mesh.parent.parent)
    assert compose(["mesh=mesh/mine.yaml"])["chip"]["name"] == "my chip"


@pytest.mark.parametrize(
    "text, says",
    [
        (None, r"mesh=.*mine\.yaml: No such file or directory; name a file, or an option of conf/mesh"),
        ("axes: [", r"mesh=.*mine\.yaml: not YAML: "),
        ("axes: {host: 1}\n", r"mesh=.*mine\.yaml: is no mesh: it lacks a _target_"),
        (f"{MESH}\nbrings: {{ship: x}}\n", r"did you mean mesh\.brings\.chip\? \(in /.*mine\.yaml\)"),
        (f"{MESH}\naxess: {{}}\n", r"mesh\.axess: no such key.*\(in /.*mine\.yaml\)"),
    ],
)
def test_a_mistake_names_the_file(mesh, text, says):
    mesh.unlink()
    if text is not None:
        mesh.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        compose([f"mesh={mesh}"])


def test_other_groups_have_no_files_outside(mesh):
    with pytest.raises(ConfigError, match="no such group"):
        compose([f"network={mesh}"])
