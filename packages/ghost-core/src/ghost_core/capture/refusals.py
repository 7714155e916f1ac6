"""What is said where an engine is attached or used at the wrong time, or in the wrong place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ghost_core._torch import is_checkpoint_error
from ghost_core.errors import CaptureError, WrongSplitError


def not_attached() -> CaptureError:
    """Say that a batch was opened of an engine that is not attached."""
    return CaptureError(
        "attach the engine first",
        reason="nothing is captured before",
        remedy="run the training loop inside with engine: ..., or a pass without training inside "
        "with engine.frozen(): ...",
    )


def attached_already() -> CaptureError:
    """Say that an engine was attached twice."""
    return CaptureError(
        "this engine is attached already",
        reason="its hooks would count every gradient twice",
        remedy="write with engine: (or with engine.frozen():) once around the loop, or make "
        "another engine",
    )


def attached_late() -> CaptureError:
    """Say that an engine was attached inside another one's batch."""
    return CaptureError(
        "cannot attach an engine while a batch is open",
        reason="it would miss what the batch has captured",
        remedy="attach all engines of a model before the first batch",
    )


def left_alone() -> CaptureError:
    """Say that candidates were scored where engines are paused."""
    return CaptureError(
        "candidates are scored while the model is left alone",
        reason="inside of engine.paused() and run.evaluation() nothing is captured",
        remedy="score them outside; model.eval() switches off dropout there",
    )


def open_already() -> CaptureError:
    """Say that an engine's batch was opened inside one of its own."""
    return CaptureError(
        "a batch is open already",
        reason="an engine captures one batch at a time",
        remedy="close it first: leave with engine.batch(...): before the next. Micro-batches and "
        "further passes of the same samples go inside one",
    )


def left_early() -> CaptureError:
    """Say that an engine was left inside a batch."""
    return CaptureError(
        "an engine of this model was left while this batch was open",
        reason="ghost's hooks went with it, so that what came after was not seen",
        remedy="leave with engine.batch(...): before with engine: ends",
    )


def broken_off() -> CaptureError:
    """Say that a backward pass failed inside a batch."""
    return CaptureError(
        "a backward pass was not completed, though gradients had arrived in it",
        reason="it failed and the error was caught inside engine.batch(), so that what had "
        "arrived is only a part, or counts twice where the pass was repeated",
        remedy="let the error end the batch, and open another to try again, with .grad as it was "
        "before",
    )


def changed_since(now: Mapping[str, bool | None]) -> CaptureError:
    """Say that parameters were frozen, unfrozen, added or taken out while an engine is attached.

    Args:
        now: Whether each of them requires gradients now, by name; None of those that are gone.
    """
    said = {True: "requires gradients", False: "no longer requires gradients", None: "is gone"}
    listed = ", ".join(f"{name} {said[flag]}" for name, flag in now.items())
    return CaptureError(f"since the engine was made, {listed}: make a new engine")


def arrived_late(label: str) -> CaptureError:
    """Say that a gradient came after its batch."""
    return CaptureError(
        f"a gradient reached {label} after its batch was closed: run backward() inside "
        "engine.batch()"
    )


def in_another_thread() -> CaptureError:
    """Say that the model was called beside a batch."""
    return CaptureError(
        "the model was called in another thread than the one that opened the batch",
        reason="whose samples these are cannot be told, and gradients of both add up",
        remedy="call it under torch.no_grad() in other threads, or when no batch is open",
    )


def disagreeing() -> CaptureError:
    """Say that one engine freezes the parameters and another one does not."""
    return CaptureError(
        "engines on one model must agree: use frozen() for all of them, or for none",
        reason="frozen() keeps autograd from making the gradients of all parameters",
        remedy="attach this one afterwards, or in the same way",
    )


def moved(name: str, gone: bool) -> CaptureError:
    """Say that a module was replaced or removed while an engine is attached.

    Args:
        name: Its name.
        gone: Whether there is none of this name any more.
    """
    what = "is gone" if gone else "is another module than when the engine was attached"
    return CaptureError(
        f"{name} {what}",
        reason="gradients are captured by hooks on the modules that were there",
        remedy="leave the engine, change the model, and make a new engine",
    )


def explain(error: RuntimeError, names: Collection[str]) -> None:
    """Say why a checkpoint cannot run code again that uses frozen parameters of other modules.

    Args:
        error: What ended a batch, which may have another reason.
        names: The parameters that were used so.

    Raises:
        WrongSplitError: If that is why.
    """
    if names and is_checkpoint_error(error):
        raise _unlike_before(sorted(names)) from error


def _unlike_before(listed: Sequence[str]) -> WrongSplitError:
    return WrongSplitError(
        f"gradients cannot be split by sample: {', '.join(listed)} are used outside of the modules "
        "that own them, in a region that activation checkpointing runs again",
        reason="under frozen(), what stands for them requires gradients in the first run alone, "
        "and so more is saved there than in the second",
        remedy="attach by `with engine:` instead of frozen(), switch checkpointing off, or leave "
        f"them out with exclude={','.join(listed)!r}",
    )


def changed_before(label: str) -> CaptureError:
    """Say that a hook of the user's gets a module's output before ghost does."""
    return CaptureError(
        f"a forward hook on {label} runs before ghost's and may change the output: register it "
        "before the engine is attached, and no global forward hooks"
    )


def used_before(label: str) -> CaptureError:
    """Say that a hook of the user's runs between ghost's and the module."""
    return CaptureError(
        f"a forward pre-hook on {label} runs after ghost's and may use parameters: register it "
        "before the engine is attached"
    )


def called_with_another(label: str, local: str) -> CaptureError:
    """Say that a module was called with something in place of a parameter."""
    return CaptureError(
        f"{label} was called with another value for its {local} (by torch.func.functional_call?), "
        "whose gradient is not the parameter's"
    )


def in_parts(what: str, name: str) -> WrongSplitError:
    """Say that something happened inside of a function of `torch.func`.

    Args:
        what: What happened.
        name: The module whose parameters it is about.
    """
    return WrongSplitError(
        f"gradients cannot be split by sample: {what} inside of torch.vmap, or of another function "
        "of torch.func",
        reason="tensors are taken apart there, and the gradients of their parts are not seen",
        remedy="call it on whole tensors, outside of that; let the module around it run again as "
        f"one, units='...'; or leave it out with exclude={name!r}",
    )


def packed_unasked(label: str, name: str) -> WrongSplitError:
    """Say that nobody asks whose the rows of a packed sequence are.

    Args:
        label: The module that got it.
        name: Its name.
    """
    return WrongSplitError(
        f"gradients cannot be split by sample: {label} got a PackedSequence",
        reason="whose each of its rows is, each pass has to be asked, and verify=False asks none",
        remedy="leave verify=False out; give it padded sequences; say which sample each row "
        f"belongs to, with row_owner={{{name!r}: key}}; or leave it out with exclude={name!r}",
    )


def hooked(label: str) -> WrongSplitError:
    """Say that a module's backward hooks hide what it computes for all samples.

    Args:
        label: The module.
    """
    return WrongSplitError(
        f"gradients cannot be split by sample: {label} has backward hooks, and is called on "
        "nothing of the samples",
        reason="such hooks make another tensor of what the module returns, which cannot be "
        "followed to where it meets the samples",
        remedy="put the hook on the tensor that it returns, with Tensor.register_hook, remove it "
        "while the engine is attached, or leave the module out with exclude=...",
    )


def declared_wrongly(label: str) -> WrongSplitError:
    """Say that a module which was declared to have nothing of the samples got values with a graph.

    Args:
        label: The module.
    """
    return WrongSplitError(
        f"gradients cannot be split by sample: {label} is declared to be called on nothing of the "
        "samples, by batch_dim, and was called on values that other parameters had computed",
        reason="under frozen(), what such a module returns begins a graph of its own",
        remedy="leave it out of batch_dim, or attach by `with engine:` instead of frozen()",
    )


def written_to_samples(operation: str, names: Sequence[str]) -> WrongSplitError:
    """Say that a shared value was written into values of samples."""
    return WrongSplitError(
        f"gradients cannot be split by sample: {operation} writes a value that is the same for "
        f"all samples, computed by {', '.join(names)}, into values of samples",
        reason="what was written cannot be told apart by sample",
        remedy="use an operation that is not in place, or leave these modules out with exclude=...",
    )


def hidden_in_function(function: str, names: Sequence[str], what: str) -> WrongSplitError:
    """Say that a custom function does not tell what samples do to a parameter."""
    return WrongSplitError(
        f"{', '.join(names)}: used in a function with a backward pass of its own, {function}, "
        f"which has {what}",
        reason="per-sample gradients cannot be seen there",
        remedy="let it return rows of samples, such as losses that are not added up, and measure a "
        f"module before it; or leave parameters out with exclude={','.join(names)!r}",
    )


def not_repeatable(function: str, names: Sequence[str]) -> WrongSplitError:
    """Say that the backward pass of a custom function may run only once."""
    return WrongSplitError(
        f"{', '.join(names)}: used in a function, {function}, whose backward pass gives something "
        "else when it runs again",
        reason="it is run again for each sample, and writes to what it keeps",
        remedy="let it leave alone what it keeps, or leave parameters out with "
        f"exclude={','.join(names)!r}",
    )
