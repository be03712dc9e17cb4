"""Holds every backend against its contract, in real processes, and kills ranks of it.

    python scripts/check_backends.py contract [--backends shm plan:ring ...] [--ranks 2 3 4 5] [--elements N] [--json]
    python scripts/check_backends.py kills    [--backends shm plan:ring ...] [--phases waiting:barrier ...] [--json]

The cases are those of tests/group_contract.py and tests/kill_matrix.py.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECKS = {"contract": "group_contract", "kills": "kill_matrix"}


def main() -> int:
    what, *words = sys.argv[1:] or ["--help"]
    if what not in CHECKS:
        print(__doc__, file=sys.stdout if what in ("-h", "--help") else sys.stderr)
        return 0 if what in ("-h", "--help") else 2
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    return importlib.import_module(CHECKS[what]).main(words)


if __name__ == "__main__":
    sys.exit(main())
