"""Rows as TensorBoard runs on two clocks, and published records as runs beside them.

`tb/measured` carries real wall times, `tb/emulated` EPOCH + emulated seconds, so the relative axis of the browser
runs on the emulated cluster's time. That axis prints hours; the tags of the group `clock/` therefore have the
milliseconds of their own clock as step. Every event has an explicit wall time, for which tensorboard's event writer
is used directly; values are float32. TensorBoard shows 1,000 points of a tag unless started with --samples_per_plugin
scalars=1000000 (with 0, which its help calls all, the custom charts stay empty); metrics.jsonl has all.
"""

import json
import os
import shutil
from pathlib import Path

EPOCH = 1_700_000_000  # Unix seconds at which every emulated clock stands at 0 (14 November 2023), by choice
FLUSH_S = 2  # a value is on disk so many seconds after its step; the browser's own reload adds 5

# value of a row -> tag whose step is the clock's milliseconds; {clock} is emulated or measured
CLOCK_TAGS = {
    "train/loss": "clock/train_loss",
    "train/top1": "clock/train_top1",
    "train/learning_rate": "clock/learning_rate",
    "eval/top1": "clock/eval_top1",
    "eval/loss": "clock/eval_loss",
    "{clock}/images_per_s": "clock/images_per_s",
    "{clock}/step_s": "clock/step_s",
}
# only in tb/emulated, so that a chart can show the emulated curve and its target lines on their own scale
EMULATED_TAG, TARGET_TAG, CLAIM_TARGET_TAG = "clock/emulated_top1", "clock/target_top1", "clock/claim_target_top1"

# Lines of one run share a colour, so each part of a step is a run of its own, a folder in its clock's, and the list of
# runs is the legend. Clock -> part -> value of a row in seconds; the tag is step/<clock>_ms, as that of the whole step.
# A part that is never above 0 has no run.
PARTS = {
    "emulated": {
        "compute": "emulated/compute_s",
        "exposed_communication": "emulated/exposed_comm_s",
        "waiting_for_slowest_chip": "emulated/straggler_s",
        "input": "emulated/input_s",
        "other": "emulated/other_s",
        "recovery": "emulated/recovery_s",
    },
    "measured": {"waiting_for_data": "measured/data_wait_s", "communication": "measured/comm_s"},
}

# category -> chart -> tags; of a chart with min, median and max: (lower, value, upper)
LAYOUT = {
    "One minute": {
        "top-1 over ms: emulated, measured, claimed": ["clock/eval_top1"],
        "top-1 over emulated ms, with the targets": [EMULATED_TAG, TARGET_TAG, CLAIM_TARGET_TAG],
        "ms of an emulated step and its parts": ["step/emulated_ms"],
        "ms of a step measured here and its waits": ["step/measured_ms"],
        "chips' BN means: min, median, max (std.)": [
            tuple(f"chips/bn_mean_shift_{which}" for which in ("min", "median", "max"))
        ],
        "chips' BN variances: min, median, max": [
            tuple(f"chips/bn_var_off_{which}" for which in ("min", "median", "max"))
        ],
    },
    "Training": {
        "loss over ms: emulated, measured": ["clock/train_loss"],
        "learning rate": ["train/learning_rate"],
        "gradient norm": ["train/grad_norm"],
    },
    "Throughput, images/s": {
        "emulated": ["emulated/images_per_s"],
        "measured": ["measured/images_per_s"],
    },
}
# keys of the configuration that the table of runs leaves out, and its metrics -> tag
NOT_HPARAMS = {"run_root", "run", "resume", "format", "explain", "out", "trace", "action", "job", "hang_timeout_s"}
HPARAMS_METRICS = {"top1": "eval/top1", "emulated_s": "result/emulated_s", "measured_s": "result/measured_s"}


class TensorBoardSink:
    """Writes every row to tb/<clock> of the run folder, for each of `clocks` (a run that was not trained here has one).

    Only the measured clock runs from `started_at_wall`; the last of `clocks` carries the table of runs.
    """

    def __init__(
        self,
        run_dir: str | Path,
        started_at_wall: float,
        config: dict | None = None,
        claim=None,
        clocks: tuple[str, ...] = ("measured", "emulated"),
    ) -> None:
        run_dir, config = Path(run_dir), config or {}
        self._clocks = {clock: started_at_wall if clock == "measured" else float(EPOCH) for clock in clocks}
        self._home = clocks[-1]
        self._folder = run_dir / "tb"
        self._writers = {clock: _writer(self._folder / clock) for clock in self._clocks}
        self._seconds = dict.fromkeys(self._clocks, 0.0)
        self._held: dict[str, tuple[tuple, bool]] = {}  # part -> its latest point, and whether it is written
        self._lines = {TARGET_TAG: config.get("target_top1")}
        if claim is not None and claim.target_top1:
            self._lines[CLAIM_TARGET_TAG] = claim.target_top1 / 100  # records are in percent
        self._lines = {tag: value for tag, value in self._lines.items() if value is not None}
        text = _text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")
        for clock in self._clocks:
            self._add(clock, 0, [text, _layout()])
        if "emulated" in clocks:
            self._add("emulated", 0, [_scalar(tag, value) for tag, value in self._lines.items()])
        self._add(self._home, 0, _hparams(config, run_dir.name, started_at_wall))
        self.flush()

    def log(self, row: dict) -> None:
        if row["kind"] == "eval":
            self._end_stretches()
        for clock in self._clocks:
            self._seconds[clock] = row[f"{clock}_s"]
            values = [_scalar(tag, value) for tag, value in row["values"].items() if self._has(clock, tag)]
            timed = {tag.format(clock=clock): on_clock for tag, on_clock in CLOCK_TAGS.items()}
            on_clock = [_scalar(timed[tag], value) for tag, value in row["values"].items() if tag in timed]
            if row["kind"] == "step":
                on_clock.append(_scalar("clock/epoch", row["epoch"]))
                values += self._parts(clock, row)
            else:
                values += [_scalar(f"result/{name}_s", row[f"{name}_s"]) for name in self._clocks]
                if clock == "emulated":
                    lines = {EMULATED_TAG: row["values"]["eval/top1"], **self._lines}
                    on_clock += [_scalar(tag, value) for tag, value in lines.items()]
            self._add(clock, row["step"], values)
            self._add(clock, round(1000 * row[f"{clock}_s"]), on_clock)

    def flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self, status: str = "done") -> None:
        from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

        end = plugin_data_pb2.SessionEndInfo(
            status=api_pb2.STATUS_SUCCESS if status == "done" else api_pb2.STATUS_FAILURE,
            end_time_secs=self._clocks.get("measured", 0.0) + self._seconds.get("measured", 0.0),
        )
        self._add(self._home, 0, [_hparams_value("_hparams_/session_end_info", session_end_info=end)])
        self._end_stretches()
        for writer in self._writers.values():
            writer.close()

    def _has(self, clock: str, tag: str) -> bool:
        """What was computed of the chips belongs to the clock that ran meanwhile, where the run has it."""
        return not tag.startswith("chips/") or clock == next(iter(self._clocks))

    def _parts(self, clock: str, row: dict) -> list:
        """Writes the parts of a step to their runs; returns what the whole step's run gets."""
        tag = f"step/{clock}_ms"
        for part, source in PARTS.get(clock, {}).items():
            seconds, name = row["values"].get(source, 0.0), f"{clock}/{part}"
            if seconds and name not in self._writers:
                self._writers[name] = _writer(self._folder / name)
            if name in self._writers:
                self._part(name, (self._wall(clock), row["step"], [_scalar(tag, 1000 * seconds)]))
        whole = row["values"].get(f"{clock}/step_s")
        return [] if whole is None else [_scalar(tag, 1000 * whole)]

    def _part(self, name: str, point: tuple) -> None:
        """A level stretch is its two ends: the writer takes its time for every event."""
        held, written = self._held.get(name, (None, True))
        level = held is not None and held[2] == point[2]
        if not level:
            if not written:
                _add(self._writers[name], *held)
            _add(self._writers[name], *point)
        self._held[name] = point, not level

    def _end_stretches(self) -> None:
        """So that a level line is seen up to here."""
        for name, (point, written) in self._held.items():
            if not written:
                _add(self._writers[name], *point)
                self._held[name] = point, True

    def _wall(self, clock: str) -> float:
        return self._clocks[clock] + self._seconds[clock]

    def _add(self, clock: str, step: int, values: list) -> None:
        _add(self._writers[clock], self._wall(clock), step, values)


def write_reference_runs(run_root: str | Path, records: list) -> None:
    """Published records as runs under <run_root>/reference/<record id>, written once: one point each, at its end.

    The point is the top-1 the record states as reached, else its target (the text says which), at its published
    seconds; a record without either has no point. `clock/eval_top1` has it at its milliseconds; `eval/top1` at step
    0, since published results come without a count of steps that this project could compare.
    """
    for record in records:
        folder = Path(run_root) / "reference" / record.id
        if folder.parent.name != "reference" or Path(record.id).name != record.id:
            raise ValueError(f"record id {record.id!r}: must be usable as the name of a folder")
        if folder.exists():
            continue
        aside = folder.with_name(f".{record.id}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        writer = _writer(aside)
        _add(writer, EPOCH, 0, [_text("record", _describe(record))])
        top1 = record.reached_top1 or record.target_top1
        if top1 and record.seconds:
            wall = EPOCH + record.seconds
            _add(writer, wall, 0, [_scalar("eval/top1", top1 / 100)])
            _add(writer, wall, round(1000 * record.seconds), [_scalar("clock/eval_top1", top1 / 100)])
        writer.close()
        try:
            aside.rename(folder)
        except OSError:  # another run has just written it
            shutil.rmtree(aside)


def write_page(folder: str | Path, texts: dict[str, str], pictures: dict[str, Path]) -> None:
    """One page in a folder of its own, in place of what is there: tag -> text (Markdown), tag -> PNG, at step 0."""
    folder = Path(folder)
    values = [_text(tag, text) for tag, text in texts.items()]
    values += [_image(tag, Path(picture).read_bytes()) for tag, picture in pictures.items()]
    shutil.rmtree(folder, ignore_errors=True)
    writer = _writer(folder)
    _add(writer, EPOCH, 0, values)
    writer.close()


def _describe(record) -> str:
    which = "reached, as published" if record.reached_top1 else "the stated target; no reached value was published"
    published = {name: value for name, value in vars(record).items() if value not in (None, "")}
    rows = "\n".join(f"| {name} | {str(value).replace('|', '/')} |" for name, value in published.items())
    return f"Published result, not computed here. Its point's top-1 is {which}.\n\n| | |\n|---|---|\n{rows}\n"


# ---- tensorboard's protocol buffers, each imported where it is built: the library must load without tensorboard ----


def _writer(folder: Path):
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(folder), max_queue_size=1000, flush_secs=FLUSH_S)


def _add(writer, wall_time: float, step: int, values: list) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    if values:
        writer.add_event(Event(wall_time=wall_time, step=step, summary=Summary(value=values)))


def _scalar(tag: str, value: float):
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value)


def _plugin(plugin: str, content: bytes):
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata

    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin, content=content))


def _bytes(tag: str, plugin: str, content: bytes, value: bytes, sizes: tuple[int, ...]):
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])
    tensor = TensorProto(dtype="DT_STRING", string_val=[value], tensor_shape=shape)
    return Summary.Value(tag=tag, tensor=tensor, metadata=_plugin(plugin, content))


def _text(tag: str, text: str):
    from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

    return _bytes(f"{tag}/text_summary", "text", TextPluginData(version=0).SerializeToString(), text.encode(), (1,))


def _image(tag: str, png: bytes):
    from tensorboard.compat.proto.summary_pb2 import Summary

    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # of a PNG's first chunk
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
    return Summary.Value(tag=tag, image=image)


def _layout():
    from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Layout

    categories = [
        Category(title=title, chart=[_chart(name, tags) for name, tags in charts.items()])
        for title, charts in LAYOUT.items()
    ]
    layout = Layout(category=categories).SerializeToString()
    return _bytes("custom_scalars__config__", "custom_scalars", b"", layout, ())


def _chart(name: str, tags: list):
    from tensorboard.plugins.custom_scalar.layout_pb2 import Chart, MarginChartContent, MultilineChartContent

    if isinstance(tags[0], tuple):
        series = [MarginChartContent.Series(lower=lower, value=value, upper=upper) for lower, value, upper in tags]
        return Chart(title=name, margin=MarginChartContent(series=series))
    return Chart(title=name, multiline=MultilineChartContent(tag=[f"{tag}$" for tag in tags]))  # regular expressions


def _hparams_value(tag: str, **content):
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData(version=0, **content).SerializeToString()
    return Summary.Value(tag=tag, metadata=_plugin("hparams", data))


def _hparams(config: dict, run_name: str, started_at_wall: float) -> list:
    """The table of runs: the configuration's scalars, and of each group its name, record, or class."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo(group_name=run_name, start_time_secs=started_at_wall)
    infos = []
    for name, value in config.items():
        if name in NOT_HPARAMS:
            continue
        if isinstance(value, dict):
            value = value.get("name") or value.get("record") or value.get("_target_", "").rpartition(".")[2]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            if value in (None, ""):
                continue
            start.hparams[name].string_value = str(value)
            infos.append(api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_STRING))
        else:
            start.hparams[name].number_value = value
            infos.append(api_pb2.HParamInfo(name=name, type=api_pb2.DATA_TYPE_FLOAT64))
    metrics = [
        api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=name) for name, tag in HPARAMS_METRICS.items()
    ]
    experiment = api_pb2.Experiment(hparam_infos=infos, metric_infos=metrics, time_created_secs=started_at_wall)
    return [
        _hparams_value("_hparams_/experiment", experiment=experiment),
        _hparams_value("_hparams_/session_start_info", session_start_info=start),
    ]
