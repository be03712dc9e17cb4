"""Constructors read from source: what counts as an argument, its type, and whether YAML must give it."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from launch import signature
from launch.signature import Parameter, UnknownTarget
from train.config import fits, spell

SOURCE = """
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Optional
import numpy as np
from .other import Kind, Link as Wire

Speed = Literal["slow", "fast"]

class Plain:
    def __init__(self, a: int, b: "float | None", speed: Speed, wire: Wire, x: np.ndarray,
                 c: list[int] = (), *, d: Kind = "p"): ...

    @classmethod
    def made(cls, size: tuple[int, int]): ...

    @staticmethod
    def loose(size: Optional[int]): ...

class Child(Plain): ...

class Empty: ...

@dataclass(frozen=True)
class Base:
    shared: ClassVar[int] = 3
    a: int
    b: str = "b"

@dataclass
class Fields(Base):
    c: list[str] = field(default_factory=list)
    d: int = field(init=False)
    _: KW_ONLY
    e: bool = field(metadata={"help": "e"})

class Row(NamedTuple):
    left: int
    right: int = 0

def function(anything, *args, a: dict[str, float], **more): ...

alias = function
"""
OTHER = """
from typing import Literal
Kind = Literal["p", "q"]
class Link: ...
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sample_pkg").mkdir()
    (tmp_path / "sample_pkg" / "__init__.py").write_text("from .things import Plain as Renamed\n1 / 0\n")
    (tmp_path / "sample_pkg" / "things.py").write_text(SOURCE)
    (tmp_path / "sample_pkg" / "other.py").write_text(OTHER)
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (signature.read, signature._file, signature._defined):
        cached.cache_clear()


def read(name: str) -> dict[str, Parameter]:
    return signature.read(f"sample_pkg.things.{name}").parameters


def test_a_class_gives_the_arguments_of_its_init() -> None:
    found = read("Plain")
    assert list(found) == ["a", "b", "speed", "wire", "x", "c", "d"]
    assert found["a"] == Parameter(int, True)
    assert found["b"] == Parameter(float | None, True)
    assert found["speed"] == Parameter(Literal["slow", "fast"], True)
    assert found["x"] == Parameter(Any, False)
    assert found["c"] == Parameter(list[int], False)
    assert found["d"] == Parameter(Literal["p", "q"], False)


def test_a_class_as_type_wants_a_node_or_comes_from_the_builder() -> None:
    wire = read("Plain")["wire"]
    assert not wire.required
    assert fits({"_target_": "sample_pkg.other.Link"}, wire.hint) and not fits("fast", wire.hint)
    assert spell(wire.hint) == "a node with a _target_ that makes a Link"


def test_methods_functions_and_other_classes() -> None:
    assert read("Plain.made") == {"size": Parameter(tuple[int, int], True)}
    assert read("Plain.loose") == {"size": Parameter(int | None, True)}
    assert list(read("Child")) == list(read("Plain")) and read("Empty") == {}
    assert read("Fields") == {
        "a": Parameter(int, True),
        "b": Parameter(str, False),
        "c": Parameter(list[str], False),
        "e": Parameter(bool, True),
    }
    assert read("Row") == {"left": Parameter(int, True), "right": Parameter(int, False)}
    assert read("function") == {"anything": Parameter(Any, False), "a": Parameter(dict[str, float], True)}
    assert read("alias") == read("function")
    assert signature.read("sample_pkg.things.function").open and not signature.read("sample_pkg.things.Plain").open


def test_names_that_a_package_imports_are_followed_and_nothing_is_run() -> None:
    assert list(signature.read("sample_pkg.Renamed").parameters) == list(read("Plain"))
    assert "sample_pkg" not in sys.modules  # importing it divides by zero


@pytest.mark.parametrize(
    "target, says",
    [
        ("sample_pkg.things.Plan", "sample_pkg.things has no Plan"),
        ("sample_pkg.thing.Plain", "sample_pkg has no thing"),
        ("sample_pkg.things.Plain.mad", "sample_pkg.things.Plain has no mad"),
        ("nowhere.Plain", "no module nowhere"),
        ("Plain", "no module Plain"),
    ],
)
def test_what_is_not_there_is_named(target: str, says: str) -> None:
    with pytest.raises(UnknownTarget, match=says):
        signature.read(target)


def test_another_library_is_read_without_importing_it() -> None:
    code = """if True:
        import sys
        from launch.signature import read
        print("lr" in read("torch.optim.SGD").parameters, "torch" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=signature.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


@pytest.mark.parametrize(
    "value, hint, expected",
    [
        (3, int, True),
        (True, int, False),
        (3, float, True),
        (True, float, False),
        ("3", float, False),
        (None, int | None, True),
        (None, int, False),
        ("a", Literal["a", "b"], True),
        (1, Literal[True], False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ([1, 2, 3], tuple[int, ...], True),
        ({"a": 1}, dict[str, int], True),
        ({"a": "1"}, dict[str, int], False),
        ({1: 1}, dict[str, int], False),
        ({"a": 1}, dict, True),
        ([1], list, True),
        (object(), Any, True),
    ],
)
def test_types(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
