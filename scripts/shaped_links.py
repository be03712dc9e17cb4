"""All-reduces of real workers on links of known speed, beside what the networks alpha_beta and flow predict.

    python scripts/shaped_links.py [LAYOUT ...] [--json] [--docs]

Hosts are network namespaces (needs root and iproute2), their links are shaped. Ping-pong alone gives alpha and beta of
the mesh; then the backend `plan` runs each algorithm, one process a chip. A LAYOUT is HOSTS, HOSTSxCHIPS (a card each
chip) or HOSTSxCHIPS:shared (a card each host). --docs writes docs/shaped_links.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts import shaped_network  # noqa: E402
from scripts.shaped_mesh import ALGORITHMS, Line, fit, mesh  # noqa: E402
from scripts.shaped_network import Cluster, Layout, Unavailable, cluster  # noqa: E402
from train.metrics import write_aside  # noqa: E402
from train.report import markdown_table  # noqa: E402
from train.sim.flow import Flow  # noqa: E402
from train.sim.network import AlphaBeta  # noqa: E402

PAGE = ROOT / "docs" / "shaped_links.md"
LAYOUTS = ("2", "3", "4", "8", "2x2", "4x2", "2x4", "4x2:shared", "2x4:shared")
MIB = (1 / 16, 1, 4, 16)
CARD_MBIT, PORT_MBIT = 100, 200
PING_PONG_BYTES = (4, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
SHORT, SHORT_BYTES = 51, 1 << 20
PING_PONGS = 7  # of a long message
NETWORKS = {"alpha_beta": AlphaBeta, "flow": Flow}
FROM_BYTES = 4 << 20  # the aims are for these and larger ones
MEDIAN, WORST, APART = 0.10, 0.20, 0.10
PORT, TIMEOUT_S = 29400, 120.0


def layout(text: str, card_mbit: int, port_mbit: int) -> Layout:
    size, colon, wiring = text.partition(":")
    hosts, x, chips = size.partition("x")
    if not (hosts.isdecimal() and (not x or chips.isdecimal()) and wiring == ("shared" if colon else "")):
        raise ValueError(f"{text!r} is no layout: give HOSTS, HOSTSxCHIPS or HOSTSxCHIPS:shared, such as 4x2:shared")
    return Layout(int(hosts), int(chips or 1), card_mbit, port_mbit, bool(colon))


def algorithms(of: Layout) -> list[str]:
    """Without hosts of several chips `hierarchical` is halving-doubling."""
    return [name for name in ALGORITHMS if of.chips_per_host > 1 or name != "hierarchical"]


def ways(of: Layout) -> dict[str, list[int]]:
    """The two chips of each ping-pong."""
    return {"between": [0, of.chips_per_host]} | ({"inside": [0, 1]} if of.chips_per_host > 1 else {})


def often(nbytes: int, repetitions: int) -> tuple[int, int]:
    """(nbytes, how often): short messages up to SHORT times, or until they make up SHORT_BYTES."""
    return nbytes, max(repetitions, min(SHORT, SHORT_BYTES // nbytes))


def measure(of: Layout, sizes: list[int], repetitions: int) -> dict:
    """{"links": rows of ping-pong, "rows": rows of all-reduces} of one layout; RuntimeError where a worker fails."""
    order = {
        "layout": asdict(of),
        "port": PORT,
        "timeout_s": TIMEOUT_S,
        "ping_pong": [
            (peers, *often(nbytes, repetitions)) for peers in ways(of).values() for nbytes in PING_PONG_BYTES
        ],
        "all_reduce": [(name, *often(nbytes, repetitions)) for name in algorithms(of) for nbytes in sizes],
    }
    with cluster(of) as made:
        found = run_workers(made, order)
    return compare(of, order, found)


def run_workers(made: Cluster, order: dict) -> dict:
    """What rank 0 of one process a chip says. RuntimeError with the last line of the first that fails."""
    command = [sys.executable, "-m", "scripts.shaped_worker"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    workers: list[subprocess.Popen] = []
    failed: list[int] = []
    with tempfile.TemporaryFile("w+") as said:
        try:
            for rank in range(made.layout.chips):
                pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
                out = said if rank == 0 else subprocess.DEVNULL
                worker = made.start(
                    rank, command, cwd=ROOT, env=environment, stdout=out, start_new_session=True, **pipes
                )
                workers.append(worker)
                worker.stdin.write(json.dumps(order | {"rank": rank}))
                worker.stdin.close()
            while not failed and any(worker.poll() is None for worker in workers):
                time.sleep(0.1)
                failed = [rank for rank, worker in enumerate(workers) if worker.poll()]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if failed:
            lines = workers[failed[0]].stderr.read().strip().splitlines() or ["it said nothing"]
            raise RuntimeError(f"{made.layout.name}: the worker of chip {failed[0]} failed: {lines[-1]}")
        said.seek(0)
        return json.load(said)


def compare(of: Layout, order: dict, found: dict) -> dict:
    """What was measured beside what the mesh of the ping-pongs predicts."""
    lines: dict[str, Line] = {}
    links, rows = [], []
    seconds = iter(map(statistics.median, found["ping_pong"]))
    for way in ways(of):
        took = [next(seconds) for _ in PING_PONG_BYTES]
        line = lines[way] = fit(list(PING_PONG_BYTES), took)
        links.append({"layout": of.name, "way": way, "alpha_s": line.alpha_s, "bytes_per_s": line.bytes_per_s})
        links[-1]["ping_pong"] = [
            {"bytes": nbytes, "seconds": one, "error": line.seconds(nbytes) / one - 1}
            for nbytes, one in zip(PING_PONG_BYTES, took, strict=True)
        ]
    of_mesh = mesh(of, lines)
    for (name, nbytes, _), took, busy in zip(order["all_reduce"], found["all_reduce"], found["busy"], strict=True):
        row = {"layout": of.name, "hosts": of.hosts, "chips": of.chips, "shared": of.shared, "algorithm": name}
        row |= {"bytes": nbytes, "seconds": statistics.median(took), "least_s": min(took), "most_s": max(took)}
        plan = ALGORITHMS[name](of_mesh)
        for network, model in NETWORKS.items():
            predicted = model().seconds(plan, nbytes)
            row |= {f"{network}_s": predicted, f"{network}_error": predicted / row["seconds"] - 1}
        rows.append(row | {"cores_busy": busy})
    return {"links": links, "rows": rows}


def score(rows: list[dict], network: str) -> dict:
    """Errors from FROM_BYTES up, and how many pairs of algorithms are in another order than predicted.

    Of the pairs (same layout, same size) those count whose predictions are more than APART from each other.
    """
    errors = [abs(row[f"{network}_error"]) for row in rows if row["bytes"] >= FROM_BYTES]
    apart = wrong = 0
    for one, other in combinations(rows, 2):
        if (one["layout"], one["bytes"]) == (other["layout"], other["bytes"]):
            faster, slower = sorted((one, other), key=lambda row: row[f"{network}_s"])
            if slower[f"{network}_s"] > (1 + APART) * faster[f"{network}_s"]:
                apart += 1
                wrong += faster["seconds"] >= slower["seconds"]
    found = {"network": network, "rows": len(errors), "pairs": apart, "wrong_pairs": wrong}
    if errors:
        found |= {"median": statistics.median(errors), "worst": max(errors)}
    return found


def aims(rows: list[dict]) -> list[dict]:
    """By network, of all layouts and of those where no card is shared, which is all that alpha_beta claims to price."""
    found = []
    for where, some in (("all layouts", rows), ("no shared card", [row for row in rows if not row["shared"]])):
        for network in NETWORKS:
            scored = score(some, network)
            met = scored["wrong_pairs"] == 0
            if scored["rows"]:
                met &= scored["median"] <= MEDIAN and scored["worst"] <= WORST
            found.append({"where": where} | scored | {"met": met})
    return found


def result(layouts: list[Layout], sizes: list[int], repetitions: int) -> dict:
    links, rows = [], []
    load = os.getloadavg()[0]
    for of in layouts:
        print(f"shaped_links: {of.name}", file=sys.stderr)
        found = measure(of, sizes, repetitions)
        links += found["links"]
        rows += found["rows"]
    machine = {"cores": os.cpu_count(), "kernel": platform.release(), "load": load, "repetitions": repetitions}
    machine |= {"card_mbit": layouts[0].card_mbit, "port_mbit": layouts[0].port_mbit}
    return {"machine": machine, "links": links, "rows": rows, "aims": aims(rows)}


def links_table(links: list[dict]) -> str:
    head = ["layout", "way", "alpha, us", "rate, MB/s"]
    head += [f"{size(nbytes)}: ms (line)" for nbytes in PING_PONG_BYTES[1:]]
    lines = [head]
    for link in links:
        points = [f"{1e3 * point['seconds']:.2f} ({point['error']:+.1%})" for point in link["ping_pong"][1:]]
        lines.append([link["layout"], link["way"], f"{1e6 * link['alpha_s']:.0f}", f"{link['bytes_per_s'] / 1e6:.2f}"])
        lines[-1] += points
    return markdown_table(lines)


def rows_table(rows: list[dict]) -> str:
    lines = [["layout", "all-reduce", "size", "measured, ms (least to most)", *NETWORKS, "cores busy"]]
    for row in rows:
        spread = f"{1e3 * row['seconds']:.1f} ({1e3 * row['least_s']:.1f} to {1e3 * row['most_s']:.1f})"
        cells = [row["layout"], row["algorithm"], size(row["bytes"]), spread]
        cells += [f"{1e3 * row[f'{network}_s']:.1f} ({row[f'{network}_error']:+.1%})" for network in NETWORKS]
        lines.append([*cells, f"{row['cores_busy']:.0%}"])
    return markdown_table(lines)


def aims_table(found: list[dict]) -> str:
    lines = [["network", "where", "rows", f"median error (aim {MEDIAN:.0%})", f"worst (aim {WORST:.0%})"]]
    lines[0] += [f"pairs more than {APART:.0%} apart in another order than measured (aim 0)", ""]
    for one in found:
        errors = [f"{one[key]:.1%}" if one["rows"] else "" for key in ("median", "worst")]
        pairs = f"{one['wrong_pairs']} of {one['pairs']}"
        said = "met" if one["met"] else "**missed**"
        lines.append([one["network"], one["where"], str(one["rows"]), *errors, pairs, said])
    return markdown_table(lines)


def size(nbytes: int) -> str:
    if nbytes < 1 << 10:
        return f"{nbytes} bytes"
    return f"{nbytes / 2**20:g} MiB" if nbytes >= 1 << 20 else f"{nbytes / 2**10:g} KiB"


def document(found: dict) -> str:
    machine = found["machine"]
    tcp = ", ".join(f"`{key}={value}`" for key, value in shaped_network.TCP.items())
    smallest, *_, largest = map(size, PING_PONG_BYTES)
    return f"""# The network models beside real all-reduces on shaped links

Written by `python scripts/shaped_links.py --docs`, as root on {machine["cores"]} cores under Linux {machine["kernel"]},
with a load of {machine["load"]:.1f} before; medians of {machine["repetitions"]}, of short messages and ping-pong more.
Each chip is a network namespace with a process of its own; cards and ports are veth pairs whose two ends have a token
bucket (`tc tbf`), so that every link carries its rate in both directions at once.

The mesh is made from ping-pong alone, from the line through {smallest} and {largest}. `train/sim` prices each plan on
that mesh; the backend `plan` (`train/comm/plan_group.py`) sends the same plan's messages over gloo and TCP. A measured
time goes from a start that all ranks have agreed on to the end of the last one; every sum is checked to be exact.

## Aims

From {size(FROM_BYTES)} up; pairs of algorithms: at every size.

{aims_table(found["aims"])}

`alpha_beta` prices every message as if it were alone on its way, and says so: where the chips of a host share a card
and send at once, it is not meant to be right. `flow` shares the card.

## All-reduces

Beside a prediction: how far it is above the measured time.

{rows_table(found["rows"])}

## Ping-pong

One way, and how far the line alpha + bytes / rate is above it.

{links_table(found["links"])}

## How the links are made, and why

- {machine["card_mbit"]} Mbit/s between hosts and {machine["port_mbit"]} inside, never above
  {shaped_network.MOST_MBIT}: all hosts share the cores of one machine, and these must not be what takes the time (last
  column of the all-reduces).
- Frames of up to {shaped_network.MTU:,} bytes, which RoCE's largest packets (4,096 bytes) need; 1,500 would keep a core
  busy.
- A bucket holds one frame ({shaped_network.BURST_BYTES:,} bytes), as a wire can't send ahead of its time.
- Queues of {size(shaped_network.QUEUE_BYTES)}, more than all windows together: nothing is dropped, as on RoCE.
- {tcp}:
  windows that open once and stay, and are alike. Transfers in opposite directions hold back each other's
  acknowledgements, and with unequal windows one of them starves (Zhang, Shenker and Clark 1991).
- The window is {size(shaped_network.WINDOW_BYTES)}. It was 1 MiB at first: a ring over shared cards then took a
  sixth longer, since gloo asks for a message before it sends, and that waited behind what stood in the card's queue.
- The backend asks for the messages of a round before it sends its own, for the same reason: the other way round, an
  exchange of two hosts took twice as long.

What the models leave out: acknowledgements take their share of a link that sends both ways, what has come is added
up, and a round begins when processes are woken up, all by {machine["cores"]} cores. It shows in the small sizes.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--mib", type=float, nargs="+", default=list(MIB), help="sizes of the buffers")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--card-mbit", type=int, default=CARD_MBIT, help="between hosts")
    parser.add_argument("--port-mbit", type=int, default=PORT_MBIT, help="inside a host of several chips")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--docs", action="store_true", help="write docs/shaped_links.md")
    given = parser.parse_args(argv)
    try:
        if given.repetitions < 1 or not all(4 <= mib * 2**20 <= 2**30 for mib in given.mib):
            raise ValueError(
                f"--repetitions {given.repetitions} must be at least 1, --mib {given.mib} 4 bytes to 1 GiB"
            )
        layouts = [layout(text, given.card_mbit, given.port_mbit) for text in given.layouts]
        sizes = [round(mib * 2**18) * 4 for mib in given.mib]
        found = result(layouts, sizes, given.repetitions)
    except (ValueError, Unavailable) as error:
        print(f"shaped_links: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"shaped_links: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("shaped_links: interrupted; the namespaces are gone", file=sys.stderr)
        return 1
    tables = [rows_table(found["rows"]), links_table(found["links"]), aims_table(found["aims"])]
    print(json.dumps(found) if given.json else "\n\n".join(tables))
    if given.docs:
        write_aside(PAGE, document(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
