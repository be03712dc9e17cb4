"""Faults on an emulated machine: the price of a step while something is broken, and of a whole run."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from train.sim.course import Course
from train.sim.faults import Condition, slowed
from train.sim.run import INTERVAL, Clock, RunTime, epoch_grid, quantile
from train.sim.step import step_time
from train.sim.timeline import Pace, Timeline, chance
from train.sim.toll import Toll

if TYPE_CHECKING:
    from train.emulator import Emulator

DRAWS = 100
"""Runs of other seeds over which the interval goes where faults have a rate."""
MOMENTS = 20
"""Of a run at which the cost of one event is taken for the mean."""
STRIDE = 7
"""Between the seeds of neighbouring numbers of epochs, so that neither follows the other."""


def price(made: Emulator, state: Condition) -> Course:
    """The steps of the run's batch on the machine in `state`; every chip that is left keeps its own images."""
    if state not in made.prices:
        machine = made if state.links == made.standing.links else _on_slow_links(made, state.links)
        images = math.ceil(made.global_batch_size / made.mesh.num_chips)
        chips = made.active_chips - state.lost
        made.prices[state] = machine.course(
            lambda workload: step_time(**machine.step_inputs(images, chips, state.slowdown, workload))
        )
    return made.prices[state]


def _on_slow_links(made: Emulator, links: tuple[tuple[str | None, float], ...]) -> Emulator:
    machine = copy.copy(made)
    machine.put_on(slowed(made.sound_mesh, links))
    return machine


def timeline(made: Emulator, steps: int, seed: int | None = None) -> Timeline:
    """When the machine's faults strike in a run of `steps` steps; None: of the run's own seed."""
    pace = Pace(
        seed=made.seed if seed is None else seed,
        chips=made.active_chips,
        chips_per_host=made.mesh.chips_per_host,
        steps_per_epoch=made.steps_per_epoch,
        step_s=price(made, Condition()).mean(max(1, steps)).step_s,
        startup_s=made.startup_s,
        eval_s=made.eval_s(made.num_eval),
        eval_every=made.eval_every,
        eval_offset=made.eval_offset,
        checkpoint_steps=made.checkpoint_steps,
    )
    return Timeline(made.faults, pace, steps)


def toll(made: Emulator, steps: int, seed: int | None = None) -> Toll:
    """The same run, priced."""
    return Toll(timeline(made, steps, seed), lambda state: price(made, state))


def of_training(made: Emulator, config: dict) -> Toll | None:
    """That of a training run; None without faults. ValueError for what can be priced but not trained."""
    if not made.faults:
        return None
    epochs = config["epochs"][-1] if isinstance(config["epochs"], list) else config["epochs"]
    steps = math.ceil(epochs * made.steps_per_epoch - 1e-9)
    found = toll(made, steps if config["max_steps"] is None else min(steps, config["max_steps"]))
    span = config["bn_span"]
    for state in found.timeline.spans:
        cut = [group for group in {chip // span for chip in state.lost} if not _whole(group, span, state.lost)]
        if cut:
            raise ValueError(
                f"faults: chip {min(state.lost)} is lost in step {state.first}, and bn_span={span} chips share their "
                "batch-norm statistics; lose whole spans (faults=lost_host), use faults.recovery=spare, or bn_span=1"
            )
        if config["bn_rule"] == "chip_0" and 0 in state.lost:
            raise ValueError(
                f"faults: chip 0 is lost in step {state.first}, and bn_rule=chip_0 evaluates with its statistics; use "
                "bn_rule=mean, or lose another chip"
            )
    return found


def _whole(group: int, span: int, lost: frozenset[int]) -> bool:
    return lost.issuperset(range(group * span, (group + 1) * span))


def disturbed(made: Emulator, run: RunTime) -> tuple[RunTime, dict]:
    """The run with the machine's faults, and what is to be told of them.

    The seven parts stay the run's: recoveries are in `other_s`. At a rate the run is that of the seed; its interval is
    over the epochs and DRAWS other seeds.
    """
    clock = Clock(
        step_s=price(made, Condition()).seconds,
        eval_s=made.eval_s(made.num_eval),
        startup_s=made.startup_s,
        steps_per_epoch=made.steps_per_epoch,
        epochs=made.epochs,
        eval_every=made.eval_every,
        eval_offset=made.eval_offset,
    )
    steps = [clock.steps(epochs) for epochs in epoch_grid(made.epochs)[1]]
    own = toll(made, max(run.steps, *steps))
    told, parts = own.report(run.steps), own.parts(run.steps)
    of_grid = [own] * len(steps)
    if any(fault.random for fault in made.faults):
        others = [toll(made, own.timeline.steps, made.seed + 1 + draw) for draw in range(DRAWS)]
        of_grid = [others[STRIDE * number % DRAWS] for number in range(len(steps))]
        told |= _expected(made, run.steps)
    times = clock.times + [one.cost_s(count) for one, count in zip(of_grid, steps, strict=True)]
    low, high = (quantile(times, made.model_error, q) for q in INTERVAL)
    changed = {name: getattr(parts, name) for name in ("compute_s", "exposed_comm_s", "straggler_s", "input_s")}
    return replace(run, **changed, other_s=parts.other_s + parts.recovery_s, interval_s=(low, high)), told


def _expected(made: Emulator, steps: int) -> dict[str, float]:
    """Events of a mean run, and what they cost, the latter to first order: no two of them meet."""
    pace, events, cost_s = timeline(made, steps).pace, 0.0, 0.0
    for fault in made.faults:
        if fault.random:
            number = steps * chance(fault, pace)
            moments = [1 + steps * (2 * part + 1) // (2 * MOMENTS) for part in range(MOMENTS)]
            single = [replace(fault, at_steps=moment, per_step=None, per_chip_hour=None) for moment in moments]
            tolls = [Toll(Timeline([one], pace, steps), lambda state: price(made, state)) for one in single]
            costs = [one.cost_s(steps) for one in tolls]
            events, cost_s = events + number, cost_s + number * sum(costs) / MOMENTS
    return {"expected_events": events, "expected_cost_s": cost_s}
