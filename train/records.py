"""Published results: one row a result, each with its source (conf/records/published.csv), and the epochs of MLPerf's
logs (conf/records/mlperf_epochs.csv)."""

import csv
import math
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

PUBLISHED = Path(__file__).resolve().parents[1] / "conf/records/published.csv"
MLPERF_EPOCHS = PUBLISHED.with_name("mlperf_epochs.csv")


@dataclass(frozen=True)
class Record:
    """Fields are the file's columns; None is an empty cell. Accuracies are percent, as published."""

    id: str
    system: str
    chips: int
    chip: str
    interconnect: str
    global_batch: int | str | None  # text where a run changed its batch, e.g. "8K then 16K"
    epochs: float | None
    target_top1: float | None
    reached_top1: float | None
    seconds: float | None  # None only where a file to predict leaves it out
    images_per_s: float | None
    images_per_s_per_chip: float | None
    scaling_efficiency: str
    precision: str
    optimizer: str
    clock_includes: str
    source: str
    verified: bool


@dataclass(frozen=True)
class EpochTime:
    """Seconds of an epoch in the logs of one MLPerf row: medians over its successful runs.

    s_per_epoch: the whole clock over the epochs. s_per_epoch_steady: from the first evaluation to the last, evaluations
    inside, so without start-up; None where the log has none.
    """

    id: str
    runs: int
    s_per_epoch: float
    s_per_epoch_steady: float | None
    evaluations: float | None
    source: str


COLUMNS = tuple(Record.__dataclass_fields__)
MOST_CHIPS = 2_000_000
"""More are a mistake: no published machine has a hundredth of them."""
TEXTS = "id system chip interconnect scaling_efficiency precision optimizer clock_includes source".split()


def load(path: str | Path = PUBLISHED, results_needed: bool = True) -> list[Record]:
    """Reads and checks a records file; ValueError names the file, the line, the column and the value.

    results_needed: False lets `seconds` be empty, as in a file of systems to predict.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such records file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be text in UTF-8 ({error.reason} at byte {error.start})") from None
    reader = csv.DictReader(StringIO(text, newline=""))
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
    if missing:
        needed = ", ".join(COLUMNS)
        raise ValueError(f"{path}, line 1: missing columns {', '.join(missing)}; there must be {needed}")
    records, lines = [], {}
    start = reader.line_num + 1
    for row in reader:
        where = f"{path}, line {start}"
        start = reader.line_num + 1
        record = _record(row, where, results_needed)
        if record.id in lines:
            raise ValueError(f"{where}: id {record.id!r} is there already ({lines[record.id]}); ids must differ")
        lines[record.id] = where.rpartition(", ")[2]
        records.append(record)
    return records


def load_epochs(path: Path = MLPERF_EPOCHS) -> dict[str, EpochTime]:
    """By the record's id."""
    with path.open(encoding="utf-8", newline="") as file:
        return {
            row["id"]: EpochTime(
                row["id"],
                int(row["runs"]),
                float(row["s_per_epoch"]),
                float(row["s_per_epoch_steady"]) if row["s_per_epoch_steady"] else None,
                float(row["evaluations"]) if row["evaluations"] else None,
                row["source"],
            )
            for row in csv.DictReader(file)
        }


def find(records: list[Record], id: str) -> Record:
    for record in records:
        if record.id == id:
            return record
    raise ValueError(f"claim.record={id}: no published record has this id; ids are in {PUBLISHED.name}")


def _record(row: dict, where: str, results_needed: bool) -> Record:
    if None in row or None in row.values():
        raise ValueError(f"{where}: {len(COLUMNS)} cells are needed, as in line 1")
    if not row["id"]:
        raise ValueError(f"{where}: id is empty")

    def number(column: str, low: float, high: float = math.inf, needed: bool = False) -> float | None:
        text = row[column]
        if not text and not needed:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low < value <= high or math.isinf(value):
            limit = f" and at most {high:,.10g}" if high < math.inf else ""
            raise ValueError(f"{where}: {column}={text!r} must be a number above {low:g}{limit}")
        return value

    def whole(column: str, high: float = math.inf, needed: bool = False) -> int | None:
        value = number(column, 0, high, needed)
        if value is not None and value != int(value):
            raise ValueError(f"{where}: {column}={row[column]!r} must be a whole number")
        return None if value is None else int(value)

    if row["verified"] not in ("yes", "no"):
        raise ValueError(f"{where}: verified={row['verified']!r} must be yes or no")
    words = " " in row["global_batch"].strip()
    return Record(
        **{name: row[name] for name in TEXTS},
        chips=whole("chips", MOST_CHIPS, needed=True),
        global_batch=row["global_batch"] if words else whole("global_batch"),
        epochs=number("epochs", 0),
        target_top1=number("target_top1", 0, 100),
        reached_top1=number("reached_top1", 0, 100),
        seconds=number("seconds", 0, needed=results_needed),
        images_per_s=number("images_per_s", 0),
        images_per_s_per_chip=number("images_per_s_per_chip", 0),
        verified=row["verified"] == "yes",
    )
