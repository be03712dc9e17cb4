import pytest

from train.sim.calibration import Calibration


def test_the_default_is_neutral():
    neutral = Calibration()
    assert neutral.in_use() == {} and neutral.origins() == {}
    assert neutral.software_factor("mxnet 2019", "mxnet 2021") == 1.0


def test_what_is_in_use_is_shown_with_its_source():
    made = Calibration(half_batch=17, software={"mxnet 2019": 1.1}, source={"half_batch": "fitted: 12 records"})
    assert made.in_use() == {"half_batch": 17}
    shown = made.origins()
    assert shown["half_batch"] == ("calibration.half_batch", 17, "images a chip", "fitted: 12 records")
    assert shown["software[mxnet 2019]"].origin.startswith("assumed")


def test_software_factors_are_ratios_of_time():
    made = Calibration(software={"mxnet 2019": 1.2, "mxnet 2021": 1.0})
    assert made.software_factor("mxnet 2019", "mxnet 2021") == pytest.approx(1.2)
    assert made.software_factor("mxnet 2021", "mxnet 2019") == pytest.approx(1 / 1.2)
    assert made.software_factor("jax 2021", "mxnet 2019") == made.software_factor("mxnet 2019", "jax 2021") == 1.0
    assert made.software_factor(None, "mxnet 2019") == made.software_factor("mxnet 2019", None) == 1.0


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"half_batch": -1}, "calibration.half_batch=-1"),
        ({"launch_floor_s": float("nan")}, "calibration.launch_floor_s=nan"),
        ({"straggler": "cauchy"}, "straggler=cauchy"),
        ({"comm_efficiency": 0}, "calibration.comm_efficiency=0"),
        ({"overlap": 1.5}, "calibration.overlap=1.5"),
        ({"model_error": 3}, "calibration.model_error=3"),
        ({"software": {"mxnet 2019": 0}}, "calibration.software.mxnet 2019=0"),
    ],
)
def test_impossible_constants_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        Calibration(**fields)
