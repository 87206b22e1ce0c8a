"""The notebook docs/tour.ipynb: it runs from its own folder, and its size stays small."""

import nbformat
from nbclient import NotebookClient

from tests.helpers.commands import ROOT

PATH = ROOT / "docs" / "tour.ipynb"


def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(PATH, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(len(cell.source.splitlines()) for cell in code) <= 120
    assert PATH.stat().st_size < 1_500_000
    before = [[output.output_type for output in cell.outputs] for cell in code]
    assert all(before[1:]), "a cell without its output"  # the first only prepares
    for cell in code:
        cell.source = cell.source.replace("--epoch 12", "--epoch 3")
        cell.outputs = []
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    for cell, kinds in zip(code, before, strict=True):
        assert {output.output_type for output in cell.outputs} >= set(kinds)
