"""Directions on disk, and the state with which another process goes on."""

import pytest
import torch
from engine_kit import squares, train

from ghost_core import CaptureError
from ghost_engines import DotProductEngine, load_direction, save_direction


def engine_of(mlp, inputs, refresh=3):
    engine = DotProductEngine(mlp)
    engine.add_direction("loss", lambda: squares(mlp(inputs + 1)).mean(), refresh=refresh)
    engine.add_direction("now", lambda: squares(mlp(inputs + 2)).mean())
    return engine


def test_a_saved_direction_is_the_same(mlp, inputs, tmp_path):
    engine = engine_of(mlp, inputs)
    expected = train(engine, mlp, inputs).total
    save_direction(tmp_path / "loss.safetensors", engine.direction("loss"))
    other = DotProductEngine(mlp)
    other.add_direction("loss", load_direction(tmp_path / "loss.safetensors"))
    assert torch.equal(train(other, mlp, inputs).total[:, 0], expected[:, 0])
    save_direction(str(tmp_path / "loss.safetensors"), {"0.bias": torch.ones(7).half()})
    assert load_direction(tmp_path / "loss.safetensors")["0.bias"].dtype == torch.float16


def test_what_is_no_direction_is_refused(tmp_path):
    path = tmp_path / "cut.safetensors"
    save_direction(path, {"weight": torch.ones(3, 4).mT})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CaptureError, match="no direction\nReason: it is cut off"):
        load_direction(path)
    with pytest.raises(FileNotFoundError):
        load_direction(tmp_path / "missing.safetensors")


def move(mlp):
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter += 0.1


def test_an_engine_goes_on_in_another_process(mlp, inputs, tmp_path):
    """A direction that is not due is neither made anew nor counted anew."""
    engine, expected = engine_of(mlp, inputs), []
    for at in range(5):
        if at == 2:
            torch.save([engine.state_dict(), mlp.state_dict()], tmp_path / "state.pt")
        expected.append(train(engine, mlp, inputs).total)
        move(mlp)
    state, parameters = torch.load(tmp_path / "state.pt", weights_only=True)
    mlp.load_state_dict(parameters)
    for resumed in (True, False):
        mlp.load_state_dict(parameters)
        other, found = engine_of(mlp, inputs), []
        if resumed:
            other.load_state_dict(state)
        for _ in range(3):
            found.append(train(other, mlp, inputs).total)
            move(mlp)
        assert all(map(torch.equal, found, expected[2:])) == resumed


def test_directions_share_their_memory_and_states_do_not(mlp, inputs):
    """An engine keeps one copy of each direction, and a state no more than its own."""
    engine = engine_of(mlp, inputs)
    train(engine, mlp, inputs)
    for name, parameter in mlp.named_parameters():
        parts = [engine.direction(each)[name].untyped_storage() for each in engine.directions]
        assert parts[0].data_ptr() == parts[1].data_ptr()
        assert parts[0].nbytes() == 2 * parameter.numel() * 8
        state = engine.state_dict()["directions"]["loss"]["tensors"][name]
        assert state.untyped_storage().nbytes() == parameter.numel() * 8


def test_the_state_of_other_directions_is_refused(mlp, inputs):
    state = engine_of(mlp, inputs).state_dict()
    with pytest.raises(CaptureError, match="directions loss, now, and the engine has none"):
        DotProductEngine(mlp).load_state_dict(state)
