"""The grid: which cells a table has, and what is refused."""

from __future__ import annotations

import json

import pytest

import reproduce
import train
from utils import InputError


def plan(tmp_path, *arguments: str):
    return reproduce.plan(*reproduce.parse(["--out", str(tmp_path), *arguments]))


def test_main_and_shots(tmp_path):
    cells, _ = plan(tmp_path, "--table", "main")
    assert len(cells) == 6 * 3
    assert {cell.shot for cell in cells} == {4}
    cells, grid = plan(tmp_path, "--table", "shots", "--obj", "Brain", "--seeds", "1", "1", "--learning_rate", "0.01")
    assert [cell.name for cell in cells] == [f"Brain-{shot}shot-seed1" for shot in (2, 4, 8, 16)]
    options = train.parse(grid.arguments(cells[1]))
    assert (options.shot, options.seed, options.learning_rate, options.select) == (4, 1, 0.01, "test")
    assert options.cache == "disk"
    _, grid = plan(tmp_path, "--table", "main", "--obj", "Brain", "--cache", "ram")
    assert train.parse(grid.arguments(cells[0])).cache == "ram"


def test_an_ablation_changes_one_component_at_a_time(tmp_path):
    cells, grid = plan(tmp_path, "--table", "ablation", "--obj", "Brain", "--seeds", "111")
    assert len(cells) == len({cell.name for cell in cells}) == 20
    assert grid.layers == (6, 12, 18, 24)  # one pass serves every choice of layers
    base = vars(grid.parse(cells[0]))
    for cell in cells[1:]:
        flag, value = cell.change
        changed = {name for name, found in vars(grid.parse(cell)).items() if found != base[name]} - {"exp_name"}
        assert changed == {flag}
        assert str(base[flag]) != value
    # Its default cell is the one of the main table.
    assert cells[0].name == plan(tmp_path, "--table", "main", "--obj", "Brain")[0][0].name


def test_an_ablation_of_another_default(tmp_path):
    cells, grid = plan(
        tmp_path,
        "--table",
        "ablation",
        "--obj",
        "Brain",
        "--seeds",
        "1",
        "--fidelity",
        "corrected",
        "--features_list",
        "6",
    )
    changes = [cell.change for cell in cells]
    assert ("fidelity", "released") in changes
    assert ("fidelity", "corrected") not in changes
    assert not any(flag == "features_list" for flag, _ in changes[1:])  # there is no part of one layer
    assert grid.class_token  # MViTFC reads it there


def test_layers():
    assert reproduce.layer_choices((6, 12, 18, 24)) == [
        "6", "12", "18", "24", "6 12", "18 24", "12 18 24", "6 18 24", "6 12 24", "6 12 18"
    ]  # fmt: skip
    assert reproduce.layer_choices((3, 9)) == ["3", "9"]
    assert reproduce.layer_choices((24,)) == []


def test_cross_tests_every_other_data_set(tmp_path):
    cells, _ = plan(tmp_path, "--table", "cross", "--obj", "Brain", "Liver", "Chest", "--seeds", "1")
    assert [(cell.obj, cell.others) for cell in cells] == [
        ("Brain", ("Liver", "Chest")), ("Liver", ("Brain", "Chest")), ("Chest", ("Brain", "Liver"))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--table", "main", "--seed", "5"], "--seed: reproduce.py sets"),
        (["--table", "main", "--shot=5"], "--shot=5: reproduce.py sets"),
        (["--table", "main", "--data_root", "x"], "one folder for 6 data sets"),
        (["--table", "cross", "--obj", "Brain"], "two data sets"),
        (["--table", "main", "--obj", "published_results"], "describes no data set"),
        (["--table", "ablation", "--features_list", "99"], "99"),
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
