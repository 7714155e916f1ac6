import copy

import torch
from torch import nn

from ghost_engines import model_digest


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())


def test_equal_models_have_equal_digests():
    assert model_digest(model()) == model_digest(copy.deepcopy(model()))


def test_whatever_changes_the_model_changes_the_digest():
    digests = {model_digest(model())}
    with torch.no_grad():
        changed = model()
        changed[0].weight[1, 2] += 1e-6
        digests.add(model_digest(changed))
        changed = model()
        changed[1].running_mean[0] = 1
        digests.add(model_digest(changed))
    digests.add(model_digest(model().double()))
    digests.add(model_digest(nn.ModuleList(model()[:2])))
    assert len(digests) == 5
