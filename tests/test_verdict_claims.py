"""The claims audit: its rule, its arithmetic, and every shipped claim recomputed by hand from records and catalog."""

import math

import pytest
import yaml

from launch.compose import CONF
from launch.verdict import ARTICLES, facts_of, load_articles, load_figures
from train import claims, records
from train.claims import CONSISTENT, INCONSISTENT, NOT_TESTABLE, Facts, Figure, admitted, audit, evaluate, judge

R = {record.id: record for record in records.load()}
E = records.load_epochs()
F = {name: figure.value for name, figure in load_figures().items()}
HUAWEI, RUNNER_UP = R["huawei-2019-atlas900"], R["mlperf-v0.6-Fujitsu-abci_2048xV100_mxnet"]
PCL, PCL_256 = (f"mlperf-v1.0-PCL-CloudBrainII_{chips}_mindspore_close" for chips in (1024, 256))
SIAT = "mlperf-v0.7-SIAT-modelarts_1024_tensorflow_open"
INTERVAL, EFFICIENCY, EPOCHS = (52.4, 76.5), 0.824, (64, 72)


def of_file(group: str, name: str) -> dict:
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))


def chip(name: str) -> dict:
    return of_file("chip", name)


def tflops(name: str, dtype: str = "fp16") -> float:
    return chip(name)["tflops"][dtype]


def anchors(name: str) -> list[float]:
    return [anchor["images_per_s"] for anchor in chip(name)["anchors"]]


def ends(*values: float) -> tuple[float, float]:
    return min(values), max(values)


V100 = [R["nvidia-dle-mxnet-v100-1"].images_per_s_per_chip, *anchors("v100_16gb")[1:4]]
POD_950, POD_960 = 128 * 8 * 8, 242 * 8 * 8
PEAKS_910C = (752, 800)

# id -> (what must come out, the verdict), worked out from the files without the claims' own arithmetic
BY_HAND = {
    "record-emulated": (INTERVAL, CONSISTENT),
    "record-reached-later": (ends(38.76), CONSISTENT),
    "record-from-later-epochs": (ends(64 * E[PCL].s_per_epoch_steady, 72 * E[SIAT].s_per_epoch_steady), NOT_TESTABLE),
    "about-1000-chips": (ends(1024), CONSISTENT),
    "half-a-million-pcs": (ends(256 / 500, 1024 / 500), NOT_TESTABLE),
    "thousands-of-chips": (ends(256 / 0.256, 1024 / 0.256), CONSISTENT),
    "peak-of-the-run": (ends(1024 * 0.256), CONSISTENT),
    "fifteen-percent-less-time": (ends(100 * (70.2 - 59.8) / 70.2, 100 * (70.42 - 59.8) / 70.42), CONSISTENT),
    "fifteen-percent-more-speed": (ends(100 * (70.2 - 59.8) / 59.8, 100 * (70.42 - 59.8) / 59.8), INCONSISTENT),
    "runner-up-chips": (ends(1024 / 2048), CONSISTENT),
    "astronomy": (ends(169 * 24 * 3600 / 10.02), NOT_TESTABLE),
    "power-maximum": (ends(350), CONSISTENT),
    "power-measured": (ends(310), CONSISTENT),
    "twice-v100-at-measured-power": (ends(256 * 300 / (310 * 125)), CONSISTENT),
    "twice-v100-at-maximum-power": (ends(256 * 300 / (350 * 125)), INCONSISTENT),
    "half-again-v100-large-batch": (ends(*(100 * 2115 / rate - 100 for rate in V100)), CONSISTENT),
    "half-again-v100-batch-32": (ends(*(100 * 1787 / rate - 100 for rate in V100)), INCONSISTENT),
    "typical-cases": (None, NOT_TESTABLE),
    "runner-up-time": (ends(1.17 * 60), CONSISTENT),
    "third-time": (ends(1.28 * 60), CONSISTENT),
    "twice-the-industry": (ends(256 / 125), CONSISTENT),
    "linearity-records": (ends(25 * E[PCL_256].s_per_epoch_steady / E[PCL].s_per_epoch_steady), CONSISTENT),
    "linearity-emulated": (ends(82.4), CONSISTENT),
    "network-terabits": (ends(102.4), CONSISTENT),
    "network-terabytes": (ends(12.8), INCONSISTENT),
    "synchronization": (None, NOT_TESTABLE),
    "cabinet": (None, NOT_TESTABLE),
    "cloudmatrix-peak": (ends(*(0.384 * peak for peak in PEAKS_910C)), CONSISTENT),
    "nvl72-peak": (ends(0.072 * tflops("gb200")), CONSISTENT),
    "outpaces-whole": (ends(*(384 * peak / (72 * tflops("gb200")) for peak in PEAKS_910C)), CONSISTENT),
    "outpaces-per-chip": (ends(*(peak / tflops("gb200") for peak in PEAKS_910C)), INCONSISTENT),
    "outpaces-per-watt": (ends(0.384 * 752 / 559 * 132 / 180, 0.384 * 800 / 559 * 145 / 180), INCONSISTENT),
    "tokens-per-chip": (ends(1943), CONSISTENT),
    "tokens-per-system": (ends(1943 * 384), INCONSISTENT),
    "h100-peak": (ends(*(peak / tflops("h100") for peak in PEAKS_910C)), INCONSISTENT),
    "h100-memory": (ends(3200 / 3350), CONSISTENT),
    "h100-tokens": (None, NOT_TESTABLE),
    "ascend-950-year": (ends(2026), CONSISTENT),
    "ascend-960-year": (ends(2027), CONSISTENT),
    "ascend-970-year": (ends(2028), CONSISTENT),
    "four-terabits": (ends(32), INCONSISTENT),
    "superpod-950": (ends(POD_950), CONSISTENT),
    "superpod-960": (ends(POD_960), CONSISTENT),
    "supercluster-950": (ends(64 * POD_950), CONSISTENT),
    "supercluster-960": (ends(1e6 / POD_960), NOT_TESTABLE),
    "nvlink-per-chip": (ends(2 / 1.8, 4 / 1.8), INCONSISTENT),
    "nvlink-per-pod": (ends(16_000 / (72 * 1.8), 16_000 / (144 * 1.8)), CONSISTENT),
}


@pytest.fixture(scope="module")
def audited() -> dict[str, claims.Audited]:
    articles = load_articles()
    emulated = {"interval_s": list(INTERVAL), "scaling_efficiency": EFFICIENCY}
    facts = facts_of(articles, R, E, EPOCHS, emulated)
    return {one.id: one for one in audit(articles, facts)}


def test_every_claim_is_recomputed_here_and_none_is_missing(audited):
    assert set(audited) == set(BY_HAND)


@pytest.mark.parametrize("id", BY_HAND)
def test_a_claim_recomputed_from_records_and_catalog(id, audited):
    span, verdict = BY_HAND[id]
    found = audited[id]
    assert found.verdict == verdict
    got = found.recomputed or found.emulated
    assert got == (pytest.approx(span) if span else None)
    assert not (found.recomputed and found.emulated), "emulated and recomputed values share no column"


def test_the_five_articles_are_there_with_their_dates_and_every_figure_has_a_source(audited):
    articles = load_articles()
    assert [str(article["date"]) for article in articles if "release" not in article["title"]] == [
        "2019-09-18",
        "2019-09-18",
        "2025-04-16",
        "2025-09-23",
        "2025-12-31",
    ]
    assert len(list(ARTICLES.glob("*.yaml"))) == 6  # and the release that two of them draw on
    for one in audited.values():
        assert all(figure.source for figure in one.figures), one.id
        assert one.figures or one.missing, one.id


def test_arithmetic_has_no_figures_but_units(audited):
    units = {"1", "8", "60", "100", "1000", "86400", "2"}  # 2: digits of round()
    for one in audited.values():
        literals = [word for word in one.arithmetic.replace("(", " ").replace(")", " ").replace(",", " ").split()]
        assert not [word for word in literals if word.replace(".", "").isdigit() and word not in units], one.id


def test_the_wattage_and_the_minutes_stand_in_the_records():
    assert f"({F['v100_w']:.0f}W)" in R["mlperf-v0.7-NVIDIA-dgx1_ngc20.06_mxnet"].chip
    assert R["huawei-2019-runnerup-A"].seconds == 70.2 and RUNNER_UP.seconds == 70.42
    assert HUAWEI.seconds == 59.8


@pytest.mark.parametrize(
    ("says", "low", "high"),
    [
        ({"exactly": 15}, 14.5, 15.5),
        ({"exactly": 59.8}, 59.75, 59.85),
        ({"exactly": 10.02}, 10.015, 10.025),
        ({"about": 1000}, 950, 1050),
        ({"between": [50, 100]}, 50, 100),
        ({"at_least": 24}, 24, math.inf),
        ({"at_most": 50}, -math.inf, 50),
    ],
)
def test_what_words_admit(says, low, high):
    assert admitted(says) == pytest.approx((low, high))


def test_more_than_leaves_out_the_bound_itself():
    low, high = admitted({"more_than": 8000})
    assert low > 8000 and low == pytest.approx(8000) and high == math.inf


def test_the_rule():
    assert judge([10, 11], (9, 12)) == CONSISTENT
    assert judge([13, 14], (9, 12)) == INCONSISTENT
    assert judge([8, 13], (9, 12)) == NOT_TESTABLE  # published figures on both sides
    assert judge([10, 13], (9, 12)) == NOT_TESTABLE
    assert judge([8, 13], (9, 12), interval=True) == CONSISTENT  # an interval that holds what is admitted
    assert judge([13, 14], (9, 12), interval=True) == INCONSISTENT


def test_arithmetic_is_only_arithmetic():
    assert evaluate("100 * (1 - a / b)", {"a": 1, "b": 4}) == 75
    assert evaluate("60 * round(a / 60, 2) + max(a, -a)", {"a": 30}) == 60
    for wrong in ("__import__('os')", "a.real", "open(a)", "c", "a if a else a", "'a'", "a ** a"):
        with pytest.raises(SyntaxError, match="not allowed or not given|round"):
            evaluate(wrong, {"a": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"with": {"x": "records.nobody.seconds"}}, "one: records.nobody.seconds: leads to no figure"),
        ({"with": {"x": "figures.nothing"}}, "figures.nothing"),
        ({"with": {"x": "records.it.system"}}, "is no number"),
        ({"against": "me"}, "claim one"),
        ({"say": 1}, "say"),
        ({"arithmetic": "y"}, "'y'"),
        ({"says": {"nearly": 1}}, "nearly"),
        ({"arithmetic": None}, "what is missing"),
    ],
)
def test_a_wrong_claim_is_named(change, words):
    class Row:
        system, seconds, source = "machine", 10.0, "somebody"

    claim = {"id": "one", "statement": "fast", "says": {"exactly": 10}, "against": "others"}
    claim |= {"with": {"x": "records.it.seconds"}, "arithmetic": "x"}
    facts = Facts(records={"it": Row}, figures={"f": Figure("f", "figures.f", 1, "somebody")})
    article = {"title": "t", "outlet": "o", "date": "2019", "claims": [claim]}
    assert audit([article], facts)[0].verdict == CONSISTENT
    with pytest.raises(ValueError, match=words):
        audit([{**article, "claims": [claim | change]}], facts)
