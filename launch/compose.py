"""The one place that composes a configuration: Hydra's tree plus overrides in, a checked plain dictionary out.

Hydra alone lets a misspelt key in an experiment file pass and exits 1 on every error. Here every node with a `_target_`
is held against its constructor's signature, every other key against train.config, and what is wrong makes one line
on stderr.
"""

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from launch import outside
from launch.node_rules import check_nodes
from launch.usage import usage
from train.config import Config, ConfigError, nearest, show

CONF = Path(__file__).resolve().parent.parent / "conf"

NO_RECIPE = "none"
FLAGS = ("-m", "--multirun", "--cfg", "-h", "--help")

BRINGS = ("chip", "wire_dtype", "network")
"""What a mesh's file may name under `brings`: a real machine's own chip, a wire dtype that the chip computes in, the
network model that its shared links need."""

OF_EMULATE = {"out": None, "trace": None}
"""Keys of launch.emulate that configurations of older runs lack."""


class Job(NamedTuple):
    """One job of a command line: its overrides and configuration, what it returned, or else why it was refused."""

    words: list[str]
    config: dict
    value: Any
    refusal: str


REFUSED = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError)
"""What wrong input raises: one line and status 2, no traceback."""


def groups() -> dict[str, list[str]]:
    """The groups of conf/ and their options."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        found.setdefault(path.parent.name, []).append(path.stem)
    return found


def compose(overrides: list[str] | tuple[str, ...] = (), experiment: str | None = None) -> dict:
    """The configuration of one run. `experiment` is the one to start from where the overrides name none.

    Raises ConfigError with the key or file, the value and the nearest right one.
    """
    (job,) = expand(overrides, sweep=False)
    return _compose(job, experiment)


def expand(overrides: list[str] | tuple[str, ...], sweep: bool) -> list[list[str]]:
    """The overrides of each job of a sweep, in Hydra's order; without `sweep`, one job and no choices allowed."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError("", f"{text!r} is no key=value; quote what is unusual: 'key=\"a, b\"'") from error
        name = override.key_or_group
        if name.split(".")[0].split("/")[0] == "hydra":
            raise ConfigError(name, "Hydra's own settings are not used here; leave it out")
        if override.is_sweep_override() and not sweep:
            raise ConfigError(name, f"{text.partition('=')[2]} is a choice of values: add -m to run them all")
        if name in groups():
            if not override.is_sweep_override() and not isinstance(override.value(), str):
                raise ConfigError(name, f"{show(override.value())} is no option{nearest(name, groups()[name])}")
            override.input_line = text.lstrip("+")
        elif not override.is_delete():
            override.input_line = "++" + text.lstrip("+")  # a new key is judged later, with the signatures at hand
            override.type = type(override.type).FORCE_ADD
        parsed.append(override)
    if not sweep:
        return [[override.input_line for override in parsed]]
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def _compose(overrides: list[str], experiment: str | None) -> dict:
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    if experiment and "experiment" not in keys:
        overrides = [f"experiment={experiment}", *overrides]
    for given, follows in (("chip_batch_size", "global_batch_size"), ("global_batch_size", "chip_batch_size")):
        if given in keys and follows not in keys:
            overrides = [*overrides, f"++{follows}=null"]  # the command line replaces the experiment's batch size
    for name in keys:
        if f"{name}.".startswith("mesh.brings."):
            raise ConfigError(name, f"is for a mesh's file; here set {' or '.join(f'{key}=' for key in BRINGS)}")
    given = [word.partition("=")[2] for word in overrides if word.startswith("recipe=")]
    words = [word for word in overrides if not word.startswith("recipe=")]
    mesh = [word.partition("=")[2] for word in words if word.startswith("mesh=")]
    if mesh:
        words += brought(mesh[-1], set(keys))
    config, chosen = _composed(words, overrides)
    if not mesh:  # the experiment's, whose own choices go before what the mesh brings
        more = brought(chosen["mesh"], {*keys, *_set_by(f"experiment/{chosen['experiment']}")})
        if set(more) - {f"chip={chosen['chip']}"}:
            words += more
            config, chosen = _composed(words, overrides)
    recipe = given[-1] if given else config.get("recipe", NO_RECIPE)
    if recipe != NO_RECIPE:
        # Composed without the experiment, so that none of its own values stay in what the recipe sets.
        sets = _set_by(f"recipe/{recipe}")
        rest = [word for word in words if re.split(r"[=.]", word.lstrip("+~"))[0] in sets]
        alone, of_recipe = _composed([*rest, f"recipe={recipe}", "~experiment"], overrides)
        config |= {name: alone[name] for name in sets}
        chosen |= {name: of_recipe[name] for name in sets & set(of_recipe)}
    chosen["recipe"] = recipe
    config |= {"experiment": chosen["experiment"], "recipe": recipe}
    config["mesh"].pop("brings", None)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(error.key, error.problem + _origin(error.key, keys, chosen)) from error
    return config


def _composed(words: list[str], on_command_line: list[str]) -> tuple[dict, dict]:
    """What Hydra makes of the overrides: the plain values, and the chosen option of each group."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        words, files = outside.for_hydra(words)
        values = [word for word in words if word.startswith("++") and "@" not in word.partition("=")[0]]
        options = [word for word in words if word not in values]
        if not {word.lstrip("~").partition("=")[0] for word in options} <= set(groups()):
            options, values = words, []  # a value that is taken away, or a mistake: Hydra's, in this order
        composed, chosen = map(deepcopy, _options(tuple(options), _stamps(files.values())))
        for value in OverridesParser.create().parse_overrides(values):
            OmegaConf.update(composed, value.key_or_group, value.value(), merge=True, force_add=True)
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True), chosen | files
    except MissingConfigException as error:
        raise _missing_option(error.missing_cfg_file or "", on_command_line) from error
    except OmegaConfBaseException as error:
        raise ConfigError(error.full_key or "", _first_line(error)) from error
    except YAMLError as error:
        raise ConfigError("", " ".join(f"not YAML: {error}".split())) from error
    except HydraException as error:
        raise ConfigError("", _first_line(error.__cause__ or error)) from error


@lru_cache
def _options(words: tuple[str, ...], stamps: tuple[str | int, ...]) -> tuple[Any, dict]:
    """The chosen options merged by Hydra, which takes most of a start: kept for the next job that chooses them."""
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", list(words), return_hydra_config=True)
    chosen = OmegaConf.to_container(composed.hydra.runtime.choices)
    OmegaConf.set_struct(composed, False)
    del composed["hydra"]
    return composed, chosen


def forget() -> None:
    """Keep nothing of conf/: for who measures what a start takes."""
    for kept in (_options, _read):
        kept.cache_clear()


def _stamps(files: Iterable[str]) -> tuple[str | int, ...]:
    """When each file of conf/, and of those outside, was changed: what is kept of them is worth that long."""
    outer = [Path(file).expanduser().resolve() for file in files]
    times = [path.stat().st_mtime_ns for path in (CONF / "config.yaml", *sorted(CONF.glob("*/*.yaml")), *outer)]
    return str(CONF), *map(str, outer), *times


def brought(mesh: str, settled: set[str]) -> list[str]:
    """The overrides that a mesh's file asks for under `brings`, such as `chip=h100`, but for keys already `settled`."""
    brings: dict = {}
    for plain in map(_plain, _bases(f"mesh/{mesh}")):
        brings = (plain.get("brings") or {}) | brings
    for name in brings:
        if name not in BRINGS:
            close = nearest(name, BRINGS, prefix="mesh.brings.")
            raise ConfigError(f"mesh.brings.{name}", f"no such key{close} (in {_spelt(f'mesh/{mesh}')})")
    return [
        f"{name}={outside.beside(mesh, name, value)}" if name in groups() else f"++{name}={value}"
        for name, value in brings.items()
        if name not in settled
    ]


def _set_by(name: str) -> set[str]:
    """The keys and groups that a recipe's or an experiment's file sets; a recipe's are then its alone."""
    found: set[str] = set()
    for plain in map(_plain, _bases(name)):
        entries = [name for entry in plain.pop("defaults", ()) if isinstance(entry, dict) for name in entry]
        found |= {*plain, *(name.rpartition("/")[2] for name in entries)}
    return found


def main(
    job: Callable[[dict], Any],
    argv: list[str],
    prog: str,
    experiment: str | None = None,
    configure: Callable[[list[str]], dict] | None = None,
    after: Callable[[list[Job]], None] | None = None,
) -> int:
    """Composes and runs `job` once per job of the command line; returns the exit status, the worst of a sweep.

    0 done, 1 the run failed, 2 the configuration or input is wrong: one line on stderr. A job returns its status, or
    something else for `after`, which is given all of them at the end. configure: makes a job's configuration of its
    overrides; by default they are composed.
    """
    flags = [word for word in argv if word.startswith("-")]
    overrides = [word for word in argv if not word.startswith("-")]
    if "--cfg" in argv and argv[-1] != "--cfg" and argv[argv.index("--cfg") + 1] == "job":
        overrides.remove("job")  # Hydra's own spelling
    try:
        for flag in flags:
            if flag not in FLAGS:
                raise ConfigError(flag, "no such option" + nearest(flag, FLAGS))
        if {"-h", "--help"} & set(flags):
            say(usage(prog, inspect.getdoc(job) or "", CONF, experiment))
            return 0
        jobs = expand(overrides, sweep=bool({"-m", "--multirun"} & set(flags)))
        configs = [configure(words) if configure else _compose(words, experiment) for words in jobs]
    except ConfigError as error:
        return _refuse(prog, error)
    if "--cfg" in flags:
        from omegaconf import OmegaConf

        say("---\n".join(OmegaConf.to_yaml(OmegaConf.create(config)) for config in configs).rstrip())
        return 0
    worst, done = 0, []
    for number, (config, words) in enumerate(zip(configs, jobs, strict=True), start=1):
        if len(jobs) > 1:
            given = " ".join(word.lstrip("+") for word in words)
            print(f"{prog}: job {number} of {len(jobs)}: {given}", file=sys.stderr)
        try:
            value, refusal = job(config), ""
        except REFUSED as error:
            value, refusal = _refuse(prog, error), one_line(error)
        except KeyboardInterrupt:
            print(f"{prog}: interrupted", file=sys.stderr)
            return 1
        worst = max(worst, value if isinstance(value, int) else 0)
        done.append(Job([word.lstrip("+") for word in words], config, value, refusal))
    try:
        if after:
            after(done)
    except REFUSED as error:
        worst = max(worst, _refuse(prog, error))
    return worst


def say(text: str) -> None:
    """Print to a reader that may stop reading, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(error: Exception) -> str:
    """What is wrong, without a traceback."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return " ".join(text.split()) or type(error).__name__


def _refuse(prog: str, error: Exception) -> int:
    print(f"{prog}: {one_line(error)}", file=sys.stderr)
    return 2


def check(config: dict) -> None:
    """Holds every key against the typed top level and every node against its constructor; raises ConfigError."""
    Config.from_dict(config)
    for name, value in config.items():
        check_nodes(name, value)
    if "_target_" not in config["faults"] and config["faults"]:
        raise ConfigError(f"faults.{next(iter(config['faults']))}", "no such key: a fault is a node with a _target_")


def known_targets() -> set[str]:
    """The `_target_`s that the files of conf/ name."""
    found = re.compile(r"^[^#\n]*?_target_:\s*[\"']?([\w.]+)", re.MULTILINE)
    return {target for path in CONF.glob("*/*.yaml") for target in found.findall(path.read_text(encoding="utf-8"))}


def load_run_config(path: str | Path) -> dict:
    """The configuration of a run folder (or its config.yaml), as data: nothing in it is resolved or may be foreign."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    path = Path(path)
    path = path / "config.yaml" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError("", f"{path}: not found; give a run folder that holds a config.yaml")
    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError("", f"{path}: no configuration: {_first_line(error)}") from error
    if isinstance(config, dict):
        where = {g: _plain(f"{g}/local") | config[g] for g in ("cluster", "launch") if isinstance(config.get(g), dict)}
        config = OF_EMULATE | config | where  # keys that older runs lack
    known = known_targets()
    for key, value in _leaves("", config):
        if isinstance(value, str) and "${" in value:
            raise ConfigError(key, f"{value!r} is no value of a finished configuration ({path})")
        if key.endswith("_target_") and value not in known:
            raise ConfigError(key, f"{value!r} is not one that conf/ names, so it is not run ({path})")
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(error.key, f"{error.problem} ({path})") from error
    return config


def _missing_option(file: str, overrides: list[str]) -> ConfigError:
    """`mesh=atlas900_1025`, on the command line or in a defaults list."""
    group, _, option = file.rpartition("/")
    known = groups()
    what, name, names = ("option", option, known[group]) if group in known else ("group", group, known)
    problem = f"no such {what}{nearest(name, names)}"
    if f"{group}={option}" not in overrides:
        pattern = re.compile(rf"\b{re.escape(group)}: *{re.escape(option)}\b" if group in known else rf"\b{group}\b")
        places = [path for path in sorted(CONF.glob("**/*.yaml")) if pattern.search(path.read_text(encoding="utf-8"))]
        problem += "".join(f" (in conf/{path.relative_to(CONF)})" for path in places)
    return ConfigError(f"{group}={option}", problem)


def _origin(key: str, on_command_line: list[str], chosen: dict) -> str:
    """' (in FILE)': who set a key: the command line, the recipe, the experiment, or the group's option."""
    names = set(on_command_line) - set(groups())
    if any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in names):
        return " (on the command line)"
    group, _, rest = key.partition(".")
    places = [(name, f"brings.{key}") for name in _bases(f"mesh/{chosen.get('mesh')}")]
    places += [(name, key) for top in ("recipe", "experiment") for name in _bases(f"{top}/{chosen.get(top)}")]
    places += [(name, rest) for name in _bases(f"{group}/{chosen.get(group)}")] + [("config", key)]
    for name, inside in places:
        if inside and inside in dict(_leaves("", _plain(name), branches=True)):
            return f" (in {_spelt(name)})"
    return ""


def _bases(name: str) -> Iterator[str]:
    """A file of conf/ and those of its group that it starts from."""
    yield name
    for base in _plain(name).get("defaults", ()):
        if isinstance(base, str) and base != "_self_":
            yield from _bases(f"{name.partition('/')[0]}/{base}")


def _plain(name: str) -> dict:
    """A file of conf/ by itself, or one outside; {} where there is none."""
    if outside.is_file(name):
        return outside.plain(name)
    path = CONF / f"{name}.yaml"
    return deepcopy(_read(path, path.stat().st_mtime_ns)) if path.is_file() else {}


@lru_cache
def _read(path: Path, changed_ns: int) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(path))


def _spelt(name: str) -> str:
    """The file of a name such as `mesh/atlas900_64`, as a message says it."""
    return name.partition("/")[2] if outside.is_file(name) else f"conf/{name}.yaml"


def _leaves(path: str, value: Any, branches: bool = False) -> Iterator[tuple[str, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None or (branches and path):
        yield path, value
    for name, item in inner or ():
        yield from _leaves(f"{path}.{name}" if path else str(name), item, branches)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
