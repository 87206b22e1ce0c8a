"""The grid of reproduce.py: cells of a table, refused arguments, costs, and contents of tables."""

import json
import shutil

import pytest

import reproduce
from dataset import phantom
from engine.files.config import train_options
from engine.study.grid import Cell, Grid, layer_choices
from engine.study.options import parse
from engine.study.tables import Statistic
from utils import InputError


def plan(tmp_path, *arguments: str):
    grid = Grid(parse(["--out", str(tmp_path), *arguments]))
    return grid.cells, grid


def test_cells_of_tables_main_and_shots(tmp_path):
    cells, _ = plan(tmp_path, "--table", "main")
    assert len(cells) == 6 * 3
    assert {cell.shot for cell in cells} == {4}
    cells, grid = plan(tmp_path, "--table", "shots", "--obj", "Brain", "--seeds", "1", "1", "--learning_rate", "0.01")
    assert [cell.name for cell in cells] == [f"Brain-{shot}shot-seed1" for shot in (2, 4, 8, 16)]
    options = train_options(grid.arguments(cells[1]))
    assert (options.shot, options.seed, options.learning_rate, options.cache) == (4, 1, 0.01, "disk")
    _, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--cache", "ram")
    assert train_options(grid.arguments(cells[0])).cache == "ram"


def test_ablation_changes_one_component_at_a_time(tmp_path):
    cells, grid = plan(tmp_path, "--table", "ablation", "--obj", "Brain", "--seeds", "111")
    assert len(cells) == len({cell.name for cell in cells}) == 20
    base = vars(grid.parse(cells[0]))
    for cell in cells[1:]:
        flag, value = cell.change
        changed = {name for name, given in vars(grid.parse(cell)).items() if given != base[name]} - {"exp_name"}
        assert changed == {flag}
        assert str(base[flag]) != value
    # The first cell is that of the main table.
    assert cells[0].name == plan(tmp_path, "--table", "main", "--obj", "Brain")[0][0].name
    flags = ["--table", "ablation", "--obj", "Brain", "--seeds", "1", "--fidelity", "corrected"]
    changes = [cell.change for cell in plan(tmp_path, *flags, "--features_list", "6")[0]]
    assert ("fidelity", "released") in changes
    assert ("fidelity", "corrected") not in changes
    assert not any(flag == "features_list" for flag, _ in changes[1:])  # one layer has no subsets
    assert layer_choices((6, 12, 18, 24)) == [
        "6", "12", "18", "24", "6 12", "18 24", "12 18 24", "6 18 24", "6 12 24", "6 12 18"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "main", "--seed", "5"], "--seed"),
        (["--table", "cross", "--obj", "Brain"], "two data sets"),
        (["--table", "leave_one_out", "--obj", "Brain", "Chest"], "Brain has masks"),
        (["--table", "leave_one_out", "--obj", "Brain", "Liver", "--select", "test"], "--select"),
        (["--table", "ablation", "--features_list", "99"], "99"),
        (["--table", "cross", "--compare", "x.json"], "--compare"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        plan(tmp_path, *arguments)


def test_a_folder_of_other_runs_is_refused(tmp_path):
    cells, grid = plan(tmp_path, "--table", "main", "--obj", "Brain")
    run = grid.run(cells[0])
    run.path.mkdir(parents=True)
    stored = {**vars(grid.parse(cells[0])), "epoch": 5, "device": "cuda", "select": "valid"}
    run.config.write_text(json.dumps({"options": stored}))
    with pytest.raises(InputError, match="--epoch 5, not 60"):
        plan(tmp_path, "--table", "main", "--obj", "Brain")
    # The device may differ, and so may --select, which a run chooses by itself.
    plan(tmp_path, "--table", "main", "--obj", "Brain", "--epoch", "5", "--device", "cpu")


def test_cost_counts_every_image_once(tmp_path):
    absent = ["--data_path", "/nowhere"]
    cells, grid = plan(tmp_path, "--table", "shots", "--obj", "Brain", "--seeds", "1", "--shots", "2", "4", *absent)
    images = 3715 + 200 + 16 * 2 * (2 + 4)
    assert f"{images:,} " in grid.cost(cells)
    assert "2.37 MB" in grid.cost(cells)  # 4 layers x 289 patches x 1024 channels x 2 bytes
    cells, grid = plan(tmp_path, "--table", "ablation", "--obj", "Brain", "--seeds", "1", *absent)
    assert f"{2 * (3715 + 200 + 16 * 8):,} " in grid.cost(cells)  # both fidelities
    with pytest.raises(InputError, match="Mine"):
        grid.cost([Cell("Mine", 4, 1)])
    phantom.write(tmp_path, ["Brain"], valid=2, test=5, seed=0, size=64)
    cells, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--seeds", "1", "--data_path", str(tmp_path))
    assert f"{10 + 200 + 16 * 8} " in grid.cost(cells)


# --- contents of tables ---


def result(auc: float, **more: object) -> dict[str, object]:
    values = {"auc": auc, "pauc": 0.97, "auc_ci95": [auc - 0.02, auc + 0.02], "pauc_ci95": [0.96, 0.98]}
    shots = {"normal": ["a.png"], "abnormal": ["b.png"]}
    return {**values, "select": "test", "shots": shots, "last": {**values, "auc": auc - 0.1}, **more}


@pytest.fixture
def grid_with_results(tmp_path):
    """Makes a grid of Brain and Chest with two seeds; all cells but one are finished."""
    phantom.write(tmp_path / "data", ["Brain", "Chest"], valid=2, test=2, seed=0, size=64)
    arguments = ["--table", "main", "--obj", "Brain", "Chest", "--seeds", "1", "2"]
    arguments += ["--data_path", str(tmp_path / "data"), "--out", str(tmp_path)]
    clean = {"auc_without_shot_patients": 0.90, "pauc_without_shot_patients": None}

    def make(*more: str, **values: object):
        grid = Grid(parse([*arguments, *more]))
        for cell, auc in zip(grid.cells, (0.92, 0.94, 0.80), strict=False):
            run = grid.run(cell)
            run.path.mkdir(parents=True, exist_ok=True)
            run.result.write_text(json.dumps(result(auc, **{**clean, **values})))
        return grid.cells, grid

    return make


def test_table_with_published_figures(grid_with_results):
    _, grid = grid_with_results()
    table = reproduce.make_table(grid, {})
    ours = table.cells["image AUROC", ("ours, selected on test",), "Brain"]
    assert (ours.mean, ours.seeds) == (pytest.approx(93), 2)
    assert ours.interval == pytest.approx((91, 95))
    assert table.cells["image AUROC", ("ours, last epoch",), "Brain"].mean == pytest.approx(83)
    assert str(table.cells["image AUROC", ("ours, selected on test",), "Chest"]) == "80.00 (1 of 2 seeds)"
    assert table.cells["image AUROC", ("MVFA (1)",), "Brain"] == Statistic(92.44)
    assert ("pixel AUROC", ("ours, last epoch",), "Chest") not in table.cells  # Chest has no masks
    text = table.markdown()
    for words in ("3 of 4 cells", "README of MVFA, 4 shots", "Made-up images (Brain, Chest)", "127 (Brain)", "(n - 1)"):
        assert words in text
    assert len(table.caption) < 250  # about three lines in an article


def test_table_names_the_selection_rule_of_the_runs(grid_with_results):
    """For custom data the epoch is chosen on valid or is the last one; no row then says `selected on test`."""
    _, grid = grid_with_results(select="valid")
    text = reproduce.make_table(grid, {}).markdown()
    assert "ours, selected on valid" in text
    assert "--select valid" in text
    cells, grid = grid_with_results(select="last")
    shutil.rmtree(grid.out / "runs" / grid.cells[2].name)  # no cell of Chest is finished
    table = reproduce.make_table(grid, {})
    assert ("image AUROC", ("ours, selected on test",), "Brain") not in table.cells
    assert "--select" not in grid.arguments(cells[0])
    assert list(grid.epochs(cells[2])) == ["last"]


def test_notes_on_seeds(grid_with_results):
    def markdown(*more: str, **values: object) -> str:
        return reproduce.make_table(grid_with_results(*more, **values)[1], {}).markdown()

    assert "same shots" in markdown()
    one = markdown("--seeds", "1", "--obj", "Brain", "Chest")
    assert "deviation" not in one
    assert "seed 1" in one
    _, grid = grid_with_results()
    path = grid.run(grid.cells[1]).result
    path.write_text(json.dumps(result(0.5, shots={"normal": ["c.png"], "abnormal": ["b.png"]})))
    assert "other shots" in reproduce.make_table(grid, {}).markdown()


def test_published_figures_of_another_number_of_shots_are_only_noted(grid_with_results):
    _, grid = grid_with_results("--shots", "2")
    table = reproduce.make_table(grid, {})
    assert not any("MVFA" in row[-1] for _, row, _ in table.cells)
    (note,) = [note for note in table.notes if "MVFA" in note]
    assert "4 shots" in note
    assert "another number of shots" in note


def test_empty_result_is_not_a_finished_cell(grid_with_results):
    cells, grid = grid_with_results()
    assert [grid.done(cell) for cell in cells] == [True, True, True, False]
    grid.run(cells[0]).result.write_text("{}")
    assert not grid.done(cells[0])
    figure = reproduce.make_table(grid, {}).cells["image AUROC", ("ours, last epoch",), "Brain"]
    assert (figure.seeds, figure.planned) == (1, 2)
    grid.run(cells[0]).result.write_text("{")
    with pytest.raises(InputError, match=r"result\.json"):
        grid.done(cells[0])


def test_figures_without_the_patients_of_shots(grid_with_results):
    """Figures without the patients of shots; a cell without a number holds the reason."""
    _, grid = grid_with_results("--clean")
    cells, clean = reproduce.make_table(grid, {}).cells, ", without the shots' patients"
    assert cells["image AUROC", (f"ours, selected on test{clean}",), "Brain"].mean == pytest.approx(90)
    assert cells["pixel AUROC", (f"ours, selected on test{clean}",), "Brain"] == "not measurable"
    assert cells["image AUROC", (f"ours, last epoch{clean}",), "Brain"] == "patients not known"
