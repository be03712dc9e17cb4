"""Train: compose, start or join Ray, place the workers, train, report.

`python -m launch.run --help` lists what can be set.
"""

import time

STARTED = time.time()

import signal  # noqa: E402 (the clock of the command starts before anything is imported)
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from functools import wraps  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402

from launch import compose, run_folder, run_page  # noqa: E402
from launch.cluster import Cluster, exposure, join, settle  # noqa: E402
from launch.console import Display  # noqa: E402
from launch.controller import Controller  # noqa: E402
from launch.decisions import Limits  # noqa: E402
from launch.events import EventLog  # noqa: E402
from launch.job_folder import check_run_root  # noqa: E402
from launch.nodes import examine  # noqa: E402
from launch.placement import Layout, ask, resource_name, wanted_workers  # noqa: E402
from launch.worker_group import WorkerFailed, WorkerGroup, started  # noqa: E402
from train.emulator import Emulator, build  # noqa: E402
from train.emulator_faults import of_training  # noqa: E402
from train.emulator_recipe import check_training  # noqa: E402
from train.mesh.blocks import blocks  # noqa: E402
from train.report import RunReport, report  # noqa: E402


def train(config: dict, started_at: float | None = None) -> int:
    """Trains ResNet as the emulated mesh would; leaves a run folder and prints its report."""
    marks = {"command": started_at or time.time(), "configuration": time.time()}
    config = _absolute(config)
    check_run_root(config)
    done = run_folder.finished(config)
    if done is not None:
        print(f"done already: {done}")
        return 0
    folder, checkpoint = run_folder.locate(config)
    if checkpoint is not None:
        config = run_folder.continued(config, folder)
    config = config | {"run": folder.name}
    emulated = emulated_machine(config)
    chips = {resource_name(emulated.chip.name): emulated.mesh.num_chips}
    try:
        with join(config["cluster"], chips, _cpus(config)) as cluster:
            marks["Ray"] = time.time()
            # Ray has set its own, which would leave no result
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            cluster, layout = settle(cluster, config["cluster"], lambda now: ask(config, emulated, now))
            config = config | {"shares": layout.shares}
            examine_nodes(config, cluster, layout)
            with started(layout.requests, cluster.loopback, config["cluster"]["interface"]) as group:
                marks["worker processes"] = time.time()
                said = group.prepare(config, checkpoint, layout.device, marks)
                return _train(config, emulated, folder, checkpoint, group, said, marks["command"])
    except WorkerFailed as failure:  # before training: there is no run folder that could say so
        print(f"launch.run: {failure}", file=sys.stderr)
        return 1


def examine_nodes(config: dict, cluster: Cluster, layout: Layout) -> None:
    """Says what is to be known of a cluster of several machines; ValueError where they can't train together."""
    if not cluster.loopback:
        of_one_kind = config["numerics"] == "exact" and layout.device == "cpu"
        interface = config["cluster"]["interface"]
        print(f"cluster  {exposure(cluster, examine(cluster.nodes, Path(config['run_root']), interface, of_one_kind))}")
    for note in layout.notes:
        print(f"cluster  {note}")


def _train(
    config: dict,
    machine: Emulator,
    folder: Path,
    checkpoint: Path | None,
    group: WorkerGroup,
    said: dict,
    started_at: float,
) -> int:
    """Everything that leaves traces: the folder, the training, the result, the report."""
    from train.records import find, load
    from train.tensorboard import write_reference_runs

    contract, facts, records = said["contract"], said["facts"], load()
    claim = find(records, config["claim"]["record"])
    restarts = run_folder.read_json(folder / "env.json").get("restarts", -1) + 1
    environment = run_folder.environment() | {"contract": contract, "placement": group.placement()}
    limits = Limits(config["max_restarts"], config["min_workers"], config["replacement_wait_s"])
    split = blocks(config, machine.mesh)
    controller = Controller(group, split, limits, config["hang_timeout_s"], EventLog(folder))
    held = run_folder.create(folder, config, environment | {"restarts": restarts}, resumed=checkpoint is not None)
    result, error = {"status": "failed"}, None
    try:
        write_reference_runs(folder.parent, [claim, *(find(records, name) for name in config["claim"]["neighbours"])])
        print(_opening(folder, checkpoint, contract, facts, group), flush=True)
        with Display() as display:
            result = controller.run(folder, display.update, said["step"])
    except (WorkerFailed, ValueError) as failure:
        error = str(failure)
    except KeyboardInterrupt:
        result["status"] = "interrupted"
    finished_at = time.time()
    marks = result.pop("first_step_marks", {})
    summary = (
        facts
        | result
        | {
            "experiment": config["experiment"],
            "target_top1": config["target_top1"],
            "seed": config["seed"],
            "error": error,
            "wall_s": finished_at - started_at,
            "restarts": restarts,
            "worker_restarts": controller.restarts,
            "losses": controller.losses,
            "claim_s": claim.seconds,
            "first_step": phases(marks),
            "time_to_first_step_s": marks["first step"] - started_at if "first step" in marks else None,
        }
    )
    try:
        run_folder.write_json(folder / "result.json", run_folder.complete(folder, summary))
        reported = report([folder])
        print(reported.text)
        _page(reported.runs[0])
    except OSError as failure:
        error = error or f"its result can't be written: {failure}"
    held.close()
    if error:
        print(f"launch.run: the run failed: {error}", file=sys.stderr)
    if result["status"] == "interrupted":
        raise KeyboardInterrupt  # ends a sweep as well
    return 0 if result["status"] == "done" and not error else 1


def _page(reported: RunReport) -> None:
    """A view of the run, which has ended by now: a disk without room for it changes nothing."""
    try:
        run_page.write(reported)
    except OSError as failure:
        print(f"launch.run: no page for TensorBoard: {failure}", file=sys.stderr)


def phases(marks: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase of the start, from the Unix times at which they ended."""
    ends = list(marks.items())
    return {name: end - begin for (_, begin), (name, end) in pairwise(ends)}


def _opening(folder: Path, checkpoint: Path | None, contract: dict, facts: dict, group: WorkerGroup) -> str:
    hosts = "; ".join(
        f"worker {p['worker']}: hosts {p['hosts'][0]}-{p['hosts'][1]} on {p['address']}" for p in group.placement()
    )
    resumed = [f"resumed  from {checkpoint.name}, with the run's own recipe"] if checkpoint else []
    lines = [
        f"run      {folder}",
        *resumed,
        f"mesh     {facts['chips']} emulated chips, {facts['chip_batch_size']} images each = "
        f"{facts['global_batch_size']} a step; {hosts}",
        f"numerics {contract['numerics']}: blocks of {contract['block_chips']} chips ({contract['block_reason']}), "
        f"{contract['order']}, "
        f"{contract['threads']} thread(s) a worker, {contract['precision']} ({contract['precision_reason']}), "
        f"batch norm over {contract['bn_span_chips']} chip(s), {contract['wire_dtype']}",
        *(f"data     {note}" for note in facts["data"]["notes"]),
        *(f"note     {note}" for note in facts["notes"]),
        f"watch    tensorboard --logdir {folder.parent}",
    ]
    return "\n".join(lines)


def emulated_machine(config: dict) -> Emulator:
    """The machine that a run emulates; ValueError for all that is wrong and needs neither Ray nor torch to be seen."""
    from train.data.folder import data_root
    from train.records import find, load

    check_training(config)
    machine = build(config)
    of_training(machine, config)
    blocks(config, machine.mesh)
    records = load()
    for record in (config["claim"]["record"], *config["claim"]["neighbours"]):
        find(records, record)
    if "root" in config["data"] and config["cluster"]["address"] is None:  # other machines have other folders
        data_root(config["data"]["root"])
    return machine


def _absolute(config: dict) -> dict:
    """Workers run in other folders: paths of the configuration must not depend on this one."""
    data = config["data"]
    if data.get("root"):
        data = data | {"root": str(Path(data["root"]).expanduser().absolute())}
    return config | {"data": data, "run_root": str(Path(config["run_root"]).expanduser().absolute())}


def _cpus(config: dict) -> int:
    """Processors to offer in a cluster started here, so that a request for more workers than cores still fits."""
    workers = wanted_workers(config) or 1
    threads = 1 if config["threads"] == "auto" else config["threads"]
    return workers * threads


def main() -> int:
    starts = iter([STARTED])  # the first job's clock starts with the command, those of a sweep's others with themselves
    names: Iterator[str] | None = None

    @wraps(train)
    def job(config: dict) -> int:
        nonlocal names
        if names is None:  # compose.main has found the command line right by now
            names = iter(_names(sys.argv[1:]))
        name = next(names)
        if name and not config["run"]:
            config = config | {"run": f"{config['experiment']}-{name}"}
        return train(config, next(starts, None))

    return compose.main(job, sys.argv[1:], "launch.run")


def _names(argv: list[str]) -> list[str]:
    """What each job of a sweep is called beside its experiment; nothing for a single job."""
    words = [word for word in argv if not word.startswith("-")]
    return run_folder.sweep_names(compose.expand(words, sweep=bool({"-m", "--multirun"} & set(argv))))


if __name__ == "__main__":
    sys.exit(main())
