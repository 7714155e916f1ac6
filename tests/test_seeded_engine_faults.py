"""The comparisons with the oracle fail where something is broken on purpose.

Each fault is one that a system before this one had, or one that is easy to make.
"""

import pytest
import torch
from torch import nn

from ghost_core import Dense, InputFactor, Outer, UnbalancedError
from ghost_engines import DotProductEngine, ProjectionEngine
from ghost_engines.directions import ClosureSource
from ghost_layers import convolution

OFF = "entries are off"

ROUNDED = [pytest.param(torch.bfloat16, marks=pytest.mark.stress), torch.float32]
"""What rounds a number more is found more easily."""


@pytest.fixture(scope="module")
def found_exact():
    """Names of models that both engines were found exact on, with nothing broken."""
    return set()


@pytest.fixture
def sound_task(make_language_task, assert_dots, assert_rows, found_exact):
    """Make a task for a language model, on which both engines are exact."""

    def make(name):
        task = make_language_task(name)
        if name not in found_exact:
            assert_dots(task)
            assert_rows(task)
            found_exact.add(name)
        return task

    return make


@pytest.fixture
def gpt2(sound_task):
    return sound_task("gpt2")


@pytest.fixture
def llama(sound_task):
    return sound_task("llama")


class FirstUse:
    """Mixed into an engine: a later use of a parameter is dropped, as if it overwrote nothing."""

    def on_start(self, batch):
        self.arrived = set()
        super().on_start(batch)

    def on_gradient(self, pass_, parameter, gradient):
        if parameter.name not in self.arrived:
            self.arrived.add(parameter.name)
            super().on_gradient(pass_, parameter, gradient)


def test_dots_without_the_second_use_of_a_tied_parameter(gpt2, assert_dots):
    class Broken(FirstUse, DotProductEngine):
        pass

    with pytest.raises(AssertionError, match=rf"transformer\.wte\.weight.*{OFF}"):
        assert_dots(gpt2, Broken)


def test_rows_without_the_second_use_of_a_tied_parameter(gpt2, assert_rows):
    class Broken(FirstUse, ProjectionEngine):
        pass

    with pytest.raises(AssertionError, match=rf"transformer\.wte\.weight.*{OFF}"):
        assert_rows(gpt2, Broken)


def test_last_use_of_a_tied_parameter_overwrites_the_first(gpt2, assert_dots):
    class Broken(DotProductEngine):
        def on_gradient(self, pass_, parameter, gradient):
            self._dots.arrived.pop(parameter.name, None)
            super().on_gradient(pass_, parameter, gradient)

    with pytest.raises(AssertionError, match=rf"transformer\.wte\.weight.*{OFF}"):
        assert_dots(gpt2, Broken)


class _Transposed:
    """Stands for a gradient whose projection comes with its axes swapped."""

    def __init__(self, gradient):
        self.gradient = gradient

    def project(self, left, right):
        return self.gradient.project(left, right).mT


def test_rows_with_their_axes_swapped_by_the_engine(llama, assert_rows):
    class Broken(ProjectionEngine):
        def on_gradient(self, pass_, parameter, gradient):
            super().on_gradient(pass_, parameter, _Transposed(gradient))

    with pytest.raises(AssertionError, match=OFF):
        assert_rows(llama, Broken)


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.stress)])
def test_rows_with_their_axes_swapped_by_the_algebra(name, request, monkeypatch, assert_rows):
    task, project = request.getfixturevalue(name), Outer.project

    def swapped(self, left, right):
        return project(self, left, right).mT.reshape(self.n, *project(self, left, right).shape[1:])

    monkeypatch.setattr(Outer, "project", swapped)
    with pytest.raises(AssertionError, match=OFF):
        assert_rows(task)


def test_maps_of_another_parameter(llama, assert_rows):
    class Broken(ProjectionEngine):
        def maps(self, parameter):
            return super().maps(parameter.replace("layers.1", "layers.0"))

    with pytest.raises(AssertionError, match=rf"layers\.1.*{OFF}"):
        assert_rows(llama, Broken)


class _Undilated(convolution.Patches):
    """Takes neighbours where the kernel has gaps."""

    def dense(self):
        geometry = self.geometry
        vertical, horizontal = (side for side in geometry.padding)
        padded = nn.functional.pad(self.x, (horizontal, horizontal, vertical, vertical))
        for axis in (0, 1):
            padded = padded.unfold(axis + 2, geometry.reach[axis], geometry.stride[axis])
            padded = padded[..., : geometry.kernel[axis]]
        windows = padded.unflatten(1, (self.groups, -1)).movedim((1, 2), (3, 4))
        return windows.flatten(1, 2).flatten(3)

    mix = InputFactor.mix
    outer = InputFactor.outer


def test_convolution_without_its_dilation(convolutions, monkeypatch, assert_dots, assert_rows):
    assert_dots(convolutions)
    assert_rows(convolutions)
    monkeypatch.setattr(convolution, "Patches", _Undilated)
    for check in (assert_dots, assert_rows):
        # The other convolutions have no gaps: only one weight may be wrong. The engine's own
        # comparison may find it before the oracle does.
        wrong = rf"of 2\.weight.*({OFF}|and so are those of 0 other)"
        with pytest.raises((AssertionError, UnbalancedError), match=wrong):
            check(convolutions)


def test_dots_in_bfloat16(llama, assert_dots):
    class Broken(DotProductEngine):
        def on_gradient(self, pass_, parameter, gradient):
            dots = gradient.dot(self._stacked[parameter.name])
            self._dots.add(parameter.name, pass_.samples, dots.bfloat16())

    with pytest.raises(AssertionError, match=OFF):
        assert_dots(llama, Broken)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_dots_with_a_rounded_direction(dtype, llama, assert_dots):
    class Broken(DotProductEngine):
        def on_start(self, batch):
            super().on_start(batch)
            self._stacked = {
                name: vectors.to(dtype).double() for name, vectors in self._stacked.items()
            }

    with pytest.raises(AssertionError, match=OFF):
        assert_dots(llama, Broken)


@pytest.mark.parametrize("dtype", ROUNDED)
def test_rows_with_rounded_gradients(dtype, llama, assert_rows):
    class Broken(ProjectionEngine):
        def on_gradient(self, pass_, parameter, gradient):
            rounded = gradient.materialize().to(dtype).double()
            super().on_gradient(pass_, parameter, Dense(rounded.unsqueeze(1)))

        def on_input(self, parameter, record):
            return record

    with pytest.raises(AssertionError, match=OFF):
        assert_rows(llama, Broken)


def test_direction_of_sums_multiplied(llama, monkeypatch, assert_dots):
    """A direction of several samples as ΣA·ΣB, in place of ΣAB."""
    exact = ClosureSource.tensors

    def multiplied(source):
        found, model = exact(source), source.model
        inputs, grads, handles = {}, {}, []

        def hook(path):
            def watch(module, args, output):
                inputs[path] = args[0].detach().flatten(0, -2).sum(0)
                output.register_hook(lambda grad: grads.update({path: grad.flatten(0, -2).sum(0)}))

            return watch

        linear = {path: each for path, each in model.named_modules() if isinstance(each, nn.Linear)}
        handles = [each.register_forward_hook(hook(path)) for path, each in linear.items()]
        torch.autograd.grad(source.closure(), list(model.parameters()))
        for handle in handles:
            handle.remove()
        for path in linear:
            found[f"{path}.weight"] = torch.outer(grads[path], inputs[path])
        return found

    monkeypatch.setattr(ClosureSource, "tensors", multiplied)
    with pytest.raises(AssertionError, match=rf"(lm_head|_proj)\.weight.*{OFF}"):
        assert_dots(llama)


def test_tokens_of_a_sample_summed_before_they_meet(llama, monkeypatch, assert_dots):
    """The same fault on the side of the samples: `(Σ_t b_t)ᵀ V (Σ_t a_t)`."""

    def contracted(self, vectors, dims):
        grad = self.grad.sum(1, keepdim=True)
        dots = [
            (self.factor.mix(self._as_map(vector)).sum(1, keepdim=True) * grad).sum(dims)
            for vector in vectors
        ]
        return torch.stack(dots, dim=-1)

    monkeypatch.setattr(Outer, "_contract", contracted)
    monkeypatch.setattr(Outer, "dot", lambda self, vectors: self._contract(vectors, (1, 2, 3)))
    with pytest.raises(AssertionError, match=OFF):
        assert_dots(llama)


def test_rows_of_the_samples_in_another_order(llama, assert_dots, assert_rows):
    class BrokenDots(DotProductEngine):
        def on_end(self, batch):
            arrived = self._dots.arrived
            arrived.update({name: dots.roll(1, 0) for name, dots in arrived.items()})
            return super().on_end(batch)

    class BrokenRows(ProjectionEngine):
        def on_end(self, batch):
            self._rows = self._rows.roll(1, 0)
            return super().on_end(batch)

    with pytest.raises(AssertionError, match=OFF):
        assert_dots(llama, BrokenDots)
    with pytest.raises(AssertionError, match=OFF):
        assert_rows(llama, BrokenRows)


def test_dropped_parameter(llama, assert_dots):
    class Broken(DotProductEngine):
        def make_scores(self, batch, dots, token_dots):
            left = {name: each for name, each in dots.items() if name != "model.norm.weight"}
            return super().make_scores(batch, left, token_dots)

    with pytest.raises(AssertionError):
        assert_dots(llama, Broken)
