"""Writes docs/catalog.md: every mesh of conf/mesh with its links, and what the record's recipe would take on it.

    python scripts/catalog.py

A test composes the same meshes and compares.
"""

import sys
from pathlib import Path

from launch.compose import compose, groups
from train import emulator
from train.emulator import Emulator
from train.mesh.topology import LinkClass
from train.metrics import write_aside
from train.report import markdown_table

PAGE = Path(__file__).resolve().parent.parent / "docs" / "catalog.md"
EXPERIMENT = "imagenet_atlas900"
HEAD = """# The catalog: every mesh, priced

Written by `python scripts/catalog.py`. Each row is `python -m launch.emulate mesh=NAME`: the record's recipe
(`experiment={experiment}`, a global batch of {batch:,}) on that machine with its own chip.
All times are **emulated**.

- Single hosts are one host of their kind (`mesh.axes.host=N` makes a cluster); chips that would get less than one image
  stand idle.
- A link is GB/s each way and us a message, *cited*, *derived* from cited figures, or *assumed*, as its file says. One
  without us is a bundle that many chips share (the uplinks of a rack, the trunk between two): such machines bring
  `network=fitted_flow`, which prices the sharing; `fitted` (alpha_beta) doesn't.
- The last column names what rests on an assumption: the links, or the chip's rate (no ResNet-50 result is published
  for it). `explain=true` prints each figure with its source.

"""
COLUMNS = (
    "mesh",
    "chips",
    "with work",
    "chip",
    "links (GB/s, us)",
    "time to train, emulated (5 % to 95 %)",
    "step",
    "efficiency",
    "all-reduce, network",
    "assumed",
)


def kind(source: str) -> str:
    """cited, derived or assumed: what a figure's source says of itself."""
    word = source.partition(":")[0]
    return word if word in ("assumed", "derived") else "cited"


def build(mesh: str) -> Emulator:
    """The record's recipe on a mesh of the catalog."""
    return emulator.build(compose([f"mesh={mesh}"], EXPERIMENT))


def page(made: dict[str, Emulator]) -> str:
    """The text of docs/catalog.md; `made` holds the emulator of every mesh."""
    head = HEAD.format(experiment=EXPERIMENT, batch=made["atlas900_1024"].global_batch_size)
    return head + markdown_table([COLUMNS, *(row(name, each) for name, each in made.items())]) + "\n"


def row(name: str, made: Emulator) -> tuple[str, ...]:
    result = made.run()
    low, high = result["interval_s"]
    assumed = {
        "links": any(kind(link.source) == "assumed" for link in made.mesh.topology.link_classes),
        "rate": any(kind(anchor["source"]) == "assumed" for anchor in made.chip.anchors_of(made.precision)),
    }
    return (
        f"`{name}`",
        f"{result['chips']:,}",
        f"{result['active_chips']:,}",
        result["chip"],
        "; ".join(map(spell, made.mesh.topology.link_classes)),
        f"{result['time_to_train_s']:,.1f} s ({low:,.1f} to {high:,.1f} s)",
        f"{1e3 * result['step_s']:,.2f} ms",
        f"{100 * result['scaling_efficiency']:.0f} %",
        f"{result['collective'].removeprefix('auto: ')}, {result['network']}",
        ", ".join(what for what, holds in assumed.items() if holds) or "no",
    )


def spell(link: LinkClass) -> str:
    latency = f", {1e6 * link.latency_s:.3g}" if link.latency_s else ""
    return f"{link.name} {link.bytes_per_s / 1e9:.4g}{latency} ({kind(link.source)})"


def main() -> int:
    write_aside(PAGE, page({name: build(name) for name in groups()["mesh"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
