from __future__ import annotations

from pathlib import Path

import pytest

from ghost_engines import ScoreLog
from ghost_examples import trainer_values

SMALL = ["--per-domain", "2", "--length", "16", "--width", "8", "--epochs", "1", "--batch", "4"]


@pytest.mark.stress
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_values_by_domain_are_printed_and_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_values.main([str(tmp_path), *SMALL])
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[0].split() == ["group", "value_scripture", "value_python", "samples"]
    assert {line.split()[0] for line in table[1:]} == {
        "scripture", "python", "dictionary", "manual"
    }  # fmt: skip
    log = ScoreLog.open(tmp_path / "ghost" / "log")
    assert sorted(log.totals().ids.tolist()) == list(range(8))
    trainer_values.main([str(tmp_path), *SMALL])  # nothing is left to train
    assert capsys.readouterr().out.splitlines()[-5:] == table
