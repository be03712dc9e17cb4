"""The certificate: one training on different workers, killed, stopped and resumed, and the hashes of its weights.

    python scripts/certify.py [overrides] [--json] [--keep] [--layouts NAME ...]

Every layout is the real command, `python -m launch.run`, with the same overrides and its own workers. Exit status: 0
where all hashes are equal (in numerics=fast: where all layouts trained), 1 where they differ, a run failed or the loss
did not fall, 2 where the configuration is wrong. The table, or with --json one JSON object, goes to stdout.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.compose import compose
from launch.run import emulated_machine
from launch.run_folder import read_json
from train import emulator
from train.checkpoint_files import checkpoint_path, list_checkpoints
from train.config import ConfigError
from train.mesh.blocks import blocks
from train.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
MIN_STEPS, MIN_EPOCHS = 30, 2
POLL_S = 0.05
STOP_PATIENCE_S = 60.0
KEYS_OF_LAYOUTS = ("workers", "shares", "run", "run_root", "resume")
"""Which no override may set."""


@dataclass(frozen=True)
class Layout:
    """How a run is spread and broken: `interrupt` is None, kill (-9, the command) or stop (SIGINT, the command)."""

    name: str
    workers: int
    interrupt: str | None = None
    resumed_workers: int = 0
    unequal: bool = False


LAYOUTS = (
    Layout("1 worker", 1),
    Layout("2 workers", 2),
    Layout("3 workers", 3),
    Layout("4 workers", 4),
    Layout("4 unequal", 4, unequal=True),
    Layout("killed and resumed", 2, "kill", 2),
    Layout("stopped on 4, resumed on 3", 4, "stop", 3),
)


class RunFailed(RuntimeError):
    """A run that should have ended well did not; the message is one line."""


@dataclass
class Trained:
    """What the certificate needs of a finished run."""

    weights_sha256: str
    steps: int
    epochs: float
    chips: int
    block: int
    losses: list[float]
    """Of every step."""
    weights: dict[str, Any] = field(default_factory=dict)
    """In fast numerics: the tensors of the last checkpoint."""


Runner = Callable[[Layout], Trained]


def certify(mode: str, layouts: list[Layout], run: Runner, say: Callable[[str], None]) -> dict:
    """Train every layout and compare: the object that --json prints. `run` may raise RunFailed: that hash is null."""
    first: Trained | None = None
    hashes: dict[str, str | None] = {}
    largest = 0.0
    for layout in layouts:
        started = time.monotonic()
        try:
            trained = run(layout)
        except RunFailed as failure:
            hashes[layout.name] = None
            say(f"{layout.name}: {failure}")
            continue
        hashes[layout.name] = trained.weights_sha256
        say(f"{layout.name}: {trained.weights_sha256[:16]} in {time.monotonic() - started:.0f} s")
        if first is None:
            first = trained
        elif mode == "fast":
            largest = max(largest, relative_difference(trained.weights, first.weights))
    made = {
        "mode": mode,
        "hashes": hashes,
        "all_equal": None not in hashes.values() and len(set(hashes.values())) == 1,
        "steps": first.steps if first else 0,
        "chips": first.chips if first else 0,
        "block": first.block if first else 0,
        "loss_first": first.losses[0] if first else None,
        "loss_last": first.losses[-1] if first else None,
    }
    return made | ({"largest_relative_difference": largest} if mode == "fast" else {})


def relative_difference(weights: dict[str, Any], first: dict[str, Any]) -> float:
    """The largest over all parameters of |a - b| / |b|; running statistics are no weights."""
    differences = [
        ((weights[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12)).item()
        for name, tensor in first.items()
        if tensor.is_floating_point() and "running_" not in name
    ]
    return max(differences)


def complaints(certificate: dict) -> list[str]:
    """Why this is no certificate, a line each; none where it is one."""
    found, hashes = [], certificate["hashes"]
    failed = [name for name, sha256 in hashes.items() if sha256 is None]
    if failed:
        found.append(f"did not finish: {'; '.join(failed)}")
    if certificate["mode"] == "exact" and len({sha256 for sha256 in hashes.values() if sha256}) > 1:
        found.append("the weights differ, and numerics=exact promises the same bits")
    first, last = certificate["loss_first"], certificate["loss_last"]
    if first is not None and not last < first:
        found.append(f"the loss did not fall (from {first:.4g} to {last:.4g}): raise max_steps or mind the recipe")
    return found


class Commands:
    """Runs layouts as commands, one after the other, their run folders in `root`."""

    def __init__(self, words: list[str], root: Path, mode: str, num_blocks: int, steps: int, keep: bool) -> None:
        self._words, self._root, self._mode, self._num_blocks = words, root, mode, num_blocks
        self._steps, self._keep = steps, keep
        self._count = 0
        self.show: Callable[[str], None] = lambda text: None
        """Called with where a run stands, several times a second."""

    def __call__(self, layout: Layout) -> Trained:
        """RunFailed where a run ended badly, ValueError where it found that the configuration is wrong."""
        folder = self._root / "".join(c if c.isalnum() else "-" for c in layout.name)
        words = [f"{key}={json.dumps(value)}" for key, value in split(layout, self._num_blocks).items()]
        if layout.interrupt is None:
            self._train(layout, folder, [*words, f"run={folder.name}"])
        else:
            self._break_off(layout, folder, [*words, f"run={folder.name}"])
            self._train(layout, folder, [f"workers={layout.resumed_workers}", f"resume={folder.name}"])
        return self._read(folder)

    def _train(self, layout: Layout, folder: Path, words: list[str]) -> None:
        process = self._start(words)
        self._until(lambda: False, process, layout, folder)
        if process.returncode:
            raise self._failure(process)

    def _break_off(self, layout: Layout, folder: Path, words: list[str]) -> None:
        """Kill the command in a step after the first checkpoint, or stop it after a third of the steps."""

        def due() -> bool:
            step = last_step(folder)
            if layout.interrupt == "stop":
                return step >= max(self._steps // 3, 1)
            saved = list_checkpoints(folder / "checkpoints")
            return bool(saved) and saved[-1].name < checkpoint_path(folder, step).name  # so that a step is lost

        process = self._start(words)
        if self._until(due, process, layout, folder):
            if layout.interrupt == "kill":
                process.kill()
            else:
                process.send_signal(signal.SIGINT)
            self._until(lambda: False, process, layout, folder)
        if process.returncode == 0:
            raise RunFailed("the run ended before it could be broken off; raise max_steps, or lower checkpoint_steps")
        ended = process.returncode, read_json(folder / "result.json").get("status")
        if ended != {"kill": (-signal.SIGKILL, None), "stop": (1, "interrupted")}[layout.interrupt]:
            raise self._failure(process)

    def _start(self, words: list[str]) -> subprocess.Popen:
        self._count += 1
        self._said = self._root / f"command{self._count}.txt"
        paths = [str(ROOT), os.environ.get("PYTHONPATH")]
        with self._said.open("w") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "launch.run", *self._words, *words, f"run_root={self._root}"],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C comes to this process alone, which stops the other in good order
            )

    def _until(self, due: Callable[[], bool], process: subprocess.Popen, layout: Layout, folder: Path) -> bool:
        """Wait until something is `due` (True) or the command has ended (False)."""
        try:
            while process.poll() is None:
                if due():
                    return True
                self.show(f"{layout.name}: step {last_step(folder)} of {self._steps}")
                time.sleep(POLL_S)
            return False
        except BaseException:
            end(process)
            raise

    def _failure(self, process: subprocess.Popen) -> Exception:
        lines = self._said.read_text(errors="replace").splitlines()
        said = [line.removeprefix("launch.run: ") for line in lines if line.startswith("launch.run: ")]
        line = said[-1] if said else f"launch.run ended with {process.returncode} (see {self._said})"
        return ValueError(line) if process.returncode == 2 else RunFailed(line)

    def _read(self, folder: Path) -> Trained:
        result, contract = read_json(folder / "result.json"), read_json(folder / "env.json")["contract"]
        losses = [row["values"]["train/loss"] for row in read_rows(folder) if row["kind"] == "step"]
        weights = {}
        if self._mode == "fast":
            from train import checkpoint

            weights = checkpoint.load(list_checkpoints(folder / "checkpoints")[-1])["model"]
        if not self._keep:
            shutil.rmtree(folder)
        sizes = result["steps"], result["epochs"], result["chips"], contract["block_chips"]
        return Trained(result["weights_sha256"], *sizes, losses, weights)


def last_step(folder: Path) -> int:
    return max((row["step"] for row in read_rows(folder)), default=0)


def end(process: subprocess.Popen) -> None:
    """Ask a command to stop; where it doesn't, kill it with all that it started."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def split(layout: Layout, num_blocks: int) -> dict:
    """The keys that spread a run."""
    if not layout.unequal:
        return {"workers": layout.workers, "shares": None}
    last = max((num_blocks - layout.workers + 2) // 3, 1)
    shares = [1] * (layout.workers - 1) + [last]
    shares[1] += num_blocks - sum(shares)  # no share begins or ends where a large node of the tree does
    return {"workers": layout.workers, "shares": shares}


def plan(overrides: list[str]) -> tuple[list[str], dict]:
    """The words of every layout's command, and the configuration that they make.

    At least 30 steps over at least 2 epochs, no evaluation but the last and so no early end, a checkpoint every sixth
    of the steps, and processors (one GPU could carry only one of the layouts); overrides win. ValueError where they are
    wrong.
    """
    given = [word.lstrip("+~").partition("=")[0] for word in overrides]
    for key in KEYS_OF_LAYOUTS:
        if key in given:
            raise ConfigError(key, "every layout has its own; leave it out")
    config = compose(overrides)
    steps_per_epoch = emulator.build(config).steps_per_epoch
    steps = config["max_steps"] or max(MIN_STEPS, MIN_EPOCHS * steps_per_epoch)
    ours = {
        "max_steps": steps,
        "target_top1": 1,
        "eval_every": 1_000_000,
        "eval_offset": 0,
        "checkpoint_steps": max(steps // 6, 1),
        "device": "cpu",
    }
    if isinstance(config["epochs"], int | float) and config["epochs"] * steps_per_epoch < steps:
        ours["epochs"] = math.ceil(steps / steps_per_epoch)
    words = [f"{key}={value}" for key, value in ours.items() if key not in given] + overrides
    return words, compose(words)


def choose(names: list[str] | None, num_blocks: int) -> list[Layout]:
    """The layouts of the given names or beginnings of names, all by default; ValueError where blocks are too few."""
    chosen = list(LAYOUTS)
    if names:
        found = [[layout for layout in LAYOUTS if layout.name.startswith(name)] for name in names]
        for name, matches in zip(names, found, strict=True):
            if len(matches) != 1:
                raise ValueError(f"--layouts {name}: give one of {', '.join(repr(layout.name) for layout in LAYOUTS)}")
        chosen = [layout for layout in LAYOUTS if [layout] in found]
        if len(chosen) < 2:
            raise ValueError(f"--layouts {names[0]}: one alone certifies nothing; give at least two")
    elif num_blocks == 4:
        chosen = [layout for layout in LAYOUTS if not layout.unequal]
    for layout in chosen:
        needed = layout.workers + layout.unequal
        if num_blocks < needed:
            raise ValueError(
                f"{layout.name!r} needs {needed} blocks, and the mesh has {num_blocks}: use a larger mesh, a smaller "
                "bn_span, or --layouts to choose others"
            )
    return chosen


def table(certificate: dict, layouts: list[Layout]) -> str:
    """What a reader gets to see."""
    made = certificate
    width = max(len(layout.name) for layout in layouts)
    lines = [f"{name:{width}}  {sha256 or 'failed'}" for name, sha256 in made["hashes"].items()]
    facts = f"numerics={made['mode']}: {made['chips']:,} chips in blocks of {made['block']}, {made['steps']} steps"
    if made["loss_first"] is not None:
        facts += f", loss {made['loss_first']:.4g} -> {made['loss_last']:.4g}"
    verdict = "all equal, to the last bit" if made["all_equal"] else "not all equal"
    if made["mode"] == "fast":
        verdict += f"; largest relative difference of a tensor: {made['largest_relative_difference']:.2g}"
    return "\n".join([facts, *lines, verdict])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, as for launch.run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--keep", action="store_true", help="keep the run folders, and say where they are")
    names = ", ".join(repr(layout.name) for layout in LAYOUTS)
    parser.add_argument("--layouts", action="append", metavar="NAME", help=f"only these, or their beginnings: {names}")
    wanted = parser.parse_intermixed_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _main(wanted)
    except (ValueError, OSError) as error:
        print(f"certify: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("certify: interrupted", file=sys.stderr)
        return 1


def _main(wanted: argparse.Namespace) -> int:
    from rich.console import Console

    words, config = plan(wanted.overrides)
    num_blocks = blocks(config | {"workers": "auto"}, emulated_machine(config | {"workers": 1}).mesh).count
    layouts = choose(wanted.layouts, num_blocks)
    for layout in layouts:
        emulated_machine(config | split(layout, num_blocks))
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if not wanted.layouts and len(layouts) < len(LAYOUTS):
        console.print(f"certify: '4 unequal' is left out: {num_blocks} blocks make no unequal shares of 4 workers")
    root = Path(tempfile.mkdtemp(prefix="certify-"))
    run = Commands(words, root, config["numerics"], num_blocks, config["max_steps"], wanted.keep)
    failed = False
    try:
        with console.status("starting") as status:
            run.show = status.update
            certificate = certify(config["numerics"], layouts, run, console.print)
        failed = None in certificate["hashes"].values()
    finally:
        if wanted.keep or failed:
            console.print(f"certify: the run folders are in {root}")
        else:
            shutil.rmtree(root)
    print(json.dumps(certificate) if wanted.json else table(certificate, layouts), flush=True)
    found = complaints(certificate)
    for complaint in found:
        print(f"certify: {complaint}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
