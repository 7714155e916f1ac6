"""Interrupts at each line while stores are joined, merged, exported, indexed and logged."""

import pytest
from interrupt_kit import Interrupt, Listed
from work_kit import WORKS, Exporting, ExportingTable

QUICK = {Exporting: 20}
"""How many interrupts of works are left out from one to the next, in the default tests."""


def cases():
    quick = [pytest.param(work, stride, id=work.__name__) for work, stride in QUICK.items()]
    every = [
        pytest.param(work, 1, marks=pytest.mark.stress, id=f"{work.__name__}-each-line")
        for work in WORKS
    ]
    return [*quick, *every]


# Where a `with` block is interrupted as it ends, Python closes its file once nobody has it.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(("work", "stride"), cases())
def test_what_was_interrupted_is_whole_or_absent_and_can_be_done_again(tmp_path, work, stride):
    """Before one of the runs of each line of the code."""
    if work is ExportingTable:
        pytest.importorskip("pyarrow")
    interrupted = 0
    for at in [0, *lines_of(work, tmp_path / "all")[::stride]]:
        root = tmp_path / f"{at}"
        root.mkdir()
        made = work(root)
        if was_interrupted(made, at):
            interrupted += 1
            made.check()
            made.do()
        made.check_done()
    assert interrupted > 9


def was_interrupted(made, at):
    try:
        with Interrupt(at):
            made.do()
    except KeyboardInterrupt:
        return True  # not until then is what the interrupted calls held let go
    return False


def lines_of(work, root):
    root.mkdir()
    made = work(root)
    with Listed() as listed:
        made.do()
    return listed.one_of_each()
