"""A tiny language model, what trainers train it on, and what its values are without ghost."""

import copy
from unittest import mock

import pytest
import torch

from ghost_core.testing.snapshots import traces

VOCABULARY, LENGTH = 19, 6
RATE = 0.5


def tiny(dtype=torch.float64):
    """Return a language model of some hundred parameters, the same each time."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype)


def rows(count, seed):
    """Return samples."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
    return [{"input_ids": each, "labels": each} for each in tokens]


def everything(name):
    """Measure all parameters."""
    return True


def gradient(loss, model, measured=everything):
    """Return the gradient of a loss as one vector, of those parameters that are trained."""
    names = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    trained = [each for name, each in names if measured(name)]
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, trained)])


def recording(trainer_class):
    """Return a trainer that keeps what it trains on, and where, in `seen`."""

    class Recording(trainer_class):
        def training_step(self, model, inputs, *args, **kwargs):
            items = args[0] if args else kwargs.get("num_items_in_batch")
            ids = inputs.pop("sample_id")
            step = {"at": self.state.global_step, "inputs": copy.copy(inputs), "items": items}
            parameters = copy.deepcopy(self.model.state_dict())
            self.seen.append(step | {"ids": ids.tolist(), "parameters": parameters})
            return super().training_step(model, inputs, *args, **kwargs)

    return Recording


def equal(one, other):
    """Tell whether two models have the same parameters, bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


class BrokenError(Exception):
    """What ends a step."""


def breaking(trainer_class, inside):
    """Return a trainer that breaks once, in its fourth batch: inside the model, or behind it."""

    class Breaking(trainer_class):
        batches = 0

        def compute_loss(self, model, *args, **kwargs):
            self.batches += 1
            if self.batches != 4:
                return super().compute_loss(model, *args, **kwargs)
            if inside == "loss":
                super().compute_loss(model, *args, **kwargs)
                raise BrokenError
            layer = next(each for name, each in model.named_modules() if name.endswith("mlp"))
            with mock.patch.object(layer, "forward", side_effect=BrokenError):
                return super().compute_loss(model, *args, **kwargs)

    return Breaking


def assert_goes_on(plain, trainer, callback):
    """Assert that training breaks with ghost as it does without, and goes on as it does.

    Args:
        plain: A trainer made by `breaking`.
        trainer: Another, with ghost inside.
        callback: What it goes on with.
    """
    for each in (plain, trainer):
        with pytest.raises(BrokenError):
            each.train()
    assert equal(trainer.model, plain.model)
    assert traces(trainer.model) == traces(plain.model)
    assert trainer.ghost.run.steps == 1
    assert not trainer.ghost.run.is_open
    trainer.remove_callback(trainer.ghost)
    trainer.add_callback(callback)
    for each in (plain, trainer):
        each.train()
    assert equal(trainer.model, plain.model)
    assert traces(trainer.model) == traces(plain.model)
    assert callback.run.steps == trainer.state.global_step == plain.state.global_step
    assert any(callback.values.to_dict().values())


def brute_force(
    model, seen, contributions, validation, *, rate=RATE, clip=None, measured=everything
):
    """Return the values of all samples, one backward pass for each.

    Args:
        model: A model to load parameters into; its training mode stays as it is.
        seen: What `recording` kept.
        contributions: Returns the losses that the samples of a step contribute, `[N]` in order of
            their ids, given the model and what was seen of the step.
        validation: Returns the validation loss, given the model.
        rate: The learning rate.
        clip: The norm that gradients are clipped to.
        measured: Tells of a parameter's name whether it is measured.
    """
    values = {}
    for at in sorted({each["at"] for each in seen}):
        parts = [each for each in seen if each["at"] == at]
        model.load_state_dict(parts[0]["parameters"])
        ids = [one for part in parts for one in part["ids"]]
        gradients = [gradient(loss, model, measured) for loss in contributions(model, parts)]
        assert len(gradients) == len(ids)
        norm = torch.stack(gradients).sum(0).norm()
        factor = 1.0 if clip is None else min(1.0, float(clip / (norm + 1e-6)))
        model.eval()
        direction = gradient(validation(model), model, measured)
        model.train()
        for one, each in zip(ids, gradients, strict=True):
            values[one] = values.get(one, 0.0) + rate * factor * float(each @ direction)
    return values
