"""Each file of conf/data holds exactly its constructor's arguments, with the constructor's defaults."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml

FILES = sorted((Path(__file__).parents[1] / "conf" / "data").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_constructor_is_the_schema(file):
    assert file.read_text().startswith("# ")
    node = yaml.safe_load(file.read_text())
    module, _, name = node.pop("_target_").rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert list(node) == list(parameters)
    for key, parameter in parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert node[key] == (None if parameter.default is inspect.Parameter.empty else parameter.default)
