"""--anonymous: running numbers instead of the names of a data set's files and patients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .layout import SPLITS
from .medical_few import MedicalDataset, Shots
from .readers.images import Sample


class Numbers:
    """The numbers of a data set's images and patients, in the order of their names: no number tells a name.

    The same files give the same numbers, in training, in a test, and after --resume.
    """

    def __init__(self, dataset: MedicalDataset) -> None:
        samples = {split: dataset.samples(split) for split in SPLITS}
        self._names = {
            (sample.path, sample.index): f"{split}-{number:05}{sample.path.suffix.lower()}"
            for split in SPLITS
            for number, sample in enumerate(samples[split], start=1)
        }
        patients = sorted({sample.patient for split in SPLITS for sample in samples[split] if sample.patient})
        self._patients = {patient: f"patient-{number:05}" for number, patient in enumerate(patients, start=1)}

    def samples(self, samples: Iterable[Sample]) -> list[Sample]:
        """Samples of the data set with numbers for names, in lists as well, and patients."""
        result = []
        for sample in samples:
            name, patient = self._names[sample.path, sample.index], self._patients.get(sample.patient or "")
            result.append(replace(sample, name=name, listed=name, patient=patient))
        return result

    def patients(self, names: Iterable[str]) -> set[str]:
        """The numbers of patients; one that the data set does not show has none."""
        return {self._patients[name] for name in names if name in self._patients}

    def shots(self, shots: Shots) -> Shots:
        """The same shots, under their numbers."""
        return replace(shots, abnormal=self.samples(shots.abnormal), normal=self.samples(shots.normal))
