"""Disks that fail while stores are joined, merged, exported, indexed, whitened and logged."""

import errno

import pytest
from disk_kit import failing, short_of_room
from work_kit import WORKS, Exporting, ExportingTable, Indexing, Joining, Logging, Merging

from ghost_engines.store import StoreError

CALLS = ("open", "write", "fsync", "replace", "rename", "mkdir")


QUICK = {(Merging, "replace"), (Exporting, "fsync"), (Joining, "write"), (Logging, "replace")}


def cases():
    """Return works, names of calls, and steps between calls that fail."""
    every = [
        pytest.param(work, name, 1, marks=pytest.mark.stress, id=f"{work.__name__}-{name}")
        for work in WORKS
        for name in CALLS
    ]
    some = [
        pytest.param(work, name, 5, id=f"{work.__name__}-{name}-some")
        for work, name in sorted(QUICK, key=str)
    ]
    return every + some


def error_of(made):
    """Do a work, and return the number of the error of the system that it ends in, if in one."""
    try:
        made.do()
    except OSError as error:
        return error.errno
    except StoreError as error:  # which says what it comes from
        cause = error.__cause__
        return cause.errno if isinstance(cause, OSError) else error
    return None


@pytest.mark.parametrize(("work", "name", "stride"), cases())
def test_a_failed_call_is_an_error_that_loses_nothing_and_a_retry_succeeds(
    tmp_path, work, name, stride
):
    if work is ExportingTable:
        pytest.importorskip("pyarrow")
    called = 0
    for at in range(0, 1000, stride):
        for number, lasts in ((errno.ENOSPC, True), (errno.EIO, False)):
            root = tmp_path / f"{at}-{lasts}"
            root.mkdir()
            made = work(root)
            with failing(name, at, number=number, lasts=lasts) as disk:
                error = error_of(made)
            if disk.calls > at and work is not Indexing:
                assert error == number or (name == "mkdir" and error is None)  # as it is there
            else:
                assert error is None
            made.check()
            made.do()
            made.check_done()
        called = max(called, disk.calls)
        if disk.calls <= at:
            break
    assert disk.calls <= at
    assert called or name in work.spared


@pytest.mark.parametrize(
    "work",
    [each if each is Exporting else pytest.param(each, marks=pytest.mark.stress) for each in WORKS],
)
def test_a_file_that_is_cut_short_is_an_error_and_a_retry_succeeds(tmp_path, work):
    if work is ExportingTable:
        pytest.importorskip("pyarrow")
    for limit in (0, 1, 50, 100, 127, 128, 129, 200, 300, 400, 500, 700, 1000, 1500, 3000):
        (tmp_path / f"{limit}").mkdir()
        made = work(tmp_path / f"{limit}")
        with short_of_room(limit):
            error = error_of(made)
        assert error in (None, errno.EFBIG)
        assert error or limit or work is Indexing
        made.check()
        made.do()
        made.check_done()
