"""A published record -> what to emulate: chip, software, mesh, collective, batch, epochs; or why it can't be.

Of a record only system, chips, chip, interconnect, precision, optimizer, global_batch, epochs and target_top1 are read:
never what it reached.
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from train.comm.algorithms import auto
from train.mesh.chip import Chip
from train.mesh.mesh import Mesh
from train.records import Record
from train.sim import workload as workloads
from train.sim.convergence import Epochs, epochs_at
from train.sim.prediction_mesh import mesh_of

NUM_TRAIN, NUM_EVAL = 1_281_167, 50_000  # ImageNet-1k (Russakovsky et al. 2015)
EVAL_EVERY = 4  # epochs; mlcommons/training_policies, training_rules.adoc
ROUND_YEARS = {"0.5": 2018, "0.6": 2019, "0.7": 2020, "1.0": 2021, "1.1": 2021} | {
    "2.0": 2022, "2.1": 2022, "3.0": 2023, "3.1": 2023, "4.0": 2024,
}  # fmt: skip
MLPERF = r"MLPerf (?:Training )?v(\d\.\d)(?: (closed|open))?"

# What a published name says in other words.
SYNONYMS = (
    (r"code ?named sapphire rapids", "8480"),
    (r"(V100-SXM3-32GB) \(450 ?W\)", r"\1-H"),
    (r"SXM4?-?(\d\d)GB", r"SXM4 \1GB"),
    (r"HL-205", "Gaudi"),
    (r"HL-225", "Gaudi2"),
    (r"7900 XTX", "7900XTX"),
    (r"RTX (\w*\d+)", r"RTX\1"),
    (r"KNL", "7250"),
    (r"PCI-?[eE]x?", "pcie"),
)
FORM = {"sxm2", "sxm3", "sxm4", "sxm5", "pcie", "nvl"}
VARIANT = r"\d+gb|sxm\d|pcie|nvl"
MODELS = {"gaudi", "bow", "p40", "p100"}

# Framework by patterns of the system text; else by the chip.
FRAMEWORKS = (
    ("mxnet", "mxnet"),
    ("pytorch", "pytorch"),
    ("tensorpack", "tensorflow"),
    ("tensorflow", "tensorflow"),
    ("mindspore", "mindspore"),
    ("jax", "jax"),
    ("tiny", "tinygrad"),
    ("mosaic", "pytorch"),
    ("caffe2", "caffe2"),
    ("-pt", "pytorch"),
    ("(?<![a-z])tf", "tensorflow"),
    ("google", "tensorflow"),
)
DEFAULT_FRAMEWORKS = {"tpu": "tensorflow", "gaudi": "tensorflow", "gaudi2": "tensorflow", "ipu": "tensorflow"} | {
    "ascend": "mindspore", "xeon": "tensorflow",
}  # fmt: skip


class NotModelled(ValueError):
    """Why a record can't be emulated."""


@dataclass(frozen=True)
class Prediction:
    """What `train.emulator.Emulator` needs for a record."""

    record_id: str
    chip: Chip
    mesh: Mesh
    arguments: dict[str, Any]
    notes: tuple[str, ...]
    round: str | None
    division: str | None
    variant: bool
    """Whether the chip is another variant of the record's, or its rate assumed."""


def predict(
    record: Record, chips: Mapping[str, Chip], catalog: Mapping[str, Mesh], epochs: float | Epochs | None = None
) -> Prediction:
    """epochs: other ones than the record's. NotModelled gives the reason.

    chips: conf/chip by file name; catalog: conf/mesh by file name.
    """
    words = words_of(record.chip)
    round_, division = mlperf(record)
    software = software_of(record, words, round_)
    found, notes = chip_of(record, chips, software)
    if not isinstance(record.global_batch, int):
        raise NotModelled(f"global_batch={record.global_batch or 'not stated'}: one batch size is needed")
    if epochs is None and record.epochs is None:
        raise NotModelled("epochs are not stated")
    if record.global_batch > NUM_TRAIN:
        raise NotModelled(f"global_batch={record.global_batch} is more than the {NUM_TRAIN:,} images of ImageNet")
    chip = copy.copy(found)
    chip.software = software
    mesh, wire_dtype, assumed = mesh_of(record, words, catalog)
    framework = software.rsplit(" ", 1)[0] if software else None
    # MXNet's MLPerf entries pad the last batch of an epoch (math.ceil in their get_epoch_size), others drop it.
    steps = math.ceil(NUM_TRAIN / record.global_batch) if framework == "mxnet" else NUM_TRAIN // record.global_batch
    arguments = dict(
        workload=workloads.resnet(),
        collective=auto,
        global_batch_size=record.global_batch,
        wire_dtype=wire_dtype,
        precision=chip.precision,
        epochs=record.epochs if epochs is None else epochs,
        eval_every=EVAL_EVERY,
        eval_offset=0,
        num_train=max(1, steps) * record.global_batch,
        num_eval=NUM_EVAL,
        data_origin="ImageNet as published",
        notes=[],
        optimizer="lars" if "lars" in record.optimizer.lower() else "sgd",
    )
    return Prediction(record.id, chip, mesh, arguments, (*notes, *assumed), round_, division, bool(notes))


def reference_epochs(record: Record) -> Epochs:
    """Epochs of the reference convergence points at the record's batch. NotModelled where they say nothing of it."""
    if not isinstance(record.global_batch, int):
        raise NotModelled(f"global_batch={record.global_batch or 'not stated'}: one batch size is needed")
    if record.target_top1 not in (None, 75.9):
        raise NotModelled(f"target_top1={record.target_top1:g}: the reference points are for 75.9 %")
    return epochs_at(record.global_batch)


def chip_of(record: Record, chips: Mapping[str, Chip], software: str | None = None) -> tuple[Chip, list[str]]:
    """The chip of conf/chip with the same model word and the nearest name; of equals one with anchors in `software`.

    Notes say where it is another variant, or its rate is assumed.
    """
    words = words_of(record.chip)
    scored = []
    for order, chip in enumerate(chips.values()):
        name = words_of(chip.name)
        if models_of(name) and models_of(name) <= words:
            near = sum(map(_weight, name & words)) - sum(map(_weight, name - words))
            scored.append((near, any(a.get("software") == software for a in chip.anchors), -order, chip))
    if not scored:
        raise NotModelled(f"chip={record.chip!r}: no published single-chip rate is known of it (conf/chip has none)")
    chip = max(scored, key=lambda each: each[:3])[3]
    unlike = [{w for w in some if re.fullmatch(VARIANT, w)} for some in (words_of(chip.name) - words, words)]
    notes = []
    if unlike[0] and unlike[1] - words_of(chip.name):
        notes.append(f"chip={record.chip}: taken as {chip.name}, another variant")
    if all(a.get("source", "").startswith("assumed") for a in chip.anchors):
        notes.append(f"chip={record.chip}: its rate is assumed")
    return chip, notes


def _weight(word: str) -> int:
    return 3 if word in FORM else 1


def words_of(text: str) -> set[str]:
    """Words of a chip's published name, synonyms replaced: "NVIDIA A100-SXM-80GB CTS" -> a100, sxm4, 80gb, ..."""
    for pattern, other in SYNONYMS:
        text = re.sub(pattern, other, text, flags=re.IGNORECASE)
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def models_of(words: set[str]) -> set[str]:
    """The words that say which model: those with a digit but for memory, power and form factor; "pro", "h" are bins."""
    plain = {w for w in words if re.search(r"\d", w) and w not in FORM and not re.fullmatch(r"\d+(gb|w)", w)}
    return plain | (words & (MODELS | {"pro", "h"}))


def mlperf(record: Record) -> tuple[str | None, str | None]:
    """(round, division) of the system text, e.g. ("2.0", "closed")."""
    found = re.search(MLPERF, record.system)
    return (found[1], found[2]) if found else (None, None)


def software_of(record: Record, words: set[str], round_: str | None) -> str | None:
    """Framework and year: "mxnet 2021". None where the text gives no year."""
    text = record.system.lower()
    framework = next((name for word, name in FRAMEWORKS if re.search(word, text)), None)
    if framework is None:
        framework = next((name for word, name in DEFAULT_FRAMEWORKS.items() if word in words), "mxnet")
    year = ROUND_YEARS.get(round_ or "")
    if year is None and round_:
        year = max(ROUND_YEARS.values())
    return f"{framework} {year}" if year else None
