"""The first verified batch of a program, and a comparison, import no compiler and no sympy."""

from tests.fresh import Fresh

_PROGRAM = """
import sys
import torch
from torch import nn
from ghost_engines import NormEngine

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.mix(self.norm(x)).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))

class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.blocks(self.tokens(x) + self.places(torch.arange(6)[None])))

class Scaled(nn.Module):  # replayed
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return x * self.scale.exp()

for model, x in (
    (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)),
    (nn.Sequential(nn.Linear(3, 3), Scaled(), nn.Linear(3, 2)), torch.randn(4, 3)),
    (Decoder(), torch.randint(0, 11, (4, 6))),
):
    with NormEngine(model, loss_weights="sum") as engine, engine.batch(range(4)) as batch:
        model(x).square().sum().backward()
    assert batch.verified
    assert engine.verify(lambda: model(x).square().flatten(1).sum(1)).ok
print(*(name for name in ("torch._dynamo", "sympy") if name in sys.modules))
"""


def test_a_verified_batch_imports_no_compiler_and_no_computer_algebra(fresh: Fresh) -> None:
    run = fresh(_PROGRAM)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
