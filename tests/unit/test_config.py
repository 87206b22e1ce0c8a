"""Flags and settings: published flags and defaults, stored settings and options."""

import json
from dataclasses import replace

import pytest

from CLIP.config import ModelConfig
from engine.files import config
from engine.files.config import (
    Settings,
    check_layers,
    shared_options,
    train_options,
)
from engine.files.config import test_options as options_of_test
from tests.helpers.data import small_settings
from utils import InputError

PUBLISHED_FLAGS = {
    "exp_name", "model_name", "pretrain", "obj", "data_path", "batch_size", "save_model", "save_path", "img_size",
    "epoch", "learning_rate", "features_list", "seed", "shot", "iterate", "text_mood", "contrast_mood", "dec_type",
    "loss_type", "visionA",
}  # fmt: skip


def test_model_flags_define_defaults_and_are_settings():
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
def test_published_flags_are_accepted(options):
    given = ["--epoch", "3", "--learning_rate", "0.1", "--exp_name", "x", "--save_model", "1", "--iterate", "1",
             "--shot", "4", "--features_list", "6", "12", "--seed", "1", "--img_size", "240"]  # fmt: skip
    parsed = vars(options(given))
    assert set(parsed) >= PUBLISHED_FLAGS
    assert parsed["save_model"] == 1


def test_flags_without_effect_in_a_test_are_reported(capsys):
    options_of_test(["--epoch", "3", "--save_model", "0"])
    assert capsys.readouterr().err == "--epoch --save_model: no effect in a test\n"
    options_of_test(["--shot", "4"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("words", "value"), [([], True), (["--save_model"], True), (["--no-save_model"], False),
                                              (["--save_model", "0"], False), (["--save_model=1"], True)])  # fmt: skip
def test_save_model(words, value):
    assert train_options(words).save_model == value


def test_settings_of_other_versions_are_readable():
    """Unknown entries are ignored, entries added later have defaults, and other missing entries are an error."""
    values = {**small_settings().to_dict(), "of a later version": 1}
    del values["mask_above"]
    assert Settings.from_dict(values) == small_settings()
    del values["dec_type"]
    with pytest.raises(KeyError, match="dec_type"):
        Settings.from_dict(values)


def test_features_list():
    assert check_layers(None, ModelConfig.load("ViT-L-14-336")) == (6, 12, 18, 24)
    assert check_layers([4, 2], ModelConfig.load("ViT-tiny-14-56")) == (4, 2)  # adapter 0 reads layer 4, as published
    for layers in ([0, 1], [1, 5], [2, 2]):
        with pytest.raises(InputError, match="--features_list"):
            check_layers(layers, ModelConfig.load("ViT-tiny-14-56"))
    tiny = ModelConfig.load("ViT-tiny-14-56")
    defaults = {depth: check_layers(None, replace(tiny, layers=depth)) for depth in (2, 3, 12)}
    assert defaults == {2: (1, 2), 3: (1, 2, 3), 12: (3, 6, 9, 12)}


def stored(folder, **changes):
    options = vars(train_options(["--obj", "Brain", "--shot", "2"]))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"options": {**options, **changes}}))
    return str(folder)


@pytest.mark.parametrize("name", ["out_json", "save_path", "cache_dir"])
def test_resume_keeps_paths_outside_the_working_folder(tmp_path, monkeypatch, name):
    """--resume keeps paths outside the working folder, such as a scratch disk."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = stored(tmp_path / "here" / "run", **{name: str(tmp_path / "scratch")})
    assert getattr(train_options(["--resume", run]), name) == str(tmp_path / "scratch")


def test_testing_another_data_set_shares_only_general_options():
    train = train_options(["--obj", "Liver", "--cache", "disk", "--anonymous", "--save_path", "x", "--mask_above", "3"])
    options = options_of_test(["--obj", "Brain"], shared_options(train))
    assert (options.obj, options.cache, options.anonymous, options.mask_above) == ("Brain", "disk", True, 3)
    assert options.save_path == options_of_test([]).save_path
    assert options.visionA is None
