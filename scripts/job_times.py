"""The life of a job, timed: submit, status, logs, stop and fetch, on a Ray head and on Slurm, both started here.

    python scripts/job_times.py [--only ray_job|slurm] [overrides]      (Slurm: root, Debian's slurm-wlm and munge)

Two jobs each: one that ends by itself, one that is stopped. Prints a table in seconds; exits with 1 if a step failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.ray_head import ray_head  # noqa: E402
from scripts.slurm_here import missing, slurm  # noqa: E402

RUN = ["experiment=digits_atlas", "workers=2", "hang_timeout_s=300"]
CPUS, CHIPS = 2, 64
STEP_TIMEOUT_S = 600.0


class Client:
    """`python -m launch.submit` with the environment of a cluster; every call is a row of the table."""

    def __init__(self, kind: list[str], run_root: Path, environment: dict[str, str]) -> None:
        self.kind, self.run_root, self.environment = kind, run_root, environment
        self.rows: list[tuple[str, float, str]] = []

    def call(self, what: str, *words: str, expected: int = 0) -> str:
        """The answer of one command; SystemExit with what it said where its status is another."""
        command = [sys.executable, "-m", "launch.submit", *words, f"run_root={self.run_root}"]
        begun = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=STEP_TIMEOUT_S
        )
        self.rows.append((what, time.monotonic() - begun, _short(done.stdout if what != "logs" else "")))
        if done.returncode != expected:
            raise SystemExit(f"{' '.join(command)}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.stdout

    def waited(self, what: str, holds) -> None:
        begun = time.monotonic()
        while not holds():
            if time.monotonic() - begun > STEP_TIMEOUT_S:
                raise SystemExit(f"{what}: not within {STEP_TIMEOUT_S:.0f} s")
            time.sleep(0.2)
        self.rows.append((what, time.monotonic() - begun, ""))


def life(client: Client, overrides: list[str]) -> None:
    run = [*client.kind, *RUN, *overrides]
    client.call("submit", *run, "job=short", "max_steps=6")
    client.call("submit again", *run, "job=short", "max_steps=6")
    client.call("status", "action=status", "job=short")
    client.call("logs", "action=logs", "job=short")
    client.call("status", "action=status", "job=short")
    client.call("fetch", "action=fetch", "job=short", f"launch.fetch_to={client.run_root / 'fetched'}")
    client.call("submit", *run, "job=long", "epochs=1000", "target_top1=1")
    metrics = client.run_root / "long" / "metrics.jsonl"
    client.waited("first step", lambda: metrics.exists() and metrics.stat().st_size)
    client.call("stop", "action=stop", "job=long")
    client.call("logs", "action=logs", "job=long", expected=1)
    client.call("fetch", "action=fetch", "job=long", f"launch.fetch_to={client.run_root / 'fetched'}")
    saved = json.loads((client.run_root / "fetched" / "long" / "result.json").read_text())
    if saved["status"] != "interrupted" or not list((client.run_root / "fetched/long/checkpoints").rglob("*.pt")):
        raise SystemExit(f"the stopped run did not save: {saved['status']}")


@contextmanager
def head(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """A Ray head; yields the overrides and the environment that reach it."""
    with ray_head(folder, CPUS, CHIPS) as (address, environment):
        yield ["launch=ray_job", f"launch.address={address}"], environment


@contextmanager
def slurm_nodes(folder: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    with slurm(nodes=2) as environment:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        yield ["launch=slurm", "launch.minutes=30"], inherited | environment


def _short(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0].partition(", run folder")[0].partition(", in /")[0].partition(" (copied")[0] if lines else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ray_job", "slurm"))
    given, overrides = parser.parse_known_args()
    kinds = {"ray_job": head, "slurm": slurm_nodes}
    if given.only != "ray_job" and (absent := missing()):
        print(f"job_times: {', '.join(absent)} not found: apt-get install slurm-wlm munge", file=sys.stderr)
        return 2
    print("| job | step | s | answer |\n|---|---|---|---|")
    for name in [given.only] if given.only else list(kinds):
        with tempfile.TemporaryDirectory(prefix="jobs-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            begun = time.monotonic()
            with kinds[name](Path(folder)) as (kind, environment):
                print(f"| {name} | cluster up | {time.monotonic() - begun:.1f} | |", flush=True)
                client = Client(kind, Path(folder) / "runs", environment)
                try:
                    life(client, overrides)
                finally:
                    for what, seconds, answer in client.rows:
                        print(f"| {name} | {what} | {seconds:.1f} | {answer.replace(folder, '...')} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
