"""What MLPerf's own checkers say of five runs' logs, as they say it: compliance of each, convergence of all five.

    python scripts/rcp.py RUN RUN RUN RUN RUN [--ruleset 4.0.0] [--json]

The reference convergence points (RCP) tell how many epochs ResNet-50 needs on ImageNet at a batch size; logs of other
data are put to the same question. The logs are emulated and no submission, whatever the verdict; the exit status is 0
for either. The checkers are those of mlcommons/logging (pip install mlperf-logging, in the extra `test`).
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_RUNS = 5  # of a result for resnet (training_policies, training_rules)
RULESETS = ("3.1.0", "4.0.0")


def check(runs: list[Path], ruleset: str) -> dict:
    """The verdicts on the runs' mlperf.log. ValueError where runs or the checkers are missing."""
    if len(runs) != NUM_RUNS:
        raise ValueError(f"{len(runs)} runs: a result for resnet is {NUM_RUNS}; name {NUM_RUNS} run folders")
    if importlib.util.find_spec("mlperf_logging") is None:
        raise ValueError("mlperf_logging is not installed: pip install mlperf-logging==4.1.68")
    logs = [run / "mlperf.log" for run in runs]
    for run, log in zip(runs, logs, strict=True):
        if not log.is_file():
            raise ValueError(f"{run}: no mlperf.log in it; name finished run folders")
    compliance = []
    with tempfile.TemporaryDirectory() as folder:
        for number, log in enumerate(logs):
            result = Path(folder, f"result_{number}.txt")
            shutil.copyfile(log, result)
            said = _said("compliance_checker", folder, "--usage", "training", "--ruleset", ruleset, str(result))
            compliance.append({"run": str(runs[number])} | said)
        rcp = _said("rcp_checker", folder, "--rcp_usage", "training", "--rcp_version", ruleset, folder)
    return {"ruleset": ruleset, "compliance": compliance, "rcp": rcp, "clock": "emulated, not a submission"}


def _said(checker: str, folder: str, *arguments: str) -> dict:
    """What a checker prints (its log), its last line, and whether it exits 0."""
    command = [sys.executable, "-m", f"mlperf_logging.{checker}", "--log_output", f"{folder}/{checker}.log", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = [line.replace(f"{folder}/", "") for line in done.stderr.splitlines() if line.strip()]
    return {"passed": done.returncode == 0, "last_line": lines[-1] if lines else "", "lines": lines}


def table(found: dict) -> str:
    lines = [f"compliance_checker, ruleset {found['ruleset']}"]
    lines += [f"  {one['run']}: {one['last_line']}" for one in found["compliance"]]
    lines += [f"rcp_checker, ruleset {found['ruleset']}, {NUM_RUNS} runs"]
    lines += [f"  {line}" for line in found["rcp"]["lines"]]
    return "\n".join([*lines, f"({found['clock']})"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"run folders, {NUM_RUNS} of them")
    parser.add_argument("--ruleset", choices=RULESETS, default=RULESETS[-1], help="MLPerf training ruleset")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    try:
        found = check(arguments.runs, arguments.ruleset)
    except ValueError as error:
        print(f"rcp: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if arguments.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
