"""train.py and test.py as a user starts them, with phantoms and the small model."""

import json
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch

from CLIP.config import ModelConfig
from tests.helpers.commands import Call, fine, refused
from tests.helpers.data import SMALL, unpacked
from tests.helpers.weights import save_hugging_face

# Every choice is in one of three trainings; tests/unit/test_golden_losses.py tests the loss of every combination.
CHOICES = {
    "text_mood": ["fix", "learnable_all", "learnable_abnormal"],
    "visionA": ["MFCFC", "MCNNFC", "MViTFC"],
    "dec_type": ["max", "both", "mean"],
    "loss_type": ["softmax", "sigmoid", "softmax"],
    "contrast_mood": ["no", "yes", "no"],
    "fidelity": ["released", "corrected", "released"],
    "obj": ["Chest", "Brain", "Brain"],
}


def figures(output: str) -> list[str]:
    """AUC and pAUC, with six decimals, from the first line that begins with `selected` or AUC."""
    line = next(line for line in output.splitlines() if line.startswith(("selected", "AUC")))
    return re.findall(r"\d\.\d{6}", line)


@pytest.mark.parametrize("obj", ["Brain", "Chest"])
def test_train_then_test(command, trained, tmp_path, obj):
    one = trained.output(obj)
    end = (
        r"\nBrain pAUC : [01]\.\d{4}\nBrain AUC : [01]\.\d{4}\n" if obj == "Brain" else r"\nChest AUC : \S+ from det\n"
    )
    assert re.search(rf"{end}\Z", one)  # as published
    assert "RANDOM" in one and "--select test" in one
    epochs = [line for line in one.splitlines() if line.startswith("epoch")]
    assert [("seg" in line, "AUC" in line) for line in epochs] == [(obj == "Brain", True)] * 2
    assert "valid_Ungood_00000.png" in one and "valid_good_00001.png" in one

    # test.py gives the same figures for the checkpoint.
    paths = [*trained.test_flags(obj), "--out_json", tmp_path / "test.json", "--figures", tmp_path / "figures"]
    tested = fine(command("test.py", *paths, draw=True))
    assert figures(tested) == figures(one)
    assert tested.splitlines()[-1] == one.splitlines()[-1]
    assert (tmp_path / "figures" / f"{obj}.png").stat().st_size > 1000

    first, second = trained.result(obj), json.loads((tmp_path / "test.json").read_text())
    assert (second["auc"], second["pauc"]) == (first["auc"], first["pauc"])
    assert second["per_image"] == first["per_image"] and len(second["per_image"]) == 14
    assert (second["obj"], second["n_normal"], second["n_abnormal"], second["select"]) == (obj, 7, 7, "test")
    assert set(second["per_image"][0]) == {"file", "label", "score"}
    stored = torch.load(trained.ckpt / f"{obj}.pth", weights_only=True)
    assert stored["about"]["shots"]["abnormal"] == ["valid_Ungood_00000.png", "valid_Ungood_00001.png"]
    assert stored["settings"]["pretrain"] == "random"
    assert stored["settings"]["weights_sha256"] and stored["about"]["madclip"]


@pytest.mark.parametrize("row", range(3))
def test_every_choice(command, phantoms, tmp_path, row):
    chosen = {name: choices[row] for name, choices in CHOICES.items()}
    paths = ["--data_path", phantoms, "--save_path", tmp_path, "--device", "cpu"]
    flags = [word for name, choice in chosen.items() for word in (f"--{name}", choice)]
    trained = fine(command("train.py", *SMALL, *paths, *flags, "--shot", 1, "--epoch", 1))
    assert figures(fine(command("test.py", *paths, *flags))) == figures(trained)
    settings = torch.load(tmp_path / f"{chosen['obj']}.pth", weights_only=True)["settings"]
    assert {name: settings[name] for name in chosen} == chosen


def test_cache_modes_give_the_same_numbers(command, phantoms, tmp_path):
    runs = {}
    for cache in ("ram", "disk", "off"):
        where = ["--run_dir", tmp_path / "runs", "--exp_name", cache, "--cache", cache, "--cache_dir", tmp_path / "c"]
        data = ["--obj", "Brain", "--data_path", phantoms, "--save_path", tmp_path / "ckpt", "--no-save_model"]
        fine(command("train.py", *SMALL, *data, *where, "--visionA", "MViTFC", "--shot", 1, "--epoch", 2))
        lines = (tmp_path / "runs" / cache / "metrics.jsonl").read_text().splitlines()
        runs[cache] = [json.loads(line) for line in lines]
    assert not list(tmp_path.glob("ckpt/*.pth"))
    assert runs["disk"] == runs["ram"]  # bit for bit
    for line, expected in zip(runs["off"], runs["ram"], strict=True):  # the batches of the tower differ
        for name in ("det", "seg", "total", "similarity", "pauc"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5)
        assert line["auc"] == pytest.approx(expected["auc"], abs=1e-6)


def test_flags_that_contradict_the_checkpoint_are_refused(command, trained):
    paths = trained.test_flags("Brain")
    fine(command("test.py", *paths, "--visionA", "MFCFC", "--features_list", 1, 2, 3, 4, "--shot", 2))
    for flag, value in (("--visionA", "MCNNFC"), ("--features_list", "1"), ("--img_size", "56"), ("--shot", 4)):
        line = refused(command("test.py", *paths, flag, value))
        assert f"{flag} {value} contradicts the checkpoint" in line


# The published commands, word for word.


@pytest.fixture
def project(phantoms, trained, tmp_path) -> Path:
    """A folder with data/ and ckpt/, in which commands run without path flags."""
    (tmp_path / "data").symlink_to(phantoms)
    shutil.copytree(trained.ckpt, tmp_path / "ckpt")
    return tmp_path


def test_the_published_test_command(command, project, trained):
    """`python test.py --obj $target-object --shot $few-shot-number` works, and so does every published flag."""
    done = command("test.py", "--obj", "Chest", "--shot", "2", cwd=project)
    assert figures(fine(done)) == figures(trained.output("Chest"))
    every = (
        "--exp_name x --model_name ViT-tiny-14-56 --pretrain random --obj Brain --data_path ./data/ --batch_size 16 "
        "--save_model 1 --save_path ./ckpt/ --img_size 42 --epoch 60 --learning_rate 0.001 --features_list 1 2 3 4 "
        "--seed 111 --shot 2 --iterate 0 --text_mood learnable_all --contrast_mood yes --dec_type mean "
        "--loss_type sigmoid --visionA MFCFC"
    )
    assert figures(fine(command("test.py", *every.split(), cwd=project))) == figures(trained.output("Brain"))


def test_the_published_training_command_renames_a_foreign_checkpoint(command, project):
    """A checkpoint of the published program is renamed, not lost; a resumed run replaces its own checkpoint."""
    published = project / "ckpt/Brain.pth"
    stored = torch.load(published, weights_only=True)
    torch.save({name: stored[name] for name in stored if name not in ("format", "settings", "about")}, published)
    before = published.read_bytes()
    words = "--shot 1 --epoch 1 --model_name ViT-tiny-14-56 --pretrain random --img_size 42 --exp_name one"
    output = fine(command("train.py", "--obj", "Brain", *words.split(), cwd=project))
    (kept,) = (project / "ckpt").glob("Brain.before-*.pth")
    assert kept.read_bytes() == before
    assert f"renamed to ckpt/{kept.name}" in output
    fine(command("train.py", "--resume", "runs/one", "--epoch", "3", cwd=project))
    assert len(list((project / "ckpt").glob("Brain*"))) == 2


# Saved evaluations.


def test_saved_scores_reproduce_every_number(command, trained, tmp_path):
    """Saved scores need no weights, no network and no data set; with the data set the page shows images."""
    scores, paths = tmp_path / "brain.npz", trained.test_flags("Brain")
    first = fine(command("test.py", *paths, "--save_scores", scores, "--out_json", tmp_path / "first.json"))
    assert str(trained.data).encode() not in scores.read_bytes()
    hidden = ["--data_path", tmp_path / "nowhere", "--save_path", tmp_path / "nowhere"]
    outputs = ["--out_json", tmp_path / "again.json", "--report", tmp_path / "page", "--figures", tmp_path / "figures"]
    a_network_is_made = Call("torch.nn.Module.__init__")
    again = fine(command("test.py", "--obj", "Brain", "--scores", scores, *hidden, *outputs,
        on=(a_network_is_made, signal.SIGKILL)))  # fmt: skip
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    assert "no pictures: " in again and "weights:" not in again and "tokens:" not in again
    assert figures(again) == figures(first) and first.splitlines()[-2:] == again.splitlines()[-2:]
    assert (tmp_path / "page/index.html").is_file() and (tmp_path / "figures/Brain-roc.png").is_file()
    seen = fine(command("test.py", *paths[:4], "--scores", scores, "--report", tmp_path / "seen"))
    assert "no pictures" not in seen
    assert len((tmp_path / "seen/index.html").read_bytes()) > len((tmp_path / "page/index.html").read_bytes())


def test_shared_files_name_no_folder_and_no_host(command, phantoms, tmp_path):
    """Checkpoints, pages, results and saved scores hold no path; of the run only config.json and result.json do."""
    save_hugging_face(ModelConfig.load("ViT-tiny-14-56"), tmp_path / "tower")
    shared = ["--obj", "Brain", "--data_path", phantoms, "--save_path", tmp_path / "ckpt", "--device", "cpu"]
    shared += ["--model_name", tmp_path / "tower", "--cache", "disk", "--cache_dir", tmp_path / "store"]
    run = ["--shot", 1, "--epoch", 1, "--run_dir", tmp_path / "runs", "--exp_name", "one"]
    fine(command("train.py", *shared, *run, "--img_size", 42))
    outputs = ["--report", tmp_path / "page", "--figures", tmp_path / "figures", "--save_scores", tmp_path / "s.npz"]
    fine(command("test.py", *shared, *outputs, "--out_json", tmp_path / "b.json"))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and tmp_path / "tower" not in path.parents]
    assert {path.name for path in written} >= {"Brain.pth", "best.pth", "b.json", "index.html", "Brain.png", "s.npz"}
    secrets = [str(tmp_path).encode(), str(phantoms).encode()]
    if len(host := socket.gethostname()) > 5:  # shorter names occur by chance in long files
        secrets.append(host.encode())
    telling = {path.name for path in written if any(s in part for part in unpacked(path) for s in secrets)}
    assert telling == {"config.json", "result.json"}  # result.json holds the path of the run


def test_anonymous_runs_contain_no_file_names(command, phantoms, tmp_path):
    """No file name is in the checkpoint, results, saved scores, run folder, page or figures, or is printed."""
    shared = ["--obj", "Brain", "--data_path", phantoms, "--save_path", tmp_path, "--anonymous", "--cache", "ram"]
    outputs = ["--report", tmp_path / "page", "--figures", tmp_path / "figures", "--save_scores", tmp_path / "s.npz"]
    said = fine(command("train.py", *SMALL, *shared, "--shot", 2, "--epoch", 1, "--out_json", tmp_path / "a.json"))
    said += fine(command("test.py", *shared, "--device", "cpu", *outputs, "--out_json", tmp_path / "b.json"))
    names = [path.stem for path in phantoms.glob("Brain_AD/*/*/img/*")]
    assert len(names) == 22
    written = [path for path in (*tmp_path.rglob("*"), *Path(f"{tmp_path}-runs").rglob("*")) if path.is_file()]
    assert {path.name for path in written} >= {"Brain.pth", "a.json", "b.json", "index.html", "Brain.png", "s.npz"}
    for path in written:
        content = b"".join(unpacked(path))
        assert not [name for name in names if name.encode() in content], path
    assert not [name for name in names if name in said]
    assert len(json.loads((tmp_path / "b.json").read_text())["per_image"]) == 14


def test_result_says_last_if_no_epoch_was_selected(command, phantoms, tmp_path):
    flags = ["--obj", "Brain", "--data_path", phantoms, "--save_path", tmp_path / "ckpt", "--shot", 1, "--epoch", 1]
    fine(command("train.py", *SMALL, *flags, "--eval_every", 2, "--out_json", tmp_path / "a.json"))
    result = json.loads((tmp_path / "a.json").read_text())
    assert (result["select"], result["selected"]) == ("last", "epoch 1 of 1, last epoch (--select test)")
    assert torch.load(tmp_path / "ckpt/Brain.pth", weights_only=True)["about"]["select"] == "last"


def test_patients_of_shots_are_excluded_or_reported_as_unknown(command, phantoms, tmp_path):
    """Also if train.py or test.py is anonymous; the test uses --patient and --mask_above of the training."""
    data = Path(shutil.copytree(phantoms / "Brain_AD", tmp_path / "data/Brain_AD"))
    for path in sorted(data.rglob("*_000*.png")):  # each patient has two images in valid and one in test
        kind, number = ("a" if "Ungood" in path.name else "n"), int(path.stem[-2:])
        path.rename(path.with_name(f"{kind}{number // (2 if 'valid' in path.name else 1)}x{number}.png"))
    shutil.rmtree(data / "fewshot_seed")
    shared = ["--obj", "Brain", "--data_path", data.parent, "--save_path", tmp_path, "--device", "cpu"]
    own = ["--shot", 2, "--epoch", 1, "--patient", r"([an]\d)x", "--mask_above", 0, "--out_json", tmp_path / "a.json"]
    for training, testing in (([], ["--anonymous"]), (["--anonymous"], [])):
        said = fine(command("train.py", *SMALL, *shared, *own, *training))
        assert not training or not re.search(r"[an]\dx", said)
        said = fine(command("test.py", *shared, *testing, "--out_json", tmp_path / "b.json"))
        whole, result = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
        assert result["pauc"] == whole["pauc"]
        assert ("not known" in said) == bool(training)
        if not training:
            keys = [key for key in whole if key.endswith("_without_shot_patients")]
            assert {key: result[key] for key in keys} == {key: whole[key] for key in keys}
            assert whole["n_normal_without_shot_patients"] < whole["n_normal"]
