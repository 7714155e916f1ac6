"""The losses that commands know by name, and the one that they take by default."""

import pytest
import torch
from command_kit import score, verify

from ghost_core import GhostError
from ghost_engines.cli.losses import load_loss, next_token_losses

# The default loss


def naive_losses(logits, batch):
    """Return losses by a loop over tokens."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = []
    for sample in range(len(ids)):
        terms = [
            -logits[sample, at].log_softmax(-1)[ids[sample, at + 1]]
            for at in range(ids.shape[1] - 1)
            if mask[sample, at] and mask[sample, at + 1]
        ]
        found.append(sum(terms) / len(terms) if terms else torch.zeros(()))
    return torch.stack(found)


@pytest.fixture
def padded():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
    ids = torch.randint(1, 19, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_default_loss_is_the_mean_over_tokens_that_are_not_padding(dtype, padded, transformer):
    model = transformer.to(dtype)
    losses = next_token_losses(model, padded)
    logits = model(padded["input_ids"])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert losses.dtype == wide
    torch.testing.assert_close(losses, naive_losses(logits.to(wide), padded).to(wide))
    assert losses[-1] == 0


def test_default_loss_takes_ids_alone(padded, transformer):
    ids = padded["input_ids"]
    everything = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = next_token_losses(transformer, everything)
    assert torch.equal(next_token_losses(transformer, ids), expected)
    assert torch.equal(next_token_losses(transformer, {"input_ids": ids}), expected)


def test_losses_go_by_name(padded, transformer):
    mask = padded["attention_mask"]
    tokens = (mask[:, 1:] * mask[:, :-1]).sum(1)
    mean, summed = (load_loss(name)[0](transformer, padded) for name in ("mean", "sum"))
    assert tokens.max() > 1
    assert torch.equal(load_loss(None)[0](transformer, padded), mean)
    torch.testing.assert_close(summed, mean * tokens)


@pytest.mark.parametrize("command", [score, verify])
def test_their_names_are_in_the_help(command, capsys):
    with pytest.raises(SystemExit):
        command("--help")
    assert "mean or sum over the next tokens" in " ".join(capsys.readouterr().out.split())


def test_default_loss_gives_a_model_the_inputs_it_takes(padded, transformer):
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = transformer

        def forward(self, attention_mask, input_ids, wrap=None):
            assert attention_mask is padded["attention_mask"]
            logits = self.inner(input_ids)
            return {"tuple": (logits, 0), "object": Output(logits), None: logits}[wrap]

    class Reader(torch.nn.Module):
        def forward(self, input_ids, decoder_input_ids):
            assert decoder_input_ids is input_ids
            return transformer(input_ids)

    expected = next_token_losses(transformer, padded)
    assert torch.equal(next_token_losses(Model(), padded), expected)
    assert torch.equal(next_token_losses(Reader(), padded), expected)
    for wrap in ("tuple", "object"):
        model = Model()
        model.forward = lambda attention_mask, input_ids, m=model, w=wrap: Model.forward(
            m, attention_mask, input_ids, w
        )
        assert torch.equal(next_token_losses(model, padded), expected)


def test_a_batch_that_the_default_loss_does_not_know(capsys):
    assert verify("subjects:mlp", "--data", "subjects:batch") == 2
    said = capsys.readouterr()
    assert said.err == (
        "ghost: the batch has no token ids [N, T]: give a loss for it, --loss module:function\n"
    )


def test_a_model_that_the_default_loss_does_not_know(capsys, tmp_path):
    (tmp_path / "other.py").write_text(
        "import torch\n\n\ndef model():\n    return torch.nn.Embedding(19, 3).double()\n\n\n"
        "def bags():\n    return torch.nn.EmbeddingBag(19, 3).double()\n"
    )
    assert verify("other:bags", "--data", "subjects:ids") == 2
    assert "returned no logits (5, 7, 'vocabulary'), but (5, 3): give a loss" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("mask", ["no", torch.ones(3), torch.full((2, 5), torch.nan)])
def test_a_mask_that_the_default_loss_does_not_know(mask, transformer):
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": mask}
    with pytest.raises(GhostError, match="attention_mask is not one finite number for each"):
        next_token_losses(transformer, batch)


@pytest.mark.parametrize(
    ("given", "told"),
    [("mena", r"did you mean 'mean'\?$"), ("Sum", r"did you mean 'sum'\?$"), ("xyz", "function$")],
)
def test_a_loss_that_is_misspelt_names_those_that_there_are(given, told):
    expected = f"--loss: '{given}' is not 'mean' or 'sum', and not of the form module:function"
    with pytest.raises(GhostError, match=told) as caught:
        load_loss(given)
    assert str(caught.value).startswith(expected)
