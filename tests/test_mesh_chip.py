import pytest

from train.mesh.chip import Chip, software_year

ANCHORS = [
    {"precision": "fp16", "batch": 32, "images_per_s": 1787},
    {"precision": "fp16", "batch": 256, "images_per_s": 2115},
]


def chip(**changes) -> Chip:
    return Chip(**{"name": "Ascend 910", "tflops": {"fp16": 256}, "hbm_gbytes": 32, "anchors": ANCHORS, **changes})


def test_the_line_goes_through_both_anchors():
    assert chip().seconds(32) == pytest.approx(32 / 1787)
    assert chip().seconds(256) == pytest.approx(256 / 2115)
    fixed, per_image = chip().affine("fp16")
    assert (fixed, per_image) == pytest.approx((3.1738e-3, 0.460416e-3), rel=1e-4)


def test_work_scales_the_images_and_leaves_the_fixed_time():
    fixed, per_image = chip().affine("fp16")
    assert chip().seconds(10, work=0.5) == pytest.approx(fixed + 5 * per_image)


def test_one_anchor_has_the_fixed_time_of_half_the_rate():
    """t = per_image (batch + half): the rate at the anchor stays, and at `half` images it is half the streaming one."""
    one = chip(anchors=ANCHORS[:1])
    assert one.seconds(64) == pytest.approx(64 / 1787)
    assert one.seconds(32, half_batch=17) == pytest.approx(32 / 1787)
    fixed, per_image = one.affine("fp16", half_batch=17)
    assert fixed == pytest.approx(17 * per_image) and per_image == pytest.approx(32 / 1787 / 49)
    assert 17 / one.seconds(17, half_batch=17) == pytest.approx(0.5 / per_image)
    assert chip().seconds(17, half_batch=17) == chip().seconds(17)  # two batches make a line of their own


def test_batches_close_together_make_no_line():
    close = chip(anchors=[{**ANCHORS[0], "batch": 400}, {**ANCHORS[0], "batch": 408, "images_per_s": 1700}])
    fixed, per_image = close.affine("fp16")
    assert fixed == 0 and per_image == pytest.approx((1 / 1787 + 1 / 1700) / 2)


def rounds(*names: str) -> list[dict]:
    """One anchor a name, with rates 1000, 2000, ... in that order."""
    return [
        {"precision": "fp16", "batch": 64, "images_per_s": 1000 * i, "software": name}
        for i, name in enumerate(names, start=1)
    ]


@pytest.mark.parametrize(
    "wanted, used",
    [
        (None, "mxnet 2021"),  # the latest
        ("mxnet 2019", "mxnet 2019"),
        ("mxnet 2018", "mxnet 2019"),  # the same framework, nearest in year
        ("tensorflow 2021", "tensorflow 2020"),
        ("jax 2021", "mxnet 2021"),  # another framework, nearest in year
        ("jax 2017", "mxnet 2019"),
    ],
)
def test_one_software_round_is_used(wanted, used):
    names = ["mxnet 2019", "mxnet 2021", "tensorflow 2020"]
    made = chip(anchors=rounds(*names), software=wanted)
    assert made.measured_in("fp16") == used
    assert made.seconds(64) == pytest.approx(64 / (1000 * (1 + names.index(used))))


def test_the_first_listed_of_a_year_is_used():
    assert chip(anchors=rounds("mxnet 2021", "tensorflow 2021")).measured_in("fp16") == "mxnet 2021"


def test_anchors_without_software_are_all_used():
    assert chip().measured_in("fp16") is None and chip(software="mindspore 2021").seconds(32) == chip().seconds(32)


def test_an_anchor_knows_the_chips_it_was_measured_on():
    assert chip().measured_on("fp16") == 1
    assert chip(anchors=[{**ANCHORS[0], "chips": 8}]).measured_on("fp16") == 8


def test_a_software_is_a_framework_and_a_year():
    assert software_year("mxnet 2021") == 2021
    for wrong in ("mxnet", "2021", "mxnet 21"):
        with pytest.raises(ValueError, match="framework and a year"):
            software_year(wrong)


def test_sustained_rate_is_below_the_peak_or_refused():
    assert chip().sustained_flops(24.3e9) / 1e12 == pytest.approx(52.78, rel=1e-3)
    with pytest.raises(ValueError, match="above its fp16 peak of 10"):
        chip(tflops={"fp16": 10}).sustained_flops(24.3e9)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hbm_gbytes": 0}, "hbm_gbytes=0"),
        ({"tflops": {"fp16": -1}}, "tflops.fp16=-1"),
        ({"anchors": [{**ANCHORS[0], "images_per_s": 0}]}, "images_per_s=0"),
        ({"anchors": [{"precision": "fp16", "batch": 32}]}, "lacks images_per_s"),
        ({"anchors": []}, "no published rate in fp16"),
        ({"precision": "fp32"}, "no published rate in fp32 .it has: fp16"),
        ({"anchors": [ANCHORS[0], {**ANCHORS[1], "images_per_s": 1000}]}, "less time an image"),
        ({"jitter": -0.1}, "jitter=-0.1"),
        ({"startup_s": -1}, "startup_s=-1"),
        ({"bucket_ends": [160, 85]}, "bucket_ends"),
        ({"hbm_gbytes_per_s": 0}, "hbm_gbytes_per_s=0"),
        ({"anchors": [{**ANCHORS[0], "software": "mxnet"}]}, "framework and a year"),
        ({"anchors": [{**ANCHORS[0], "software": "mxnet 2021"}, ANCHORS[1]]}, "name all or none"),
        ({"anchors": [{**ANCHORS[0], "optimizer": "adam"}]}, "optimizer=adam"),
        ({"anchors": [{**ANCHORS[0], "chips": 0}]}, "chips=0"),
        ({"anchors": [{**ANCHORS[0], "image_per_s": 1}]}, "no such key: image_per_s"),
    ],
)
def test_a_wrong_chip_is_refused_in_one_line(changes, named):
    with pytest.raises(ValueError, match=named) as error:
        chip(**changes)
    assert "\n" not in str(error.value)
