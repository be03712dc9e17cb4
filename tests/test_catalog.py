"""Every mesh and chip of conf/: it answers, its numbers have sources, what is assumed is said; the page is current."""

import math
import tracemalloc

import pytest
import yaml

from launch import compose
from launch.compose import CONF, groups
from launch.emulate import EXPERIMENT, emulate
from scripts import catalog
from train.emulator import make
from train.records import find, load
from train.sim.workload import resnet

CHIPS = {
    "atlas800": 8,
    "atlas900_256": 256,
    "atlas900_512": 512,
    "atlas900_1024": 1024,
    "atlas900_2048": 2048,
    "atlas900_4096": 4096,
    "cloudmatrix384": 384,
    "gb200_nvl72": 72,
    "atlas950_superpod": 8192,
    "atlas960_superpod": 15_488,
    "atlas950_supercluster": 524_288,
    "atlas960_supercluster": 1_006_720,
    "dgx1_p100": 8,
    "dgx1_v100": 8,
    "dgx2_v100": 16,
    "dgx2h_v100": 16,
    "abci": 4352,
    "dgx_a100": 8,
    "dgx_h100": 8,
    "dgx_h200": 8,
    "tpu_v2": 256,
    "tpu_v3": 1024,
    "tpu_v4": 4096,
    "gaudi": 8,
    "gaudi2": 8,
    "ipu_pod": 64,
    "xeon": 8,
    "localhost": 1,
}
# Each is the other's rate (base, batch, images/s) times the less of the ratios of peak and of memory rate.
ANNOUNCED = {
    "ascend910b": "ascend910",
    "ascend910c": "ascend910",
    "ascend950pr": "ascend910",
    "ascend950dt": "ascend910",
    "ascend960": "ascend910",
    "ascend970": "ascend910",
    "gb200": "h200",
}
NO_SOURCE = "assumed: no source given"


def chip_file(name: str) -> dict:
    return yaml.safe_load((CONF / "chip" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made():
    """The emulator of the record's recipe on every mesh."""
    return {name: catalog.build(name) for name in groups()["mesh"]}


@pytest.fixture(scope="module")
def results(made):
    return {name: each.run() for name, each in made.items()}


def test_every_named_system_is_there_with_its_chips(results):
    assert {name: results[name]["chips"] for name in CHIPS} == CHIPS


def test_every_mesh_answers_in_finite_numbers(results):
    for name, result in results.items():
        numbers = [value for value in result.values() if isinstance(value, (int, float))]
        assert all(map(math.isfinite, numbers)), name
        low, high = result["interval_s"]
        assert 0 < low < result["time_to_train_s"] < high < math.inf, name
        assert 0 < result["scaling_efficiency"] <= 1 + 1e-9, name
        assert result["active_chips"] == min(result["chips"], 32_768), name


def test_every_number_of_a_machine_has_a_source(made):
    for name, each in made.items():
        for link in each.mesh.topology.link_classes:
            assert link.source and link.source != NO_SOURCE, f"{name}: {link.name}"


def test_a_mesh_with_assumed_links_says_so(made):
    said = set()
    for name, each in made.items():
        for link in each.mesh.topology.link_classes:
            noted = any(note.startswith(f"link.{link.name} = ") for note in each.notes)
            assert noted == link.source.startswith("assumed"), f"{name}: {link.name}"
            said |= {name} if noted else set()
    assert {"atlas950_superpod", "atlas960_supercluster", "tpu_v4", "localhost"} <= said
    assert not {"dgx_a100", "dgx_h100", "abci", "atlas900_1024", "cloudmatrix384"} & said


@pytest.mark.parametrize("name", groups()["chip"])
def test_every_number_of_a_chip_has_a_source(name):
    file = chip_file(name)
    for key in ("tflops", "hbm_gbytes", "hbm_gbytes_per_s", "jitter", "startup_s", "bucket_ends"):
        assert key not in file or file["sources"].get(key), f"{key} has no source"
    assert all(anchor["source"] for anchor in file["anchors"])


@pytest.mark.parametrize("name", groups()["chip"])
def test_no_anchor_exceeds_the_peak(name):
    file = chip_file(name)
    for anchor in file["anchors"]:
        reached = anchor["images_per_s"] * resnet().training_flops
        assert 0.02 < reached / (file["tflops"][anchor["precision"]] * 1e12) < 1, anchor


@pytest.mark.parametrize("name", groups()["chip"])
def test_anchors_agree_with_the_records_that_they_name(name):
    """The steady epoch is quicker than the whole clock, by start-up and evaluations."""
    for anchor in chip_file(name)["anchors"]:
        if "record" not in anchor:
            continue
        record = find(load(), anchor["record"])
        assert record.chips == anchor["chips"]
        assert record.global_batch == anchor["batch"] * anchor["chips"]
        assert 0.99 < anchor["images_per_s"] / record.images_per_s_per_chip < 1.15, anchor


@pytest.mark.parametrize("name", ANNOUNCED)
def test_an_announced_chip_is_scaled_from_a_published_one(name):
    file, base = chip_file(name), chip_file(ANNOUNCED[name])
    (anchor,), published = file["anchors"], base["anchors"][-1]
    ratio = min(file["tflops"]["fp16"] / base["tflops"]["fp16"], file["hbm_gbytes_per_s"] / base["hbm_gbytes_per_s"])
    assert anchor["source"].startswith("assumed") and anchor["batch"] == published["batch"]
    assert anchor["images_per_s"] == pytest.approx(ratio * published["images_per_s"], abs=1)


def test_a_million_chips_are_no_list():
    node = compose.compose(["mesh=atlas960_supercluster"], EXPERIMENT)["mesh"]
    make(node)  # imports
    tracemalloc.start()
    mesh = make(node)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mesh.num_chips > 1_000_000 and held < 1_000_000


def test_the_page_is_current(made):
    """Else: python scripts/catalog.py."""
    assert catalog.PAGE.read_text(encoding="utf-8") == catalog.page(made)


@pytest.mark.parametrize(
    "overrides, named",
    [
        ("mesh=dgx_h100 mesh.chips=16", "axes host 1 x chip 8 = 8, not chips=16"),
        ("mesh=tpu_v4 mesh.axes.z=8", "2048"),
        ("mesh=dgx_h100 mesh.topology.inside.gbytes_per_s=0", "gbytes_per_s=0 must be a positive number"),
        ("mesh=atlas950_superpod mesh.topology.taper=0", "taper=0"),
        ("mesh=tpu_v3 precision=fp16", "chip TPU v3 has no published rate in fp16 (it has: bf16); set precision"),
        ("mesh=dgx_h101", "mesh=dgx_h101: no such option; did you mean dgx_h100?"),
        ("mesh=dgx_h100 chip=h101", "chip=h101: no such option; did you mean h100?"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(overrides, named, capsys):
    assert compose.main(emulate, overrides.split(), "launch.emulate", experiment=EXPERIMENT) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and named in printed.err and printed.err.count("\n") == 1
