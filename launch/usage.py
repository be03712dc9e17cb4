"""The --help text: groups, options and keys as conf/ and train.config describe them."""

import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path

from train.config import Config, spell

WIDTH = 116

EXAMPLES = (
    ("--cfg", "show the configuration"),
    ("experiment=imagenet_atlas900 data.root=/data/imagenet", "another experiment"),
    ("experiment=synthetic recipe=sgd_256", "another recipe"),
    ("optim=lars schedule.base_lr=1.0 seed=1", "another optimizer, other values"),
    ("-m seed=1,2,3", "a sweep: one job after the other"),
)


def usage(prog: str, about: str, conf: Path, experiment: str | None) -> str:
    """`about` is the command's own description; `experiment` the one it starts from, where that is not the default."""
    chosen = _defaults(conf) | ({"experiment": experiment} if experiment else {})
    lines = [f"usage: python -m {prog} [key=value ...] [-m] [--cfg] [--help]", ""]
    lines += [about, ""] if about else []
    lines += ["Groups (group=option; * is the default, which an experiment may override)"]
    helps = {item.name: item for item in fields(Config)}
    for group in ["experiment", *(name for name in helps if (conf / name).is_dir() and name != "experiment")]:
        lines += ["", f"{group}: {helps[group].metadata['help']}"]
        for path in sorted((conf / group).glob("*.yaml")):
            mark = "*" if chosen.get(group) == path.stem else " "
            lines += _entry(f"{mark} {path.stem}", first_comment(path))
        lines += [line for inner in _inner(helps[group].type) for line in _entry(f"  {group}.{inner[0]}", inner[1])]
    lines += ["", "Keys of an option: group.key=value; --cfg shows them all.", "", "Keys"]
    for item in helps.values():
        if not (conf / item.name).is_dir():
            lines += _entry(f"  {item.name}", f"{item.metadata['help']} ({spell(item.type)})")
    lines += ["", "Examples"]
    lines += [line for words, text in EXAMPLES for line in _entry(f"  python -m {prog} {words}", text, column=84)]
    return "\n".join(lines)


def first_comment(path: Path) -> str:
    """The first line of a YAML file that says what it is."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def _inner(hint: type) -> list[tuple[str, str]]:
    if not is_dataclass(hint):
        return []
    return [(item.name, f"{item.metadata['help']} ({spell(item.type)})") for item in fields(hint)]


def _entry(name: str, text: str, column: int = 26) -> list[str]:
    rest = textwrap.wrap(text, WIDTH - column) or [""]
    head = f"{name:<{column - 2}}  {rest[0]}".rstrip()
    return [head, *(" " * column + line for line in rest[1:])]


def _defaults(conf: Path) -> dict[str, str]:
    """The defaults list of config.yaml."""
    import yaml

    entries = yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}
