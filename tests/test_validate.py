"""Predictions read what they may and nothing else; unseen rows get a prediction or a reason; the scores by hand."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from launch.compose import compose
from launch.validation import Catalog, load_catalog, rows_of, step_scores, summary, time_scores, twins
from scripts import validate, validation_page
from train import emulator, records
from train.records import PUBLISHED, EpochTime
from train.sim.prediction import NotModelled, chip_of, predict, software_of, words_of
from train.sim.prediction_mesh import hosts_of


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


@pytest.fixture(scope="module")
def published() -> list:
    return records.load()


@pytest.fixture(scope="module")
def rows(catalog, published) -> list:
    return rows_of(published, catalog)


def test_results_are_not_read(catalog, published, rows):
    """Seconds tripled, rates, efficiency, accuracy, clock and source blanked, another id: the same predictions."""
    blank = dict(images_per_s=None, images_per_s_per_chip=None, scaling_efficiency="", reached_top1=None)
    other = [
        replace(r, id=f"row {n}", seconds=3 * r.seconds, clock_includes="", source="", verified=False, **blank)
        for n, r in enumerate(published)
    ]
    for before, after in zip(rows, rows_of(other, catalog), strict=True):
        assert (before.reason is None) == (after.reason is None)
        if before.reason is None:
            assert (before.predicted_s, before.run.interval_s) == (after.predicted_s, after.run.interval_s)


def test_the_json_has_the_keys_and_the_scores_stand(rows):
    found = json.loads(json.dumps(validate.as_json(rows)))
    keys = "median_abs_error p90_abs_error bias coverage mean_width modelled rows baseline_median rows_detail"
    assert list(found) == keys.split()
    assert list(found["rows_detail"][0]) == "id published_s predicted_s interval_s fitted_on reason".split()
    assert (found["rows"], found["modelled"]) == (170, 128)
    assert found["median_abs_error"] <= 0.10 and found["p90_abs_error"] <= 0.25
    assert 0.80 <= found["coverage"] <= 0.98


def test_steps_are_within_the_targets(rows):
    found = summary(step_scores(rows, records.load_epochs()))
    assert found["scored"] >= 45
    assert found["median_abs_error"] <= 0.06 and found["p90_abs_error"] <= 0.15 and abs(found["bias"]) <= 0.03


def test_the_page_has_these_scores(rows):
    text = (validation_page.DOCS / "validation.md").read_text()
    steps, times = step_scores(rows, records.load_epochs()), time_scores(rows)
    for name, scored in (
        ("(a) seconds of an epoch, closed MLPerf rows", steps),
        ("(b) time, epochs as published, all rows", times),
    ):
        assert "| " + " | ".join(validation_page.line(name, scored)) + " |" in text
    assert (validation_page.DOCS / "validation.png").stat().st_size > 10_000


def test_the_table_lists_reasons_and_scores(tmp_path, capsys, published):
    few = [published[0], next(r for r in published if r.chip == "NVIDIA P40")]
    path = str(write(tmp_path / "few.csv", few))
    assert validate.main(["--runs", path, "--json"]) == 0
    assert [row["reason"] is None for row in json.loads(capsys.readouterr().out)["rows_detail"]] == [True, False]
    assert validate.main(["--runs", path]) == 0
    said = capsys.readouterr().out
    assert "not modelled: chip='NVIDIA P40': no published single-chip rate" in said
    assert "(fitted on)" in said and "1 of 2 rows are modelled" in said


def write(path, rows, **changes):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, records.COLUMNS)
        writer.writeheader()
        for row in rows:
            values = {name: getattr(row, name) for name in records.COLUMNS}
            writer.writerow({**values, "verified": "yes", **changes})
    return path


def test_a_file_without_results_is_predicted_and_scored_nowhere(tmp_path, capsys, published):
    path = str(write(tmp_path / "blank.csv", published[:2], seconds="", images_per_s="", reached_top1=""))
    assert validate.main(["--runs", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["median_abs_error"] is None and found["rows_detail"][0]["published_s"] is None
    assert found["rows_detail"][0]["predicted_s"] > 0
    assert validate.main(["--runs", path]) == 0
    assert "no rows" in capsys.readouterr().out


def test_an_impossible_file_is_refused_with_its_line(tmp_path, capsys, published):
    assert validate.main(["--runs", str(write(tmp_path / "bad.csv", published[:1], chips="-3"))]) == 2
    assert "line 2: chips='-3'" in capsys.readouterr().err
    (tmp_path / "short.csv").write_text("id,system\na,b\n")
    assert validate.main(["--runs", str(tmp_path / "short.csv")]) == 2
    assert "line 1: missing columns chips" in capsys.readouterr().err
    assert validate.main(["--runs", str(tmp_path / "none.csv")]) == 2


@pytest.mark.parametrize("hosts", [8, 5])
def test_one_code_path_with_the_emulator_of_a_configuration(catalog, published, hosts):
    """A DGX A100 row and the same composed for launch.emulate give the same step."""
    record = records.find(published, "mlperf-v1.1-NVIDIA-dgxa100_n8_ngc21.09_mxnet")
    (row,) = rows_of([replace(record, system=record.system.replace("_n8", f"_n{hosts}"), chips=8 * hosts)], catalog)
    overrides = [
        "mesh=dgx_a100",
        f"mesh.axes.host={hosts}",
        "network=fitted",
        "collective=auto",
        "+chip.software=mxnet 2021",
    ]
    config = compose([*overrides, "global_batch_size=3264", "epochs=35"], experiment="imagenet_atlas900")
    assert emulator.build(config).step(3264).step_s == pytest.approx(row.emulator.step(3264).step_s, rel=1e-9)


@pytest.mark.parametrize(
    "system, chips, chip, interconnect, hosts, cards",
    [
        ("Dell 32xXE8545x4A100-SXM-40GB", 128, "NVIDIA A100-SXM-40GB", "2x ConnectX-6 IB HDR 200Gb/Sec", (32, 4), 400),
        ("Dell 2xDSS8440x8A100-PCIE-40GB", 16, "NVIDIA A100-PCIE-40GB", "1x ConnectX-5 IB EDR 100Gb/Sec", (2, 8), 100),
        ("xFusion G5500V7x10xA30", 10, "NVIDIA A30", "", (1, 10), None),
        ("Nettrix X640G40_14xA100-PCIe-80GB_mxnet", 14, "NVIDIA A100-PCIe-80GB", "PCIe; Mesh", (1, 14), None),
        ("NVIDIA dgxa100_n540_ngc21.09", 4320, "NVIDIA A100-SXM4-80GB", "8x ConnectX-6 IB HDR 200Gb", (540, 8), 1600),
        ("NVIDIA dgx2h_n32_ngc19.05_mxnet", 512, "NVIDIA V100-SXM3-32GB-H", "InfiniBand EDR 100 Gb/s", (32, 16), None),
        ("Intel-HabanaLabs HLS-1H-N4", 16, "Habana Gaudi", "HCCS; Mesh", (4, 4), None),
        ("Intel 16-nodes-SPR-pytorch", 32, "Xeon 8480", "Ethernet Network Adapter E810", (16, 2), 100),
        ("Fujitsu abci_2048xV100", 2048, "NVIDIA V100-SXM2-16GB", "InfiniBand EDR 100 Gb/s x2 per node", (512, 4), 200),
        ("Facebook, Caffe2", 256, "NVIDIA P100", "NVLink in node; 50 Gb/s Ethernet", (32, 8), 50),
        ("nobody's", 7, "NVIDIA V100", "", (1, 7), None),
        ("nobody's 2xB100 racks", 1024, "NVIDIA V100-SXM2-16GB", "NVLink", (128, 8), None),
    ],
)
def test_hosts_are_read_from_the_texts(system, chips, chip, interconnect, hosts, cards):
    record = SimpleNamespace(system=system, chips=chips, chip=chip, interconnect=interconnect)
    found = hosts_of(record, words_of(chip))
    assert ((found.count, found.chips), found.cards_gbit) == (hosts, cards)


@pytest.mark.parametrize(
    "text, name, variant",
    [
        ("NVIDIA A100-SXM4-80GB (400W)", "NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA A100-SXM-40GB", "NVIDIA A100-SXM4-40GB", False),
        ("NVIDIA A100-PCIE-40GB (250W)", "NVIDIA A100-PCIe-40GB", False),
        ("NVIDIA V100-SXM3-32GB (450W)", "NVIDIA V100-SXM3-32GB-H", False),
        ("Nvidia Tesla V100-SXM2-32GB", "NVIDIA V100-SXM2-16GB", True),
        ("NVIDIA H100-NVL", "NVIDIA H100-SXM5-80GB", True),
        ("Ascend 910 Pro A", "Ascend 910 Pro A", False),
        ("Ascend 910", "Ascend 910", False),
        ("Habana Gaudi HL-205", "Habana Gaudi", False),
        ("Intel Gaudi2", "Habana Gaudi2", False),
        ("TPU v3", "TPU v3", False),
        ("Intel(R) Xeon(R) code named Sapphire Rapids socket", "Intel Xeon Platinum 8480", False),
    ],
)
def test_chips_are_found_by_their_published_names(catalog, text, name, variant):
    chip, notes = chip_of(SimpleNamespace(chip=text), catalog.chips)
    assert (chip.name, any("another variant" in note for note in notes)) == (name, variant)


@pytest.mark.parametrize("text", ["Intel Gaudi3", "NVIDIA T4", "", "TPU v5e", "AMD MI300X"])
def test_an_unknown_chip_is_a_reason(catalog, text):
    with pytest.raises(NotModelled, match="no published single-chip rate"):
        chip_of(SimpleNamespace(chip=text), catalog.chips)


def test_another_variant_has_a_wider_interval(catalog, published):
    record = records.find(published, "mlperf-v3.0-NVIDIA-dgxh100_ngc23.04_mxnet")
    known, other = rows_of([record, replace(record, chip="NVIDIA H100-NVL")], catalog)
    width = [(row.run.interval_s[1] - row.run.interval_s[0]) / row.predicted_s for row in (known, other)]
    assert width[1] > 1.2 * width[0]


def test_software_is_the_framework_and_the_round_s_year():
    def of(system, chip="NVIDIA A100", round_="2.1"):
        return software_of(SimpleNamespace(system=system), words_of(chip), round_)

    assert of("Fujitsu rx_A30x2_mxnet_NGC_22.04") == "mxnet 2022"
    assert of("Intel 16-nodes-SPR-pytorch", "Xeon", "3.0") == "pytorch 2023"
    assert of("HLS-Gaudi2-PT", "Habana Gaudi2", "3.1") == "pytorch 2023"
    assert of("tpu-v3-32", "TPU v3", "0.6") == "tensorflow 2019"
    assert of("Dell XE8545", round_="9.9") == "mxnet 2024"
    assert of("Facebook, Caffe2", round_=None) is None
    assert of("Dell platform8xA100") == "mxnet 2022" and of("gpu-v100-8-TF2.0") == "tensorflow 2022"


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"global_batch": None}, "global_batch=not stated"),
        ({"global_batch": "8K then 16K"}, "global_batch=8K then 16K"),
        ({"epochs": None}, "epochs are not stated"),
        ({"global_batch": 2_000_000}, "more than the 1,281,167 images"),
    ],
)
def test_a_row_that_lacks_something_says_what(catalog, published, changes, reason):
    with pytest.raises(NotModelled, match=reason):
        predict(replace(published[0], **changes), catalog.chips, catalog.meshes)


def test_odd_sizes_give_a_prediction(catalog, published):
    """Sizes that no published machine of the chip has; chips without an image stand idle."""
    for name, sizes in {
        "mlperf-v0.6-Google-tpu-v3-2048": (1, 7, 96, 4096),
        "mlperf-v1.1-Graphcore-ipu-pod64-TF1": (3, 96),
    }.items():
        record = records.find(published, name)
        for row in rows_of([replace(record, chips=chips, global_batch=1024) for chips in sizes], catalog):
            assert row.reason is None and 0 < row.run.interval_s[0] < row.predicted_s < row.run.interval_s[1]


def test_scores_by_hand():
    def row(published, predicted, interval):
        run = SimpleNamespace(interval_s=interval)
        return SimpleNamespace(record=SimpleNamespace(seconds=published), predicted_s=predicted, run=run)

    rows = [row(100, 110, (90, 130)), row(100, 80, (70, 90))]
    found = summary([(r, r.record.seconds, r.predicted_s, 50.0) for r in rows])
    assert found["median_abs_error"] == pytest.approx(0.15)
    assert found["bias"] == pytest.approx(-0.05)
    assert (found["coverage"], found["baseline_median"]) == (0.5, 0.5)
    assert found["mean_width"] == pytest.approx((40 / 110 + 20 / 80) / 2)
    assert summary([])["median_abs_error"] is None


def test_rows_of_the_fit_count_in_no_score(catalog, rows):
    scored = {row.record.id for row, *_ in time_scores(rows)}
    assert scored and not scored & catalog.fitted_on
    assert catalog.anchors < catalog.fitted_on == {row.record.id for row in rows if row.fitted_on}


def test_a_twin_is_predicted_by_the_others(catalog):
    first = records.load()[0]
    pair = [replace(first, id=name) for name in "ab"]
    epochs = {name: EpochTime(name, 5, 0.0, seconds, None, "") for name, seconds in (("a", 100.0), ("b", 110.0))}
    assert dict(twins(pair, epochs, catalog.chips)) == pytest.approx({"a": 0.1, "b": -1 / 11})


def test_logged_epochs_belong_to_published_rows():
    ids = {record.id: record for record in records.load(PUBLISHED)}
    for id, found in records.load_epochs().items():
        assert id in ids and found.s_per_epoch > 0 and found.source.startswith("mlcommons/training_results_v")
        if ids[id].epochs:
            assert found.s_per_epoch == pytest.approx(ids[id].seconds / ids[id].epochs, rel=0.06), id


@pytest.mark.parametrize("chips, each", [(100, 4), (12, 4), (6, 6), (16, 8)])
def test_ascend_chips_keep_their_links_in_hosts_of_any_size(catalog, published, chips, each):
    record = replace(records.find(published, "mindspore-zoo-8x910"), chips=chips)
    (row,) = rows_of([record], catalog)
    topology = row.emulator.mesh.topology
    assert (row.emulator.mesh.chips_per_host, topology.library) == (each, "hccl")
    assert {"hccs", "roce"} <= {link.name for link in topology.link_classes}


def test_one_chip_stands_in_no_assumed_host(catalog, published):
    record = replace(records.find(published, "mlperf-v0.7-NVIDIA-dgx1_ngc20.06_mxnet"), chips=1)
    (row,) = rows_of([record], catalog)
    assert row.emulator.mesh.num_chips == 1 and row.prediction.notes == ()
