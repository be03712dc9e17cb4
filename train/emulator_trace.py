"""Some steps of an emulated machine as a trace in Chrome's event format (opens in Perfetto): chosen chips, and links.

`drawing` is one step of it, for the trace of a run that was trained on the machine (train/trace). The mean chip's lanes
add up to the parts of `Emulator.step`. Other chips' compute is drawn from the straggler's distribution with a seed,
scaled so that the slowest is as late as the model expects. The links carry the all-reduce of each bucket, shifted by
the wait for the slowest chip; what of it the published rate holds already is taken off its start, as in train/sim/step.
"""

import json
import math

import numpy as np

from train.emulator import Emulator
from train.sim.step import buckets, exposed_s, ready_s, reduce_ends_s
from train.sim.straggler import draw
from train.trace import Drawing, Part, process_names

NUM_STEPS = 3
ALL_CHIPS = 8
"""Up to so many chips every one is drawn; of more the first, the last, and step 1's slowest and fastest."""
MOST_GROUPS, MOST_GROUPS_OF_A_RUN = 500, 16
"""Of rounds of one all-reduce that are drawn apart, in few steps and in the many of a run's trace."""

LINKS, MEAN_CHIP = 1, 2  # process ids; the chosen chips follow
CHIP_LANES = {
    "input_s": "input",
    "compute_s": "compute",
    "straggler_s": "waiting for the slowest chip",
    "exposed_comm_s": "exposed communication",
    "other_s": "other",
}


def dumps(made: Emulator, seed: int = 0, steps: int = NUM_STEPS) -> str:
    """The whole file."""
    about = {"label": "emulated", "mesh": made.mesh.name, "chip": made.chip.name, "collective": made.plan.name}
    text = {"displayTimeUnit": "ms", "otherData": about, "traceEvents": events(made, seed, steps)}
    return json.dumps(text, allow_nan=False, separators=(",", ":"))


def events(made: Emulator, seed: int = 0, steps: int = NUM_STEPS) -> list[dict]:
    """Trace events of the first `steps` steps, from 0 on."""
    late, drawn = lateness(made, seed, steps), drawing(made, MOST_GROUPS)
    period = max([drawn.step.step_s, *(part.begin_s + part.seconds for part in drawn.links)])
    found = process_names(LINKS, drawn.title, drawn.link_lanes)
    for number in range(steps):
        for part in drawn.links:
            found.append(part.event(LINKS, drawn.link_lanes, number * period, {"step": number + 1}))
    chips = {MEAN_CHIP: ("the mean chip", np.zeros(steps))}
    for chip, roles in chosen(late[0]).items():
        chips[len(chips) + MEAN_CHIP] = (f"chip {chip:,}{roles}", late[:, chip])
    for process, (name, later) in chips.items():
        found += process_names(process, f"{name}, {made.chip.name}", CHIP_LANES)
        for number in range(steps):
            for part in chip_parts(made, float(later[number])):
                found.append(part.event(process, CHIP_LANES, number * period, {"step": number + 1}))
    return found


def drawing(made: Emulator, most_groups: int = MOST_GROUPS_OF_A_RUN) -> Drawing:
    """One step of the machine, every chip as late as the mean one."""
    lanes = {"all_reduce": "all-reduce"} | {link.name: link.name for link in made.mesh.topology.link_classes}
    title = f"links of {made.mesh.name}, {made.plan.name} (all groups alike)"
    return Drawing(made.course().at(1), CHIP_LANES, chip_parts(made), title, lanes, link_parts(made, most_groups))


def link_parts(made: Emulator, most_groups: int) -> list[Part]:
    """The all-reduce of each bucket, and the link classes that are busy with it."""
    found = []
    for bucket, (begin, seconds, nbytes) in enumerate(_reduces(made), 1):
        args = {"bucket": bucket, "bytes": nbytes}
        found.append(Part("all_reduce", begin, seconds, f"bucket {bucket}", args))
        for length, busy, rounds in _groups(made, nbytes, most_groups):
            words = f"{rounds:,} rounds" if rounds > 1 else "1 round"
            found += [Part(link, begin, took, words, args) for link, took in busy.items() if took > 0]
            begin += length
    return found


def lateness(made: Emulator, seed: int, steps: int) -> np.ndarray:
    """[steps, chips]: seconds that each chip with work computes longer than the mean one; the largest is the wait."""
    step, random = made.course().at(1), np.random.default_rng(seed)
    images = math.ceil(made.global_batch_size / made.mesh.num_chips)
    natural = made.wait_s(images, made.active_chips, made.sizes[0][1])
    late = np.zeros((steps, made.active_chips))
    for row in late if natural else []:
        drawn = draw(made.calibration.straggler, made.active_chips, random)
        row += np.maximum(natural * drawn / drawn.max(), -step.compute_s)
    if step.straggler_s > natural:  # a fault: one chip, the same in every step
        late[:, random.integers(made.active_chips)] = step.straggler_s
    return late


def chosen(late: np.ndarray) -> dict[int, str]:
    """chip -> what it is drawn for; `late` [chips] is of the first step."""
    if len(late) <= ALL_CHIPS:
        return dict.fromkeys(range(len(late)), "")
    roles: dict[int, list[str]] = {0: ["first"]}
    roles.setdefault(int(late.argmax()), []).append("slowest of step 1")
    roles.setdefault(int(late.argmin()), []).append("fastest of step 1")
    roles.setdefault(len(late) - 1, []).append("last")
    return {chip: f" ({', '.join(words)})" for chip, words in roles.items()}


def chip_parts(made: Emulator, late: float = 0.0) -> list[Part]:
    """A step of a chip that computes `late` seconds longer than the mean one, its parts one after another."""
    step, forward = made.course().at(1), made.sizes[0][1].forward_flops / made.sizes[0][1].training_flops
    compute_s = step.compute_s + late
    launches = step.other_s - made.update_s
    parts = [
        ("input_s", step.input_s, ""),
        ("compute_s", forward * compute_s, "forward"),
        ("compute_s", (1 - forward) * compute_s, "backward"),
        ("other_s", launches, "launches"),
        ("straggler_s", step.straggler_s - late, ""),
        ("exposed_comm_s", step.exposed_comm_s - made.norm_s, ""),
        ("exposed_comm_s", made.norm_s, "batch-norm sums"),
        ("other_s", made.update_s, "update"),
    ]
    found, begin = [], 0.0
    for key, seconds, name in parts:
        if seconds > 1e-9:  # Perfetto's clock has whole nanoseconds
            found.append(Part(key, begin, seconds, name))
            begin += seconds
    return found


def _reduces(made: Emulator) -> list[tuple[float, float, float]]:
    """(begin, seconds, bytes) of each bucket's all-reduce, in seconds of the step."""
    images = math.ceil(made.global_batch_size / made.mesh.num_chips)
    given = made.step_inputs(images, made.active_chips, workload=made.sizes[0][1])
    if made.active_chips == 1:
        return []
    step, lane = made.course().at(1), max(given["compute_s"], given["floor_s"])
    cut = buckets(given["workload"], given["bucket_ends"])
    sizes = [bucket.parameters * given["wire_bytes"] for bucket in cut]
    seconds = [given["all_reduce_s"](size) for size in sizes]
    ready = ready_s(cut, lane, given["overlap"])
    begins = [end - took for end, took in zip(reduce_ends_s(ready, seconds), seconds, strict=True)]
    held = exposed_s(ready, seconds, lane) - (step.exposed_comm_s - made.norm_s)
    move = step.input_s + step.straggler_s - held
    move = max(move, -begins[0])
    return [(begin + move, *rest) for begin, *rest in zip(begins, seconds, sizes, strict=True)]


def _groups(made: Emulator, nbytes: float, most: int) -> list[tuple[float, dict[str, float], int]]:
    """(seconds, link class -> seconds it is busy, rounds) of neighbouring rounds on the same link classes.

    A class is busy in a round until the last message that crosses it has arrived.
    """
    topology, groups = made.plan.mesh.topology, []
    for turn, times, seconds in made.network.rounds(made.plan, nbytes):
        hops = topology.hops(turn.source, turn.destination)
        busy = {
            link.name: times * float(seconds[crossing > 0].max())
            for link, crossing in zip(topology.link_classes, hops, strict=True)
            if (crossing > 0).any()
        }
        groups.append((times * float(seconds.max()), busy, times))
    merged: list[tuple[float, dict[str, float], int]] = []
    for group in groups:
        if merged and merged[-1][1].keys() == group[1].keys():
            merged[-1] = _sum([merged[-1], group])
        else:
            merged.append(group)
    return merged if len(merged) <= most else [_sum(merged)]


def _sum(groups: list[tuple[float, dict[str, float], int]]) -> tuple[float, dict[str, float], int]:
    names = dict.fromkeys(name for _, busy, _ in groups for name in busy)
    busy = {name: sum(each.get(name, 0.0) for _, each, _ in groups) for name in names}
    return sum(length for length, _, _ in groups), busy, sum(rounds for *_, rounds in groups)
