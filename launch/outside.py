"""A mesh or a chip in a file of its own outside conf/, named by its path: `mesh=FILE.yaml`, `chip=FILE.yaml`.

A chip that such a mesh brings may lie beside it, in the folder chip/ next to the folder mesh/.
"""

import re
from pathlib import Path

from train.config import ConfigError

GROUPS = ("mesh", "chip")


def is_file(name: str) -> bool:
    """Whether a name such as `mesh/FILE.yaml` is that of such a file, and not of one of conf/."""
    group, _, option = name.partition("/")
    return group in GROUPS and option.endswith(".yaml")


def plain(name: str) -> dict:
    """What the file of `mesh/FILE.yaml` says. ConfigError where there is none, or where it is no node."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    group, _, option = name.partition("/")
    try:
        found = OmegaConf.to_container(OmegaConf.load(Path(option).expanduser()))
    except OSError as error:
        problem = f"{error.strerror}; name a file, or an option of conf/{group}"
        raise ConfigError(f"{group}={option}", problem) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{group}={option}", f"not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not {"_target_", "defaults"} & set(found):
        raise ConfigError(f"{group}={option}", f"is no {group}: it lacks a _target_, as the files of conf/{group} have")
    return found


def for_hydra(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """The overrides with each such file under a name that Hydra finds it by, and group -> file."""
    from hydra.core.config_store import ConfigStore

    given, files = [], {}
    for word in words:
        group, _, option = word.partition("=")
        if is_file(f"{group}/{option}"):
            name = re.sub(r"\W", "_", option)
            ConfigStore.instance().store(name, plain(f"{group}/{option}"), group)
            word, files[group] = f"{group}={name}", option
        given.append(word)
    return given, files


def beside(mesh: str, group: str, option: str) -> str:
    """The file of an option that a mesh brings, where the mesh is such a file and has it beside it; else the option."""
    path = Path(mesh).parent.parent / group / f"{option}.yaml"
    return str(path) if is_file(f"mesh/{mesh}") and group in GROUPS and path.expanduser().is_file() else option
