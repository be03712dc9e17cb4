"""`python -m launch.emulate`: what the emulated machine would have needed, beside the claim.

Loads neither torch nor Ray. With run= the steps and evaluations are those of a finished run.
"""

import json
import math
import sys

from launch import compose, retime, whatif
from launch.whatif import Priced
from train import emulator, records
from train.emulator import Emulator
from train.emulator_origins import kind
from train.mesh.origin import Origin
from train.records import Record
from train.sim import straggler

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
COUNTS = [8, 64, 512, 1024, 4096, 65_536, 1_048_576]
"""Chips at which explain=true shows the wait for the slowest one."""


def emulate(config: dict) -> Priced:
    """Prices the run on the emulated machine and prints it beside the claim; writes nothing to disk without out, trace.

    run=FOLDER mesh=...: the time that a finished run, or a published one, would have taken there. With -m a table of
    all jobs follows; out=FOLDER keeps it with a plot and a CSV, trace=FILE.json shows some steps in Perfetto.
    """
    published = records.load()
    claim = records.find(published, config["claim"]["record"])
    neighbours = [records.find(published, name) for name in config["claim"]["neighbours"]]
    result, made, rows = retime.price(config) if config["run"] else price(config)
    result = {"experiment": config["experiment"], **result}
    if config["format"] == "json":
        result["claim"] = claimed(claim)
        result["neighbours"] = [claimed(record) for record in neighbours]
        if config["explain"]:
            result["origins"] = [{**origin._asdict(), "kind": kind(origin)} for origin in made.origins()]
            result["expected_max"] = {"chips": COUNTS, **straggler.table(COUNTS)}
        compose.say(json.dumps(result))
        return Priced(result, made, rows)
    compose.say(table(result, [claim, *neighbours]))
    if rows is not None:
        compose.say("\n" + retime.table(result))
    if config["explain"]:
        compose.say("\n" + explained(made.origins()))
    return Priced(result, made, rows)


def price(config: dict) -> Priced:
    """The run that the configuration describes."""
    made = machine(keep_chip_batch(config) if config["scaling"] == "weak" else config)
    return Priced(made.run(), made, None)


def machine(config: dict) -> Emulator:
    """The emulator of a configuration, in the precision that it asks for."""
    return emulator.build(config, precision=None if config["precision"] == "auto" else config["precision"])


def explained(origins: list[Origin]) -> str:
    """Every number that moves the clock with its origin, and how the wait for the slowest chip grows with the chips."""
    lines, width = ["Where the numbers come from"], max(len(origin.name) for origin in origins)
    for origin in origins:
        figure = f"{origin.value:,.6g}" if isinstance(origin.value, (int, float)) else origin.value
        lines.append(f"  {origin.name:<{width}} {figure + ' ' + origin.unit:<36} {kind(origin):<8} {origin.origin}")
    lines += ["", "The slowest of n chips, in standard deviations above the mean"]
    lines.append(f"  {'n':<12}" + "".join(f"{count:>11,}" for count in COUNTS))
    for name, values in straggler.table(COUNTS).items():
        lines.append(f"  {name:<12}" + "".join(f"{value:>11.3f}" for value in values))
    return "\n".join(lines)


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
        f"{result['epochs']:>6.4g} {'':>9} {result['time_to_train_s']:>7.1f} s   {low:.1f} to {high:.1f} s"
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
        *details(result),
    ]
    lines += ["", *(f"note: {note}" for note in result["notes"])]
    return "\n".join(lines)


def details(result: dict) -> list[str]:
    """What else shaped the step and the run, where there is any of it."""
    lines, wait = [], result["straggler"]
    low, high = result["epochs_interval"]
    if low < high:
        lines.append(f"  {'epochs, 5 to 95 %':<30} {low:>9.1f} to {high:.1f}, from {result['epochs_from']}")
    if wait["jitter"]:
        of = f"{wait['distribution']} deviations of {100 * wait['jitter']:.2f} % of compute"
        lines.append(f"  {'the slowest chip':<30} {wait['expected_max']:>9.2f} {of}")
    if result["bn_span"] > 1:
        lines.append(
            f"  {'batch-norm sums':<30} {1e3 * result['bn_sync_s']:>9.3f} ms a step, {result['bn_span']} chips"
        )
    if result["update_s"]:
        lines.append(f"  {'update beyond the chip rate':<30} {1e3 * result['update_s']:>9.3f} ms a step")
    if result["host_images_per_s"]:
        lines.append(f"  {'input of a host':<30} {result['host_images_per_s']:>9,.0f} images/s at most")
    if result["software"]:
        lines.append(f"  {'software':<30} {result['software']}")
    if result["calibration"]:
        constants = ", ".join(f"{name} {value}" for name, value in result["calibration"].items())
        lines.append(f"  {'calibration':<30} {constants}")
    if faults := result.get("faults"):
        added = f"{faults['cost_s']:>9.3f} s by {faults['num_events']} faults, {faults['lost_chips']} chips lost"
        lines.append(f"  {'added by faults':<30} {added}; {faults['recovery_s']:.3f} s to recover, in other")
        if "expected_events" in faults:
            mean = f"{faults['expected_cost_s']:>9.3g} s by {faults['expected_events']:.3g} faults"
            lines.append(f"  {'added in a mean run':<30} {mean}; above are those of this seed")
    return lines


def main() -> int:
    return answer(sys.argv[1:])


def answer(arguments: list[str]) -> int:
    """The command; returns its exit status."""
    return compose.main(emulate, arguments, "launch.emulate", EXPERIMENT, configuration, whatif.finish)


def configuration(words: list[str]) -> dict:
    return retime.configuration(words, EXPERIMENT)


if __name__ == "__main__":
    sys.exit(main())
