"""The modes of the dot product engine on whole models, and over many steps."""

import copy
from functools import partial

import pytest
import torch

from ghost_core.testing import assert_within
from ghost_engines import DotProductEngine


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
