"""`python -m launch.verdict`: the claims audit, and the region and the odds of the claimed time.

Loads neither torch nor Ray.
"""

import csv
import json
import sys
from pathlib import Path

from launch import compose
from launch.emulate import EXPERIMENT, claimed, machine
from launch.validation import node
from launch.verdict_odds import published_runs, with_each_changed
from launch.verdict_text import Verdict, as_markdown, as_text
from train import claims, records
from train.claims import Facts, Figure
from train.emulator import Emulator
from train.metrics import write_aside
from train.records import EpochTime, Record
from train.sim.convergence import POINTS
from train.sim.region import Priced, priced

ARTICLES = compose.CONF / "records/articles"
FIGURES = compose.CONF / "records/figures.csv"
RECORD = "huawei-2019-atlas900"
"""The record that the articles claim."""

EPOCHS = (48, 52, 56, 60, 64, 68, 72, 80, 90)
"""Epochs at which the needed rate is listed."""


def verdict(config: dict) -> None:
    """Audits what the articles say of systems; says where a run of the claimed time would have to lie and how likely
    the emulator holds it; writes verdict.md, verdict.json, verdict.png and tb/ to <run_root>/verdict (of a sweep, the
    last one stays).
    """
    folder = Path(config["run_root"]).expanduser() / "verdict"
    if folder.parent.is_file():
        raise ValueError(f"run_root={config['run_root']}: is a file; name a folder")
    found = judged(config)
    folder.mkdir(parents=True, exist_ok=True)
    write(found, folder)
    compose.say(json.dumps(found.as_dict()) if config["format"] == "json" else as_text(found, config["explain"]))
    print(f"launch.verdict: written to {folder}", file=sys.stderr)


def write(found: Verdict, folder: Path) -> None:
    """verdict.md, verdict.json, verdict.png and tb/ of a folder that is there."""
    from launch.verdict_picture import draw
    from train.tensorboard import write_page

    text = as_markdown(found)
    write_aside(folder / "verdict.md", text)
    write_aside(folder / "verdict.json", json.dumps(found.as_dict(), indent=1) + "\n")
    draw(found, folder / "verdict.png")
    write_page(folder / "tb", {"verdict": text}, {"verdict/picture": folder / "verdict.png"})


def judged(config: dict) -> Verdict:
    """Everything that the text, the JSON object and the picture show."""
    published = records.load()
    by_id = {record.id: record for record in published}
    claim = records.find(published, config["claim"]["record"])
    if not claim.seconds:
        raise ValueError(f"claim.record={claim.id}: has no time to hold against the emulator")
    made = machine(config)
    if passing := [fault.name for fault in made.faults if not fault.stands]:
        raise ValueError(
            f"faults: a {passing[0]} strikes during a run, and the verdict is over machines as they stand; leave it "
            "out, or have it broken in every step (slow_chip, slow_link)"
        )
    run, epochs = priced(made), records.load_epochs()
    result = made.run()
    record_run, record_result = run, result
    if not is_the_record(config, result, by_id[RECORD]):  # the articles speak of their own machine
        of_record = machine(compose.compose([], EXPERIMENT))
        record_run, record_result = priced(of_record), of_record.run()
    articles = load_articles()
    facts = facts_of(articles, by_id, epochs, record_run.epochs_interval, record_result)
    return Verdict(
        experiment=config["experiment"],
        claim=claim,
        neighbours=[records.find(published, name) for name in config["claim"]["neighbours"]],
        emulated=result,
        run=run,
        odds=run.odds(claim.seconds),
        changed=with_each_changed(config, run, claim.seconds),
        needed=[(at, run.needed_rate(at, claim.seconds)) for at in EPOCHS],
        reference=reference_runs(made, run),
        published=published_runs(by_id, epochs, made.num_train),
        audit=claims.audit(articles, facts),
        articles=articles,
        claimed=claimed(claim),
    )


def is_the_record(config: dict, result: dict, record: Record) -> bool:
    """Whether the configuration prices the machine, the training and the claim that the articles speak of."""
    same_machine = (result["chips"], result["chip"]) == (record.chips, record.chip)
    return same_machine and config["experiment"] == EXPERIMENT and config["claim"]["record"] == record.id


def reference_runs(made: Emulator, run: Priced) -> list[tuple[int, float, float, Priced]]:
    """(batch, epochs, their deviation, emulated run) of the reference points from 8,192 on that this machine can share
    out; none unless the run's own batch is one that they cover.
    """
    found = []
    if not POINTS[0].batch <= made.global_batch_size <= POINTS[-1].batch or made.workload.name[:9] != "ResNet-50":
        return found
    for point in POINTS:
        if point.batch < 8_192 or point.batch < made.mesh.num_chips:
            continue
        at = run.but(
            step_s=made.step(point.batch).step_s,
            steps_per_epoch=max(1, made.num_train // point.batch),
            global_batch_size=point.batch,
            epochs=point.mean,
        )
        found.append((point.batch, point.mean, point.stdev, at))
    return found


def load_articles(folder: Path = ARTICLES) -> list[dict]:
    """The articles with their claims, in order of their dates."""
    import yaml

    found = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))]
    return sorted(found, key=lambda article: (str(article["date"]), article["outlet"]))


def load_figures(path: Path = FIGURES) -> dict[str, Figure]:
    """Published figures that are neither a record nor in the catalog, by id."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row["id"]: Figure(row["id"], f"figures.{row['id']}", float(row["value"]), row["source"])
            for row in csv.DictReader(file)
        }


def facts_of(
    articles: list[dict],
    by_id: dict[str, Record],
    epochs: dict[str, EpochTime],
    recipe_epochs: tuple[float, float],
    emulated: dict,
) -> Facts:
    """What the articles' claims may name. `emulated` is of the record's experiment."""
    return Facts(
        records=by_id,
        epochs=epochs,
        figures=load_figures(),
        chips=catalog("chip", articles),
        meshes=catalog("mesh", articles),
        recipe={"epochs": list(recipe_epochs)},
        emulated=emulated,
    )


def catalog(group: str, articles: list[dict]) -> dict[str, dict]:
    """The files of conf/chip or conf/mesh that the claims name."""
    plural = {"chip": "chips", "mesh": "meshes"}[group]
    named = {path.split(".")[1] for path in claims.paths(articles) if path.startswith(f"{plural}.")}
    return {name: node(group, name) for name in sorted(named & set(compose.groups()[group]))}


def main() -> int:
    return compose.main(verdict, sys.argv[1:], "launch.verdict", experiment=EXPERIMENT)


if __name__ == "__main__":
    sys.exit(main())
