"""A folder with modules that the command imports functions from, and a small checkpoint."""

import importlib.util
import sys

import pytest
import torch
from command_kit import SUBJECTS


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Work in a folder that has the module `subjects`."""
    (tmp_path / "subjects.py").write_text(SUBJECTS)
    (tmp_path / "faulty.py").write_text("import missing_dependency\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a small GPT-2 in bfloat16, and a tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    words = ["<unk>", "<eos>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "and"]
    known = tokenizers.models.WordLevel(
        {word: at for at, word in enumerate(words)}, unk_token="<unk>"
    )
    tokenizer = tokenizers.Tokenizer(known)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _logged():
    """Let the logger of transformers take a stream that outlives each test."""
    if importlib.util.find_spec("transformers"):
        importlib.import_module("transformers.utils.logging").get_logger()
