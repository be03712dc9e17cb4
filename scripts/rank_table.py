"""Ascend's rank table and HCCL's settings for a mesh and a collective, for Ascend 910 and 910B.

    python scripts/rank_table.py mesh=atlas900_256 --out DIR [--hccn SERVER_ID=HCCN_CONF ...]
    python scripts/rank_table.py --check rank_table.json

Without --hccn (a server's address and a copy of its /etc/hccn.conf, once for each host of the mesh, in their order) the
addresses are made up. Without --out the table is printed. Untested on Ascend; held against HCCL's documents.
"""

import argparse
import json
import sys
from pathlib import Path

from launch import rank_table
from launch.compose import compose, one_line, say
from train.emulator import make


def servers(given: list[str]) -> dict[str, list[str]] | None:
    found: dict[str, list[str]] = {}
    for text in given:
        server, equals, path = text.partition("=")
        if not (server and equals and path) or server in found:
            raise ValueError(f"--hccn {text}: give SERVER_ID=FILE, each server once")
        found[server] = rank_table.device_addresses(Path(path))
    return found or None


def read(path: Path) -> dict:
    if path.suffix != ".json":
        raise ValueError(f"{path}: HCCL reads no table whose name does not end in .json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON (comments are not allowed either): {error}") from error


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="as of launch.emulate: mesh=, collective= ...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write rank_table.json and hccl.sh there")
    parser.add_argument("--hccn", action="append", default=[], metavar="SERVER_ID=FILE")
    parser.add_argument("--check", type=Path, metavar="FILE", help="only say whether a table meets the rules")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check:
            table = read(arguments.check)
            rank_table.check(table)
            print(f"{arguments.check}: meets the rules ({table['server_count']} servers)")
            return 0
        config = compose(arguments.overrides)
        plan = make(config["collective"])(make(config["mesh"]))
        found = servers(arguments.hccn)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            print(*rank_table.write(arguments.out, plan, found), sep="\n")
        else:
            say(json.dumps(rank_table.rank_table(plan.mesh, found), indent=1))
    except (ValueError, OSError) as error:
        print(f"rank_table: {one_line(error)}", file=sys.stderr)
        return 2
    if rank_table.level1(plan) is None and plan.mesh.num_hosts > 1:
        said = f"HCCL has no all-reduce like {plan.name} on this mesh: HCCL_ALGO is left to HCCL"
        print(f"rank_table: {said}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
