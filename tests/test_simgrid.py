"""The network model `flow` against SimGrid (scripts/simgrid_agreement.py makes docs/simgrid.md of the same)."""

import pytest

from scripts import simgrid_agreement as agreement

pytestmark = pytest.mark.simgrid
CASES = list(zip(agreement.cases(), agreement.cases(latencies=False), strict=True))


@pytest.mark.parametrize("case, twin", CASES, ids=[case.name for case, _ in CASES])
def test_agreement(case, twin):
    rows = agreement.compare(case, twin)
    assert len(rows) == 3
    for row in rows:
        assert row["worst_round"] <= agreement.allowed(row), row
        assert row["worst_round_lazy"] <= agreement.allowed(row), row
        assert row["worst_message_without_latencies"] <= 0.001, row
    assert any(row["rounds_contended"] for row in rows)


def test_simgrid_s_default_update_overfills_a_link():
    """The reason for network/optim:Full; 27 MB into one port of 12.5 GB/s."""
    ends = agreement.overfilled()
    assert ends["flow"].max() == pytest.approx(2162, abs=0.1)
    assert ends["SimGrid, Full"].tolist() == pytest.approx(ends["flow"].tolist(), rel=1e-4)
    assert ends["SimGrid, Lazy"].max() < 2130
