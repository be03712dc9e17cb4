"""Writes docs/verdict.md and docs/verdict.png: what `python -m launch.verdict` says without overrides.

    python scripts/verdict_page.py

A test compares the page's figures with the command's.
"""

import sys
from pathlib import Path

from launch.compose import compose
from launch.emulate import EXPERIMENT
from launch.verdict import judged
from launch.verdict_picture import draw
from launch.verdict_text import as_markdown
from train.metrics import write_aside

PAGE = Path(__file__).resolve().parent.parent / "docs" / "verdict.md"
HEAD = """# The verdict on 59.8 s

Written by `python scripts/verdict_page.py` from what `python -m launch.verdict` finds.

![The plane of epochs and images/s a chip, and the time under each changed assumption](verdict.png)

"""


def main() -> int:
    found = judged(compose([], EXPERIMENT))
    write_aside(PAGE, HEAD + as_markdown(found))
    draw(found, PAGE.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
