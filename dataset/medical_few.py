"""A data set on disk: its samples, its splits and its few shots. Where they lie is dataset/layout.py's matter.

The six published data sets lie as <data_path>/<obj>_AD/{valid,test}/{good,Ungood}/{img,anomaly_mask}/NAME
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from utils import InputError, anonymous_name, preview, warn

from .fewshot import SEEDS, check_shot_names, parse_shot_list, pick_lines
from .layout import (
    BENCHMARKS,
    FOLDER,
    KINDS,
    MADE_UP,
    SPLITS,
    Layout,
    described,
    find_masks,
    list_images,
    mask_folder,
    object_name,
)
from .patients import compile_rule, falls_in_valid, patient
from .readers import (
    EXTENSIONS,
    Ends,
    NoImageError,
    ReadOptions,
    Sample,
    file_kind,
    frames,
    is_deep,
    parse_window,
    read_mask,
    stem,
    warn_once,
)

if TYPE_CHECKING:
    import argparse

__all__ = ["Sample"]


def anonymous(samples: Iterable[Sample]) -> list[Sample]:
    """Samples with hashes for names and patients, which may be people's: what is shared shows these."""
    return [replace(s, name=anonymous_name(s.name), patient=s.patient and anonymous_name(s.patient)) for s in samples]


class ImageFile(NamedTuple):
    """An image file of a class."""

    path: Path
    masks: list[Path]  # the files that fit as its mask: one, unless something is wrong
    folder: str  # the class's, relative to the data set's: the file lies in it or below


def equal_images(
    samples_a: Iterable[Sample],
    samples_b: Iterable[Sample],
    content_hash: Callable[[Sample], str] = Sample.content_hash,
) -> list[tuple[Sample, Sample]]:
    """Pairs of samples whose files are equal, byte for byte, one of each list.

    `content_hash` lets a caller that has the hashes already (a token store) save the reading; by default they are
    remembered by path, size and time (`utils.sha256_file`).
    """
    by_hash = defaultdict(list)
    for sample in samples_a:
        by_hash[content_hash(sample)].append(sample)
    return [(first, second) for second in samples_b for first in by_hash.get(content_hash(second), ())]


def data_folder(obj: str, data_path: str | Path, data_root: str | Path | None = None) -> Path:
    """`data_root`, or <data_path>/<obj>_AD; `InputError` where it is no folder."""
    name = object_name(obj)
    root = Path(data_path) / f"{name}_AD" if data_root is None else Path(data_root)
    if not root.is_dir():
        flag = f"--data_path {data_path}" if data_root is None else f"--data_root {data_root}"
        raise InputError(f"{flag}: {root} not found; {_hint(obj, data_path)}")
    return root


def _hint(obj: str, data_path: str | Path) -> str:
    if obj in BENCHMARKS:
        draw = f"`python -m dataset.phantom --obj {obj} --out {data_path}` draws a made-up one"
        return f"docs/data.md says where to get {obj}, and {draw}"
    advice = "may be your own: put the data set there, or name its folder with --data_root (docs/data.md)"
    return f"--obj {obj} is none of {', '.join(described())}, but {advice}"


HASHED = "the patient, or of the name where none is recognised"


@dataclass(frozen=True)
class MedicalDataset:
    """A data set: its name, its folder and how that is laid out."""

    obj: str
    root: Path
    layout: Layout

    @classmethod
    def open(
        cls,
        obj: str,
        data_path: str | Path,
        data_root: str | Path | None = None,
        patient: str | None = None,
        mask_above: int | None = None,
        window: Ends | str | None = None,
        plane: str | None = None,
    ) -> MedicalDataset:
        """Find `data_root`, or <data_path>/<obj>_AD; `InputError` where it or a part of it is missing.

        <obj>.json in the folder itself or in dataset/ may describe it. `patient` (a regular expression), `mask_above`
        (0 to 254), `window` and `plane` stand for what that file says; see docs/data.md.
        """
        root = data_folder(obj, data_path, data_root)
        layout = Layout.load(obj, root)
        for folder in chain(*layout.valid.values(), *layout.test.values()):
            top = root / PurePosixPath(folder).parts[0]
            if not top.is_dir():
                other = f"dataset/{obj}.json names it; under a new --obj the folder's own layout would be found"
                raise InputError(f"{top} not found; {_hint(obj, data_path) if data_root is None else other}")
        if patient is not None:
            compile_rule(patient, "--patient")
        if mask_above is not None and not 0 <= mask_above <= 254:
            raise InputError(f"--mask_above {mask_above}: from 0 to 254, of 255")
        layout = replace(
            layout, patient=patient or layout.patient, window=window or layout.window, plane=plane or layout.plane,
            mask_above=layout.mask_above if mask_above is None else mask_above,
        )  # fmt: skip
        return cls(obj, root, layout)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> MedicalDataset:
        """`open` with the flags of a command line: obj, data_path, data_root, and those of `add_reading_flags`."""
        return cls.open(
            options.obj, options.data_path, options.data_root, options.patient, options.mask_above,
            parse_window(options.window or ()), options.plane,
        )  # fmt: skip

    @property
    def reading(self) -> dict[str, Any]:
        """How pictures beyond 8 bits are read, in plain values: what a checkpoint keeps."""
        window, plane = self.layout.window, self.layout.plane
        kinds = {file_kind(file.path) for file in self.image_files("valid", "normal", required=False)}
        formats = sorted(kind for kind in kinds if kind)
        shown = {"window": list(window) if isinstance(window, tuple) else window, "plane": plane, "formats": formats}
        return {**shown, "deep": True} if self.options.deep else shown

    @property
    def prompt_name(self) -> str:
        """What the prompts call the object."""
        return self.layout.prompt_name

    @property
    def pixel_metrics(self) -> bool:
        """Whether the data set has masks that are used."""
        return self.layout.pixel_metrics

    @property
    def mask_above(self) -> int:
        """The grey of a mask above which a pixel is abnormal, of 255."""
        return self.layout.mask_above

    @cached_property
    def options(self) -> ReadOptions:
        """How files with more than 8 bits or more than one slice are read; one depth holds for all of its pictures."""
        paths: list[Path] = []
        for split, kind in product(SPLITS, KINDS):
            with suppress(InputError):  # it is reported where the images are used
                paths += [file.path for file in self.image_files(split, kind, required=False)]
        return replace(self.layout.options, deep=is_deep(paths))

    @property
    def is_benchmark(self) -> bool:
        """Whether this is one of the paper's six: what others measured on its very files is accepted as it is."""
        return self.obj in BENCHMARKS and not (self.root / MADE_UP).is_file()

    @cached_property
    def _patient_rule(self) -> re.Pattern[str] | None:
        return compile_rule(self.layout.patient, "--patient") if self.layout.patient else None

    def samples(self, split: str) -> list[Sample]:
        """The images of `valid` or `test`, normal first, each class sorted by name; `valid` may lack abnormal ones.

        In `valid` an abnormal image without a mask has mask None although the data set has masks: it may be no shot,
        and cannot be calibrated on.

        Raises:
            InputError: a class without images, or with pixel metrics a test image without a mask of its own.
        """
        files = {kind: self.image_files(split, kind, (split, kind) != ("valid", "abnormal")) for kind in KINDS}
        for kind in KINDS:
            self._check_masks(files[kind], kind, may_lack_mask=split == "valid")
        return [sample for kind in KINDS for file in files[kind] for sample in self.samples_in(file, kind)]

    def image_files(self, split: str, kind: str, required: bool = True) -> list[ImageFile]:
        """The image files of a class (`normal`, `abnormal`) in a split, folder by folder and sorted, with their masks.

        Raises:
            InputError: a folder is missing or there are no images; not where none are `required`.
        """
        result: list[ImageFile] = []
        folders = self.layout.folders(split, kind)
        divided = 0  # images in folders that both splits share
        for folder in folders:
            if not (self.root / folder).is_dir():
                if not required:
                    continue
                raise InputError(f"{self.root / folder} not found; docs/data.md shows the layout of a data set")
            images = list_images(self.root / folder)
            if folder in self.layout.shared(kind):
                divided += len(images)
                share, is_valid = self.layout.valid_share, split == "valid"
                images = [p for p in images if falls_in_valid(self.name(p), share, self.patient(p, folder)) == is_valid]
            with_masks = kind == "abnormal" and self.pixel_metrics
            masks = find_masks(self.root, folder, self.layout.masks, images) if with_masks else [[]] * len(images)
            result += [ImageFile(path, fitting, folder) for path, fitting in zip(images, masks, strict=True)]
        if required and not result:
            where = ", ".join(str(self.root / folder) for folder in folders) or "its JSON file names no folder"
            if divided:
                fault = f"{where}: divided by a hash of {HASHED}, none of the {divided} {kind} images is {split}"
                raise InputError(f"{fault}; give the splits folders of their own, in dataset/{self.obj}.json")
            raise InputError(f"{where}: no images ({', '.join(EXTENSIONS)}) for {split}, {kind}")
        return result

    def name(self, path: Path) -> str:
        """The path below the data set's folder."""
        return path.relative_to(self.root).as_posix()

    def patient(self, path: Path, folder: str) -> str | None:
        """The patient of an image in a class's folder, or below it, as far as the name tells."""
        return patient(self.name(path), self._patient_rule, path.relative_to(self.root / folder).as_posix())

    def mask_problems(self, files: Sequence[ImageFile]) -> tuple[list[str], list[str]]:
        """The images that have no mask, and those whose mask is ambiguous, in words."""
        names = [file.path.with_name(stem(file.path)) for file in files]
        count = Counter(names)
        ambiguous = [
            f"{file.path} ({len(file.masks)} masks fit {count[name]} images of that name)"
            for file, name in zip(files, names, strict=True)
            if file.masks and (len(file.masks) > 1 or count[name] > 1)
        ]
        return [str(file.path) for file in files if not file.masks], ambiguous

    def _check_masks(self, files: Sequence[ImageFile], kind: str, may_lack_mask: bool = False) -> None:
        """`InputError` where an abnormal image has no mask of its own."""
        if kind == "normal" or not self.pixel_metrics:
            return
        missing, ambiguous = self.mask_problems(files)
        if missing and not may_lack_mask:
            image = next(file for file in files if not file.masks)
            place = mask_folder(self.root, image.folder, self.layout.masks)
            fault = f"{preview(missing)}: no mask ({len(missing)} of {len(files)} abnormal images)"
            advice = f'add them, or set "pixel_metrics": false in dataset/{self.obj}.json'
            raise InputError(f"{fault}; they are sought in {place}; `python -m dataset.check` names them all; {advice}")
        if ambiguous:
            raise InputError(f"{preview(ambiguous)}: give each image a name of its own, and its mask the same")

    def samples_in(self, file: ImageFile, kind: str) -> list[Sample]:
        """The samples in a file: one, or of a DICOM series and a NIfTI volume one for each frame and slice.

        Of an abnormal volume whose mask is a volume, only the slices that the mask marks are abnormal; the others are
        left out, as nobody has said that they are normal. DICOM objects without a picture give none, with a warning.
        """
        mask, name = file.masks[0] if file.masks else None, self.name(file.path)
        sample = Sample(
            file.path,
            KINDS.index(kind),
            mask,
            name,
            self.patient(file.path, file.folder),
            options=self.options,
            published=self.is_benchmark,
        )
        if file_kind(file.path) == "pillow":
            return [sample]
        try:
            inside = frames(file.path, self.options)
        except NoImageError as error:
            warn_once(f"{error}; left out")
            return []
        if len(inside) == 1:
            return [sample]
        slices = [replace(sample, index=frame.index, name=f"{name}#{frame.index}") for frame in inside]
        if mask is None or file_kind(mask) != "nifti":
            return slices
        return [entry for entry in slices if (marks := read_mask(entry)) and marks.image.getbbox()]

    def split_note(self) -> str | None:
        """A line on the folders that are divided between the splits; None where none is."""
        shared = {kind: folders for kind in KINDS if (folders := self.layout.shared(kind))}
        if not shared:
            return None
        valid, test = (
            sum(file.folder in folders for kind, folders in shared.items() for file in self.image_files(split, kind))
            for split in SPLITS
        )
        counts = f"of their {valid + test} images {valid} are valid, for shots, and {test} test"
        return f"{self.obj}: {preview([*chain(*shared.values())])} serve both splits: {counts}, by a hash of {HASHED}"

    def patients_note(self) -> str:
        """A line on how many patients were recognised in the names, with examples; `warning: ...` where none was."""
        if (self.root / MADE_UP).is_file():
            return "patients: none, as the images are made up"
        files = [file for split in SPLITS for kind in KINDS for file in self.image_files(split, kind, required=False)]
        known = {file.path: self.patient(file.path, file.folder) for file in files}
        patients = sorted({number for number in known.values() if number})
        if not patients:
            fault = f"none recognised in the names{f' (such as {self.name(files[0].path)})' if files else ''}"
            advice = f"say how to find them with --patient REGEX, or `patient` in {self.obj}.json"
            return f"warning: patients: {fault}, so that one may be in both splits without a word; {advice}"
        unknown = "" if all(known.values()) else f" ({sum(v is None for v in known.values())} images without)"
        return f"patients: {len(patients)} recognised in {len(known)} names{unknown}: {preview(patients)}"

    def shots(self, shot_normal: int, shot_abnormal: int, iterate: int, seed: int) -> Shots:
        """The few-shot images; a class's list is the one for its own number of shots. See `Shots`.

        Without a list they are drawn; where the data set has masks, abnormal ones among those that have one.

        Raises:
            InputError: a list that names other images or too few, fewer images than shots, a shot without a mask.
        """
        draw = random.Random(seed)
        chosen: dict[str, list[Sample]] = {"abnormal": [], "normal": []}
        names: dict[str, list[str]] = {"abnormal": [], "normal": []}
        sources: dict[str, None] = {}  # an ordered set, and so is
        warnings: dict[str, None] = {}
        for kind, count in (("abnormal", shot_abnormal), ("normal", shot_normal)):
            if not count:
                continue
            known = self.known_shots(kind)
            listed = self._listed(kind, count, iterate, known, warnings) if iterate >= 0 else None
            eligible = sorted(
                name for name, (file, _) in known.items() if file.masks or kind == "normal" or not self.pixel_metrics
            )
            if listed is None and len(eligible) < count:
                flag = "--shot" if shot_normal == shot_abnormal else f"--shot_{kind}"
                masked = " with a mask" * (len(eligible) < len(known))
                raise InputError(
                    f"{flag} {count}: valid holds only {len(eligible)} {kind} images{masked} in {self.root}"
                )
            source = f"sampled with seed {seed} from the sorted names of valid/ (no list for {count} shots is used)"
            names[kind], source = listed or (draw.sample(eligible, count), source)
            sources[source] = None
            files = {known[name][0].path: known[name][0] for name in names[kind]}
            self._check_masks(list(files.values()), kind)
            chosen[kind] = [known[name][1] for name in names[kind]]
        for text in warnings:
            warn(text)
        return Shots(chosen["abnormal"], chosen["normal"], ", ".join(sources), names)

    def known_shots(self, kind: str) -> dict[str, tuple[ImageFile, Sample]]:
        """The images of a class in valid by what lists call them: the name, or the path below the root.

        The path where a class has several folders or folders below, and `#INDEX` behind it for a slice.
        """
        files = self.image_files("valid", kind)
        flat = len(self.layout.valid[kind]) == 1 and all(file.path.parent == self.root / file.folder for file in files)
        return {
            PurePosixPath(sample.name).name if flat else sample.name: (file, sample)
            for file in files
            for sample in self.samples_in(file, kind)
        }

    def _listed(
        self, kind: str, count: int, iterate: int, known: Collection[str], warnings: dict[str, None]
    ) -> tuple[list[str], str] | None:
        """The names on the list for `count` shots and that list's name; None where there is none for these images."""
        path = next((path for path in self.shot_lists() if path.name == f"my{count}-shot.txt"), None)
        if path is None:
            return None
        lines, remarks = parse_shot_list(path)
        names = pick_lines(lines, remarks, path, iterate)[0 if kind == "abnormal" else 1]
        source = str(path)
        if SEEDS in path.parents:
            source = path.relative_to(FOLDER.parent).as_posix()
            if not set(names) & set(known):  # other images under the same name, as with the phantom
                if self.is_benchmark:
                    fault = f"{source}: none of its {kind} images is in valid, so the shots are not the published ones"
                    warnings[f"{fault}: is the copy whole?"] = None
                return None
        remarks += check_shot_names(names, known, count, source, self.root)
        warnings.update(dict.fromkeys(remarks))
        return names, source

    def shot_lists(self) -> list[Path]:
        """The few-shot lists, the data set's own first: they win over the project's of the same name."""
        files = [file for folder in (self.root / "fewshot_seed", SEEDS / self.obj) for file in sorted(folder.glob("*"))]
        return [file for file in files if re.fullmatch(r"my\d+-shot\.txt", file.name)]


@dataclass(frozen=True)
class Shots:
    """The few labelled images that training sees."""

    abnormal: list[Sample]  # may be empty: normal-only support
    normal: list[Sample]
    source: str  # the list file, or how they were sampled
    listed: dict[str, list[str]]

    def anonymous(self) -> Shots:
        """The same with hashes for names."""
        listed = {kind: [anonymous_name(name) for name in names] for kind, names in self.listed.items()}
        return Shots(anonymous(self.abnormal), anonymous(self.normal), self.source, listed)

    def names(self) -> dict[str, list[str]]:
        """What is printed, logged and stored in the checkpoint: the names as a list would give them."""
        return self.listed
