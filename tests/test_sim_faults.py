"""Faults on the emulated clock: what one slow chip and one slow link cost."""

from dataclasses import replace

import pytest
from emulator_samples import atlas, record_config

from train import emulator
from train.comm.algorithms import hierarchical, ring
from train.sim.faults import slowed
from train.sim.network import AlphaBeta


def test_all_wait_for_the_slow_chip():
    sound = emulator.build(record_config())
    broken = emulator.build(record_config() | {"faults": {"_target_": "train.sim.faults.SlowChip", "factor": 2}})
    healthy, slow = sound.step(32_768), broken.step(32_768)
    assert slow == replace(healthy, straggler_s=healthy.compute_s)
    assert broken.run()["scaling_efficiency"] < 0.6 * sound.run()["scaling_efficiency"]
    assert {origin.name: origin.value for origin in broken.origins()}["faults.factor"] == 2


def test_a_chip_that_is_hardly_slow_hides_behind_the_slowest():
    sound = emulator.build(record_config())
    hardly = {"_target_": "train.sim.faults.SlowChip", "factor": 1.001}
    assert sound.step(32_768).straggler_s > 0.001 * sound.step(32_768).compute_s
    assert emulator.build(record_config() | {"faults": hardly}).step(32_768) == sound.step(32_768)


def test_a_slow_link_holds_up_every_round_that_uses_it():
    network, nbytes = AlphaBeta(), 8e6
    sound, slow = (ring(mesh) for mesh in (atlas(4), slowed(atlas(4), [("roce", 4)])))
    seconds = nbytes / 32 / 12e9 + 7e-6, 4 * nbytes / 32 / 12e9 + 7e-6
    assert network.seconds(sound, nbytes) == pytest.approx(62 * seconds[0])
    assert network.seconds(slow, nbytes) == pytest.approx(62 * seconds[1])
    slowest = slowed(atlas(4), [(None, 4), ("roce", 2)])
    assert [link.bytes_per_s for link in slowest.topology.link_classes] == [19.3e9, 19.3e9, 3e9]
    inside = hierarchical(slowed(atlas(1), [("roce", 4)]))
    assert network.seconds(inside, nbytes) == network.seconds(hierarchical(atlas(1)), nbytes)


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"factor": 0.5}, "faults.factor=0.5: SlowLink is so many times slower: at least 1"),
        ({"link": "nvlink"}, "faults.link=nvlink: mesh Atlas 900 has no such links; it has hccs, pcie, roce"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(changed, named):
    fault = {"_target_": "train.sim.faults.SlowLink", "link": "roce", "factor": 4, **changed}
    with pytest.raises(ValueError, match=named):
        emulator.build(record_config() | {"faults": fault})
