"""Norms of own gradients, and cosines with directions, against per-sample autograd in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ghost_core import CaptureError, UnknownNameError, UnknownOptionError
from ghost_core.testing import assert_within, check_engine, next_token_losses, per_sample_gradients
from ghost_core.testing.snapshots import Watched
from ghost_engines import CosineEngine, InRunValues, NormEngine


def squares(outputs):
    """Return a loss per sample, `[N]`, from outputs `[N, ...]`."""
    return outputs.square().flatten(1).sum(1) + outputs.flatten(1).sum(1)


def rows(gradients):
    """Return whole gradients as rows, `[N, size]`."""
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1).double()


def by_layer(gradients):
    layers = {}
    for name, gradient in gradients.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = gradient
    return {name: rows(parts) for name, parts in layers.items()}


def check_norms(norms, gradients, tolerance=1e-9):
    """Assert that norms are those of per-sample gradients, `[N, *shape]` by parameter name."""
    assert norms.squared.keys() == norms.by_parameter.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), f"the reference of {name} is zero, so nothing would be tested"
        expected = gradient.flatten(1).double().norm(dim=1)
        assert_within(norms.squared[name], expected**2, expected**2, 2 * tolerance, name)
        assert_within(norms.by_parameter[name], expected, expected, tolerance, name)
    layers = by_layer(gradients)
    assert norms.by_layer.keys() == layers.keys()
    for name, layer in layers.items():
        assert_within(norms.by_layer[name], layer.norm(dim=1), layer.norm(dim=1), tolerance, name)
    total = rows(gradients).norm(dim=1)
    assert_within(norms.total, total, total, tolerance, "total")
    assert norms.finite.all()


def measure(model, inputs, loss, loss_weights="sum", given=None, **options):
    """Measure one batch; `loss` makes the backpropagated loss of the model's outputs."""
    engine = NormEngine(model, loss_weights=loss_weights, **options)
    with engine, engine.batch(range(len(inputs)), loss_weights=given) as batch:
        loss(model(inputs)).backward()
    return batch.result


def sum_of_squares(outputs):
    return squares(outputs).sum()


class Repeated(nn.Module):
    """Uses one layer several times."""

    def __init__(self, inner, times):
        super().__init__()
        self.inner, self.times = inner, times

    def forward(self, inputs):
        for _ in range(self.times):
            inputs = torch.tanh(self.inner(inputs))
        return inputs


@pytest.fixture
def inputs():
    return torch.randn(4, 5, dtype=torch.float64)


WEIGHTS = torch.tensor([0.25, 3.0, 1e-3, 0.5, 1.5], dtype=torch.float64)


# Exact


@pytest.mark.parametrize("length", [3, 7])
def test_language_model_with_a_tied_head(length, transformer, tokens):
    """The tied weight's two uses overlap, so that a norm without their product would be wrong.

    Three tokens are held as rows and gradients of the table, seven as its built gradient.
    """
    tokens = tokens[:, :length]
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = NormEngine(transformer, loss_weights="sum")
    with engine, engine.batch(tokens[:, 0]) as batch:
        next_token_losses(transformer(tokens), tokens).sum().backward()
    check_norms(batch.result, expected)
    assert torch.equal(batch.result.ids, tokens[:, 0])
    assert batch.result.verified
    assert batch.result.total.dtype == torch.float64
    assert engine.collect() is batch.result


@pytest.mark.parametrize(
    ("kind", "given", "weights"),
    [
        ("sum", None, torch.ones(5)),
        ("mean", None, torch.full((5,), 0.2, dtype=torch.float64)),
        ("given", WEIGHTS, WEIGHTS),
        ("given", WEIGHTS.float(), WEIGHTS.float()),
        ("given", -WEIGHTS, -WEIGHTS),
        ("given", 0.1, torch.full((5,), 0.1, dtype=torch.float64)),
        ("given", 3, torch.full((5,), 3)),
        ("given", torch.tensor(3), torch.full((5,), 3)),
    ],
)
def test_the_weight_of_each_loss_is_divided_out(kind, given, weights, transformer, tokens):
    def losses():
        return next_token_losses(transformer(tokens), tokens)

    expected = per_sample_gradients(transformer, losses())
    engine = NormEngine(transformer, loss_weights=kind)
    with engine, engine.batch(range(5), loss_weights=given) as batch:
        (weights * losses()).sum().backward()
    check_norms(batch.result, expected)


def test_token_mean_with_padding_takes_the_tokens_of_each_sample_as_weights(transformer, tokens):
    targets, lengths = tokens.clone(), torch.tensor([7, 2, 4, 6, 3])
    for sample, length in enumerate(lengths):
        targets[sample, length:] = -100
    each = functional.cross_entropy(transformer(tokens).mT, targets, reduction="none")
    expected = per_sample_gradients(transformer, each.sum(1) / lengths)
    engine = NormEngine(transformer, loss_weights="given")
    with engine, engine.batch(range(5), loss_weights=lengths / lengths.sum().double()) as batch:
        functional.cross_entropy(transformer(tokens).flatten(0, 1), targets.flatten()).backward()
    check_norms(batch.result, expected)


@pytest.mark.parametrize("times", [1, 2, 9])
@pytest.mark.parametrize("tokens_each", [1, 3, 40])
def test_layer_used_several_times(times, tokens_each):
    """Few tokens are held as factors, many as the built gradient; uses of both add up."""
    model = Repeated(nn.Linear(5, 5), times).double()
    inputs = torch.randn(4, tokens_each, 5, dtype=torch.float64)
    expected = per_sample_gradients(model, squares(model(inputs)))
    check_norms(measure(model, inputs, sum_of_squares), expected)


def test_images_and_gradients_without_factors():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, groups=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2)
    ).double()
    inputs = torch.randn(3, 3, 6, 7, dtype=torch.float64)
    expected = per_sample_gradients(model, squares(model(inputs)))
    check_norms(measure(model, inputs, sum_of_squares), expected)


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 3), (3, 2)])
@pytest.mark.parametrize("given", [None, WEIGHTS])
def test_micro_batches_follow_one_another(sizes, given, transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    weights = torch.ones(5) if given is None else given
    engine = NormEngine(transformer, loss_weights="sum" if given is None else "given")
    with engine, engine.batch(range(5), loss_weights=given) as batch:
        for part, part_weights in zip(
            tokens.split(list(sizes)), weights.split(list(sizes)), strict=True
        ):
            (part_weights * next_token_losses(transformer(part), part)).sum().backward()
    check_norms(batch.result, expected)


@pytest.mark.parametrize("passes_first", [True, False])
@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_two_passes_on_the_same_samples_are_one_gradient(passes_first, kind, mlp, inputs):
    others = inputs.flip(1) + 1
    expected = per_sample_gradients(mlp, squares(mlp(inputs)) + 3 * squares(mlp(others)))
    engine = NormEngine(mlp, loss_weights=kind)
    with engine, engine.batch(range(4)) as batch:
        if passes_first:
            losses = squares(mlp(inputs)) + 3 * squares(mlp(others))
            getattr(losses, kind)().backward()
        else:
            getattr(squares(mlp(inputs)), kind)().backward()
            (3 * getattr(squares(mlp(others)), kind)()).backward()
    check_norms(batch.result, expected)


def test_backward_twice_over_one_graph_adds(mlp, inputs):
    expected = per_sample_gradients(mlp, 3 * squares(mlp(inputs)))
    engine = NormEngine(mlp, loss_weights="mean")
    with engine, engine.batch(range(4)) as batch:
        loss = squares(mlp(inputs)).mean()
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    check_norms(batch.result, expected)


def test_frozen_gives_the_same_norms(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    engine = NormEngine(transformer, loss_weights="mean")
    with engine.frozen(), engine.batch(range(5)) as batch:
        next_token_losses(transformer(tokens), tokens).mean().backward()
    check_norms(batch.result, expected)
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_every_batch_may_have_another_shape(mlp):
    engine = NormEngine(mlp, loss_weights="mean")
    for shape in [(4, 5), (7, 5), (2, 30, 5), (1, 5), (3, 2, 5), (40, 5), (3, 1, 2, 5)]:
        inputs = torch.randn(shape, dtype=torch.float64)
        expected = per_sample_gradients(mlp, squares(mlp(inputs)))
        with engine, engine.batch(range(len(inputs))) as batch:
            squares(mlp(inputs)).mean().backward()
        check_norms(batch.result, expected)


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_batch_without_samples(kind, mlp):
    norms = measure(mlp, torch.zeros(0, 5, dtype=torch.float64), sum_of_squares, kind)
    assert norms.total.shape == (0,)
    assert all(squared.shape == (0,) for squared in norms.squared.values())


def test_selected_layers_only(transformer, tokens):
    names = ["before_mlp.bias", "before_mlp.weight", "tokens.weight"]
    losses = next_token_losses(transformer(tokens), tokens)
    expected = per_sample_gradients(transformer, losses, names)
    norms = measure(
        transformer,
        tokens,
        lambda logits: next_token_losses(logits, tokens).sum(),
        layers="tokens,before_*",
        exclude=["*_attention"],
    )
    check_norms(norms, expected)


def test_parameter_that_the_loss_does_not_depend_on_has_norm_zero(mlp, inputs):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = mlp, nn.Linear(5, 2).double()

        def forward(self, inputs):
            return self.used(inputs)

    norms = measure(Spare(), inputs, sum_of_squares)
    assert norms.by_parameter["spare.weight"].tolist() == [0.0] * 4
    assert norms.by_layer["used.0"].all()


def test_gradients_that_cancel_have_norm_zero_and_not_nan():
    """The sum over pairs of tokens is rounded, to a little less than zero."""
    model = nn.Linear(50, 50, bias=False).double()
    inputs = (1e3 + torch.randn(20, 1, 50, dtype=torch.float64)).expand(20, 3, 50)
    signs = torch.randn(20, 3, 50, dtype=torch.float64)
    signs[:, 2] = -signs[:, 0] - signs[:, 1]
    norms = measure(model, inputs, lambda outputs: (signs * outputs).sum())
    scale = signs.flatten(1).norm(dim=1) * inputs.flatten(1).norm(dim=1)
    assert_within(norms.total, torch.zeros(20), scale, 1e-7)
    assert (norms.total == 0).any()


def test_two_engines_at_once(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    mean, weights = (
        NormEngine(transformer, loss_weights="mean"),
        NormEngine(transformer, loss_weights="given", layers="*.weight"),
    )
    with (
        mean,
        weights,
        mean.batch(range(5)) as first,
        weights.batch(range(5), loss_weights=0.2) as second,
    ):
        next_token_losses(transformer(tokens), tokens).mean().backward()
    check_norms(first.result, expected)
    check_norms(second.result, {n: g for n, g in expected.items() if n.endswith("weight")})


# Precision


def test_float32_model_is_measured_in_float32_and_close(transformer, tokens):
    expected = per_sample_gradients(transformer, next_token_losses(transformer(tokens), tokens))
    single = copy.deepcopy(transformer).float()
    norms = measure(single, tokens, lambda logits: next_token_losses(logits, tokens).mean(), "mean")
    check_norms(norms, expected, 1e-4)
    assert norms.total.dtype == torch.float32


@pytest.mark.parametrize("whole_batch", [True, False])
def test_autocast_does_not_reach_the_norms(whole_batch, mlp):
    """Factors are rounded to bfloat16; products of them are not, wherever the batch is closed."""
    model, inputs = mlp.float(), torch.randn(6, 4, 5)
    engine = NormEngine(model, loss_weights="sum")
    held = []
    engine_add = engine.on_gradient

    def spy(pass_, parameter, gradient):
        held.append((parameter.name, gradient.materialize().double()))
        engine_add(pass_, parameter, gradient)

    engine.on_gradient = spy
    around = torch.autocast("cpu", torch.bfloat16, enabled=whole_batch)
    with engine, around, engine.batch(range(6)) as batch:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        squares(outputs.float()).sum().backward()
    check_norms(batch.result, dict(held), 1e-5)


def test_bfloat16_model_is_within_the_rounding_of_its_own_gradients(transformer, tokens):
    rounded = transformer.bfloat16()
    exact = copy.deepcopy(rounded).double()
    expected = rows(per_sample_gradients(exact, next_token_losses(exact(tokens), tokens)))
    norms = measure(rounded, tokens, lambda logits: next_token_losses(logits.float(), tokens).sum())
    assert_within(norms.total, expected.norm(dim=1), expected.norm(dim=1), 5e-2)
    assert norms.total.dtype == torch.float32


# Loss scaling


def test_the_scale_of_a_grad_scaler_is_divided_out(mlp, inputs):
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.0)
    engine = NormEngine(mlp, loss_weights="mean", grad_scaler=scaler)
    with engine:
        for _ in range(2):
            with engine.batch(range(4)) as batch:
                scaler.scale(squares(mlp(inputs)).mean()).backward()
                scaler.step(optimizer)
                scaler.update()
            check_norms(batch.result, expected)


def test_overflow_gives_norms_that_are_not_finite(mlp, inputs):
    mlp.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    engine = NormEngine(mlp, loss_weights="sum", grad_scaler=scaler)
    with engine, engine.batch(range(4)) as batch:
        scaler.scale((100 * squares(mlp(inputs.float()))).sum()).backward()
    assert not batch.result.finite.any()
    assert not batch.result.total.isfinite().any()


# Weights


def test_weight_zero_gives_nan(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    norms = measure(
        mlp, inputs, lambda outputs: (weights * squares(outputs)).sum(), "given", weights
    )
    assert norms.finite.tolist() == [True, False, True, False]
    assert norms.total.isnan().tolist() == [False, True, False, True]
    total = rows(expected).norm(dim=1)
    assert_within(norms.total[::2], total[::2], total[::2])


def test_weight_zero_of_a_sample_with_a_gradient_is_refused(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0])
    with pytest.raises(CaptureError, match=r"zero for samples \[1, 3\], whose gradients are not"):
        measure(mlp, inputs, sum_of_squares, "given", weights)


def test_weights_are_copied(mlp, inputs):
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    weights = torch.full((4,), 2.0, dtype=torch.float64)
    engine = NormEngine(mlp, loss_weights="given")
    with engine, engine.batch(range(4), loss_weights=weights) as batch:
        (weights * squares(mlp(inputs))).sum().backward()
        weights.fill_(7.0)
    check_norms(batch.result, expected)


def test_mean_is_refused_where_micro_batches_leave_it_open(mlp, inputs):
    engine = NormEngine(mlp, loss_weights="mean")
    with engine:
        refused = pytest.raises(CaptureError, match=r"which mean, in a batch of 4 .* of 2")
        with refused, engine.batch(range(4)):
            squares(mlp(inputs[:2])).mean().backward()
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).mean().backward()
    check_norms(batch.result, per_sample_gradients(mlp, squares(mlp(inputs))))


def test_batch_that_cannot_be_opened_leaves_the_open_one_its_weights(mlp, inputs):
    engine = NormEngine(mlp, loss_weights="given")
    with engine, engine.batch(range(4), loss_weights=2.0) as batch:
        with pytest.raises(CaptureError, match="open already"):
            engine.batch(range(4), loss_weights=5.0).__enter__()
        (2 * squares(mlp(inputs))).sum().backward()
    check_norms(batch.result, per_sample_gradients(mlp, squares(mlp(inputs))))


def test_loss_weights_have_no_default(mlp):
    with pytest.raises(CaptureError, match=r"NormEngine needs loss_weights.* 'sum', 'mean'"):
        NormEngine(mlp)


@pytest.mark.parametrize("kind", ["average", "", "Mean"])
def test_unknown_loss_weights_list_what_exists(kind, mlp):
    with pytest.raises(UnknownNameError, match="Available: given, mean, sum"):
        NormEngine(mlp, loss_weights=kind)


@pytest.mark.parametrize("kind", [torch.ones(4), 0.5])
def test_weights_at_the_wrong_place_are_refused(kind, mlp):
    with pytest.raises(CaptureError, match=r"loss_weights='given'.*engine\.batch"):
        NormEngine(mlp, loss_weights=kind)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"open batches with engine\.batch\(ids, loss_weights=\.\.\.\)"),
        (torch.ones(3), r"\[4\].*float32 of shape \(3,\)"),
        (torch.ones(1), r"of shape \(1,\)"),
        (torch.ones(4, 1), r"of shape \(4, 1\)"),
        (torch.ones(4, dtype=torch.bool), "not torch.bool"),
        (torch.ones(4, dtype=torch.complex64), "not torch.complex64"),
        ([1.0] * 4, "not list"),
        (True, "not bool"),
        ("mean", "not str"),
        (torch.tensor([1.0, torch.nan, 1.0, 1.0]), "not finite"),
        (torch.inf, "not finite"),
    ],
)
def test_wrong_weights_are_refused(given, message, mlp, inputs):
    engine = NormEngine(mlp, loss_weights="given")
    with engine:
        with pytest.raises(CaptureError, match=message):
            engine.batch(range(4), loss_weights=given).__enter__()
        with engine.batch(range(4), loss_weights=1.0) as batch:
            squares(mlp(inputs)).sum().backward()
    check_norms(batch.result, per_sample_gradients(mlp, squares(mlp(inputs))))


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_weights_that_nobody_asked_for_are_refused(kind, mlp):
    engine = NormEngine(mlp, loss_weights=kind)
    with engine, pytest.raises(CaptureError, match=f"was made with loss_weights='{kind}'"):
        engine.batch(range(4), loss_weights=torch.ones(4)).__enter__()


# What is held


def test_tensors_overwritten_before_the_batch_is_closed_are_refused(mlp, inputs):
    """A loader may fill one tensor again and again."""
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    engine, buffer = NormEngine(mlp, loss_weights="sum"), inputs[:2].clone()
    refused = pytest.raises(CaptureError, match=r"owns 0\.weight was overwritten")
    with engine:
        with refused, engine.batch(range(4)):
            for part in inputs.split(2):
                buffer.copy_(part)
                squares(mlp(buffer)).sum().backward()
        for part in (slice(0, 2), slice(2, 4)):
            buffer.copy_(inputs[part])
            with engine.batch(range(2)) as batch:
                squares(mlp(buffer)).sum().backward()
            check_norms(batch.result, {name: g[part] for name, g in expected.items()})


def test_token_ids_overwritten_before_the_batch_is_closed_are_refused():
    model, ids = nn.Sequential(nn.Embedding(50, 4), nn.Tanh()), torch.randint(0, 50, (3, 2))
    engine = NormEngine(model, loss_weights="sum")
    refused = pytest.raises(CaptureError, match=r"owns 0\.weight was overwritten")
    with engine, refused, engine.batch(range(3)):
        squares(model(ids)).sum().backward()
        ids.zero_()


def test_parameters_as_inputs_may_change_after_the_batch_only(inputs):
    class Queries(nn.Module):
        """Adds a linear map of what is learned to the input."""

        def __init__(self):
            super().__init__()
            self.queries, self.map = nn.Parameter(torch.randn(2, 5)), nn.Linear(5, 5)

        def forward(self, inputs):
            return self.map(self.queries.expand(len(inputs), -1, -1)) + inputs[:, None]

    model = Queries().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = NormEngine(model, loss_weights="sum", exclude="queries", verify=False)
    refused = pytest.raises(CaptureError, match=r"owns map\.weight was overwritten")
    with engine, refused, engine.batch(range(4)):
        squares(model(inputs)).sum().backward()
        optimizer.step()
    expected = per_sample_gradients(model, squares(model(inputs)), ["map.weight", "map.bias"])
    with engine, engine.batch(range(4)) as batch:
        squares(model(inputs)).sum().backward()
    optimizer.step()
    check_norms(batch.result, {name: expected[name] for name in batch.result.squared})


def test_no_activation_is_held_where_the_gradient_is_smaller():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for tokens, held in ((100, False), (1, True)):
        inputs = torch.randn(4, tokens, 5)
        expected = per_sample_gradients(model, squares(model(inputs)))
        engine, watched = NormEngine(model, loss_weights="sum"), Watched(model)
        with engine, engine.batch(range(4)) as batch:
            with watched:
                squares(model(inputs)).sum().backward()
            alive = [what for what in watched.alive() if what != "input of 0"]
            assert bool(alive) is held
        assert watched.alive() == ["input of 0"]  # which this test has
        check_norms(batch.result, expected, 1e-5)


def test_unknown_option_is_a_type_error(mlp):
    with pytest.raises(UnknownOptionError, match="layer_names"):
        NormEngine(mlp, loss_weights="sum", layer_names="0")


def test_norms_say_whether_the_split_was_verified(mlp, inputs):
    for verify in (True, False):
        assert measure(mlp, inputs, sum_of_squares, verify=verify).verified is verify


def test_keeps_what_every_engine_promises():
    check_engine(lambda model: NormEngine(model, loss_weights="sum"))


# Cosines with directions


def check_cosines(cosines, gradients, directions):
    assert cosines.directions == tuple(directions)
    columns = [{name: each[name][None] for name in gradients} for each in directions.values()]
    mine = [("total", cosines.cosine, rows(gradients), torch.cat([rows(c) for c in columns]))]
    layers, of_columns = by_layer(gradients), [by_layer(each) for each in columns]
    assert cosines.cosine_by_layer.keys() == layers.keys()
    for name, layer in layers.items():
        others = torch.cat([each[name] for each in of_columns])
        mine.append((name, cosines.cosine_by_layer[name], layer, others))
    for name, got, left, right in mine:
        expected = functional.normalize(left) @ functional.normalize(right).mT
        assert_within(got, expected, 1.0, what=name)


@pytest.mark.parametrize("weights", [torch.ones(5), torch.full((5,), 0.2), WEIGHTS])
def test_cosines_do_not_depend_on_weights(
    weights, transformer, tokens, draw_directions, assert_scores
):
    validation = tokens[:3].roll(2, 1)

    def validation_loss():
        return next_token_losses(transformer(validation), validation).mean()

    def losses():
        return next_token_losses(transformer(tokens), tokens)

    directions = draw_directions(transformer, 2)
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    of_loss = torch.autograd.grad(validation_loss(), list(named.values()))
    directions["loss"] = dict(zip(named, of_loss, strict=True))
    engine = CosineEngine(transformer)
    for name in ("random 0", "random 1"):
        engine.add_direction(name, directions[name])
    engine.add_direction("loss", validation_loss)
    own = per_sample_gradients(transformer, losses())
    with engine, engine.batch(range(5)) as batch:
        (weights * losses()).sum().backward()
    check_cosines(batch.result, own, directions)
    shape = [(-1, *[1] * (gradient.dim() - 1)) for gradient in own.values()]
    contributions = {
        name: weights.reshape(axes) * gradient
        for (name, gradient), axes in zip(own.items(), shape, strict=True)
    }
    assert_scores(batch.result, contributions, directions)
    assert batch.result.cosine_by_layer.keys() == batch.result.by_layer.keys()


def test_cosines_over_passes_and_uses(draw_directions):
    model = Repeated(nn.Linear(5, 5), 3).double()
    inputs, directions = torch.randn(4, 2, 5, dtype=torch.float64), draw_directions(model, 2)
    engine = CosineEngine(model)
    for name, direction in directions.items():
        engine.add_direction(name, direction)
    expected = per_sample_gradients(model, squares(model(inputs)))
    with engine.frozen(), engine.batch(range(4)) as batch:
        for part in inputs.split([1, 3]):
            squares(model(part)).mean().backward()
    check_cosines(batch.result, expected, directions)


def test_cosine_with_itself_is_one_and_never_more(mlp, inputs):
    mlp.float()
    engine = CosineEngine(mlp)
    engine.add_direction("same", lambda: squares(mlp(inputs[:1].float())).sum())
    with engine, engine.batch(range(1)) as batch:
        squares(mlp(inputs[:1].float())).sum().backward()
    assert_within(batch.result.cosine, torch.ones(1, 1), 1.0, 1e-6)
    assert (batch.result.cosine <= 1).all()


def test_cosine_of_nothing_is_nan(mlp, inputs):
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    engine = CosineEngine(mlp)
    engine.add_direction("loss", lambda: squares(mlp(inputs + 1)).mean())
    zeros = {name: torch.zeros_like(p) for name, p in mlp.named_parameters()}
    engine.add_direction("zero", zeros)
    with engine, engine.batch(range(4)) as batch:
        (weights * squares(mlp(inputs))).sum().backward()
    assert batch.result.cosine.isnan().tolist() == [[weight == 0, True] for weight in weights]
    assert batch.result.finite.all()


def test_cosines_with_a_grad_scaler(mlp, inputs, draw_directions):
    directions = draw_directions(mlp, 1)
    expected = per_sample_gradients(mlp, squares(mlp(inputs)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = CosineEngine(mlp, grad_scaler=scaler)
    engine.add_direction("random 0", directions["random 0"])
    with engine, engine.batch(range(4)) as batch:
        scaler.scale(squares(mlp(inputs)).mean()).backward()
    check_cosines(batch.result, expected, directions)


def test_overflow_gives_no_cosine(mlp, inputs):
    """Finite dots over infinite norms would be zero."""
    mlp.float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80)
    engine = CosineEngine(mlp, grad_scaler=scaler)
    engine.add_direction("loss", lambda: squares(mlp(inputs.float() + 1)).mean())
    with engine, engine.batch(range(4)) as batch:
        scaler.scale(squares(mlp(inputs.float())).sum()).backward()
    assert batch.result.finite.all()
    assert batch.result.cosine.isnan().all()


def test_in_run_values_follow_an_engine_of_cosines(mlp, inputs):
    optimizer = torch.optim.SGD(mlp.parameters(), lr=0.1)
    engine = CosineEngine(mlp)
    engine.add_direction("loss", lambda: squares(mlp(inputs + 1)).mean())
    with InRunValues(engine, optimizer) as values, engine:
        with engine.batch(range(4)) as batch:
            squares(mlp(inputs)).sum().backward()
        optimizer.step()
    for sample in range(4):
        dot = batch.result.total[sample, 0].item()
        assert values[sample] == pytest.approx(0.1 * dot, rel=1e-12)


def test_engine_of_cosines_keeps_what_every_engine_promises():
    def make_engine(model):
        ids = torch.arange(12).view(2, 6)
        engine = CosineEngine(model)
        engine.add_direction("loss", lambda: next_token_losses(model(ids), ids).mean(), refresh=3)
        return engine

    check_engine(make_engine)
