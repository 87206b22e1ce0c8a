"""--anonymous: names are replaced by running numbers, which are the same for the same files and reveal no name."""

import itertools
import re
from argparse import Namespace

from dataset import phantom
from dataset.medical_few import MedicalDataset
from engine.files.config import train_options
from engine.files.run import shot_patients
from engine.training import Splits
from tests.helpers.data import small_settings


def write(folder) -> MedicalDataset:
    """A data set with two slices of each of two patients (valid) and three patients (test) of each class."""
    phantom.write(folder, ["Brain"], valid=4, test=6, seed=0, size=32)
    for path in sorted((folder / "Brain_AD").rglob("*.png")):
        split, kind, number = re.search(r"(valid|test)_(good|Ungood)_(\d+)", path.name).groups()
        first = (10 if split == "valid" else 11) + (500 if kind == "Ungood" else 0)
        path.rename(path.with_name(f"patient{first + int(number) // 2}_slice{int(number) % 2}.png"))
    for path in (folder / "Brain_AD/fewshot_seed").glob("*"):
        path.unlink()
    return MedicalDataset.open("Brain", folder)


def test_anonymous_names_are_stable_and_reveal_no_name(tmp_path):
    dataset = write(tmp_path)
    samples = dataset.samples("test")
    hidden = MedicalDataset.open("Brain", tmp_path, anonymous=True)
    shown = hidden.samples("test")
    assert [sample.name for sample in shown[:2]] == ["test-00001.png", "test-00002.png"]
    assert len({sample.name for sample in shown}) == len(shown)
    assert MedicalDataset.open("Brain", tmp_path, anonymous=True).samples("test") == shown
    assert [sample.path for sample in samples] == [sample.path for sample in shown]
    for one, other in itertools.pairwise(shown):  # images share a patient as before
        same = samples[shown.index(one)].patient == samples[shown.index(other)].patient
        assert (one.patient == other.patient) == same
    assert not any("patient1" in str(sample.patient).replace("patient-", "") for sample in shown)
    assert hidden.numbers["patient11"] == shown[0].patient
    assert all("slice" not in name for names in hidden.shots(2, 2, -1, 0).names.values() for name in names)


def options_of(folder, *flags):
    return train_options(["--obj", "Brain", "--data_path", str(folder), "--shot", "2", "--iterate", "-1", *flags])


def test_negative_seed_draws_other_shots(tmp_path):
    write(tmp_path)
    drawn = [Splits.open(options_of(tmp_path, "--seed", seed)).shots.names for seed in ("5", "-5", "-5")]
    assert drawn[0] != drawn[1] == drawn[2]


def known(metadata, obj="Brain", patient=None):
    """`shot_patients` of this metadata; `patient` is the rule of the data set, from --patient or its JSON file."""
    return shot_patients(
        small_settings(), metadata, Namespace(obj=obj, layout=Namespace(patient=patient), numbers=None)
    )


def test_unknown_patients_of_shots_are_not_an_empty_set():
    """The patients of the shots are returned, or None with the reason why they are unknown."""
    metadata = {"shot_patients": ["7"], "data": {"patient": None}}
    assert known(metadata) == ({"7"}, "")
    assert known({"shot_patients": []}) == (set(), "")
    for unknown in (known({}), known(metadata, obj="Liver"), known(metadata, patient=r"\d+"),
                    known({"shot_patients": None})):  # fmt: skip
        assert unknown[0] is None
        assert unknown[1]
