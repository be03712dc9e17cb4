import csv

import pytest

from train.records import COLUMNS, PUBLISHED, find, load, load_epochs


def test_every_published_row_is_read():
    records = load()
    assert len(records) == 170
    claim = find(records, "huawei-2019-atlas900")
    assert (claim.seconds, claim.chips, claim.target_top1, claim.epochs) == (59.8, 1024, 75.9, None)
    assert find(records, "smith-2017").global_batch == "8K then 16K"


def test_an_unknown_id_is_named():
    with pytest.raises(ValueError, match="claim.record=nobody"):
        find(load(), "nobody")


def write(path, rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


GOOD = dict(zip(COLUMNS, "a,A,8,chip,,256,90,75.9,76,100,,,,,,,s,yes".split(","), strict=True))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"seconds": "-5"}, "line 3: seconds='-5'"),
        ({"seconds": ""}, "line 3: seconds=''"),
        ({"chips": "many"}, "line 3: chips='many'"),
        ({"chips": "8.5"}, "line 3: chips='8.5' must be a whole number"),
        ({"chips": "1e9"}, "line 3: chips='1e9' must be a number above 0 and at most 2,000,000"),
        ({"reached_top1": "760"}, "line 3: reached_top1='760' must be a number above 0 and at most 100"),
        ({"epochs": "nan"}, "line 3: epochs='nan'"),
        ({"verified": "perhaps"}, "line 3: verified='perhaps'"),
        ({"id": "a"}, "line 3: id 'a' is there already .line 2"),
        ({"id": ""}, "line 3: id is empty"),
    ],
)
def test_impossible_rows_are_named_with_their_line(tmp_path, changes, named):
    path = write(tmp_path / "records.csv", [GOOD.values(), {**GOOD, "id": "b", **changes}.values()])
    with pytest.raises(ValueError, match=named):
        load(path)


def test_seconds_may_be_empty_where_no_results_are_needed(tmp_path):
    path = write(tmp_path / "records.csv", [{**GOOD, "seconds": ""}.values()])
    assert load(path, results_needed=False)[0].seconds is None
    with pytest.raises(ValueError, match="line 2: seconds='0'"):
        load(write(path, [{**GOOD, "seconds": "0"}.values()]), results_needed=False)


def test_the_logs_epochs_are_read():
    epochs = load_epochs()
    assert len(epochs) == 126
    pcl = epochs["mlperf-v1.0-PCL-CloudBrainII_1024_mindspore_close"]
    assert (pcl.runs, pcl.s_per_epoch_steady, pcl.evaluations) == (5, 0.6816, 14)
    assert epochs["mlperf-v1.1-Graphcore-ipu-pod16-TF1"].s_per_epoch_steady is None


def test_lines_count_through_quoted_line_breaks(tmp_path):
    rows = [{**GOOD, "source": "two\nlines"}.values(), {**GOOD, "id": "b", "seconds": "0"}.values()]
    with pytest.raises(ValueError, match="line 4: seconds='0'"):
        load(write(tmp_path / "records.csv", rows))


def test_missing_columns_short_rows_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="line 1: missing columns verified"):
        load(write(tmp_path / "a.csv", [], COLUMNS[:-1]))
    with pytest.raises(ValueError, match="line 2: 18 cells are needed"):
        load(write(tmp_path / "b.csv", [["only", "three", "cells"]]))
    with pytest.raises(ValueError, match="no such records file"):
        load(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_bytes(b"\xff\xfeid")
    with pytest.raises(ValueError, match="d.csv: must be text in UTF-8"):
        load(tmp_path / "d.csv")


def test_a_spreadsheet_s_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = write(tmp_path / "records.csv", [GOOD.values()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(path)[0].id == "a"


def test_the_claim_s_files_name_records():
    text = (PUBLISHED.parents[1] / "claim/atlas900_2019.yaml").read_text()
    claims = {
        "huawei-2019-atlas900": 59.8,
        "mlperf-v1.0-PCL-CloudBrainII_1024_mindspore_close": 38.76,
        "mlperf-v0.6-Fujitsu-abci_2048xV100_mxnet": 70.42,
    }
    for name, seconds in claims.items():
        assert name in text and find(load(), name).seconds == seconds
