"""The grid: which cells a table has, what is refused, what it costs, and what its tables say."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest

import reproduce
from CLIP.config import ModelConfig
from dataset import MedicalDataset, phantom
from engine.files.config import train_options
from engine.study import cost
from engine.study.cost import grid_cost
from engine.study.grid import Cell, Grid, layer_choices, parse
from engine.study.tables import Statistic
from utils import InputError


def plan(tmp_path, *arguments: str):
    grid = Grid(parse(["--out", str(tmp_path), *arguments]))
    return grid.cells, grid


def test_main_and_shots(tmp_path):
    cells, _ = plan(tmp_path, "--table", "main")
    assert len(cells) == 6 * 3
    assert {cell.shot for cell in cells} == {4}
    cells, grid = plan(tmp_path, "--table", "shots", "--obj", "Brain", "--seeds", "1", "1", "--learning_rate", "0.01")
    assert [cell.name for cell in cells] == [f"Brain-{shot}shot-seed1" for shot in (2, 4, 8, 16)]
    options = train_options(grid.arguments(cells[1]))
    assert (options.shot, options.seed, options.learning_rate, options.select) == (4, 1, 0.01, "test")
    assert options.cache == "disk"
    _, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--cache", "ram")
    assert train_options(grid.arguments(cells[0])).cache == "ram"


def test_an_ablation_changes_one_component_at_a_time(tmp_path):
    cells, grid = plan(tmp_path, "--table", "ablation", "--obj", "Brain", "--seeds", "111")
    assert len(cells) == len({cell.name for cell in cells}) == 20
    base = vars(grid.parse(cells[0]))
    for cell in cells[1:]:
        flag, value = cell.change
        changed = {name for name, given in vars(grid.parse(cell)).items() if given != base[name]} - {"exp_name"}
        assert changed == {flag}
        assert str(base[flag]) != value
    # Its default cell is the one of the main table.
    assert cells[0].name == plan(tmp_path, "--table", "main", "--obj", "Brain")[0][0].name


def test_an_ablation_of_another_default(tmp_path):
    flags = ["--table", "ablation", "--obj", "Brain", "--seeds", "1", "--fidelity", "corrected"]
    changes = [cell.change for cell in plan(tmp_path, *flags, "--features_list", "6")[0]]
    assert ("fidelity", "released") in changes
    assert ("fidelity", "corrected") not in changes
    assert not any(flag == "features_list" for flag, _ in changes[1:])  # there is no part of one layer


def test_layers():
    assert layer_choices((6, 12, 18, 24)) == [
        "6", "12", "18", "24", "6 12", "18 24", "12 18 24", "6 18 24", "6 12 24", "6 12 18"
    ]  # fmt: skip
    assert layer_choices((3, 9)) == ["3", "9"]
    assert layer_choices((24,)) == []


def test_cross_tests_every_other_data_set(tmp_path):
    cells, _ = plan(tmp_path, "--table", "cross", "--obj", "Brain", "Liver", "Chest", "--seeds", "1")
    assert [(cell.obj, cell.others) for cell in cells] == [
        ("Brain", ("Liver", "Chest")), ("Liver", ("Brain", "Chest")), ("Chest", ("Brain", "Liver"))
    ]  # fmt: skip


def test_leave_one_out_trains_on_the_others(tmp_path):
    cells, grid = plan(tmp_path, "--table", "leave_one_out", "--obj", "Brain", "Liver", "Chest", "--seeds", "1")
    # A data set with masks learns from those that have them.
    assert [(cell.obj, cell.sources) for cell in cells] == [
        ("Brain", ("Liver",)), ("Liver", ("Brain",)), ("Chest", ("Brain", "Liver"))
    ]  # fmt: skip
    options = grid.parse(cells[2])
    assert (options.shot, options.select, options.data_path) == (8, "last", str(tmp_path / "unions"))
    assert options.obj == cells[2].name == "Chest-from-Brain-Liver-4shot-seed1"


def test_the_union_holds_others_shots_and_ones_own_test_images(tmp_path):
    phantom.write(tmp_path / "data", ["Brain", "Liver", "Chest"], valid=3, test=2, seed=0, size=64)
    flags = ["--table", "leave_one_out", "--obj", "Brain", "Liver", "Chest", "--seeds", "1", "--shots", "2"]
    cells, grid = plan(tmp_path, *flags, "--data_path", str(tmp_path / "data"))
    for cell in cells:
        reproduce.write_union(grid, cell)
        options = grid.parse(cell)
        union = MedicalDataset.open(options.obj, options.data_path)
        target, *sources = (MedicalDataset.open(obj, tmp_path / "data") for obj in (cell.obj, *cell.sources))
        assert union.pixel_metrics == target.pixel_metrics
        contents = [(s.path.read_bytes(), s.label, s.mask and s.mask.read_bytes()) for s in union.samples("test")]
        assert contents == [(s.path.read_bytes(), s.label, s.mask and s.mask.read_bytes())
                            for s in target.samples("test")]  # fmt: skip
        shots = union.shots(options.shot_normal, options.shot_abnormal, options.iterate, options.seed)
        assert shots.source.endswith(f"my{2 * len(sources)}-shot.txt")
        for kind in ("normal", "abnormal"):
            theirs = [s for source in sources for s in getattr(source.shots(2, 2, 0, 1), kind)]
            assert [s.path.read_bytes() for s in getattr(shots, kind)] == [s.path.read_bytes() for s in theirs]
        assert all((s.mask is not None) == union.pixel_metrics for s in shots.abnormal)


def test_a_union_is_read_as_its_data_sets_are(tmp_path):
    phantom.write(tmp_path, ["Brain", "Liver"], valid=3, test=2, seed=0, size=64)
    flags = ["--table", "leave_one_out", "--obj", "Brain", "Liver", "--seeds", "1", "--shots", "1"]
    (tmp_path / "Liver_AD" / "Liver.json").write_text('{"mask_above": 25}')
    cells, grid = plan(tmp_path, *flags, "--data_path", str(tmp_path))
    with pytest.raises(InputError, match="Liver is read otherwise than Brain: give --mask_above"):
        reproduce.write_union(grid, cells[0])
    (tmp_path / "Brain_AD" / "Brain.json").write_text('{"mask_above": 25}')
    reproduce.write_union(grid, cells[0])
    assert MedicalDataset.open(cells[0].name, tmp_path / "unions").mask_above == 25


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "main", "--seed", "5"], "--seed: reproduce.py sets"),
        (["--table", "main", "--shot=5"], "--shot=5: reproduce.py sets"),
        (["--table", "main", "--data_root", "x"], "one folder for 6 data sets"),
        (["--table", "cross", "--obj", "Brain"], "two data sets"),
        (["--table", "leave_one_out", "--obj", "Brain"], "two data sets"),
        (["--table", "leave_one_out", "--obj", "Brain", "Chest"], "Brain has masks, and none of the others"),
        (["--table", "main", "--obj", "published_results"], "describes no data set"),
        (["--table", "ablation", "--features_list", "99"], "99"),
        (["--table", "cross", "--verdict"], "no published figure belongs"),
    ],
)
def test_what_is_refused(tmp_path, arguments, words):
    with pytest.raises(InputError, match=words):
        plan(tmp_path, *arguments)


def test_a_folder_of_other_runs_is_refused(tmp_path):
    cells, grid = plan(tmp_path, "--table", "main", "--obj", "Brain")
    run = grid.run(cells[0])
    run.path.mkdir(parents=True)
    stored = {**vars(grid.parse(cells[0])), "epoch": 5, "device": "cuda"}
    run.config.write_text(json.dumps({"options": stored}))
    with pytest.raises(InputError, match=r"--epoch 5, not 60: choose another --out"):
        plan(tmp_path, "--table", "main", "--obj", "Brain")
    plan(tmp_path, "--table", "main", "--obj", "Brain", "--epoch", "5", "--device", "cpu")  # machines may differ


# --- what a grid costs ---


def test_cost_counts_every_image_once(tmp_path):
    cells, grid = plan(tmp_path, "--table", "shots", "--obj", "Brain", "--seeds", "1", "2", "--shots", "2", "4",
                       "--data_path", "/nowhere")  # fmt: skip
    total = grid_cost(grid, cells)
    views = (15 + 2) * 2 * (2 + 4)  # 15 views that never change, and a jittered one for each seed
    assert total.images == 3715 + 200 + views
    assert total.image_bytes == 4 * 289 * 1024 * 2  # 2.37 MB
    assert total.unknown == []
    one, two = grid_cost(grid, cells[:1]), grid_cost(grid, [cells[0], cells[2]])  # two: another seed
    assert two.epochs == 2 * one.epochs
    assert two.images == one.images + 4
    cells, grid = plan(tmp_path, "--table", "ablation", "--obj", "Brain", "--seeds", "1", "--data_path", "/nowhere")
    assert grid_cost(grid, cells).images == 2 * (3715 + 200 + 16 * 8)  # both fidelities
    mine = grid_cost(grid, [Cell("Mine", 4, 1)])
    assert mine.unknown == ["Mine"]
    assert mine.images == 200 + 16 * 8
    assert "the test images of Mine" in mine.describe(1e12, "CPU")


def test_cost_of_data_that_is_there(tmp_path):
    phantom.write(tmp_path, ["Brain"], valid=2, test=5, seed=0, size=64)
    cells, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--seeds", "1", "--data_path", str(tmp_path))
    assert grid_cost(grid, cells).images == 10 + 200 + 16 * 8


def test_operations_against_the_recorded_benchmarks():
    """benchmarks/results: a ViT-L run of 1 shot and 24 test images, measured at about 330 GFLOP/s."""
    config = ModelConfig.load("ViT-L-14-336")
    assert cost.tower_operations(config, 240, 24) == pytest.approx(183.8e9, rel=0.01)
    for fidelity, seconds in (("released", 12.0), ("corrected", 5.9)):
        operations = cost.epoch_operations(config, 240, 4, 2, 24, 16, fidelity)
        assert operations / 330e9 / cost.CPU_SHARES[1] == pytest.approx(seconds, rel=0.35)


def test_the_words_of_a_dry_run():
    lines = cost.Cost(1000, 2367488, 3.6e15, 7.2e15).describe(1e12, "CPU, 2 threads").splitlines()
    assert "1,000 through" in lines[0]
    assert "2.4 GB (2.37 MB an image) in float16" in lines[1]
    assert "4.7 GB in float32" in lines[1]
    assert "about 3.9 hours, from 1,000 GFLOP/s" in lines[2]  # 3.6 / 0.8 + 7.2 / 0.75 in 10**15 / 10**12 / 3600
    assert "PREDICTIONS" in lines[3]
    assert "RTX 4090 4.5 minutes" in lines[3]
    rate, device = cost.measured_rate()
    assert rate > 1e8
    assert device


# --- what a table says ---


def result(auc: float, **more: object) -> dict[str, object]:
    values = {"auc": auc, "pauc": 0.97, "auc_ci95": [auc - 0.02, auc + 0.02], "pauc_ci95": [0.96, 0.98]}
    return {**values, "last": {**values, "auc": auc - 0.1}, **more}


@pytest.fixture
def grid_with_results(tmp_path):
    """Brain and Chest, two seeds, all but one cell done."""
    phantom.write(tmp_path / "data", ["Brain", "Chest"], valid=2, test=2, seed=0, size=64)
    arguments = ["--table", "main", "--obj", "Brain", "Chest", "--seeds", "1", "2", "--shots", "4"]
    arguments += ["--data_path", str(tmp_path / "data"), "--out", str(tmp_path)]
    clean = {"auc_without_shot_patients": 0.90, "pauc_without_shot_patients": None}

    def make(*more: str):
        grid = Grid(parse([*arguments, *more]))
        cells = grid.cells
        for cell, auc in zip(cells[:3], (0.92, 0.94, 0.80), strict=True):
            run = grid.run(cell)
            run.path.mkdir(parents=True, exist_ok=True)
            run.result.write_text(json.dumps(result(auc, **clean)))
        return cells, grid

    return make


def test_figures_beside_published_ones(grid_with_results):
    _, grid = grid_with_results()
    table = reproduce.make_table(grid, {})
    ours = table.cells["image AUROC", ("ours, selected on test",), "Brain"]
    assert (ours.mean, ours.seeds) == (pytest.approx(93), 2)
    assert ours.interval == pytest.approx((91, 95))
    assert table.cells["image AUROC", ("ours, last epoch",), "Brain"].mean == pytest.approx(83)
    assert str(table.cells["image AUROC", ("ours, selected on test",), "Chest"]) == "80.00 (1 of 2 seeds)"
    assert table.cells["image AUROC", ("MVFA (1)",), "Brain"] == Statistic(92.44)
    assert ("pixel AUROC", ("ours, last epoch",), "Chest") not in table.cells  # it has no masks
    text = table.markdown()
    assert "3 of 4 cells are done" in text
    assert "(1) MVFA: README of MVFA, 4 shots, best epoch on the test set" in text
    assert "its paper" not in text  # nothing of it is on record, so no empty column
    assert "Made-up images (Brain, Chest)" in text
    assert "Abnormal pixels: a mask's grey above 127 (--mask_above)." in text
    assert len(table.caption) < 230  # three lines of an article


def test_what_another_tower_and_test_set_mean(tmp_path):
    phantom.write(tmp_path, ["Retina_OCT2017", "Chest"], valid=2, test=3, seed=0, size=64)
    (tmp_path / "Chest_AD").rename(tmp_path / "Mine_AD")
    for obj in ("Retina_OCT2017", "Mine"):
        (tmp_path / f"{obj}_AD" / "PHANTOM.txt").unlink()
    shutil.copyfile("CLIP/model_configs/ViT-tiny-14-56.json", tmp_path / "tower.json")
    tower = ["--model_name", str(tmp_path / "tower.json"), "--weights", str(tmp_path / "tower.pt")]
    flags = ["--table", "baselines", "--seeds", "1", *tower, "--data_path", str(tmp_path), "--obj", "Mine"]
    text = reproduce.make_table(plan(tmp_path, *flags)[1], {}).markdown()
    assert "tower, tower.pt, 240 px" in text
    assert str(tmp_path) not in text
    assert "(--select test)." in text  # the published protocol is that of the paper's data sets
    text = reproduce.make_table(plan(tmp_path, *flags, "Retina_OCT2017")[1], {}).markdown()
    assert "Retina_OCT2017: 6 test images, not the published ones, so no published figure compares." in text
    assert "Mine:" not in text


def test_the_paper_by_compare(grid_with_results, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"results": [{"method": "MadCLIP", "source": "the paper", "shots": 4,
                                             "auc": {"Brain": 95.5}, "pauc": {"Brain": 96.5}}]}))  # fmt: skip
    _, grid = grid_with_results("--compare", str(path), "--verdict")
    table = reproduce.make_table(grid, {})
    rows = {row[0] for _, row, _ in table.cells}
    assert "MadCLIP (8)" in rows
    verdict = reproduce.make_verdict(grid, table)
    assert verdict.name == "main-verdict"
    assert "(8) MadCLIP: the paper, 4 shots" in verdict.markdown()
    assert "Made-up images (Brain, Chest)" in verdict.markdown()
    assert verdict.cells["image AUROC", ("MadCLIP (8)",), "Brain"] == "-2.50 outside"
    assert verdict.cells["pixel AUROC", ("MadCLIP (8)",), "Brain"] == "+0.50 inside"
    assert verdict.cells["image AUROC", ("IQE-CLIP (6)",), "Brain"] == "+11.73 outside"
    assert "$-$2.50 outside" in verdict.latex()


def test_clean_figures(grid_with_results):
    _, grid = grid_with_results("--clean")
    table = reproduce.make_table(grid, {})
    assert table.cells["image AUROC", ("ours, selected on test, clean",), "Brain"].mean == pytest.approx(90)
    assert table.cells["pixel AUROC", ("ours, selected on test, clean",), "Brain"] == "not measurable"
    assert ("image AUROC", ("ours, last epoch, clean",), "Brain") not in table.cells  # not measured there
    assert "Clean: without the test images of patients" in table.markdown()


def test_failed_cells_are_named_in_the_table(grid_with_results, tmp_path):
    cells, grid = grid_with_results()
    shutil.rmtree(grid.run(cells[2]).path)
    reproduce.read_result.cache_clear()
    table = reproduce.make_table(grid, {cells[2]: "OutOfMemoryError: CUDA out of memory"})
    assert table.cells["image AUROC", ("ours, last epoch",), "Chest"] == "failed"
    assert "Failed: Chest-4shot-seed1 (OutOfMemoryError: CUDA out of memory)." in table.markdown()
    table = reproduce.make_table(grid, {})
    assert table.cells["image AUROC", ("ours, last epoch",), "Chest"] == "to do"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InputError("--shot 9: too many"), "--shot 9: too many"),
        (RuntimeError("CUDA error:\n a device-side assert"), "RuntimeError: CUDA error: a device-side assert"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_any_error_ends_its_cell_alone(tmp_path, monkeypatch, error, words):
    cells, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--seeds", "1", "2")

    def broken(*_):
        print("as far as it came")
        raise error

    monkeypatch.setattr("train.train", broken)
    assert [reproduce.run_cell(grid, cell) for cell in cells] == [words, words]
    log = grid.log(cells[0]).read_text()
    assert "as far as it came" in log
    assert ("Traceback" in log) == (not isinstance(error, InputError))


def test_a_killed_grid_is_not_a_failed_cell(tmp_path, monkeypatch):
    cells, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--seeds", "1")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run_cell(grid, cells[0])


def test_the_bar_moves_with_the_epochs(tmp_path, monkeypatch):
    cells, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--seeds", "1", "2", "--epoch", "3")
    seen = []

    def pretend(options, *_):
        run = grid.run(Cell(options.obj, options.shot, options.seed))
        run.path.mkdir(parents=True)
        for epoch in range(2):  # the second cell is given up before its third epoch
            with run.metrics.open("a") as file:
                file.write("{}\n")
            print(f"epoch {epoch + 1}/3")
            seen.append(progress.n)

    monkeypatch.setattr("train.train", pretend)
    with reproduce.Progress(grid) as progress:
        for cell in cells:
            reproduce.run_cell(grid, cell, progress.refresh_bar)
            progress.refresh_bar(cell)
    assert seen == [1, 2, 4, 5]
    assert (progress.n, progress.total) == (6, 6)


def test_a_log_tells_of_lines(tmp_path):
    lines = []
    with reproduce.Log(tmp_path / "log.txt", lambda: lines.append(1)) as log, contextlib.redirect_stdout(log):
        print("a", end="")
        assert lines == []
        print("b")
    assert len(lines) == 1
    assert (tmp_path / "log.txt").read_text() == "ab\n"
