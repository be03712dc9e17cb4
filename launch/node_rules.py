"""What a node of a configuration may say: its keys and their types are those of its `_target_`'s constructor."""

from typing import Any

from launch import signature
from train.config import ConfigError, fits, nearest, show, spell

HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_"}

HANDED_OVER = {
    "backend": {"rank", "world_size", "store", "device"},
    "optim": {"parameters"},
    "schedule": {"epochs"},
}
"""Arguments that the builder gives a group's constructor itself: never in YAML."""

FROM_DATA = {"model.num_classes"}
"""Keys that take the data's value where they are null."""


def check_nodes(path: str, value: Any) -> None:
    if isinstance(value, dict) and "_target_" in value:
        _check_node(path, value)
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        check_nodes(f"{path}.{name}", item)


def _check_node(path: str, node: dict) -> None:
    target = node["_target_"]
    try:
        accepted = signature.read(str(target))
    except signature.UnknownTarget as error:
        close = nearest(str(target).rpartition(".")[2], error.names) if error.names else ""
        raise ConfigError(f"{path}._target_", f"{target}: {error}{close}") from error
    handed_over = HANDED_OVER.get(path, set())
    parameters = {name: parameter for name, parameter in accepted.parameters.items() if name not in handed_over}
    for name, value in node.items():
        key = f"{path}.{name}"
        if name in HYDRA_KEYS or (value is None and key in FROM_DATA):
            continue
        if name in parameters:
            if not fits(value, parameters[name].hint):
                raise ConfigError(key, f"{show(value)} is not {spell(parameters[name].hint)}")
        elif name in handed_over or not accepted.open:
            raise ConfigError(key, "no such key" + nearest(name, parameters, prefix=f"{path}."))
    missing = [name for name, parameter in parameters.items() if parameter.required and name not in node]
    if missing and not node.get("_partial_"):
        raise ConfigError(f"{path}.{missing[0]}", f"is missing: {target} needs {', '.join(missing)}")
