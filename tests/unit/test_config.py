"""Flags and settings: the choices are those of the code, stored options are read like a command line."""

from __future__ import annotations

import json

import pytest

import loss
from CLIP.adapter_shared import ADAPTERS
from CLIP.config import ADAPTER_KINDS, ModelConfig
from engine.files import config
from engine.files.config import (
    Settings,
    check_against,
    check_layers,
    default_select,
    shareable,
    train_options,
    train_parser,
)
from engine.files.config import test_options as options_of_test
from tests.helpers.data import small_settings
from utils import InputError

PUBLISHED_FLAGS = [
    "exp_name",
    "model_name",
    "pretrain",
    "obj",
    "data_path",
    "batch_size",
    "save_model",
    "save_path",
    "img_size",
    "epoch",
    "learning_rate",
    "features_list",
    "seed",
    "shot",
    "iterate",
    "text_mood",
    "contrast_mood",
    "dec_type",
    "loss_type",
    "visionA",
]


def test_choices_are_those_of_the_code():
    assert config.DEC_TYPES == loss.DEC_TYPES and config.LOSS_TYPES == loss.LOSS_TYPES
    assert tuple(ADAPTERS) == ADAPTER_KINDS


def test_published_defaults():
    options = vars(train_options([]))
    expected = {
        "obj": "Liver", "img_size": 240, "batch_size": 16, "epoch": 60, "learning_rate": 0.001, "seed": 111, "shot": 16,
        "iterate": 0, "text_mood": "learnable_all", "contrast_mood": "yes", "dec_type": "mean",
        "loss_type": "sigmoid", "visionA": "MFCFC", "model_name": "ViT-L-14-336", "pretrain": "openai",
    }  # fmt: skip
    assert {name: options[name] for name in expected} == expected
    assert options_of_test([]).obj == "Brain"


@pytest.mark.parametrize("options", [train_options, options_of_test])
def test_every_published_flag_is_taken(options):
    given = ["--epoch", "3", "--learning_rate", "0.1", "--exp_name", "x", "--save_model", "1", "--iterate", "1",
             "--shot", "4", "--features_list", "6", "12", "--seed", "1", "--img_size", "240"]  # fmt: skip
    parsed = vars(options(given))
    assert set(PUBLISHED_FLAGS) <= set(parsed)
    assert parsed["save_model"] is True


def test_a_folder_whose_name_cannot_be_a_data_sets_asks_for_one():
    with pytest.raises(InputError, match=r"--data_root /x/my knee!: .* give --obj NAME"):
        train_options(["--data_root", "/x/my knee!"])
    assert train_options(["--obj", "Knee", "--data_root", "/x/my knee!"]).obj == "Knee"


def test_flags_without_effect_in_a_test_are_named(capsys):
    options_of_test(["--epoch", "3", "--save_model", "0"])
    assert capsys.readouterr().err == "--epoch --save_model: no effect in a test\n"
    options_of_test(["--shot", "4"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("words", "value"), [([], True), (["--save_model"], True), (["--no-save_model"], False),
                                              (["--save_model", "0"], False), (["--save_model=1"], True)])  # fmt: skip
def test_save_model(words, value):
    assert train_options(words).save_model is value


@pytest.mark.parametrize(("shots", "flags", "fits"), [
    ({"normal": ["a"] * 5, "abnormal": ["b"] * 4}, ["--shot", "5"], False),
    ({"normal": ["a"] * 4, "abnormal": ["b"] * 4}, ["--shot", "4"], True),
    ({"normal": ["a"] * 4, "abnormal": ["b"] * 4}, ["--shot", "16"], False),
    ({"normal": ["a"] * 4, "abnormal": ["b"] * 2}, ["--shot", "4"], False),
    ({"normal": ["a"] * 4, "abnormal": ["b"] * 2}, ["--shot_normal", "4", "--shot_abnormal", "2"], True),
    (None, ["--shot", "16"], True),
])  # fmt: skip
def test_shots_are_checked_against_the_checkpoint(shots, flags, fits):
    metadata = {"shots": shots}
    if fits:
        check_against(small_settings(), metadata, options_of_test(flags))
    else:
        with pytest.raises(InputError, match=r"--shot \d+ contradicts the checkpoint"):
            check_against(small_settings(), metadata, options_of_test(flags))


def test_shots_are_those_that_were_asked_for_where_a_list_names_more():
    metadata = {
        "shots": {"normal": ["a"] * 3, "abnormal": ["b"] * 2},
        "options": {"shot_normal": 2, "shot_abnormal": 2},
    }
    check_against(small_settings(), metadata, options_of_test(["--shot", "2"]))
    with pytest.raises(InputError, match="--shot 3 contradicts the checkpoint, which was trained with 2 normal shots"):
        check_against(small_settings(), metadata, options_of_test(["--shot", "3"]))


def test_model_flags_are_checked_against_the_checkpoint():
    check_against(small_settings(), {}, options_of_test(["--features_list", "2", "4", "--img_size", "42"]))
    with pytest.raises(InputError, match="--dec_type max contradicts the checkpoint, which was trained with mean"):
        check_against(small_settings(), {}, options_of_test(["--dec_type", "max"]))


def test_settings_survive_json():
    settings = small_settings(states={"normal": ["{}"], "abnormal": ["bad {}"]})
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(("name", "value"), [
    ("features_list", [1, 1, 1, 1]), ("features_list", [-1, 0, 1]), ("features_list", []), ("features_list", "12"),
    ("img_size", 0), ("img_size", 10**6), ("img_size", True), ("eval_batch", 0), ("obj", "x" * 201), ("obj", 5),
    ("visionA", "other"), ("pixel_metrics", 1), ("states", [1]), ("weights_sha256", None),
])  # fmt: skip
def test_damaged_settings_are_named(name, value):
    with pytest.raises(InputError):
        Settings.from_dict({**small_settings().to_dict(), name: value})


def test_missing_settings_are_named():
    values = small_settings().to_dict()
    del values["dec_type"]
    with pytest.raises(InputError, match="here: dec_type is missing"):
        Settings.from_dict(values, "here")


def test_layers():
    assert check_layers(None, ModelConfig.load("ViT-L-14-336")) == (6, 12, 18, 24)
    assert check_layers([4, 2], ModelConfig.load("ViT-tiny-14-56")) == (4, 2)  # adapter 0 reads layer 4, as published
    for layers in ([0, 1], [1, 5], [2, 2]):
        with pytest.raises(InputError, match="--features_list"):
            check_layers(layers, ModelConfig.load("ViT-tiny-14-56"))


def test_select_defaults_to_test_for_the_papers_data_sets_alone():
    assert default_select(True, lambda: (0, 0)) == "test"
    assert default_select(False, lambda: (3, 2)) == "valid"
    assert default_select(False, lambda: (3, 0)) == "last"


def stored(folder, **changes):
    options = vars(train_options(["--obj", "Brain", "--shot", "2"]))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"options": {**options, **changes}}))
    return str(folder)


def test_resume_takes_the_stored_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = stored(tmp_path / "run", features_list=[2, 4], learning_rate=0.01, save_model=False, log_model=True)
    options = train_options(["--resume", run, "--epoch", "7"])
    assert (options.features_list, options.learning_rate, options.save_model) == ([2, 4], 0.01, False)
    assert (options.log_model, options.epoch, options.resume, options.obj) == (True, 7, run, "Brain")


def test_resume_refuses_what_shapes_the_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--learning_rate 0\.1 contradicts the run, started with 0.001: leave it out"):
        train_options(["--resume", stored(tmp_path / "run"), "--learning_rate", "0.1"])


@pytest.mark.parametrize(("name", "value"), [
    ("learning_rate", None), ("seed", 1.5), ("obj", "a/b"), ("save_path", ["x", "y"]), ("epoch", "many"),
    ("features_list", [[1]]), ("save_model", "yes"), ("batch_size", 0), ("prompts", [1, 2]),
])  # fmt: skip
def test_damaged_options_are_one_line(tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        train_options(["--resume", stored(tmp_path / "run", **{name: value})])
    assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize("name", ["out_json", "save_path", "cache_dir"])
def test_a_run_from_elsewhere_does_not_decide_where_files_go(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = stored(tmp_path / "here" / "run", **{name: str(tmp_path / "planted")})
    with pytest.raises(InputError, match=rf"--{name} .*planted lies outside of this folder: give --{name} again"):
        train_options(["--resume", run])
    assert getattr(train_options(["--resume", run, f"--{name}", str(tmp_path / "planted")]), name)


def test_what_is_shared_holds_no_path():
    options = train_options(["--data_path", "/home/me/data", "--save_path", "/home/me", "--weights", "/home/me/w.pt"])
    assert "/home/me" not in json.dumps(shareable(options))
    every_path = {a.dest for a in train_parser()._actions if a.type is config.nonempty_path} | {"resume"}
    assert every_path <= set(config.PATHS)


def test_the_label_names_both_classes_where_they_differ():
    options = train_options(["--shot", "16"])
    assert config.shots_label(options) == "16shot"
    assert config.shots_label(train_options(["--shot", "16", "--shot_abnormal", "4"])) == "16n4a-shot"
