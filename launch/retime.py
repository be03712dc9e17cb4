"""`launch.emulate run=FOLDER mesh=...`: a finished run, or an imported published one, re-timed without training."""

import math
import shutil
from pathlib import Path
from typing import Any

from launch import compose
from launch.run_folder import read_json, write_json
from train import emulator, emulator_recipe, retime
from train.config import ConfigError, show
from train.emulator import Emulator
from train.metrics import METRICS_FILE, json_line, read_rows, write_aside

MACHINE = "mesh chip collective network wire_dtype faults".split()
"""What may be another than the run's own: groups and keys that move its clock alone."""
OF_THE_COMMAND = set("run_root format explain out trace claim".split())


def configuration(words: list[str], experiment: str) -> dict:
    """The configuration of one job of launch.emulate: composed, or with run= the run's own on another machine.

    Raises ConfigError with the key, the value and the remedy.
    """
    given = {_key(word): word for word in words}
    named = given.pop("run", "run=null").partition("=")[2]
    if named in ("", "null"):
        return compose.compose(words, experiment)
    for key in given:
        if key.split(".")[0] not in (*MACHINE, *OF_THE_COMMAND):
            raise ConfigError(key, f"is the run's own; with run= change {', '.join(MACHINE)} or keys of theirs")
    folder = _folder(named, given.get("run_root", "run_root=runs").partition("=")[2])
    own = compose.load_run_config(folder)
    if "mesh" in given:
        given |= {_key(word): word for word in compose.brought(given["mesh"].partition("=")[2], set(given))}
    elif (folder / "published.json").exists():
        raise ConfigError("run", f"{named}: a published log doesn't say on what machine its clock ran; give mesh=")
    chosen = {key: word for key, word in given.items() if key in OF_THE_COMMAND or key.split(".")[0] in given}
    known = own["experiment"] if own["experiment"] in compose.groups()["experiment"] else experiment
    composed = compose.compose(list(chosen.values()), known)
    config = own | {key: composed[key] for key in {name.split(".")[0] for name in chosen} | OF_THE_COMMAND - {"claim"}}
    for key in given.keys() - chosen.keys():
        _set(config, key, given[key])
    config |= {"run": str(folder), "global_batch_size": batch_of(own), "chip_batch_size": None, "scaling": "strong"}
    compose.check(config)
    return config


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _folder(named: str, run_root: str) -> Path:
    """The run folder that a path, or a name under run_root, leads to."""
    for path in (Path(named), Path(run_root) / named):
        if (path / "retimed.json").exists():
            origin = read_json(path / "retimed.json")["run"]
            raise ConfigError("run", f"{path}: is itself re-timed; give the run that it comes from, {origin}")
        if (path / "config.yaml").is_file():
            return path
    raise ConfigError("run", f"{named}: no run folder (one with a config.yaml) is there or in {run_root}")


def _set(config: dict, key: str, word: str) -> None:
    """A single value of the run's own machine."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    *path, last = key.split(".")
    node: Any = config
    for name in path:
        if not isinstance(node, dict) or not isinstance(node.get(name), dict):
            raise ConfigError(key, f"no such key: the run's {'.'.join(path)} is {show(node)}")
        node[name] = dict(node[name])
        node = node[name]
    node[last] = OverridesParser.create().parse_override(word).value()


def batch_of(config: dict) -> int:
    """The run's global batch."""
    return emulator_recipe.global_batch_size(config, math.prod(config["mesh"]["axes"].values()), [])


def price(config: dict) -> tuple[dict, Emulator, list[dict]]:
    """With run=: what launch.emulate says of the run on the machine, the machine, and the re-timed rows."""
    folder = Path(config["run"])
    facts = read_json(folder / "published.json") or read_json(folder / "result.json")
    classes = (facts.get("data") or {}).get("num_classes")
    sizes = {"num_train": facts.get("num_train"), "num_eval": facts.get("num_eval"), "num_classes": classes}
    made, before = emulator.build(config, **sizes), list(read_rows(folder))
    rows = retime.retime(before, made)
    result = {"run": str(folder)} | retime.result(before, rows, made, config["target_top1"])
    result["before"]["seconds"] = facts.get("seconds", result["before"]["seconds"])  # of a published log, to run_stop
    return result, made, rows


def table(result: dict) -> str:
    """The accuracy curve on its own clock and on the other machine's."""
    own = "published" if result["before"]["label"] == "published" else "emulated then"
    target = f"{100 * result['target_top1']:.4g} % top-1"
    lines = [
        f"the run {result['run']}: its {result['steps']:,} steps and {result['evaluations']} evaluations, accuracy"
    ]
    lines[0] += f" as it was\n{'':<32} {own:>14} {'emulated here':>14}   5 to 95 %"
    ends = {"its end": (result["before"]["seconds"], result["time_to_train_s"], result["interval_s"])}
    if result["reached"]:
        when = result["before"]["time_to_target_s"], result["time_to_target_s"], result["target_interval_s"]
        ends = {f"time to {target}": when} | ends
    else:
        lines.append(f"  {target} was not reached")
    for words, (then, now, (low, high)) in ends.items():
        lines.append(f"  {words:<30} {then:>12.2f} s {now:>12.2f} s   {low:.2f} to {high:.2f} s")
    for point in result["curve"]:
        words = f"epoch {point['epoch']:g}, {100 * point['top1']:.2f} %"
        lines.append(f"  {words:<30} {point['before_s']:>12.2f} s {point['emulated_s']:>12.2f} s")
    return "\n".join(lines)


def write(folder: Path, config: dict, result: dict, rows: list[dict]) -> None:
    """A folder that TensorBoard shows as a run with the emulated clock alone; an older one of this kind is replaced.

    ValueError where the folder holds a run that was trained or imported.
    """
    from yaml import safe_dump

    from train.tensorboard import EPOCH, TensorBoardSink

    if (folder / METRICS_FILE).exists() and not (folder / "retimed.json").exists():
        raise ValueError(f"out={folder}: holds a run; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "tb", ignore_errors=True)
    config = config | {"run": folder.name, "out": None, "trace": None}
    write_aside(folder / "config.yaml", safe_dump(config, sort_keys=False, allow_unicode=True))
    write_json(folder / "retimed.json", result)
    write_aside(folder / METRICS_FILE, "".join(map(json_line, rows)))
    board = TensorBoardSink(folder, EPOCH, config, clocks=("emulated",))
    for row in rows:
        board.log(row)
    board.close()
