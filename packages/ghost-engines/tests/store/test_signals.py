"""Ctrl-C at any moment is a KeyboardInterrupt: neither lost nor taken for another error."""

import gc
import random
import signal

import pytest
from kill_kit import TOTAL, UNIT, FakeEngine, assert_holds_exactly, batch

from ghost_engines.store import GradientStore, StoreError

WEAK = ("weakref", "_weakrefset")
"""Modules whose functions Python calls when it deletes an object."""


def in_finalizer(frame):
    """Tell whether an object is being deleted, as a progress bar or a key of a weak dictionary.

    So are objects while what others registered with the garbage collector runs.
    """
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        code, module = frame.f_code, frame.f_globals["__name__"]
        if code.co_name == "__del__" or module in WEAK or code in collecting:
            return True
        frame = frame.f_back
    return False


@pytest.fixture
def interrupts(monkeypatch):
    """Count alarms, each of which is an interrupt."""
    sent = []

    def interrupt(number, frame):
        if in_finalizer(frame):  # from which Python lets nothing out: a little later
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
            return
        sent.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield sent
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(act, after, sent):
    """Do something with an alarm under way; return whether it was interrupted."""
    known = len(sent)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        act()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert len(sent) == known + 1
        return True
    assert len(sent) == known, "an interrupt was swallowed"
    return False


# A folder whose listing was interrupted before it began is closed when nobody holds it any more.
@pytest.mark.filterwarnings("ignore:unclosed scandir iterator:ResourceWarning")
@pytest.mark.parametrize("rounds", [3, pytest.param(400, marks=pytest.mark.stress)])
def test_an_alarm_at_any_moment_is_an_interrupt(tmp_path, interrupts, rounds):
    draw = random.Random(0)
    for at in range(rounds):
        root = tmp_path / f"{at}"
        with GradientStore.create(root, FakeEngine(), unit=UNIT) as store:
            while len(store) < TOTAL:
                start = len(store)
                rows = batch(start, min(start + draw.randint(1, 20), TOTAL))

                def work(store=store, rows=rows):
                    store.append(rows, loss=rows.loss)
                    if draw.random() < 0.5:
                        store.commit()

                if interrupted(work, draw.random() * 0.004, interrupts):
                    try:
                        if len(store) == start:
                            store.append(rows, loss=rows.loss)
                    except StoreError as error:
                        raise AssertionError("rows that were not taken are refused") from error
                    store.commit()

        def read(root=root):
            found = GradientStore.open(root)
            found.rows()
            found.search(batch(0, 1).rows, k=2)

        interrupted(read, draw.random() * 0.004, interrupts)
        assert_holds_exactly(GradientStore.open(root), TOTAL)
    assert rounds < 10 or interrupts
