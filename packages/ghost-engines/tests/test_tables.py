"""Tables in files and pictures."""

import csv
import json
import os

import numpy as np
import pytest

from ghost_core import MissingExtraError, UnknownNameError
from ghost_engines import ScoreTable
from ghost_engines.plots import check_picture, save
from ghost_engines.tables import check_file, extremes, write_table

SCORES = np.array([[0.1, -2.0], [1 / 3, np.nan], [-1e-300, 5.0], [0.0, np.inf]])


@pytest.fixture
def table():
    return ScoreTable(
        ids=np.array([4, 9, 2**62, -1]),
        names=("val", "a, b"),
        scores=SCORES,
        norms=np.arange(4.0),
        cosines=SCORES / 8,
        signed=True,
        verified=True,
    )


NAMES = ["id", "score_val", "score_a, b", "norm", "cosine_val", "cosine_a, b"]


def test_csv_gives_back_every_number(table, tmp_path):
    table.to_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    assert names == NAMES
    assert [int(row[0]) for row in rows] == table.ids.tolist()
    for at, column in enumerate(table.columns().values()):
        np.testing.assert_array_equal([float(row[at]) for row in rows], column.astype(float))
    assert os.listdir(tmp_path) == ["scores.csv"]


def test_json_lines_have_null_for_what_is_not_finite(table, tmp_path):
    table.to_jsonl(tmp_path / "scores.jsonl")
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [list(row) for row in rows] == [NAMES] * 4
    assert [row["score_a, b"] for row in rows] == [-2.0, None, 5.0, None]
    assert [row["score_val"] for row in rows] == SCORES[:, 0].tolist()
    assert rows[2]["id"] == 2**62


def test_pandas_has_the_columns(table):
    pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert list(frame) == NAMES
    np.testing.assert_array_equal(frame[["score_val", "score_a, b"]].to_numpy(), SCORES)
    assert frame["id"].dtype == np.int64


def test_parquet_gives_back_every_number(table, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    table.to_parquet(tmp_path / "scores.parquet")
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(tmp_path / "scores.parquet"), table.to_pandas()
    )


def test_a_missing_library_is_named_before_work_is_done(table, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ghost-engines\[pandas\]'"):
        table.to_pandas()
    with pytest.raises(MissingExtraError, match=r"pip install 'ghost-engines\[pandas\]'"):
        check_file(tmp_path / "a.parquet")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ghost-engines\[plot\]'"):
        check_picture(tmp_path / "a.png")


def test_the_kind_of_file_is_its_ending(table, tmp_path):
    write_table(table, tmp_path / "a.csv")
    table.to_csv(tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    with pytest.raises(UnknownNameError, match=r"unknown kind of file '.xlsx'. Available: .csv"):
        write_table(table, tmp_path / "a.xlsx")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .* to write a\.csv to"):
        write_table(table, tmp_path / "none" / "a.csv")


def test_a_file_that_cannot_be_written_leaves_the_old_one(table, tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        table.to_csv(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.csv"]


def test_extremes_are_finite_and_signed_in_order():
    values = np.array([0.0, 3.0, np.nan, -1.0, 3.0, np.inf, 2.0, -5.0, -np.inf])
    highest, lowest = extremes(values, 3, signed=True)
    assert highest.tolist() == [1, 4, 6]
    assert lowest.tolist() == [7, 3]
    highest, lowest = extremes(values, 4, signed=False)
    assert highest.tolist() == [1, 4, 6, 0]
    assert lowest.tolist() == [7, 3, 0, 6]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_has_a_row_for_each_target(table, tmp_path, kind):
    pytest.importorskip("matplotlib")
    figure = table.plot(tmp_path / f"scores.{kind}", top=1)
    bars, histogram, *_ = figure.axes
    assert len(figure.axes) == 4
    assert [label.get_text() for label in bars.get_yticklabels()] == ["9", str(2**62)]
    assert [bar.get_width() for bar in bars.patches] == [1 / 3, -1e-300]
    assert sum(patch.get_height() for patch in histogram.patches) == 4
    assert (tmp_path / f"scores.{kind}").stat().st_size > 1000
    assert save(figure, None) is figure
    with pytest.raises(UnknownNameError, match=r"unknown kind of picture '\.bmp'"):
        save(figure, tmp_path / "scores.bmp")
