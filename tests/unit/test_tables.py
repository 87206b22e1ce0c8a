"""Tables: figures over seeds, the three formats, and what is on record of others."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import statistics
import subprocess

import pytest

from dataset import OBJECTS, object_name
from engine.study.tables import Statistic, Table, latex, read_published
from utils import InputError


def test_a_figure_over_seeds():
    figure = Statistic.over([0.9, 0.8, 0.85], [[0.8, 1.0], [0.6, 0.9], [0.7, 0.95]], planned=3)
    assert figure.mean == pytest.approx(85)
    assert figure.std == pytest.approx(statistics.stdev([90, 80, 85]))
    assert figure.interval == pytest.approx((70, 95))
    assert str(figure) == "85.00 ± 5.00"
    assert str(Statistic.over([0.9, 0.8], [[0.8, 1.0], [0.6, 0.9]], planned=3)).endswith("(2 of 3 seeds)")
    assert str(Statistic.over([0.9], [[0.8, 1.0]], planned=1)) == "90.00"  # one seed has no deviation
    assert Statistic.over([0.9, 0.8], [], planned=2).interval is None
    assert str(Statistic(92.4)) == "92.40"


@pytest.fixture
def table():
    result = Table("main", "AUC of 50% & more (--select test).", ["method"], notes=["Note_1."])
    result.add("image AUC", ["a|b"], "Brain", Statistic.over([0.5, 0.7], [[0.4, 0.6], [0.6, 0.8]], planned=2))
    result.add("image AUC", ["a|b"], "Retina_RESC", "to do")
    result.add("image AUC", ["theirs"], "Brain", Statistic(92.0))
    result.add("image AUC", ["theirs"], "Retina_RESC", None)
    result.add("image AUC", ["nobody's"], "Brain", None)
    result.add("image AUC", ["a|b"], "Chest", None)
    result.add("pixel AUC", ["a|b"], "Brain", Statistic.over([0.99], [[0.98, 1.0]], planned=1))
    return result


def test_markdown(table):
    lines = table.markdown().splitlines()
    assert lines[0] == "AUC of 50% & more (--select test)."
    assert lines[2:9] == [
        "| metric | method | Brain | Retina_RESC |",
        "| --- | --- | ---: | ---: |",
        r"| image AUC | a\|b | 60.00 ± 14.14 | to do |",
        "| image AUC | theirs | 92.00 |  |",
        r"| pixel AUC | a\|b | 99.00 |  |",
        r"| image AUC, 95% interval | a\|b | [50.00, 70.00] |  |",
        r"| pixel AUC, 95% interval | a\|b | [98.00, 100.00] |  |",
    ]
    assert "Note_1." in lines
    assert "Chest" not in table.markdown()
    assert "nobody" not in table.markdown()


def test_latex(table):
    text = table.latex()
    assert r"\caption{AUC of 50\% \& more (-{}-select test).}" in text
    assert r"image AUC & a$|$b & 60.00 $\pm$ 14.14 & to do \\" in text
    assert r" & theirs & 92.00 &  \\" in text  # the metric stands above
    assert r"{Note\_1.}" in text
    assert latex("a\\b~c^d{}#$<") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{\}\#\$$<$"
    assert text.count(r"\begin{table*}") == text.count(r"\end{table*}") == 1


def test_a_long_table_is_divided_and_its_notes_are_three_lines():
    result = Table("ablation", "Caption.", ["setting"], notes=["Short one." * 10] * 8)
    for i in range(90):
        result.add("image AUC", [str(i)], "Brain", Statistic(50))
    text = result.latex()
    assert text.count(r"\begin{table*}") == 3
    assert text.count("Short one.") == 40  # of 8 notes, 100 characters each, 4 fit
    assert result.markdown().count("Short one.") == 80


def test_csv_has_a_line_for_each_figure(table):
    table.add("image AUC", ["=HYPERLINK(1)"], "Brain", "-x")
    rows = list(csv.DictReader(io.StringIO(table.csv())))
    assert [(row["method"], row["data set"], row["metric"]) for row in rows] == [
        ("a|b", "Brain", "image AUC"),
        ("a|b", "Retina_RESC", "image AUC"),
        ("theirs", "Brain", "image AUC"),
        ("a|b", "Brain", "pixel AUC"),
        ("'=HYPERLINK(1)", "Brain", "image AUC"),  # a spreadsheet would compute it
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
    assert "60.00" in kept.read_text()  # what is of the same scope is replaced
    assert kept.stem in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 6


def six_by(rows: int, caption_words: int = 35) -> Table:
    """A table as wide as the paper's, with the longest names and figures."""
    text = " ".join(["MadCLIP --select"] + ["words"] * caption_words)
    notes = [f"({i}) MadCLIP: third-party rerun, README of SGGP, 4 shots, best on the test set." for i in range(8)]
    result = Table("main", text, ["component", "method"], notes=notes)
    for metric in ("image AUROC", "pixel AUROC"):
        for i in range(rows):
            for obj in OBJECTS:
                figure = Statistic(99.99, 12.34, (88.88, 99.99), 3, 3)
                result.add(metric, ["dual objective", f"selected on test, clean {i}"], obj, figure)
    return result


def compile_latex(table: Table, folder) -> tuple[str, str]:
    """The log of pdflatex in a two-column article, and the PDF's text."""
    preamble = r"\documentclass[twocolumn]{article}\usepackage{booktabs,graphicx}\begin{document}\sloppy"
    prose = "Much is written around tables in articles. " * 20 + "\n\n"
    (folder / "paper.tex").write_text(f"{preamble}\n{prose}\n{table.latex()}\n{20 * prose}" + r"\end{document}")
    for _ in range(2):  # twice, for the reference
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, done.stdout[-2000:]
    text = subprocess.run(
        ["pdftotext", "-layout", "paper.pdf", "-"], cwd=folder, capture_output=True, check=True
    ).stdout
    return (folder / "paper.log").read_text(errors="replace"), text.decode()


@pytest.mark.skipif(not shutil.which("pdflatex") or not shutil.which("pdftotext"), reason="no TeX here")
@pytest.mark.parametrize("rows", [8, 30])
def test_the_latex_compiles_and_fits_a_two_column_article(tmp_path, rows):
    log, text = compile_latex(six_by(rows), tmp_path)
    assert "Overfull" not in log
    assert "too large" not in log  # no float is higher than its page
    assert "undefined" not in log
    assert "--select" in text  # no dash
    assert len(re.findall(r"99\.99 ± 12\.34", text)) == 2 * 6 * rows
    assert text.count("[88.88, 99.99]") == 2 * 6 * rows
    before_header = text[text.index("Table 1:") : text.index("component")]
    assert len([line for line in before_header.splitlines() if line.strip()]) <= 3  # the caption


def test_what_is_on_record():
    published = {(column.method, column.source): column for column in read_published()}
    readme = published["MVFA", "README of MVFA"]
    assert [readme.figure("Brain", metric).mean for metric in ("auc", "pauc")] == [92.44, 97.30]
    assert readme.figure("Retina_OCT2017", "auc").mean == 99.38
    assert readme.figure("Mine", "auc") is None
    rerun = published["MadCLIP", "third-party rerun, README of SGGP"]
    assert [rerun.figure("Liver", metric).mean for metric in ("auc", "pauc")] == [83.42, 99.55]
    sggp = published["MadCLIP+SGGP", "README of SGGP"]
    assert [sggp.figure("Brain", metric).mean for metric in ("auc", "pauc")] == [92.85, 97.33]
    assert published["MVFA+SGGP", "README of SGGP"].figure("Retina_RESC", "pauc").mean == 99.03
    mpr = next(column for column in published.values() if column.method == "MPR")
    assert mpr.figure("Brain", "auc").mean == 96.46
    assert mpr.figure("Brain", "pauc") is None
    paper = published["MadCLIP", "its paper (MICCAI 2025)"]
    assert (paper.auc, paper.pauc) == (None, None)
    assert len(published) == 8
    for column in published.values():
        assert (column.selection is None) == (column.method == "IQE-CLIP")
        if column.auc:
            assert set(column.auc) == set(OBJECTS)
            assert set(column.pauc or {}) in ({"Brain", "Liver", "Retina_RESC"}, set())


def test_a_users_own_figures(tmp_path):
    path = tmp_path / "mine.json"
    entry = {"method": "Mine", "source": "paper", "shots": 16, "auc": {"Brain": 95.5}}
    path.write_text(json.dumps({"results": [entry]}))
    mine = read_published([path])[-1]
    assert (mine.method, mine.shots, mine.figure("Brain", "auc").mean) == ("Mine", 16, 95.5)
    assert mine.note() == "Mine: paper, 16 shots, selection not stated"
    wrong = ({"auc": {"Brain": 0.955}}, {"auc": [95]}, {"shots": None}, {"shots": 0}, {"shots": "4"}, {"AUC": {}})
    for change in wrong:
        path.write_text(json.dumps({"results": [entry, {**entry, **change}]}))
        with pytest.raises(InputError, match=r"mine.json, entry 2: "):
            read_published([path])
    path.write_text("{")
    for other in (path, tmp_path / "none.json"):
        with pytest.raises(InputError, match=other.name):
            read_published([other])


def test_the_record_is_no_data_set():
    assert "published_results" not in OBJECTS
    with pytest.raises(InputError, match="describes no data set"):
        object_name("published_results")
