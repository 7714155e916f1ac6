"""Configs are checked field by field; what does not exist is named with what does."""

import json
from dataclasses import fields

import numpy as np
import pytest

from ghost_core import CaptureError, UnknownNameError
from ghost_engines import RunConfig

yaml = pytest.importorskip("yaml")

FIELDS = {
    "folder": "runs/a",
    "method": ["dot_product", "projection"],
    "mode": "fused",
    "options": {"projection": {"dim": 16}, "dot_product": {"exclude": ["*.bias"]}},
    "values": True,
    "order": 2,
    "history": 10,
    "refresh": 5,
    "log_every": 20,
    "policy": {"greedy": {"k": 4}},
    "target": "val",
}


def written(tmp_path, given):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def test_a_file_says_all_fields(tmp_path):
    assert FIELDS.keys() == {each.name for each in fields(RunConfig)}
    config = RunConfig.read(written(tmp_path, FIELDS))
    assert config == RunConfig(**FIELDS) == RunConfig.of(FIELDS)
    assert config.engines == ("dot_product", "projection")
    assert config.to_dict() == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_a_misspelt_field_names_the_nearest(name, tmp_path):
    wrong = name[:-2] + name[-1]
    given = {wrong if each == name else each: value for each, value in FIELDS.items()}
    with pytest.raises(UnknownNameError, match=rf"'{wrong}'; did you mean '{name}'\? Available:"):
        RunConfig.read(written(tmp_path, given))
    with pytest.raises(TypeError, match=name):
        RunConfig(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dot_produkt"}, "unknown method 'dot_produkt'; did you mean 'dot_product'"),
        ({"method": "regular"}, "cosine, dot_product, gram, none, norm, projection"),
        ({"method": ["none", "gram"]}, "beside others"),
        ({"method": ["gram", "gram"]}, "twice"),
        ({"method": []}, "name or a list of names"),
        ({"mode": "fussed"}, "did you mean 'fused'"),
        ({"method": "projection", "mode": "fused"}, "only the engine dot_product has modes"),
        ({"options": {"gram": {}}}, "unknown engine in options 'gram'"),
        ({"options": {"dot_product": {"mode": "fused"}}}, "mode is a field of its own"),
        ({"options": {"dot_product": {"registry": object()}}}, "cannot be written to a file"),
        (
            {"options": {"dot_product": {"exlude": "*"}}},
            "unknown option of DotProductEngine 'exlude'; did you mean 'exclude'",
        ),
        ({"options": 3}, "must be a mapping"),
        ({"options": {"dot_product": {"model": "a"}}}, "DotProductEngine 'model'.* Available: bat"),
        ({"values": "yes"}, "values must be True or False"),
        ({"order": 3}, "order must be 1 or 2"),
        ({"order": 2.0}, "order must be"),
        ({"order": True}, "order must be"),
        ({"method": [["a"]]}, "name or a list of names"),
        ({"folder": "a\0b"}, "folder must be a path"),
        ({"history": 0}, "history must be at least 1"),
        ({"refresh": "1"}, "refresh must be at least 1, a whole number"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"folder": 3}, "folder must be a path"),
        ({"policy": "topk"}, "did you mean 'top_k'[?] Available: greedy, random, threshold, top_k"),
        ({"policy": 3}, "a name, or a mapping of one name to its options, not 3"),
        ({"policy": {"top_k": {"k": 1}, "greedy": {}}}, "a mapping of one name to its options"),
        ({"policy": {"top_k": 3}}, "options of top_k must be a mapping"),
        ({"policy": {"greedy": {"rl": 1}}}, "unknown option of policy greedy 'rl'"),
        ({"policy": {"top_k": {"k": 0}}}, "k must be at least 1"),
        ({"policy": {"greedy": {"k": object()}}}, "cannot be written to a file"),
        ({"policy": "threshold", "method": "none"}, "by scores, and method='none' has none"),
        ({"policy": "threshold", "method": "norm"}, "by scores, and method='norm' has none"),
        ({"policy": "threshold", "mode": "concatenated"}, "not go with mode='concatenated'"),
        ({"policy": "threshold", "target": 3}, "target must be a str"),
        ({"target": "val"}, "target='val' without a policy"),
        ({"policy": {"random": {"k": 1}}, "target": "val"}, "target='val' without a policy"),
    ],
)
def test_a_wrong_value_says_what_is_right(changes, message):
    with pytest.raises((CaptureError, UnknownNameError), match=message):
        RunConfig(**{"folder": "a"} | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("method: none", "has no folder"), ("- a", "mapping"), ("a: [", "no YAML"), ("1: 2", "1")],
)
def test_a_file_that_is_no_config_is_refused(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises((CaptureError, UnknownNameError), match=message):
        RunConfig.read(path)


def test_numbers_of_numpy_are_as_pythons_own():
    given = {"values": np.bool_(False)}
    given |= {name: np.int64(2) for name in ("order", "history", "refresh", "log_every")}
    found = RunConfig(folder="a", **given)
    assert found.values is False
    assert json.loads(json.dumps(found.to_dict()))["order"] == 2
