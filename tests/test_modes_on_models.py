"""The modes of the dot product engine on whole models, and over many steps.

Every architecture of the zoo runs under every mode: exact, or refused by name, as `REFUSED` says.
"""

import copy
from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
from tests.zoo import FAMILIES
from tests.zoo.modes import MODES, compare_mode

from ghost_core import GhostError
from ghost_core.testing import assert_within
from ghost_engines import DotProductEngine

COUPLED = r"changing the gradient of sample 0's output alone changes other rows at"
NOT_SELECTED = r"has to make the gradients of all trainable parameters, and .* are not selected"

REFUSED: dict[tuple[str, str], str] = {
    # Every image meets every text.
    **{("clip", mode): COUPLED for mode in MODES},
    ("clip_logits", "exact"): COUPLED,
    ("clip_logits", "fused"): COUPLED,
    # These leave parameters out, whose `.grad` would be that of validation samples too.
    ("clip_logits", "concatenated"): NOT_SELECTED,
    ("mixtral_but_experts", "concatenated"): NOT_SELECTED,
}
"""What the refusal of an architecture says under a mode."""

UNLIKE_OTHERS = {
    ("mixtral", "fused"),  # routed rows
    ("t5", "fused"),  # a table of positions that layers share
    ("mamba", "concatenated"),  # bare parameters
    ("llava_some_images", "concatenated"),  # rows with owners
}


def marked(name, mode):
    """Leave most to the stress tests; exact dots of all architectures are compared elsewhere."""
    marks = () if (name, mode) in UNLIKE_OTHERS else pytest.mark.stress
    return pytest.param(name, mode, marks=marks)


@pytest.mark.parametrize(
    ("name", "mode"),
    [marked(name, mode) for name in FAMILIES for mode in MODES if (name, mode) not in REFUSED],
)
def test_every_architecture(name, mode):
    compare_mode(FAMILIES[name].case(6), mode)


@pytest.mark.stress
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n].stochastic])
def test_every_architecture_with_random_numbers(name, mode):
    compare_mode(FAMILIES[name].case(6, training=True), mode)


def refused():
    """Leave to the stress tests what is refused before it matters which mode it is."""
    for name, mode in REFUSED:
        again = REFUSED[name, mode] == COUPLED and (name, mode) != ("clip", "concatenated")
        yield pytest.param(name, mode, marks=pytest.mark.stress if again else ())


@pytest.mark.parametrize(("name", "mode"), [*refused()])
def test_refused_by_name(name, mode):
    with pytest.raises(GhostError, match=REFUSED[name, mode]):
        compare_mode(FAMILIES[name].case(6), mode)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fused_dots_and_gradients(name, make_language_task, assert_dots):
    """Where the engine makes the gradients from the first batch on."""
    task = make_language_task(name)
    plain = copy.deepcopy(task.model)
    kind = partial(DotProductEngine, mode="fused", norms=True)
    assert_dots(task, kind, verify=False)
    task.all_losses().sum().backward()
    wanted = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
    task.model.zero_grad()
    engine = kind(task.model, verify=False)
    engine.add_direction("weights", dict(plain.named_parameters()))
    with engine, engine.batch(range(task.n)) as batch:
        task.all_losses().sum().backward()
    for at, gradient in wanted.items():
        found = task.model.get_parameter(at).grad
        assert_within(found, gradient, gradient.norm(), 1e-12, f"{at}.grad")
    own = torch.cat([each.flatten(1) for each in task.reference().values()], 1).norm(dim=1)
    assert_within(batch.result.norms, own, own, what="norms")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_concatenated_dots_and_gradients(name, make_language_task):
    """The last two samples of a padded batch are of validation."""
    task = make_language_task(name)
    n, m = task.n - 2, 2
    gradients = task.reference()
    engine = DotProductEngine(task.model, mode="concatenated")
    with engine:
        for _ in range(2):
            task.model.zero_grad()
            engine.concatenate(torch.zeros(n, 1), torch.zeros(m, 1))
            with engine.batch(range(n)) as batch:
                engine.backward(task.all_losses(), train_weight=1, validation_weight=0.5)
    assert batch.result.by_parameter.keys() == gradients.keys()
    for at, gradient in gradients.items():
        rows, direction = gradient[:n].flatten(1), 0.5 * gradient[n:].flatten(1).sum(0)
        scale = rows.norm(dim=1) * direction.norm()
        found = batch.result.by_parameter[at][:, 0]
        assert_within(found, rows @ direction, scale, what=f"dots of {at}")
        wanted, made = gradient[:n].sum(0), task.model.get_parameter(at).grad
        assert_within(made, wanted, gradient.flatten(1).norm(dim=1).sum(), 1e-12, f"{at}.grad")


@pytest.mark.stress
@pytest.mark.parametrize("mode", ["exact", "fused"])
def test_fifty_steps(mode, make_model):
    """Exact training is bit-identical; the gradients of fused steps are within 1e-6."""
    model = make_model("gpt2").eval()
    plain = copy.deepcopy(model)
    engine = DotProductEngine(model, mode=mode, norms=True)
    engine.add_direction("weights", dict(plain.named_parameters()))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (model, plain)]
    with engine:
        for step in range(50):
            tokens = torch.randint(0, 23, (32, 6), generator=torch.Generator().manual_seed(step))
            if mode == "fused":  # compared step by step, as rounding grows
                plain.load_state_dict(model.state_dict())
            with engine.batch(range(32)):
                model(tokens, labels=tokens).loss.backward()
            plain(tokens, labels=tokens).loss.backward()
            for (name, mine), theirs in zip(
                model.named_parameters(), plain.parameters(), strict=True
            ):
                scale = theirs.grad.norm().double()
                error = 0.0 if mode == "exact" else 1e-6
                assert_within(mine.grad, theirs.grad, scale, error, f"step {step}, {name}.grad")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    if mode == "exact":
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)


FEATURES = ["accumulation", "autocast", "checkpoints", "clipping", "dropout", "scaler"]


def trained(model, feature, kind):
    """Return the parameters after 50 steps of 32 samples, scored by an engine or not."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=feature == "scaler")
    narrow = torch.autocast("cpu", torch.bfloat16, enabled=feature == "autocast")
    engine = None
    with ExitStack() as attached:
        if kind is not None:
            engine = kind(model, grad_scaler=scaler if feature == "scaler" else None)
            directions = {name: each.detach() for name, each in model.named_parameters()}
            engine.add_direction("weights", {n: each.clone() for n, each in directions.items()})
            attached.enter_context(engine)
        for step in range(50):
            torch.manual_seed(step)  # of the tokens, and of dropout
            tokens = torch.randint(0, 23, (32, 6))
            parts = tokens.split(8 if feature == "accumulation" else 32)
            with nullcontext() if engine is None else engine.batch(range(32)):
                for part in parts:
                    with narrow:
                        loss = model(part, labels=part).loss / len(parts)
                    scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if feature == "clipping":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return list(model.parameters())


def same(feature, kind, make_model):
    """Tell whether training ends where it does without an engine."""
    model = make_model("gpt2").train(feature in ("checkpoints", "dropout"))
    if feature == "checkpoints":
        model.activation_checkpointing_enable({"use_reentrant": False})
    plain = trained(copy.deepcopy(model), feature, None)
    return all(map(torch.equal, trained(model, feature, kind), plain))


@pytest.mark.stress
@pytest.mark.parametrize("feature", FEATURES)
def test_fifty_steps_are_those_of_plain_training(feature, make_model):
    """And a sum that is made in another order would be told from it."""
    assert same(feature, DotProductEngine, make_model)
    assert not same(feature, partial(DotProductEngine, mode="fused"), make_model)
