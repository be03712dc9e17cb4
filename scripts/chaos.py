"""Chaos: a short training in exact numerics while its processes are killed and stopped from outside.

    python scripts/chaos.py [overrides] [--kills N] [--seed S] [--json] [--keep]

Ray nodes on loopback (a head, and two that carry two workers each) and the real command, `python -m launch.run`. At
seeded moments a worker, a node's raylet or the command itself gets kill -9 or SIGSTOP. A stopped worker or raylet stays
stopped, a stopped command goes on after some seconds; a killed command, and a node that is given up, is started again
here. The head asks its nodes for a sign of life twice a second (by default every three seconds, five times in vain).
Moments are seen from outside: a worker names its thread after what it does. Runs follow each other until all kills are
given.
Exit status: 0 where every run's weights equal the undisturbed run's to the bit, 1 where not or a run failed.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from launch.cluster import LOOPBACK_VARIABLE  # noqa: E402
from launch.compose import compose  # noqa: E402
from launch.events import EVENTS_FILE  # noqa: E402
from launch.run_folder import read_json  # noqa: E402
from scripts.chaos_strikes import NODES, WORKERS, Strike, line, plan, summary, unasked_losses  # noqa: E402
from train import emulator  # noqa: E402
from train.config import ConfigError  # noqa: E402
from train.metrics import read_rows  # noqa: E402

STEPS = 60
SMALL = "model=resnet_cifar20 data.image_size=16 chip_batch_size=2 mesh=atlas900_64 precision=fp32".split()
KEYS_OF_CHAOS = ("workers", "run", "run_root", "resume", "cluster.address")
HEALTH_CHECK = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
STOPPED_S, HANG_TIMEOUT_S = 5.0, 3.0
SETTLED_STEPS = 3
"""Steps that all workers have made together before the next kill."""
LAST_STEPS = 20
"""Of a run, which are left in peace: what a kill costs is to be seen before the run ends."""
MOMENT_PATIENCE_S, PATIENCE_S = 120.0, 240.0
POLL_S = 0.02


class Broken(RuntimeError):
    """The run did not survive; the message is one line."""


class Nodes:
    """Ray nodes of this machine, on loopback, which ask for a token."""

    def __init__(self, folder: Path, chips: int) -> None:
        os.environ |= {LOOPBACK_VARIABLE: "0", "RAY_TMPDIR": str(folder)}
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        from ray.cluster_utils import Cluster

        self._node = {"num_cpus": WORKERS // NODES, "resources": {"ascend910": chips // NODES}}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECK}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._cluster.add_node(wait=False, **self._node) for _ in range(NODES)]
        self._cluster.wait_for_nodes()
        self.address = self._cluster.address

    def raylet(self, number: int) -> int:
        return self._nodes[number].all_processes["raylet"][0].process.pid

    def number(self, node_id: str) -> int:
        return next(number for number, node in enumerate(self._nodes) if node.node_id == node_id)

    def start_again(self, number: int) -> None:
        """In place of a node whose raylet is dead."""
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)
        self._nodes[number] = self._cluster.add_node(wait=False, **self._node)

    def close(self) -> None:
        self._cluster.shutdown()


class Run:
    """One training as the command, started again whenever it is killed."""

    def __init__(self, words: list[str], root: Path, name: str, nodes: Nodes) -> None:
        self.folder = root / name
        self._nodes, self._log = nodes, root / f"{name}.txt"
        joins = [f"cluster.address={nodes.address}", f"workers={WORKERS}", f"hang_timeout_s={HANG_TIMEOUT_S}"]
        self._words = [*words, *joins, f"run={name}", "resume=auto", f"run_root={root}", "max_restarts=1000"]
        self.process = self.start()

    def start(self) -> subprocess.Popen:
        self.process = launch(self._words, self._log)
        return self.process

    @property
    def step(self) -> int:
        return max((row["step"] for row in read_rows(self.folder) if row["kind"] == "step"), default=0)

    def events(self, name: str, since: float = 0.0) -> list[dict]:
        path = self.folder / EVENTS_FILE
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == name and event["time"] >= since]

    def placement(self, since: float) -> list[dict]:
        """Where the workers are, by what was written last: at the start, or at a change of workers."""
        return [*self.events("attempt", since), *self.events("regrouped", since)][-1]["placement"]

    def until(self, what: str, condition, patience_s: float = PATIENCE_S) -> bool:
        """Whether it came true before the run ended; Broken where neither happens in time."""
        deadline = time.monotonic() + patience_s
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Broken(f"{self.folder.name}: {what} did not happen within {patience_s:.0f} s")
            time.sleep(POLL_S)
        return True

    def check_end(self, expected: str) -> bool:
        """Once it has ended: whether its weights are the undisturbed run's. Broken where it failed."""
        result = read_json(self.folder / "result.json")
        if self.process.wait() != 0 or result.get("status") != "done":
            lines = self._log.read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith("launch.run")]
            raise Broken(f"{self.folder.name}: {said[-1] if said else self._log}")
        return result["weights_sha256"] == expected


def launch(words: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "launch.run", *words],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


class Chaos:
    """Gives the strikes of a plan to one run after the other."""

    def __init__(self, nodes: Nodes, steps: int, seed: int, say) -> None:
        self._nodes, self._steps, self._say, self._draw = nodes, steps, say, random.Random(seed)
        self._started_at, self._settled = 0.0, 0

    def disturb(self, run: Run, strikes: list[Strike]) -> list[Strike]:
        """Give strikes until the run ends; returns those that were given."""
        given: list[Strike] = []
        self._started_at, self._settled = time.time(), 1
        while len(given) < len(strikes):
            if not run.until("training by all workers", lambda: self._whole(run) and run.step >= self._settled):
                break
            if run.step > self._steps - LAST_STEPS:
                break
            strike = strikes[len(given)]
            if not self._strike(run, strike):
                break
            given.append(strike)
            self._settled = run.step + SETTLED_STEPS
            self._say(strike)
        run.until("the end of the run", lambda: run.process.poll() is not None, 10 * PATIENCE_S)
        return given

    def _whole(self, run: Run) -> bool:
        """All workers train, in the present attempt."""
        attempts = run.events("attempt", self._started_at)
        if not attempts or run.step <= attempts[-1]["step"]:
            return False
        losses = run.events("worker_lost", self._started_at)
        changes = run.events("training", losses[-1]["time"]) if losses else []
        return not losses or bool(changes) and len(changes[-1]["members"]) == WORKERS

    def _strike(self, run: Run, strike: Strike) -> bool:
        """False where the run ended before it could be given."""
        placement = run.placement(self._started_at)
        # rank 0 alone writes checkpoints
        seen = placement[0] if strike.moment == "checkpoint" else self._draw.choice(placement)
        deadline = time.monotonic() + MOMENT_PATIENCE_S
        while strike.moment not in threads(seen["pid"]):
            if run.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise Broken(f"{run.folder.name}: worker {seen['worker']} was not seen in {strike.moment}")
        victim, how = strike.kind.split()
        number = self._nodes.number(seen["node"])
        pids = {"worker": seen["pid"], "raylet": self._nodes.raylet(number), "driver": run.process.pid}
        struck_at = time.time()
        os.kill(pids[victim], signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        strike.step = run.step
        if victim == "driver" and how == "killed":
            self._restart(run, strike, struck_at)
        elif victim == "driver":
            time.sleep(STOPPED_S)
            run.process.send_signal(signal.SIGCONT)
            run.until("a step after the stop", lambda: run.step > strike.step)
        else:
            theirs = [worker["pid"] for worker in placement if worker["node"] == seen["node"]]
            ended_at: list[float] = []

            def lost() -> list[dict]:
                if not ended_at and not all(map(alive, theirs)):
                    ended_at.append(time.time())
                return run.events("worker_lost", struck_at)

            noticed = run.until("its detection", lost)
            if victim == "raylet":
                self._nodes.start_again(number)
            if victim == "raylet" and ended_at:
                strike.worked_on_s, struck_at = ended_at[0] - struck_at, ended_at[0]
            if not noticed:
                raise Broken(f"{run.folder.name}: ended before the loss of a {victim} was seen")
            first = lost()[0]
            run.until("training after the loss", lambda: run.events("training", first["time"]))
            again = run.events("training", first["time"])
            strike.detected_s = max(first["time"] - struck_at, 0.0)
            if again:
                strike.training_again_s = again[0]["training_at"] - struck_at
                strike.steps_repeated, strike.source = again[0]["steps_repeated"], again[0]["source"]
        return True

    def _restart(self, run: Run, strike: Strike, struck_at: float) -> None:
        run.process.wait()
        self._started_at = time.time()
        run.start()
        if run.until("the command's first step again", lambda: self._whole(run)):
            strike.training_again_s = time.time() - struck_at
        (attempt,) = run.events("attempt", self._started_at)
        strike.steps_repeated, strike.source = strike.step - attempt["step"], "checkpoint"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def threads(pid: int) -> set[str]:
    """What a process's threads are called; none where it is gone."""
    names = set()
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        try:
            names.add(path.read_text().strip())
        except OSError:
            continue
    return names


def words_of(overrides: list[str]) -> list[str]:
    """The run's overrides: a small model, checkpoints and evaluations often, no early end; those given win."""
    given = [word.lstrip("+~").partition("=")[0] for word in overrides]
    for key in KEYS_OF_CHAOS:
        if key in given:
            raise ConfigError(key, "chaos has its own; leave it out")
    ours = {"max_steps": STEPS, "target_top1": 1, "epochs": 1000, "checkpoint_steps": 5, "device": "cpu"}
    words = [word for word in SMALL if word.partition("=")[0] not in given]
    words += [f"{key}={value}" for key, value in ours.items() if key not in given] + overrides
    config = compose(words)
    if config["numerics"] != "exact":
        raise ConfigError("numerics", f"{config['numerics']}: only numerics=exact promises the same bits")
    if "eval_every" not in given:
        words.append(f"eval_every={5 / emulator.build(config).steps_per_epoch}")
    return words


def _main(wanted: argparse.Namespace) -> int:
    words = words_of(wanted.overrides)
    config = compose(words)
    chips, steps = emulator.build(config).mesh.num_chips, config["max_steps"]
    if steps is None or steps < 2 * LAST_STEPS:
        raise ConfigError("max_steps", f"{steps}: chaos needs at least {2 * LAST_STEPS}")
    strikes, given, equal, unasked = plan(wanted.kills, wanted.seed), [], [], 0
    root = Path(tempfile.mkdtemp(prefix="chaos"))
    nodes = None
    try:
        alone = launch([*words, "workers=1", "run=undisturbed", f"run_root={root}"], root / "undisturbed.txt")
        if alone.wait() != 0:
            raise Broken(f"the undisturbed run failed: {(root / 'undisturbed.txt').read_text().splitlines()[-1]}")
        expected = read_json(root / "undisturbed/result.json")["weights_sha256"]
        print(f"undisturbed: {expected[:16]}", file=sys.stderr, flush=True)
        nodes = Nodes(root / "ray", chips)

        def say(strike: Strike) -> None:
            done = len(given) + sum(1 for one in strikes[len(given) :] if one.step)
            print(f"{done}/{len(strikes)} {line(strike)}", file=sys.stderr, flush=True)

        chaos = Chaos(nodes, steps, wanted.seed, say)
        while len(given) < len(strikes):
            run = Run(words, root, f"disturbed-{len(equal)}", nodes)
            try:
                struck = chaos.disturb(run, strikes[len(given) :])
                given += struck
                unasked += unasked_losses(len(run.events("worker_lost")), struck)
                equal.append(run.check_end(expected))
            finally:
                if run.process.poll() is None:
                    run.process.kill()
                    run.process.wait()
            print(f"{run.folder.name}: {'equal' if equal[-1] else 'DIFFERENT'}", file=sys.stderr, flush=True)
    finally:
        if nodes is not None:
            nodes.close()
        if wanted.keep:
            print(f"kept: {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)
    made = summary(given, equal, unasked)
    print(json.dumps(made) if wanted.json else "\n".join([*map(line, given), f"hash equal: {made['hash_equal']}"]))
    return 0 if made["hash_equal"] else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, as for launch.run")
    parser.add_argument("--kills", type=int, default=6, help="how many, in all (default 6: one of each kind)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds, moments and victims")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--keep", action="store_true", help="keep the run folders, and say where they are")
    wanted = parser.parse_intermixed_args(argv)
    if wanted.kills < 1:
        print(f"chaos: --kills {wanted.kills}: must be at least 1", file=sys.stderr)
        return 2
    try:
        return _main(wanted)
    except Broken as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"chaos: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
