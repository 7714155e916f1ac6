"""Each wrong split is refused with module, parameters, reason and remedy; nothing else is."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ghost_core import SamplerRegistry, WrongSplitError
from ghost_core.split import probed_samples
from ghost_core.testing import (
    GradientHolder,
    PlainLinear,
    TinyTransformer,
    next_token_losses,
    per_sample_gradients,
)
from ghost_core.tracking import Claim, dotted_name

N, T, D = 4, 3, 8
Hold = Callable[..., GradientHolder]


class Two(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)


class SequenceFirst(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.transpose(0, 1)).relu().transpose(0, 1))


class Folded(Two):
    """Folds another axis into the samples, and turns the rows around."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.reshape(-1, D).flip(0)).relu().flip(0).reshape(x.shape))


class Sorted(Two):
    def forward(self, x: Tensor) -> Tensor:
        order = torch.argsort(x[:, 0])
        hidden = self.a(x[order])
        unsorted = torch.zeros_like(hidden)
        unsorted[order] = hidden
        return self.b(unsorted.relu())


class Normalised(Two):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).relu())


class ZeroGate(Two):
    """Mixes samples behind a gate that is closed at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + self.gate * self.a(x).mean(0, keepdim=True)


class LossInside(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).square().mean()


class Opaque(nn.Module):
    """Wraps a model's output in an object that is neither a tensor nor a container."""

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Output:
        return self.Output(self.inner(x))


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


REFUSED = {
    "sequence first": (SequenceFirst, lambda: floats(N, N, D), "  a [a.weight, a.bias]: rows 0, 1"),
    "batch normalisation": (Normalised, lambda: floats(N, D), "  a [a.weight, a.bias]: rows 0, 1"),
    "behind a zero gate": (ZeroGate, lambda: floats(N, D), "  a [a.weight, a.bias]: rows 0, 1"),
    "loss inside": (LossInside, lambda: floats(N, D), "the model's output does not tell 4 samples"),
}

REASONS = {
    "sequence first": ("first axis is not the samples", "Put samples on the first axis"),
    "batch normalisation": ("'norm' (BatchNorm1d) normalises over the batch", "evaluation mode"),
    "behind a zero gate": ("a later operation mixes samples", "leave these modules out"),
    "loss inside": ("of shape [4, ...]", "compute the loss outside"),
}


def run(engine: GradientHolder, model: nn.Module, x: Tensor) -> None:
    with engine.batch(range(len(x))):
        output = model(x)
        getattr(output, "logits", output).square().sum().backward()


def excluded(model: nn.Module) -> str | tuple[()]:
    return "gate" if hasattr(model, "gate") else "norm" if hasattr(model, "norm") else ()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_split_is_refused(hold: Hold, case: str, frozen: bool) -> None:
    kind, make, where = REFUSED[case]
    model = kind()
    engine, x = hold(model, exclude=excluded(model)), make()
    with engine.frozen() if frozen else engine, pytest.raises(WrongSplitError) as caught:
        run(engine, model, x)
    message = str(caught.value)
    for part in (where, *REASONS[case]):
        assert part in message


@pytest.mark.parametrize("case", REFUSED)
def test_excluding_what_the_error_names_helps_or_the_rest_is_refused(
    hold: Hold, assert_held, case: str
) -> None:
    kind, make, _ = REFUSED[case]
    model, x = kind().double(), make()
    x = x.double() if x.is_floating_point() else x
    if case in ("batch normalisation", "loss inside"):
        return  # every module is affected
    left_out = ["a", *filter(None, [excluded(model)])]
    engine = hold(model, exclude=left_out)
    expected = per_sample_gradients(
        model,
        model(x).square().flatten(1).sum(1),
        [parameter.name for parameter in engine.parameters],
    )
    with engine, engine.batch(range(N)) as batch:
        model(x).square().sum().backward()
    assert batch.verified
    assert_held(batch.result, expected)


class Rolled(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.roll(1, 0)).relu().roll(-1, 0))


MOVED: list[tuple[type[Two], tuple[int, ...]]] = [
    (Sorted, (N, D)),
    (Rolled, (N, D)),
    (Folded, (N, T, D)),
]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("kind", "shape"), MOVED)
def test_rows_in_another_order_are_found(
    hold: Hold, assert_held, kind: type[Two], shape: tuple[int, ...], frozen: bool
) -> None:
    model = kind().double()
    engine, batches = hold(model), [floats(*shape).double() for _ in range(3)]
    expected = [per_sample_gradients(model, model(x).sin().flatten(1).sum(1)) for x in batches]
    with engine.frozen() if frozen else engine:
        for x, gradients in zip(batches, expected, strict=True):
            with engine.batch(range(N)) as batch:
                model(x).sin().sum().backward()
            assert batch.verified
            assert_held(batch.result, gradients)


def test_an_output_that_cannot_be_looked_into_is_not_taken_for_verified(hold: Hold) -> None:
    model = Opaque(SequenceFirst())
    engine = hold(model)
    with engine, pytest.raises(WrongSplitError):
        run(engine, model, floats(N, N, D))


PLAIN = {
    "a sequence": lambda: nn.Sequential(
        nn.Linear(D, D), nn.ReLU(inplace=True), nn.LayerNorm(D), nn.Linear(D, D)
    ),
    "evaluated batch normalisation": lambda: Normalised().eval(),
    "a residual": lambda: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, D)),
}


@pytest.mark.parametrize("n", [1, 2, N])
@pytest.mark.parametrize("shape", [(D,), (N, D), (T, D)])
@pytest.mark.parametrize("case", PLAIN)
def test_no_false_alarm(hold: Hold, case: str, shape: tuple[int, ...], n: int) -> None:
    model = PLAIN[case]()
    if len(shape) > 1 and case.startswith("evaluated"):
        shape = (D,)
    engine, x = hold(model, exclude=excluded(model)), floats(n, *shape)
    with engine, engine.batch(range(n)) as batch:
        model(x).square().sum().backward()
    assert batch.verified


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_no_false_alarm_on_a_transformer(hold: Hold, frozen: bool, autocast: bool) -> None:
    model, ids = TinyTransformer(), torch.randint(0, 19, (N, N))
    engine = hold(model)
    with engine.frozen() if frozen else engine, engine.batch(range(N)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids)
        next_token_losses(logits, ids).sum().backward()


def test_no_false_alarm_for_parameters_that_share_memory(hold: Hold) -> None:
    model = Two()
    memory = torch.randn(2, D, D)
    model.a.weight, model.b.weight = (nn.Parameter(part) for part in memory)
    model.forward = lambda x: model.b(model.a(x))
    engine = hold(model)
    with engine:
        run(engine, model, floats(N, D))


def test_looking_at_parameters_without_gradients_is_no_use(hold: Hold) -> None:
    class Logs(Two):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.norm_of_a = self.a.weight.norm()
            return self.b(self.a(x))

    engine = hold(model := Logs())
    with engine:
        run(engine, model, floats(N, D))


def test_verification_is_repeated_in_another_mode(hold: Hold) -> None:
    model = Normalised().eval()
    engine, x = hold(model, exclude="norm"), floats(N, D)
    with engine:
        run(engine, model, x)
        model.norm.train()
        with pytest.raises(WrongSplitError, match=r"'norm' \(BatchNorm1d\) normalises"):
            run(engine, model, x)


def test_verification_of_one_sample_does_not_vouch_for_several(hold: Hold) -> None:
    engine = hold(model := SequenceFirst())
    with engine:
        run(engine, model, floats(1, 1, D))
        with pytest.raises(WrongSplitError):
            run(engine, model, floats(N, N, D))


def test_modules_that_are_called_later_are_verified_then(hold: Hold) -> None:
    class Grows(Two):
        deep = False

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.transpose(0, 1)).transpose(0, 1)) if self.deep else self.b(x)

    engine = hold(model := Grows())
    with engine:
        run(engine, model, floats(N, N, D))
        model.deep = True
        with pytest.raises(WrongSplitError, match=re.escape("a [a.weight, a.bias]")):
            run(engine, model, floats(N, N, D))


def test_a_refusal_leaves_the_engine_usable(hold: Hold) -> None:
    model = ZeroGate()
    engine, x = hold(model, exclude="b,gate"), floats(N, D)
    with engine:
        for _ in range(2):
            with pytest.raises(WrongSplitError):
                run(engine, model, x)


def test_verification_can_be_switched_off_and_the_result_says_so(hold: Hold) -> None:
    model, x = Sorted(), floats(N, D)
    engine = hold(model, verify=False)
    with engine, engine.batch(range(N)) as batch:
        model(x).square().sum().backward()
    assert not batch.verified
    assert batch.result.uses["a.weight"]


def test_rows_are_checked_without_verification_too(hold: Hold) -> None:
    engine = hold(model := Folded(), verify=False)
    with engine, pytest.raises(WrongSplitError, match="folded"):
        run(engine, model, floats(N, T, D))


def test_a_scalar_output_is_refused() -> None:
    class Total(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.total = Total(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.total(x)

    registry = SamplerRegistry([Claim(dotted_name(Total), PlainLinear, "test")])
    engine = GradientHolder(model := Model(), registry=registry)
    with engine, pytest.raises(WrongSplitError, match=r"total \[.*\] returned a scalar"):
        run(engine, model, floats(N, D))


@pytest.mark.filterwarnings("ignore:Error detected")
def test_anomaly_detection_does_not_stop_at_the_probe(hold: Hold) -> None:
    model, x = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)), floats(N, D)
    engine = hold(model)
    with torch.autograd.set_detect_anomaly(True), engine:
        run(engine, model, x)
    assert model[0].weight.grad.isfinite().all()


def test_training_is_the_same_with_verification(hold: Hold) -> None:
    gradients = []
    for verify in (True, False):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Linear(D, D)), floats(N, D)
        engine = hold(model, verify=verify)
        with engine:
            run(engine, model, x)
        gradients.append([parameter.grad for parameter in model.parameters()])
        gradients[-1].append(torch.rand(3))
    for verified, plain in zip(*gradients, strict=True):
        assert torch.equal(verified, plain)


@pytest.mark.parametrize(("n", "rows"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (8, [0, 4, 7])])
def test_probed_rows(n: int, rows: list[int]) -> None:
    assert probed_samples(n) == rows


class Late(nn.Module):
    """Runs its second layer, and whatever else, from the second call on."""

    def __init__(self, late: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.late, self.calls = late, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.first(x) if self.calls == 1 else self.late(self, self.first(x))


def test_a_module_that_runs_later_makes_its_batch_unverified(registry) -> None:
    model = Late(lambda model, x: model.second(x))
    engine, x = GradientHolder(model, registry=registry), torch.randn(3, 4)
    verified = []
    with engine:
        for _ in range(3):
            with engine.batch(range(3)) as batch:
                model(x).sum().backward()
            verified.append(batch.verified)
    assert verified == [True, False, True]


def test_a_use_outside_is_followed_in_the_pass_after_a_module_ran_for_the_first_time(
    hold: Hold, assert_held
) -> None:
    late = Late(lambda model, x: model.second(x) + nn.functional.linear(x, model.first.weight))
    engine, x = hold(late.double()), torch.randn(3, 4).double()
    with engine:
        for _ in range(2):
            with engine.batch(range(3)) as batch:
                late(x).sum().backward()
        assert not batch.verified
        expected = per_sample_gradients(late, late(x).sum(1))
        with engine.batch(range(3)) as batch:
            late(x).sum().backward()
    assert batch.verified
    assert_held(batch.result, expected)


def test_what_is_computed_for_all_samples_may_have_any_number_of_rows(
    hold: Hold, assert_held
) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.place, self.rows = nn.Linear(4, 4), nn.Linear(4, 4), 3

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.place(torch.ones(self.rows, 4, dtype=x.dtype))

    model, x = Positions().double(), torch.randn(3, 4).double()
    engine = hold(model)
    with engine:
        for rows in (3, 1, 3):
            model.rows = rows
            expected = per_sample_gradients(model, model(x).sin().sum(1))
            with engine.batch(range(3)) as batch:
                model(x).sin().sum().backward()
            assert_held(batch.result, expected)


def test_one_row_for_all_samples_must_not_be_returned(registry) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.place = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.place(torch.ones(1, 4))

    engine = GradientHolder(model := Returns(), registry=registry)
    with (
        engine,
        pytest.raises(WrongSplitError, match="returned by the model"),
        engine.batch([1, 2]),
    ):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("freeze", [True, False])
def test_a_parameter_used_in_the_loss_is_found(registry, freeze: bool) -> None:
    engine = GradientHolder(model := nn.Sequential(nn.Linear(4, 4)), registry=registry)
    attached = engine.frozen() if freeze else engine
    with attached, pytest.raises(WrongSplitError, match=r"0\.weight"), engine.batch(range(3)):
        nn.functional.linear(model(torch.randn(3, 4)), model[0].weight).sum().backward()


def test_logging_the_norm_of_a_parameter_is_no_use_of_it(registry) -> None:
    engine = GradientHolder(model := nn.Sequential(nn.Linear(4, 4)), registry=registry)
    with engine, engine.batch(range(3)) as batch:
        loss = model(torch.randn(3, 4)).sum()
        loss.backward()
        norms = [parameter.detach().norm() for parameter in model.parameters()]
    assert batch.verified
    assert len(norms) == 2


def test_modules_behind_outputs_without_rows_are_refused(registry) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.first(x)
            return self.head(features.flip(0)).square().sum(), features

    engine = GradientHolder(model := Model(), registry=registry)
    with engine, pytest.raises(WrongSplitError, match=r"head\.weight"), engine.batch(range(3)):
        model(torch.randn(3, 4))[0].backward()


@pytest.mark.parametrize("verify", [True, False])
def test_one_sample_called_as_a_batch_is_refused(registry, verify: bool) -> None:
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, texts: list[str]) -> Tensor:
            return self.head(torch.stack([torch.full((4,), float(len(text))) for text in texts]))

    engine = GradientHolder(model := Texts(), registry=registry, verify=verify)
    with engine, pytest.raises(WrongSplitError, match="one row"), engine.batch([1, 2, 3]):
        model(["a"]).sum().backward()


def test_only_what_all_samples_share_can_be_tracked(registry) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.place = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.place(torch.ones(1, 4))

    engine = GradientHolder(model := Model(), registry=registry, layers="place")
    with engine, engine.batch(range(3)) as batch:
        model(torch.randn(3, 4)).sum().backward()
    assert batch.verified


def test_sparse_tensors_in_a_model_are_no_trouble(registry) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(torch.eye(len(x)).to_sparse(), self.layer(x))

    engine = GradientHolder(model := Graph(), registry=registry)
    with engine, engine.batch(range(3)) as batch:
        model(torch.randn(3, 4)).sum().backward()
    assert batch.verified


class Half(nn.Module):
    """A layer of an awkward width, so that half-precision kernels work with padded tails."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(32, 32), nn.Linear(32, 50), mix

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)))


@pytest.mark.parametrize("n", [2, 6, 9])
def test_no_false_alarm_in_half_precision(registry, n: int) -> None:
    engine = GradientHolder(model := Half(nn.Identity()), registry=registry)
    with engine, engine.batch(range(n)) as batch:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(torch.randn(n, 12, 32))
        out.float().square().sum().backward()
    assert batch.verified


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x + x.mean(0, keepdim=True),
    "mean behind a zero gate": lambda x: x + 0 * x.mean(0, keepdim=True),
    "last": lambda x: x + x[-1:],
    "flipped, and the first": lambda x: x.flip(0) + 0 * x[:1],
}


@pytest.mark.parametrize("mix", MIXES)
def test_mixing_is_found_in_half_precision(registry, mix: str) -> None:
    engine = GradientHolder(model := Half(MIXES[mix]), registry=registry)
    with engine, torch.autocast("cpu", torch.bfloat16), pytest.raises(WrongSplitError):  # noqa: SIM117
        with engine.batch(range(6)):
            model(torch.randn(6, 12, 32))
