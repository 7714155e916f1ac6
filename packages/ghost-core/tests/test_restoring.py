"""What is changed for a while is restored, also where an interrupt ends what restores it."""

import pytest
import torch

from ghost_core.algebra import full_precision
from ghost_core.restoring import graphs_kept, undone


@pytest.mark.parametrize("inside", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_what_an_interrupt_kept_from_being_undone_is_undone(inside):
    undone_by = []

    def back(*given):
        undone_by.append(given)
        if len(undone_by) == 1:
            raise KeyboardInterrupt

    def run():
        with undone(back, 1, 2):
            if inside is not None:
                raise inside

    with pytest.raises(KeyboardInterrupt):
        run()
    assert undone_by == [(1, 2)] * 2


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_graphs_are_kept_for_a_while(before, kept):
    with torch.set_grad_enabled(before):
        with graphs_kept(kept):
            assert torch.is_grad_enabled() is kept
        assert torch.is_grad_enabled() is before


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_what_is_computed_precisely_has_no_graph(before, autocast):
    with torch.set_grad_enabled(before), torch.autocast("cpu", enabled=autocast):
        with full_precision(torch.device("cpu")):
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled() is before
        assert torch.is_autocast_enabled("cpu") is autocast
