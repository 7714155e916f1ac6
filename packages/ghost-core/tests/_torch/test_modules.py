"""Parameters of modules, against what torch says itself."""

from torch import nn

from ghost_core._torch import any_gradient_hooks, is_of_torch, parameters_by_name


def test_parameters_have_the_names_and_the_order_that_torch_gives_them():
    shared, tied = nn.Linear(2, 2), nn.Embedding(3, 2)
    model = nn.Sequential(shared, nn.Sequential(nn.LayerNorm(2), shared), nn.Linear(2, 3), tied)
    model[2].weight = tied.weight
    model[1].own = nn.Parameter(tied.weight.detach())
    model[1].bias = None
    model.register_module("none", None)
    model.register_parameter("nothing", None)
    shared.around = nn.ModuleList([model[1]])  # a circle
    found, expected = parameters_by_name(model), dict(model.named_parameters())
    assert list(found) == list(expected)
    assert all(found[name] is expected[name] for name in expected)
    assert {"3.weight", "1.1.weight"}.isdisjoint(found)


def test_hooks_on_any_gradient_are_seen():
    parameters = list(nn.Linear(2, 2).parameters())
    assert not any_gradient_hooks(parameters)
    handle = parameters[1].register_hook(lambda grad: grad)
    assert any_gradient_hooks(parameters)
    handle.remove()
    assert not any_gradient_hooks(parameters)


def test_modules_of_torch_are_told_from_those_with_code_of_others_inside():
    class Own(nn.Linear):
        pass

    attention = nn.MultiheadAttention(4, 2)
    assert is_of_torch(attention)
    attention.out_proj = Own(4, 4)
    assert not is_of_torch(attention)
    assert not is_of_torch(nn.Sequential(nn.ReLU(), Own(2, 2)))
