"""`python -m launch.emulate`: what the emulated machine would have needed, beside the claim.

Loads neither torch nor Ray.
"""

import json
import math
import sys

from launch import compose
from train import emulator, records
from train.records import Record

EXPERIMENT = "imagenet_atlas900"
PARTS = {
    "compute_s": "compute",
    "exposed_comm_s": "exposed communication",
    "straggler_s": "waiting for the slowest chip",
    "input_s": "input",
    "other_s": "other",
    "eval_s": "evaluation",
    "startup_s": "start-up",
}


def emulate(config: dict) -> None:
    """Prices the run on the emulated machine and prints it beside the claim; writes nothing to disk."""
    published = records.load()
    claim = records.find(published, config["claim"]["record"])
    neighbours = [records.find(published, name) for name in config["claim"]["neighbours"]]
    precision = None if config["precision"] == "auto" else config["precision"]
    made = emulator.build(keep_chip_batch(config) if config["scaling"] == "weak" else config, precision=precision)
    result = {"experiment": config["experiment"], **made.run()}
    origins = made.origins() if config["explain"] else []
    if config["format"] == "json":
        result["claim"] = claimed(claim)
        result["neighbours"] = [claimed(record) for record in neighbours]
        if origins:
            result["origins"] = [origin._asdict() for origin in origins]
        compose.say(json.dumps(result))
        return
    compose.say(table(result, [claim, *neighbours]))
    if origins:
        compose.say("\nWhere the numbers come from")
        for name, value, unit, origin in origins:
            figure = f"{value:,.6g}" if isinstance(value, (int, float)) else value
            compose.say(f"  {name:<22} {figure + ' ' + unit:<34} {origin}")


def keep_chip_batch(config: dict) -> dict:
    """The images per chip that the experiment has on its own mesh, where it gives the global batch only."""
    if config["chip_batch_size"] is not None:
        return {**config, "global_batch_size": None}
    axes = compose.compose([f"experiment={config['experiment']}"])["mesh"]["axes"]
    chips = math.prod(axes.values())
    return {**config, "chip_batch_size": max(1, config["global_batch_size"] // chips), "global_batch_size": None}


def claimed(record: Record) -> dict:
    return {
        "label": "claimed",
        "record": record.id,
        "system": record.system,
        "chips": record.chips,
        "chip": record.chip,
        "global_batch": record.global_batch,
        "epochs": record.epochs,
        "seconds": record.seconds,
        "source": record.source,
    }


def table(result: dict, published: list[Record]) -> str:
    lines = [f"{'':<58} {'chips':>7} {'batch':>7} {'epochs':>6} {'claimed':>9} {'emulated':>9}   5 to 95 %"]
    for record in published:
        batch = f"{record.global_batch:,}" if isinstance(record.global_batch, int) else record.global_batch or "-"
        epochs = f"{record.epochs:g}" if record.epochs else "-"
        lines.append(f"{record.system[:58]:<58} {record.chips:>7,} {batch:>7} {epochs:>6} {record.seconds:>7.1f} s")
    low, high = result["interval_s"]
    lines.append(
        f"{result['mesh'] + ', ' + result['chip']:<58} {result['chips']:>7,} {result['global_batch_size']:>7,} "
        f"{result['epochs']:>6g} {'':>9} {result['time_to_train_s']:>7.1f} s   {low:.1f} to {high:.1f} s"
    )
    how = f"{result['collective']} all-reduce in {result['wire_dtype']}, {result['network']}"
    lines += ["", f"emulated: {result['model']}, {how}"]
    for key, words in PARTS.items():
        lines.append(f"  {words:<30} {result[key]:>9.3f} s {100 * result[key] / result['time_to_train_s']:>6.1f} %")
    lines += [
        f"  {'a step':<30} {1e3 * result['step_s']:>9.3f} ms",
        f"  {'steps':<30} {result['steps']:>9,}, {result['steps_per_epoch']} an epoch",
        f"  {'images/s':<30} {result['images_per_s']:>9,.0f}, {result['images_per_s_per_chip']:,.0f} a chip",
        f"  {'efficiency against one host':<30} {100 * result['scaling_efficiency']:>9.1f} %",
        f"  {'chips with work':<30} {result['active_chips']:>9,} of {result['chips']:,}",
    ]
    lines += ["", *(f"note: {note}" for note in result["notes"])]
    return "\n".join(lines)


def main() -> int:
    return compose.main(emulate, sys.argv[1:], "launch.emulate", experiment=EXPERIMENT)


if __name__ == "__main__":
    sys.exit(main())
