"""Training is bit-identical with and without engines, and nothing of them stays behind."""

import gc
import random
from contextlib import ExitStack
from itertools import product

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ghost_core import CaptureError
from ghost_engines import DotProductEngine, ProjectionEngine

STEPS, MICRO_BATCHES, N, TOKENS, VOCABULARY = 10, 2, 32, 6, 23
KINDS = ("dots", "rows")


@pytest.fixture
def gpt2(make_model):
    """A GPT-2 with its defaults: dropout 0.1, head tied to the embedding, in training mode."""
    model = make_model("gpt2")
    assert model.config.attn_pdrop == model.config.embd_pdrop == model.config.resid_pdrop == 0.1
    assert model.lm_head.weight is model.transformer.wte.weight
    return model.train()


def draw(n, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (n, TOKENS), generator=generator)
    mask = torch.ones_like(tokens)
    mask[::3, -2:] = 0
    return tokens, mask


def loss_of(model, tokens, mask):
    """Return the loss that the model itself computes, a mean over tokens."""
    labels = tokens.masked_fill(mask == 0, -100)
    return model(input_ids=tokens, attention_mask=mask, labels=labels).loss


def make_engines(model, kinds):
    def validation_loss():
        model.train()  # dropout, and all else that the engine has to undo
        np.random.rand()
        random.random()
        return loss_of(model, *draw(5, 99))

    engines = []
    if "dots" in kinds:
        engine = DotProductEngine(model)
        engine.add_direction("validation", validation_loss, refresh=7)
        engines.append(engine)
    if "rows" in kinds:
        engines.append(ProjectionEngine(model, dim=16, min_dim=2))
    return engines


def states():
    """Return the states of all random number generators."""
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), numpy[1].tolist(), numpy[2:], random.getstate()


def train(model, kinds, *, autocast=False, checkpointing=False, steps=STEPS):
    """Train with AdamW, accumulation and clipping; return what the engines found last."""
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        assert all(block.gradient_checkpointing for block in model.transformer.h)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    engines = make_engines(model, kinds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = []
    with ExitStack() as attached:
        for engine in engines:
            attached.enter_context(engine)
        for step in range(steps):
            optimizer.zero_grad()
            with ExitStack() as opened:
                ids = range(MICRO_BATCHES * N * step, MICRO_BATCHES * N * (step + 1))
                batches = [opened.enter_context(engine.batch(ids)) for engine in engines]
                for part in range(MICRO_BATCHES):
                    tokens, mask = draw(N, MICRO_BATCHES * step + part)
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = loss_of(model, tokens, mask) / MICRO_BATCHES
                    loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return [batch.result for batch in batches]


@pytest.fixture(scope="module")
def trained_without():
    """Train without ghost, once for each setting."""
    return {}


QUICK = {(False, False, KINDS), (True, True, KINDS)}


@pytest.mark.parametrize(
    ("autocast", "checkpointing", "kinds"),
    [
        setting if setting in QUICK else pytest.param(*setting, marks=pytest.mark.stress)
        for setting in product((False, True), (False, True), (("dots",), ("rows",), KINDS))
    ],
)
def test_parameters_are_equal(autocast, checkpointing, kinds, make_model, gpt2, trained_without):
    setting = {"autocast": autocast, "checkpointing": checkpointing}
    key = (autocast, checkpointing)
    if key not in trained_without:
        plain = make_model("gpt2").train()
        untrained = {name: p.detach().clone() for name, p in plain.named_parameters()}
        train(plain, (), **setting)
        trained_without[key] = plain, states()
        assert all(not torch.equal(p, untrained[name]) for name, p in plain.named_parameters())
    plain, plain_states = trained_without[key]
    results = train(gpt2, kinds, **setting)
    assert states() == plain_states
    watched = dict(gpt2.named_parameters())
    different = [name for name, p in plain.named_parameters() if not torch.equal(p, watched[name])]
    assert different == []
    buffers = dict(gpt2.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in plain.named_buffers())
    assert len(results) == len(kinds)
    for kind, result in zip(kinds, results, strict=True):
        found = result.total if kind == "dots" else result.rows
        assert len(found) == len(result.ids) == MICRO_BATCHES * N
        assert found.isfinite().all()
        assert (found != 0).any(1).all()


def test_autocast_and_dropout_and_seeds_matter(make_model, trained_without):
    """Or else equal parameters would not mean much."""
    trained = {}
    for case in ("plain", "autocast", "no dropout"):
        model = make_model("gpt2")
        model.train(case != "no dropout")
        train(model, (), autocast=case == "autocast", steps=2)
        trained[case] = model.transformer.h[0].mlp.c_fc.weight
    assert not torch.equal(trained["plain"], trained["autocast"])
    assert not torch.equal(trained["plain"], trained["no dropout"])


def test_scores_of_a_batch_sum_to_the_dot_of_its_gradient(gpt2):
    """Padding, accumulation and dropout included, in float32."""
    generator = torch.Generator().manual_seed(0)
    direction = {
        name: torch.randn(p.shape, generator=generator) for name, p in gpt2.named_parameters()
    }
    engine = DotProductEngine(gpt2)
    engine.add_direction("random", direction)
    with engine, engine.batch(range(MICRO_BATCHES * N)) as batch:
        for part in range(MICRO_BATCHES):
            (loss_of(gpt2, *draw(N, part)) / MICRO_BATCHES).backward()
    for name, dots in batch.result.by_parameter.items():
        grad = gpt2.get_parameter(name).grad.double()
        bound = 1e-5 * dots.double().norm() + 1e-6 * grad.norm() * direction[name].norm()
        expected = (grad * direction[name]).sum()
        assert (dots.double().sum() - expected).abs() <= bound, name


# What stays behind


class Capture:
    """Mixed into an engine: remembers, without holding them, the storages of all it sees."""

    def watch(self):
        self.storages = []
        return self

    def see(self, value):
        for tensor in vars(value).values():
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.storages.append(StorageWeakRef(tensor.untyped_storage()))

    def on_input(self, parameter, record):
        self.see(record)
        kept = super().on_input(parameter, record)
        self.see(kept)
        return kept

    def on_gradient(self, pass_, parameter, gradient):
        self.see(gradient)
        super().on_gradient(pass_, parameter, gradient)

    def alive(self):
        gc.collect()
        return sum(not storage.expired() for storage in self.storages)


class WatchedDots(Capture, DotProductEngine):
    pass


class WatchedRows(Capture, ProjectionEngine):
    pass


def watched_engines(model):
    dots = WatchedDots(model).watch()
    dots.add_direction("validation", lambda: loss_of(model, *draw(3, 99)))
    return [dots, WatchedRows(model, dim=16, min_dim=2).watch()]


def hooks(model):
    """Return all that hooks and engines could leave on modules and parameters."""
    modules = {
        (name, attribute): len(value) if "hooks" in attribute else None
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    }
    parameters = {
        name: (p.requires_grad, p._backward_hooks, p._post_accumulate_grad_hooks, sorted(vars(p)))
        for name, p in model.named_parameters()
    }
    return modules, parameters


def attach(engines, frozen):
    stack = ExitStack()
    for engine in engines:
        stack.enter_context(engine.frozen() if frozen else engine)
    return stack


def step(model, engines, n=2, seed=0, fail_in=None):
    """Run forward and backward of one batch, with an exception somewhere."""

    def fail(*_):
        raise ZeroDivisionError

    def fail_backward(module, args, output):
        output.register_hook(fail)

    handles = []
    middle = model.transformer.h[1].ln_1
    if fail_in == "forward":
        handles.append(middle.register_forward_hook(fail))
    if fail_in == "backward":
        handles.append(middle.register_forward_hook(fail_backward))
    try:
        with ExitStack() as opened:
            for engine in engines:
                opened.enter_context(engine.batch(range(n)))
            loss = loss_of(model, *draw(n, seed))
            if fail_in == "batch":
                fail()
            loss.backward()
        if fail_in == "loop":
            fail()
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("fail_in", "frozen"),
    [  # the engine is left in the loop as in the batch, forward passes are alike in both ways
        pytest.param("forward", False, id="forward-training"),
        pytest.param("backward", False, id="backward-training"),
        pytest.param("backward", True, id="backward-frozen"),
        pytest.param("batch", True, id="batch-frozen"),
        pytest.param("loop", False, id="loop-training"),
        pytest.param("forward", True, id="forward-frozen", marks=pytest.mark.stress),
        pytest.param("batch", False, id="batch-training", marks=pytest.mark.stress),
        pytest.param("loop", True, id="loop-frozen", marks=pytest.mark.stress),
    ],
)
def test_nothing_stays_after_an_exception(fail_in, frozen, gpt2):
    gpt2.transformer.wpe.weight.requires_grad_(False)
    gpt2.transformer.h[0].mlp.c_fc.bias.requires_grad_(False)
    found, engines = hooks(gpt2), watched_engines(gpt2)
    failed = False
    try:
        with attach(engines, frozen):
            assert hooks(gpt2) != found
            step(gpt2, engines)
            step(gpt2, engines, fail_in=fail_in)
    except ZeroDivisionError:
        failed = True
    assert failed
    assert hooks(gpt2) == found
    for engine in engines:
        assert len(engine.storages) > 50
        assert engine.alive() == 0
    with attach(engines, frozen):  # and the next batch works
        step(gpt2, engines)
    assert all(len(engine.collect().ids) == 2 for engine in engines)
    assert hooks(gpt2) == found


def live_tensors():
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


@pytest.mark.stress
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
def test_nothing_stays_after_two_hundred_steps(frozen, gpt2):
    gpt2.transformer.wpe.weight.requires_grad_(False)
    found, engines = hooks(gpt2), watched_engines(gpt2)
    with attach(engines, frozen):
        for seed in range(3):
            step(gpt2, engines, seed=seed)
        few = live_tensors()
        for seed in range(197):
            step(gpt2, engines, seed=seed)
        assert live_tensors() <= few
    assert hooks(gpt2) == found
    for engine in engines:
        assert len(engine.storages) > 200 * 50
        assert engine.alive() == 0
    assert all((p.grad is not None) == (p.requires_grad and not frozen) for p in gpt2.parameters())


def test_nothing_stays_after_a_refusal(gpt2):
    """One of two engines cannot be attached; the other one is detached."""
    found, engines = hooks(gpt2), watched_engines(gpt2)
    with pytest.raises(CaptureError, match="must agree"), engines[0], engines[1].frozen():
        pass
    assert hooks(gpt2) == found
    with pytest.raises(CaptureError, match="samples"), attach(engines, False):
        step_on_other_samples(gpt2, engines)
    assert hooks(gpt2) == found


def step_on_other_samples(model, engines):
    with engines[0].batch(range(3)), engines[1].batch(range(3)):
        loss_of(model, *draw(4, 0)).backward()
