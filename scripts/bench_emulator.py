"""What emulating costs: seconds and memory against the number of chips, for each network model, beside SimGrid.

    python scripts/bench_emulator.py [--json] [--chips N ...]

A whole answer is timed, from composing the configuration to the interval, in a fresh process each, after its imports;
memory is that process's peak. SimGrid (Debian's python3-simgrid) prices one all-reduce of the gradients on the same
links; only its simulation is timed, and beside it the same all-reduce by our two networks.
"""

import argparse
import json
import subprocess
import sys
import time

from train.memory import peak_bytes
from train.report import markdown_table

CHIPS = (8, 64, 512, 1024, 4096, 32_768, 262_144, 1_048_576)
FLOW_UP_TO = 32_768  # its cost grows with the transfers of a round
SIMGRID_UP_TO = 1024
RECORD, LARGEST = 1024, 1_048_576
AIMS = (  # what, network, chips, key, aim
    ("the record, 1,024 chips: seconds", "alpha_beta", RECORD, "seconds", 0.3),
    ("flow, 1,024 chips: seconds", "flow", RECORD, "seconds", 2.0),
    ("1,048,576 chips: seconds", "alpha_beta", LARGEST, "seconds", 3.0),
    ("1,048,576 chips: peak bytes", "alpha_beta", LARGEST, "peak_bytes", 2**30),
)
MISSING = "needs Debian's python3-simgrid (apt-get install python3-simgrid)"


def overrides(network: str, chips: int) -> list[str]:
    """The record's experiment on so many Ascend 910: its own global batch at its size, 32 images a chip elsewhere."""
    words = ["experiment=imagenet_atlas900", f"network={network}"]
    return words + ([f"mesh.axes.host={chips // 8}", "scaling=weak", "chip_batch_size=32"] if chips != RECORD else [])


def one(network: str, chips: int) -> dict:
    """Seconds and peak memory of one emulation in this process."""
    from launch.compose import compose, forget
    from train import emulator

    emulator.build(compose(overrides(network, 8)))  # what composing and building import is imported now
    tried: list[tuple[float, float]] = []
    while len(tried) < 5 and sum(seconds for seconds, _ in tried) < 3:  # the best one has the fewest interruptions
        forget()  # a command composes once
        began = time.perf_counter()
        config = compose(overrides(network, chips))
        composed = time.perf_counter()
        result = emulator.build(config).run()
        tried.append((time.perf_counter() - began, composed - began))
    seconds, composing_s = min(tried)
    return {
        "network": network,
        "chips": chips,
        "seconds": seconds,
        "composing_s": composing_s,
        "peak_bytes": peak_bytes(),
        "time_to_train_s": result["time_to_train_s"],
    }


def all_reduce(chips: int) -> dict:
    """SimGrid's simulation of the record's all-reduce beside ours: what each costs, and what each says it takes."""
    from simgrid_agreement import BUFFER_BYTES, rounds, simgrid_seconds

    from launch.compose import compose
    from train import emulator
    from train.sim.flow import Flow
    from train.sim.network import AlphaBeta

    plan = emulator.build(compose(overrides("alpha_beta", chips))).plan
    theirs = simgrid_seconds(plan.mesh.topology, chips, {plan.name: rounds(plan)})
    row = {"chips": chips, "collective": plan.name, "simgrid_wall_s": theirs["wall_s"]}
    row["simgrid_s"] = sum(max(turn) for turn in theirs["seconds"][plan.name])
    for network in (AlphaBeta(), Flow()):
        walls = []
        for _ in range(3):
            began = time.perf_counter()
            row[f"{network.name}_s"] = network.seconds(plan, BUFFER_BYTES)
            walls.append(time.perf_counter() - began)
        row[f"{network.name}_wall_s"] = min(walls)
    return row


def fresh(*arguments: str) -> dict:
    """A measurement in a process of its own; {"skipped": reason} where it can't be made."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"skipped": MISSING if "simgrid" in done.stderr else reason}
    return json.loads(done.stdout)


def measure(chips: list[int]) -> dict:
    rows = []
    for count in chips:
        row = {"chips": count, "alpha_beta": fresh("--one", "alpha_beta", str(count))}
        row["flow"] = {"skipped": f"above {FLOW_UP_TO:,} chips"}
        if count <= FLOW_UP_TO:
            row["flow"] = fresh("--one", "flow", str(count))
        row["all_reduce"] = {"skipped": f"above {SIMGRID_UP_TO:,} chips"}
        if count <= SIMGRID_UP_TO:
            row["all_reduce"] = fresh("--all-reduce", str(count))
        rows.append(row)
    return {"rows": rows, "aims": aims(rows)}


def aims(rows: list[dict]) -> list[dict]:
    found = []
    for what, network, chips, key, aim in AIMS:
        for row in rows:
            if row["chips"] == chips:
                value = row[network].get(key)
                met = value is not None and value < aim
                found.append({"what": what, "measured": value, "aim": aim, "met": met})
    return found


def tables(result: dict) -> str:
    head = ["chips", "alpha_beta: seconds (composing)", "peak memory", "flow: seconds (composing)", "peak memory"]
    head += [
        "SimGrid, one all-reduce: seconds",
        "by flow",
        "by alpha_beta",
        "the all-reduce takes: SimGrid, flow, alpha_beta",
    ]
    lines, skipped = [head], {}
    for row in result["rows"]:
        cells = [f"{row['chips']:,}"]
        for network in ("alpha_beta", "flow"):
            one = row[network]
            mib = "" if "skipped" in one else f"{one['peak_bytes'] / 2**20:,.0f} MiB"
            cells += [one.get("skipped") or f"{one['seconds']:.3f} ({one['composing_s']:.3f})", mib]
        reduce = row["all_reduce"]
        if "skipped" in reduce:
            skipped[reduce["skipped"]] = None
            cells += ["", "", "", ""]
        else:
            cells += [f"{reduce[f'{who}_wall_s']:.4f}" for who in ("simgrid", "flow", "alpha_beta")]
            cells.append(
                " ".join(f"{1e3 * reduce[f'{who}_s']:.4f}" for who in ("simgrid", "flow", "alpha_beta")) + " ms"
            )
        lines.append(cells)
    aims = [["what", "measured", "aim", ""]]
    for aim in result["aims"]:
        figure = "skipped" if aim["measured"] is None else f"{aim['measured']:,.3g}"
        aims.append([aim["what"], figure, f"{aim['aim']:,.3g}", "met" if aim["met"] else "**missed**"])
    notes = [f"SimGrid {reason}." for reason in skipped]
    return "\n".join([markdown_table(lines), "", *notes, "", markdown_table(aims)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--chips", type=int, nargs="+", default=list(CHIPS), help="multiples of 8")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "CHIPS"), help="measure one emulation in this process")
    parser.add_argument("--all-reduce", type=int, metavar="CHIPS", help="SimGrid and ours on one all-reduce")
    given = parser.parse_args()
    if any(count < 8 or count % 8 for count in given.chips):
        parser.error(f"--chips {' '.join(map(str, given.chips))}: hosts have 8 chips, give multiples of 8")
    if given.one or given.all_reduce:
        print(json.dumps(one(given.one[0], int(given.one[1])) if given.one else all_reduce(given.all_reduce)))
        return 0
    result = measure(given.chips)
    print(json.dumps(result) if given.json else tables(result))
    return 0 if all(aim["met"] for aim in result["aims"]) else 1


if __name__ == "__main__":
    sys.exit(main())
