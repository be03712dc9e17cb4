import pytest

from train.mesh.chip import Chip

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


def test_one_anchor_has_no_fixed_time():
    assert chip(anchors=ANCHORS[:1]).seconds(64) == pytest.approx(64 / 1787)


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
    ],
)
def test_a_wrong_chip_is_refused_in_one_line(changes, named):
    with pytest.raises(ValueError, match=named) as error:
        chip(**changes)
    assert "\n" not in str(error.value)
