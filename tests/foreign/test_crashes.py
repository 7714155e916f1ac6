"""What ended in a raw error gives a result, or a refusal that names module, reason and remedy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tests.foreign.foreign import WAYS, Foreign, assert_same, check, curved
from tests.foreign.rows import Scalar
from tests.fresh import Fresh
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from ghost_core import GhostError
from ghost_core.testing import GradientHolder, check_sampler, per_sample_gradients
from ghost_engines import DotProductEngine, NormEngine, ProjectionEngine

N = 4


def batch_of(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 3)}


def curved_output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return curved(model(batch["x"]))


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape or (N, 3), dtype=torch.float64)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "a linear layer": lambda: nn.Sequential(checkpoint_wrapper(nn.Linear(3, 8)), nn.Linear(8, 2)),
    "a replayed module": lambda: nn.Sequential(
        nn.Linear(3, 8), checkpoint_wrapper(Scalar.Temperature()), nn.Linear(8, 2)
    ),
    "the root": lambda: checkpoint_wrapper(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))),
}


@pytest.mark.parametrize(
    "name",
    [
        "a linear layer",
        "a replayed module",
        "the root",
    ],
)
def test_checkpoint_wrapper_around(name: str) -> None:
    foreign = Foreign(name, WRAPPED[name], batch_of, curved_output)
    for way in WAYS:
        check(foreign, way)


IMPORTS = """
import torch
from torch import nn
from ghost_core.testing import GradientHolder
"""


def test_replays_after_backend_flags_are_disabled(fresh: Fresh) -> None:
    """The flags cannot be set any more, which replays do."""
    ran = fresh(f"""{IMPORTS}
torch.backends.disable_global_flags()
class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
    def forward(self, x):
        return x * self.scale
model = nn.Sequential(nn.Linear(3, 3), Scale())
engine = GradientHolder(model)
with engine, engine.batch(range(4)):
    model(torch.randn(4, 3)).sum().backward()""")
    assert ran.returncode == 0, ran.stderr.splitlines()[-1]


ALONE = {
    "replayed": "nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Flatten(), nn.Linear(128, 2)), x",
    "replayed as a batch": "nn.Sequential(nn.Conv2d(3, 8, 1), Noise(norm), nn.Flatten()), x",
    "lifted": "Borrowing(norm), x",
}


@pytest.mark.stress
@pytest.mark.parametrize("way", ["engine", "engine.frozen()"])
@pytest.mark.parametrize("name", ALONE)
def test_channels_last_group_norm_without_bias(fresh: Fresh, name: str, way: str) -> None:
    """Torch dies where only the weight's gradient is asked for, as ghost does for each sample."""
    ran = fresh(f"""{IMPORTS}
class Norm(nn.GroupNorm):
    def forward(self, x):
        return nn.functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
class Noise(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight = norm.weight
    def forward(self, x):
        x = nn.functional.dropout(x, 0.5)
        return nn.functional.group_norm(x, 2, self.weight)
class Borrowing(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.conv = norm, nn.Conv2d(3, 8, 1)
    def forward(self, x):
        return nn.functional.group_norm(self.conv(x), 2, self.norm.weight).flatten(1)
torch.manual_seed(0)
norm = Norm(2, 8)
norm.register_parameter("bias", None)
x = torch.randn(4, 3, 4, 4).to(memory_format=torch.channels_last)
model, x = {ALONE[name]}
model = model.to(memory_format=torch.channels_last)
engine = GradientHolder(model, exclude="0" if isinstance(model, nn.Sequential) else "conv")
with {way}, engine.batch(range(4)) as batch:
    model(x).square().sum().backward()
(held,) = [g for n, g in batch.result.materialize().items() if g[0].shape == (8,)][:1]
if {way == "engine"}:
    (made,) = [p.grad for n, p in model.named_parameters() if p is norm.weight]
    assert torch.allclose(held.sum(0).float(), made, rtol=1e-4), (held.sum(0), made)
assert held.any(1).all()""")
    assert ran.returncode == 0, (ran.returncode, ran.stderr[-300:])


class ScalarLayer(nn.Module):
    """A factor without an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


def test_scalar_parameter_in_a_batch() -> None:
    foreign = Foreign("scalar", ScalarLayer, batch_of, curved_output)
    for way in WAYS:
        check(foreign, way)


def test_scalar_parameter_in_check_sampler() -> None:
    from ghost_layers import GenericSampler

    check_sampler(GenericSampler, ScalarLayer(), torch.randn(N, 3))


def test_sparse_gradients_in_the_oracle() -> None:
    table, index = nn.Embedding(5, 2, sparse=True).double(), torch.tensor([[0, 1], [3, 3]])
    held = per_sample_gradients(table, table(index).square().sum((1, 2)))["weight"]
    table.sparse = False
    expected = per_sample_gradients(table, table(index).square().sum((1, 2)))["weight"]
    assert torch.equal(held, expected)


class Scaled(nn.Module):
    """A replayed module with one inside that has hooks of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_an_attached_model_can_be_replayed(how: Callable[[nn.Module], nn.Module]) -> None:
    """What is left of ghost's hooks on a copy is no hook that may change what it computes."""
    model, x = Scaled().double(), inputs()
    with GradientHolder(model):
        copied = how(model)
    expected = per_sample_gradients(copied, curved(copied(x)))
    engine = GradientHolder(copied)
    with engine, engine.batch(range(N)) as batch:
        curved(copied(x)).sum().backward()
    assert_same(batch.result.materialize(), expected)


BLANK = {
    "batch norm": (lambda: nn.BatchNorm1d(3).double(), lambda: (inputs(),)),
    "no samples": (lambda: nn.LayerNorm(N).double(), lambda: (inputs(N),)),
}


@pytest.mark.parametrize("name", BLANK)
def test_messages_for_the_root_have_a_name(name: str) -> None:
    make, arguments = BLANK[name]
    model = make()
    engine = GradientHolder(model)
    with pytest.raises(GhostError) as caught, engine, engine.batch(range(N)):
        curved(model(*arguments())).sum().backward()
    message = str(caught.value)
    assert "exclude=''" not in message
    assert ":  " not in message
    assert not message.startswith(" ")


def test_direction_whose_function_calls_backward() -> None:
    model, x = mlp(), inputs()

    def loss() -> Tensor:
        value = curved(model(x)).mean()
        value.backward()
        return value

    engine = DotProductEngine(model)
    engine.add_direction("own backward", loss)
    with pytest.raises(GhostError), engine, engine.batch(range(N)):
        curved(model(x)).sum().backward()


def test_verify_of_losses_that_were_backpropagated() -> None:
    model, x = mlp(), inputs()
    losses = curved(model(x))
    losses.sum().backward()
    with pytest.raises(GhostError):
        GradientHolder(model).verify(lambda: losses)


ENGINES: dict[str, Callable[[nn.Module], object]] = {
    "dots": DotProductEngine,
    "norms": lambda model: NormEngine(model, loss_weights="sum"),
    "projections": lambda model: ProjectionEngine(model, dim=4),
    "holder": GradientHolder,
}

COPIES: dict[str, Callable[[object], object]] = {
    "pickled": lambda engine: pickle.loads(pickle.dumps(engine)),
    "deep-copied": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ENGINES)
def test_engines_are_copied_or_say_why_not(name: str, how: str) -> None:
    model = mlp()
    engine = ENGINES[name](model)
    copied, reason = copied_or_refused(COPIES[how], engine)
    if reason:
        assert len(reason.splitlines()) == 1
    else:
        assert type(copied) is type(engine)
        assert copied.model is not model  # type: ignore[attr-defined]


def copied_or_refused(copy_of: Callable[[object], object], engine: object) -> tuple[object, str]:
    """Return a copy, or the reason why there is none."""
    try:
        return copy_of(engine), ""
    except GhostError as error:
        return None, str(error)


class TwoTowers(nn.Module):
    """CLIP without its loss: a scale that is returned, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3, 4), nn.Linear(3, 4)
        self.logit_scale, self.logit_bias = (
            nn.Parameter(torch.ones(())),
            nn.Parameter(torch.ones(())),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.image(x), self.text(x.tanh()), self.logit_scale.exp()


def of_towers(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    image, text, _ = model(batch["x"])
    return curved(image * text)


def test_unused_scales() -> None:
    foreign = Foreign("two towers", TwoTowers, batch_of, of_towers)
    for way in WAYS:
        check(foreign, way)


class Recomputed(nn.Module):
    """Uses another module's weight in a region that is run again in the backward pass."""

    def __init__(self, saves: bool) -> None:
        super().__init__()
        self.layer, self.other, self.saves = nn.Linear(3, 8), nn.Linear(8, 8), saves
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return output

    def body(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        lifted = nn.functional.linear(x, self.other.weight) if self.saves else x + self.other.bias
        return lifted.tanh() + self.other(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("saves", [False, True])
def test_lifted_parameter_in_a_checkpoint(saves: bool, frozen: bool) -> None:
    """Under `frozen()` more may be saved the first time: that is refused, by name."""
    model, x = Recomputed(saves), inputs()
    expected, engine = per_sample_gradients(model, curved(model(x))), GradientHolder(model)
    with engine.frozen() if frozen else engine:
        if saves and frozen:
            with pytest.raises(GhostError, match=r"other\.weight are used .* runs again"):  # noqa: SIM117
                with engine.batch(range(N)):
                    curved(model(x)).sum().backward()
            return
        with engine.batch(range(N)) as batch:
            curved(model(x)).sum().backward()
    assert_same(batch.result.materialize(), expected)


class Forces(nn.Module):
    """Returns the slope of an energy, as interatomic potentials do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.energy = nn.Linear(3, 8), nn.Linear(8, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.energy(self.layer(x).tanh())
        return torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_gradients_are_refused_by_name(frozen: bool) -> None:
    model, x = Forces(), inputs()
    engine = GradientHolder(model)
    refused = pytest.raises(GhostError, match=r"taken through layer \[.*create_graph=True")
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        curved(model(x)).sum().backward()


class Placed(nn.Module):
    """Positions for all samples alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.places = nn.Linear(3, 8), nn.Embedding(1, 8)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.places(torch.arange(1)).tanh()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_hook_on_a_module_that_is_called_for_all_samples(frozen: bool) -> None:
    model, x = Placed(), inputs()
    model.places.register_full_backward_hook(lambda *_: None)
    engine = GradientHolder(model)
    refused = pytest.raises(GhostError, match=r"places \[places.weight\] has backward hooks")
    with engine.frozen() if frozen else engine, refused, engine.batch(range(N)):
        curved(model(x)).sum().backward()
