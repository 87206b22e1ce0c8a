"""Flags and settings: the choices are those of the code, stored options are read like a command line."""

from __future__ import annotations

import json

import pytest

from CLIP.adapter_shared import ADAPTERS
from CLIP.config import ADAPTER_KINDS, ModelConfig
from engine.files import config
from engine.files.config import (
    Settings,
    check_against,
    check_layers,
    shareable,
    shared_options,
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
    assert tuple(ADAPTERS) == ADAPTER_KINDS


def test_a_flag_stands_once_for_the_command_line_the_checkpoint_and_the_check():
    defaults = vars(train_options([]))
    assert {name: defaults[name] for name in config.MODEL_FLAGS} == {
        name: flag["default"] for name, flag in config.MODEL_FLAGS.items()
    }
    assert config.MODEL_FLAGS.keys() <= Settings.__dataclass_fields__.keys()


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


def test_settings_survive_json():
    settings = small_settings(states={"normal": ["{}"], "abnormal": ["bad {}"]})
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_any_version_reads_any():
    """Unknown entries are ignored, and late ones default; what is missing is an error."""
    values = {**small_settings().to_dict(), "of a later version": 1}
    del values["mask_above"]
    assert Settings.from_dict(values) == small_settings()
    del values["dec_type"]
    with pytest.raises(KeyError, match="dec_type"):
        Settings.from_dict(values)


def test_layers():
    assert check_layers(None, ModelConfig.load("ViT-L-14-336")) == (6, 12, 18, 24)
    assert check_layers([4, 2], ModelConfig.load("ViT-tiny-14-56")) == (4, 2)  # adapter 0 reads layer 4, as published
    for layers in ([0, 1], [1, 5], [2, 2]):
        with pytest.raises(InputError, match="--features_list"):
            check_layers(layers, ModelConfig.load("ViT-tiny-14-56"))


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


@pytest.mark.parametrize("name", ["out_json", "save_path", "cache_dir"])
def test_resume_takes_paths_anywhere(tmp_path, monkeypatch, name):
    """The line that a stopped run prints holds on a machine with a scratch disk."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = stored(tmp_path / "here" / "run", **{name: str(tmp_path / "scratch")})
    assert getattr(train_options(["--resume", run]), name) == str(tmp_path / "scratch")


def test_a_test_on_another_data_set_shares_what_is_no_data_sets_own():
    train = train_options(["--obj", "Liver", "--cache", "disk", "--anonymous", "--save_path", "x", "--mask_above", "3"])
    options = options_of_test(["--obj", "Brain"], shared_options(train))
    assert (options.obj, options.cache, options.anonymous, options.mask_above) == ("Brain", "disk", True, 3)
    assert options.save_path == options_of_test([]).save_path
    assert options.visionA is None


def test_what_is_shared_holds_no_path():
    options = train_options(["--data_path", "/home/me/data", "--save_path", "/home/me", "--weights", "/home/me/w.pt"])
    assert "/home/me" not in json.dumps(shareable(options))
    every_path = {a.dest for a in train_parser()._actions if a.type is config.nonempty_path} | {"resume"}
    assert every_path <= set(config.PATHS)


def test_the_label_names_both_classes_where_they_differ():
    options = train_options(["--shot", "16"])
    assert config.shots_label(options) == "16shot"
    assert config.shots_label(train_options(["--shot", "16", "--shot_abnormal", "4"])) == "16n4a-shot"
