"""The fitted constants: a refit gives the file; anchors are the records'; the parts of the fit by exact numbers."""

import math

import numpy as np
import pytest
import yaml

from launch import fitting
from launch.fitting import Data, calibration, fit, least_absolute, multi_host_rows, search, software_factors
from launch.validation import CONF
from scripts import fit_records
from train import records
from train.mesh.chip import Chip
from train.sim.calibration import Calibration
from train.sim.network import AlphaBeta


@pytest.fixture(scope="module")
def data() -> Data:
    return fitting.load()


def test_a_refit_gives_the_file_again(data):
    found = fit(data)
    written = yaml.safe_load(fit_records.PAGE.read_text())["calibration"]
    assert written["fitted_on"] == found["fitted_on"]
    for name, value in found.items():
        if name == "software":
            assert written[name] == pytest.approx(value, rel=0.005)
        elif name != "fitted_on":
            assert written[name] == pytest.approx(value, rel=0.03), name
    assert fit_records.page(found).splitlines()[2:4] == fit_records.PAGE.read_text().splitlines()[2:4]


def test_every_anchor_is_its_record(data):
    """images/s of one chip from the log's steady epoch, the record's batch and chips."""
    epochs, published = records.load_epochs(), {r.id: r for r in records.load()}
    for chip in data.catalog.chips.values():
        for anchor in chip.anchors:
            if "record" not in anchor:
                continue
            record, logged = published[anchor["record"]], epochs[anchor["record"]]
            seconds = logged.s_per_epoch_steady or logged.s_per_epoch
            assert anchor["images_per_s"] == pytest.approx(1_281_167 / seconds / record.chips, rel=1e-3), record.id
            assert anchor["batch"] * record.chips == record.global_batch, record.id
            assert anchor["chips"] == record.chips, record.id
            assert anchor["software"].endswith(str(data.rows[record.id].prediction.chip.software[-4:])), record.id


def test_no_1024_chip_ascend_record_is_in_any_fit(data):
    published = {record.id: record for record in records.load()}
    used = data.catalog.anchors | set(multi_host_rows(data))
    assert used and not [id for id in used if published[id].chips == 1024 and "Ascend" in published[id].chip]


def test_at_most_twelve_software_factors_and_none_of_a_submitter():
    software = yaml.safe_load(fit_records.PAGE.read_text())["calibration"]["software"]
    assert len(software) <= 12
    assert all(name.split()[0] == "mxnet" and len(name.split()) == 2 for name in software)


def test_software_factors_are_found_again():
    """Two chips, three years: seconds an image made up from chip x year."""
    years = {2019: 1.2, 2021: 1.0, 2022: 0.9}
    chips = [
        Chip(
            f"chip {each}",
            {"fp16": 1000},
            1,
            [
                dict(
                    precision="fp16",
                    batch=100,
                    images_per_s=100 / (each * 120 * years[year]),
                    software=f"mxnet {year}",
                    record=f"{each} {year}",
                )
                for year in years
            ],
        )
        for each in (0.01, 0.02)
    ]
    found = software_factors(chips, 20.0)
    assert found == pytest.approx({"mxnet 2019": 1.2, "mxnet 2021": 1.0, "mxnet 2022": 0.9}, rel=0.002)


def test_the_search_finds_a_minimum_off_the_axes():
    best = search(lambda z: float((z[0] - 1) ** 2 + (z[1] + 2) ** 2 + (z[0] + z[1] + 1) ** 2), 2, least=1e-3)
    assert best == pytest.approx([1, -2], abs=5e-3)


def test_remembered_prices_are_the_network_s(data):
    id = "mlperf-v1.1-NVIDIA-dgxa100_n128_ngc21.09_mxnet"
    made = calibration(data, {"half_batch": 15.0, "jitter": 0.03, "comm_efficiency": 0.37, "overlap": 0.4})
    quick = data.row(id, made).emulator
    plain = AlphaBeta(calibration=made)
    for nbytes in (2e6, 51e6):
        assert quick.network.seconds(quick.plan, nbytes) == pytest.approx(plain.seconds(quick.plan, nbytes), rel=1e-6)


def test_startup_is_found_again():
    """Rows that start in 5 s + 40 s a host, but for two that don't."""
    hosts = np.array([1, 1, 1, 2, 8, 64, 128, 540.0])
    rest = 5 + 40 / hosts
    rest[[1, 4]] = 200, 0
    found = least_absolute(rest, hosts, np.full(8, 1000.0))
    assert found == pytest.approx((5, 40), rel=1e-6)


def test_the_error_s_prior_and_rows_are_as_said(data):
    written = yaml.safe_load(fit_records.PAGE.read_text())["calibration"]
    made = Calibration(**{k: v for k, v in written.items() if k not in ("_target_", "source", "model_error")})
    errors = np.abs([data.time_error(id, made) for id in written["fitted_on"]])
    mean = (errors.sum() + fitting.TWIN_ROWS * fitting.TWIN_ERROR) / (len(errors) + fitting.TWIN_ROWS)
    assert written["model_error"] == pytest.approx(math.sqrt(math.pi / 2) * mean, rel=0.06)


def test_the_file_is_the_page_s_own_form():
    text = (CONF / "network/fitted.yaml").read_text()
    assert text.startswith("# alpha_beta") and "never by hand" in text
    assert set(yaml.safe_load(text)["calibration"]["source"]) >= {"half_batch", "jitter", "software", "model_error"}
