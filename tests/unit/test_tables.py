"""Tables: statistics over seeds, output formats, and published or user-supplied figures."""

import csv
import io
import json
import statistics

import pytest

from engine.study.tables import Statistic, Table, read_published
from utils import InputError


def test_statistic_over_seeds():
    figure = Statistic.over([0.9, 0.8, 0.85], [[0.8, 1.0], [0.6, 0.9], [0.7, 0.95]], planned=3)
    assert figure.mean == pytest.approx(85)
    assert figure.std == pytest.approx(statistics.stdev([90, 80, 85]))
    assert figure.interval == pytest.approx((70, 95))
    assert str(figure) == "85.00 ± 5.00"
    assert str(Statistic.over([0.9, 0.8], [[0.8, 1.0], [0.6, 0.9]], planned=3)).endswith("(2 of 3 seeds)")
    assert str(Statistic.over([0.9], [[0.8, 1.0]], planned=1)) == "90.00"  # one seed has no standard deviation
    assert Statistic.over([0.9, 0.8], [], planned=2).interval is None
    assert str(Statistic(92.4)) == "92.40"


@pytest.fixture
def table():
    result = Table("main", "AUC of 50% & more (--select test).", ["method"], notes=["Note_1."])
    result.add("image AUC", ["a|b"], "Brain", Statistic.over([0.5, 0.7], [[0.4, 0.6], [0.6, 0.8]], planned=2))
    result.add("image AUC", ["a|b"], "Retina_RESC", "to do")
    result.add("image AUC", ["theirs"], "Brain", Statistic(92.0))
    result.add("image AUC", ["nobody's"], "Chest", None)
    result.add("pixel AUC", ["a|b"], "Brain", Statistic.over([0.99], [[0.98, 1.0]], planned=1))
    return result


def test_markdown(table):
    lines = table.markdown().splitlines()
    assert lines[0] == "AUC of 50% & more (--select test)."
    assert lines[2:9] == [
        "| metric | method | Brain | Retina_RESC |",  # empty columns and rows are omitted
        "| --- | --- | ---: | ---: |",
        r"| image AUC | a\|b | 60.00 ± 14.14 | to do |",
        "| image AUC | theirs | 92.00 |  |",
        r"| pixel AUC | a\|b | 99.00 |  |",
        r"| image AUC, 95% interval | a\|b | [50.00, 70.00] |  |",
        r"| pixel AUC, 95% interval | a\|b | [98.00, 100.00] |  |",
    ]
    assert "Note_1." in lines


def test_csv_has_a_line_for_each_figure(table):
    table.add("image AUC", ["=HYPERLINK(1)"], "Brain", "-x")
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [(row["method"], row["data set"], row["metric"]) for row in rows] == [
        ("a|b", "Brain", "image AUC"),
        ("a|b", "Retina_RESC", "image AUC"),
        ("theirs", "Brain", "image AUC"),
        ("a|b", "Brain", "pixel AUC"),
        ("'=HYPERLINK(1)", "Brain", "image AUC"),  # else a spreadsheet would run it
    ]
    assert float(rows[0]["std"]) == pytest.approx(14.142136)
    assert (rows[0]["ci95_low"], rows[0]["ci95_high"], rows[0]["seeds"]) == ("50.000000", "70.000000", "2")
    assert {rows[1][name] for name in ("mean", "std", "ci95_low", "seeds")} == {""}
    assert (rows[1]["note"], rows[4]["note"]) == ("to do", "'-x")
    assert (rows[2]["mean"], rows[2]["seeds"]) == ("92.000000", "")


def test_files_of_another_scope_are_kept(tmp_path, capsys):
    for scope, figure in (("--obj Brain", 50), ("--obj Brain", 60), ("--obj Chest", 70)):
        table = Table("main", "Caption.", ["method"], scope=scope)
        table.add("image AUC", ["ours"], scope.split()[1], Statistic(figure))
        table.write(tmp_path)
    assert "70.00" in (tmp_path / "main.md").read_text()
    (kept,) = tmp_path.glob("main.before-*.md")
    assert "60.00" in kept.read_text()  # a file of the same scope is replaced
    assert kept.stem in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 6


def test_user_supplied_figures(tmp_path):
    path = tmp_path / "mine.json"
    entry = {"method": "Mine", "source": "paper", "shots": 16, "auc": {"Brain": 95.5}}
    path.write_text(json.dumps({"results": [entry]}))
    mine = read_published([path])[-1]
    assert (mine.method, mine.shots, mine.figure("Brain", "auc").mean) == ("Mine", 16, 95.5)
    wrong = ({"auc": {"Brain": 0.955}}, {"shots": 0}, {"AUC": {}})
    for change in wrong:
        path.write_text(json.dumps({"results": [entry, {**entry, **change}]}))
        with pytest.raises(InputError, match=r"mine.json, entry 2: "):
            read_published([path])
