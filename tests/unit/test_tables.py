"""Tables: figures over seeds, the three formats, and what is on record of others."""

from __future__ import annotations

import csv
import io
import statistics

import pytest

from dataset import OBJECTS, object_name
from engine.tables import Figure, Table, latex, read_published
from utils import InputError


def test_a_figure_over_seeds():
    figure = Figure.over([0.9, 0.8, 0.85], [[0.8, 1.0], [0.6, 0.9], [0.7, 0.95]], planned=3)
    assert figure.mean == pytest.approx(85)
    assert figure.std == pytest.approx(statistics.stdev([90, 80, 85]))
    assert figure.interval == pytest.approx((70, 95))
    assert str(figure) == "85.00 ± 5.00 [70.00, 95.00]"
    assert str(Figure.over([0.9, 0.8], [[0.8, 1.0], [0.6, 0.9]], planned=3)).endswith("(2 of 3 seeds)")
    assert str(Figure.over([0.9], [[0.8, 1.0]], planned=1)) == "90.00 [80.00, 100.00]"  # one seed has no deviation
    assert Figure.over([], [], planned=3) is None
    assert str(Figure(92.4)) == "92.40"


@pytest.fixture
def table():
    found = Table("AUC of 50% & more.", ["data set"], ["ours", "theirs"], ["Note_1."])
    found.rows.append((["a|b"], [Figure.over([0.5, 0.7], [[0.4, 0.6], [0.6, 0.8]], planned=2), Figure(92.0)]))
    found.rows.append((["Retina_RESC"], [None, "not on record"]))
    return found


def test_markdown(table):
    lines = table.markdown().splitlines()
    assert lines[0] == "AUC of 50% & more."
    assert lines[2:6] == [
        "| data set | ours | theirs |",
        "| --- | ---: | ---: |",
        r"| a\|b | 60.00 ± 14.14 [50.00, 70.00] | 92.00 |",
        "| Retina_RESC |  | not on record |",
    ]
    assert lines[-1] == "Note_1."


def test_latex(table):
    text = table.latex()
    assert r"\caption{AUC of 50\% \& more. Note\_1.}" in text
    assert r"a|b & 60.00 $\pm$ 14.14 [50.00, 70.00] & 92.00 \\" in text
    assert r"Retina\_RESC &  & not on record \\" in text
    assert latex("a\\b~c^d{}#$") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{\}\#\$"
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert all(line.count("&") - line.count(r"\&") == 2 for line in body.splitlines()[1:])


def test_csv_has_a_line_for_each_figure(table):
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [(row["data set"], row["column"]) for row in rows] == [
        ("a|b", "ours"), ("a|b", "theirs"), ("Retina_RESC", "ours"), ("Retina_RESC", "theirs")
    ]  # fmt: skip
    assert float(rows[0]["std"]) == pytest.approx(14.142136)
    assert (rows[0]["ci95_low"], rows[0]["ci95_high"], rows[0]["seeds"]) == ("50.000000", "70.000000", "2")
    assert (rows[1]["mean"], rows[1]["seeds"]) == ("92.000000", "")
    assert {rows[2][name] for name in ("mean", "std", "ci95_low", "seeds", "note")} == {""}
    assert (rows[3]["mean"], rows[3]["note"]) == ("", "not on record")


def test_what_is_on_record():
    found = {(column.method, column.source): column for column in read_published()}
    readme = found["MVFA", "README of MVFA"]
    assert [readme.figure("Brain", 4, metric).mean for metric in ("auc", "pauc")] == [92.44, 97.30]
    assert readme.figure("Retina_OCT2017", 4, "auc").mean == 99.38
    assert readme.figure("Brain", 16, "auc") is None  # it has no figure for 16 shots
    assert readme.figure("Mine", 4, "auc") is None
    rerun = found["MadCLIP", "third-party rerun, README of SGGP"]
    assert [rerun.figure("Liver", 4, metric).mean for metric in ("auc", "pauc")] == [83.42, 99.55]
    paper = found["MadCLIP", "its paper (MICCAI 2025)"]
    assert paper.figure("Brain", 4, "auc") == paper.figure("Liver", 16, "pauc") == "not on record"
    assert len(found) == 5
    for column in found.values():
        if column.figures:
            assert set(column.figures["auc"]) == set(OBJECTS)
            assert set(column.figures["pauc"]) == {"Brain", "Liver", "Retina_RESC"}


def test_the_record_is_no_data_set():
    assert "published_results" not in OBJECTS
    with pytest.raises(InputError, match="describes no data set"):
        object_name("published_results")
