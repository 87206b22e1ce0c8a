"""A data set on disk: its samples, its splits and its few shots. Where they lie is dataset/layout.py's matter.

The six published data sets lie as <data_path>/<obj>_AD/{valid,test}/{good,Ungood}/{img,anomaly_mask}/NAME
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from PIL import Image

from utils import InputError, prefetch, preview, warn

from .entries import Entry, read_folders
from .fewshot import SEEDS, check_shot_names, draw_shots, list_paths, parse_shot_list, pick_lines
from .layout import BENCHMARKS, FOLDER, KINDS, MADE_UP, PUBLISHED_COUNTS, SPLITS, Layout, described, object_name
from .lists import find_list, read_list
from .pairing import mask_folder
from .readers import (
    EXTENSIONS,
    Levels,
    Mask,
    NoImageError,
    ReadOptions,
    Sample,
    file_kind,
    frames,
    is_deep,
    levels_note,
    parse_window,
    read,
    read_mask,
    stem,
    warn_once,
)

if TYPE_CHECKING:
    import argparse

__all__ = ["Sample"]

HASHED = "the patient, or of the name where none is recognised"
READERS = 4  # threads that read masks
FLAT = 8  # of 255: a slice whose greys differ by less shows nothing
NOTHING = Image.new("L", (1, 1))
# Why something is no sample.
UNMARKED_MASK = "abnormal images whose mask marks nothing"
EMPTY_SLICE = "slices that show nothing"
COPY = "copies of another slice of their series"


def equal_images(
    samples_a: Iterable[Sample],
    samples_b: Iterable[Sample],
    content_hash: Callable[[Sample], str] = Sample.content_hash,
) -> list[tuple[Sample, Sample]]:
    """Samples of the second list whose file equals one of the first, byte for byte, each with the first such one.

    `content_hash` lets a caller that has the hashes already (a token store) save the reading; by default they are
    remembered by path, size and time (`utils.sha256_file`).
    """
    by_hash: dict[str, Sample] = {}
    for sample in samples_a:
        by_hash.setdefault(content_hash(sample), sample)
    pairs = ((by_hash.get(content_hash(sample)), sample) for sample in samples_b)
    return [(first, second) for first, second in pairs if first]


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


@dataclass(frozen=True)
class MedicalDataset:
    """A data set: its name, its folder and how that is laid out. What is read of the folder is kept."""

    obj: str
    root: Path
    layout: Layout
    entries: list[Entry] = field(compare=False, repr=False)
    listing: Path | None = None  # the list that they come from
    left_out: dict[str, set[str]] = field(init=False, compare=False, repr=False)  # why -> names of what is no sample
    levels: dict[str, Mask] = field(init=False, compare=False, repr=False)  # name of a sample -> its mask's levels
    _known: dict[Any, Any] = field(init=False, compare=False, repr=False)  # samples of files, and copies in series

    def __post_init__(self) -> None:
        for name, empty in (("left_out", defaultdict(set)), ("levels", {}), ("_known", {})):
            object.__setattr__(self, name, empty)

    @classmethod
    def open(
        cls,
        obj: str,
        data_path: str | Path,
        data_root: str | Path | None = None,
        listing: Path | None = None,
        **given: Any,  # noqa: ANN401 - fields
    ) -> MedicalDataset:
        """Find `data_root`, or <data_path>/<obj>_AD; `InputError` where it or a part of it is missing.

        A list of the images, given or called images.csv in the folder, stands for its layout (`dataset.lists`).
        <obj>.json in the folder itself or in dataset/ may describe it. What is `given` and not None, of the fields of
        `Layout`, stands for what that file says; see docs/data.md.
        """
        root = listing.parent if listing else data_folder(obj, data_path, data_root)
        listing = listing or find_list(root)
        layout = Layout.load(obj, root, listed=listing is not None)
        for folder in [folder for split, kind in product(SPLITS, KINDS) for folder in layout.folders(split, kind)]:
            top = root / PurePosixPath(folder).parts[0]
            if not top.is_dir():
                other = f"dataset/{obj}.json names it; under a new --obj the folder's own layout would be found"
                raise InputError(f"{top} not found; {_hint(obj, data_path) if data_root is None else other}")
        layout = replace(layout, **{name: value for name, value in given.items() if value is not None})
        return cls(obj, root, layout, read_list(listing, layout) if listing else read_folders(root, layout), listing)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> MedicalDataset:
        """`open` with the flags of a command line: obj, data_path, data_root, and those of `add_reading_flags`."""
        return cls.open(
            options.obj, options.data_path, options.data_root, options.list and Path(options.list),
            patient=options.patient, unmarked=options.unmarked, mask_above=options.mask_above,
            mask_labels=tuple(options.mask_labels or ()) or None,
            window=parse_window(options.window or ()), plane=options.plane,
        )  # fmt: skip

    @property
    def reading(self) -> dict[str, Any]:
        """How pictures beyond 8 bits are read, in plain values: what a checkpoint keeps."""
        window, plane = self.layout.window, self.layout.plane
        kinds = {file_kind(entry.path) for entry in self.entries}
        formats = sorted(kind for kind in kinds if kind)
        shown = {"window": list(window) if isinstance(window, tuple) else window, "plane": plane, "formats": formats}
        return {**shown, "deep": True} if self.options.deep else shown

    @property
    def prompt_name(self) -> str:
        """What the prompts call the object."""
        return self.layout.prompt_name

    @cached_property
    def pixel_metrics(self) -> bool:
        """Whether the data set has masks that are used."""
        has_masks = any(entry.masks for entry in self.entries if entry.kind == "abnormal")
        return has_masks if self.layout.pixel_metrics is None else self.layout.pixel_metrics

    @property
    def mask_above(self) -> int:
        """The grey of a mask above which a pixel is abnormal, of 255."""
        return self.layout.mask_above

    @cached_property
    def options(self) -> ReadOptions:
        """How files with more than 8 bits or more than one slice are read, and what counts in masks."""
        return replace(self.layout.options, deep=is_deep([entry.path for entry in self.entries]))

    # --- which of the paper's data sets it is ---

    @cached_property
    def is_benchmark(self) -> bool:
        """Whether this is one of the paper's six: what others measured on its very files is accepted as it is.

        Its name says so, and it has as many images as the published one.
        """
        return self.obj in BENCHMARKS and not self.is_made_up and not self.other_counts

    @property
    def is_made_up(self) -> bool:
        """Whether dataset.phantom has drawn it."""
        return (self.root / MADE_UP).is_file()

    def count(self, split: str) -> tuple[int, ...]:
        """How many normal and abnormal files there are."""
        return tuple(len(self.image_files(split, kind, required=False)) for kind in KINDS)

    @cached_property
    def other_counts(self) -> list[str]:
        """Where the numbers of images are not the published ones, in words."""
        parts = []
        for split, accepted in PUBLISHED_COUNTS.get(self.obj, {}).items():
            images = self.count(split)
            if images not in accepted and (sum(images),) not in accepted:
                published = " or ".join(" + ".join(map(str, counts)) for counts in accepted)
                parts.append(f"{split} {' + '.join(map(str, images))} (published: {published})")
        return parts

    # --- files ---

    def image_files(self, split: str, kind: str, required: bool = True) -> list[Entry]:
        """The image files of a class (`normal`, `abnormal`) in a split, folder by folder and sorted.

        Raises:
            InputError: a folder is missing or there are no images; not where none are `required`.
        """
        result = [entry for entry in self.entries if (entry.split, entry.kind) == (split, kind)]
        if required and not result:
            folders = self.layout.folders(split, kind)
            where = ", ".join(str(self.root / folder) for folder in folders) or str(self.listing or self.root)
            if divided := sum(entry.kind == kind and entry.divided for entry in self.entries):
                fault = f"{where}: divided by a hash of {HASHED}, none of the {divided} {kind} images is {split}"
                raise InputError(f"{fault}; give the splits folders of their own, in dataset/{self.obj}.json")
            if missing := [folder for folder in folders if not (self.root / folder).is_dir()]:
                raise InputError(f"{self.root / missing[0]} not found; docs/data.md shows the layout of a data set")
            raise InputError(f"{where}: no images ({', '.join(EXTENSIONS)}) for {split}, {kind}")
        return result

    # --- samples ---

    def samples(self, split: str) -> list[Sample]:
        """The images of `valid` or `test`, normal first, each class sorted by name; `valid` may lack abnormal ones.

        In `valid` an abnormal image without a mask has mask None although the data set has masks: it may be no shot,
        and cannot be calibrated on.

        Raises:
            InputError: a class without images, or with pixel metrics a test image without a mask of its own.
        """
        result: list[Sample] = []
        for kind in KINDS:
            files = self.image_files(split, kind, (split, kind) != ("valid", "abnormal"))
            self._check_masks(files, kind, may_lack_mask=split == "valid")
            workers = 1 if any(file.series for file in files) else READERS  # of copies the first one stays
            found = [sample for inside in prefetch(self.samples_in, files, workers) for sample in inside]
            if split == "test" and not found:
                why = "; ".join((*self.left_out_lines(), self.levels_line() or "no slice"))
                raise InputError(f"{self.root}: none of the {len(files)} {kind} files of test gives an image: {why}")
            result += found
        return sorted(result, key=lambda sample: sample.label)  # slices without a mark may have become normal

    def mask_problems(self, files: Sequence[Entry]) -> tuple[list[str], list[str]]:
        """The images that have no mask, and those whose mask is ambiguous, in words."""
        names = [file.path.with_name(stem(file.path)) for file in files]
        count = Counter(names)
        ambiguous = [
            f"{file.path} ({len(file.masks)} masks fit {count[name]} images of that name)"
            for file, name in zip(files, names, strict=True)
            if file.masks and (count[name] > 1 or len({stem(mask) for mask in file.masks}) < len(file.masks))
        ]
        return [str(file.path) for file in files if not file.masks], ambiguous

    def _check_masks(self, files: Sequence[Entry], kind: str, may_lack_mask: bool = False) -> None:
        """`InputError` where an abnormal image has no mask of its own."""
        if kind == "normal" or not self.pixel_metrics:
            return
        missing, ambiguous = self.mask_problems(files)
        if missing and not may_lack_mask:
            image = next(file for file in files if not file.masks)
            homes = (mask_folder(self.root, image.folder, place, image.path.parent) for place in self.layout.masks)
            places = [str(self.listing)] if self.listing else map(str, homes)
            fault = f"{preview(missing)}: no mask ({len(missing)} of {len(files)} abnormal images)"
            advice = f'add them, or set "pixel_metrics": false in dataset/{self.obj}.json'
            where = ", ".join(dict.fromkeys(places))
            raise InputError(f"{fault}; they are sought in {where}; `python -m dataset.check` names them all; {advice}")
        if ambiguous:
            raise InputError(f"{preview(ambiguous)}: give each image a name of its own, and its mask the same")

    def samples_in(self, file: Entry, judged: bool = True) -> list[Sample]:
        """The samples in a file: one, or of a DICOM series and a NIfTI volume one for each frame and slice.

        DICOM objects without a picture give none, with a warning. Where they are `judged`, slices that show nothing and
        copies within a series are left out, and so are abnormal images and slices whose mask marks nothing, unless
        `unmarked` says otherwise.

        Raises:
            InputError: a mask has another number of slices than its image.
        """
        if judged:
            key = (file.path, file.index)
            if key not in self._known:
                found = (self._judged(sample, file.series) for sample in self.samples_in(file, judged=False))
                self._known[key] = [sample for sample in found if sample]
            known: list[Sample] = self._known[key]
            return known
        masks = file.masks if file.kind == "abnormal" and self.pixel_metrics else []
        sample = Sample(
            file.path, KINDS.index(file.kind), masks[0] if masks else None, file.name, file.patient,
            options=self.options, published=self.is_benchmark, more_masks=tuple(masks[1:]),
            kind=self._kind_of(file),
        )  # fmt: skip
        samples = [sample]
        if file_kind(file.path) != "pillow":
            try:
                inside = frames(file.path, self.options)
            except NoImageError as error:
                warn_once(f"{error}; left out")
                return []
            if len(inside) > 1:
                samples = [replace(sample, index=frame.index, name=f"{file.name}#{frame.index}") for frame in inside]
        for mask in masks:
            if file_kind(mask) != "pillow" and (count := len(frames(mask, self.options))) != len(samples):
                raise InputError(f"{mask}: {count} slices, but {file.path} has {len(samples)}: no mask of it")
        if file.index is not None and not 0 <= file.index < len(samples):
            raise InputError(f"{self.listing}: slice {file.index} of {file.path}, which has {len(samples)}")
        return samples if file.index is None else samples[file.index : file.index + 1]

    def _kind_of(self, file: Entry) -> str:
        """What kind of abnormal a file is, by the list or, where there are several, by its class's folder."""
        names = {folder: PurePosixPath(folder.removesuffix("/img")).name for split in SPLITS
                 for folder in self.layout.folders(split, "abnormal")}  # fmt: skip
        several = file.kind == "abnormal" and len(set(names.values())) > 1
        return file.word or (names.get(file.folder, "") if several else "")

    def _judged(self, sample: Sample, series: str) -> Sample | None:
        """A sample by what its mask and, of DICOM and NIfTI, its picture shows; None where it is left out."""
        unmarked, mask = self.layout.unmarked or ("abnormal" if self.is_benchmark else "out"), None
        if (self.layout.unmarked or not self.is_benchmark) and (mask := read_mask(sample)):
            self.levels[sample.name] = mask._replace(image=NOTHING)
            if not mask.marks(self.mask_above) and unmarked != "abnormal":
                self.left_out[UNMARKED_MASK].add(sample.name)
                if unmarked == "out":
                    return None
                sample = replace(sample, label=0, mask=None, more_masks=())
        kind = file_kind(sample.path)
        if kind == "pillow" or (kind == "nifti" and sample.mask):
            return sample
        picture = read(sample)
        low, high = picture.image.convert("L").getextrema()
        if high - low < FLAT and not sample.mask:  # type: ignore[operator]
            self.left_out[EMPTY_SLICE].add(sample.name)
            return None
        if kind == "dicom" and series:
            key = (series, sample.index, hashlib.sha256(picture.image.tobytes()).digest())
            if self._known.setdefault(key, sample.name) != sample.name:
                self.left_out[COPY].add(sample.name)
                return None
        return sample

    def left_out_lines(self, examples: bool = True) -> list[str]:
        """A line for each reason why something is no sample, of the samples that were asked for so far."""
        words = {UNMARKED_MASK: f"{self.layout.unmarked or 'out'} by --unmarked"}
        return [
            f"{len(names)} {why}: {words.get(why, 'left out')}"
            + (f", such as {preview(sorted(names), 1)}" if examples else "")
            for why, names in sorted(self.left_out.items())
        ]

    def levels_line(self) -> str | None:
        """A line on masks of other levels than 0 and 255, as far as they were read; the paper's are not looked at."""
        total = sum((mask.levels for mask in self.levels.values()), Levels())
        by_label = any(mask.by_label for mask in self.levels.values())
        return levels_note(total, by_label, self.mask_above, self.options.mask_labels) if total else None

    # --- shots ---

    def shots(self, shot_normal: int, shot_abnormal: int, iterate: int, seed: int) -> Shots:
        """The few-shot images; a class's list is the one for its own number of shots. See `Shots`.

        Without a list they are drawn, each of another patient as far as patients are known and there are so many (not
        on the paper's data); where the data set has masks, abnormal ones among those that have one.

        Raises:
            InputError: a list that names other images or too few, fewer images than shots, a shot without a mask.
        """
        draw = random.Random(seed if seed >= 0 else str(seed))  # which takes -5 for 5
        chosen: dict[str, list[Sample]] = {"abnormal": [], "normal": []}
        names: dict[str, list[str]] = {"abnormal": [], "normal": []}
        sources: dict[str, None] = {}  # an ordered set, and so is
        warnings: dict[str, None] = {}
        for kind, count in (("abnormal", shot_abnormal), ("normal", shot_normal)):
            if not count:
                continue
            known = self.known_shots(kind)
            listed = self._listed(kind, count, iterate, known, warnings) if iterate >= 0 else None
            source = f"sampled with seed {seed} from the sorted names of valid/ (no list for {count} shots is used)"
            names[kind], source = listed or (
                self._drawn(kind, count, draw, known, f"shot_{kind}" if shot_normal != shot_abnormal else "shot"),
                source,
            )
            sources[source] = None
            files = {known[name][0].path: known[name][0] for name in names[kind]}
            self._check_masks(list(files.values()), kind)
            chosen[kind] = [known[name][1] for name in names[kind]]
        for text in warnings:
            warn(text)
        return Shots(chosen["abnormal"], chosen["normal"], ", ".join(sources), names)

    def known_shots(self, kind: str) -> dict[str, tuple[Entry, Sample]]:
        """The images of a class in valid by what lists call them, `#INDEX` behind it for a slice."""
        return {
            file.listed + sample.name.removeprefix(file.name): (file, sample)
            for file in self.image_files("valid", kind)
            for sample in self.samples_in(file, judged=False)
        }

    def _drawn(
        self, kind: str, count: int, draw: random.Random, known: dict[str, tuple[Entry, Sample]], flag: str
    ) -> list[str]:
        """The names of `count` images, drawn from those that may be shots."""
        patients = {
            name: None if self.is_benchmark else sample.patient
            for name, (file, sample) in known.items()
            if (file.masks or kind == "normal" or not self.pixel_metrics)
            and any(judged == sample for judged in self.samples_in(file))
        }
        if len(patients) < count:
            masked = " with a mask" * (len(patients) < len(known))
            raise InputError(f"--{flag} {count}: valid holds only {len(patients)} {kind} images{masked} in {self.root}")
        return draw_shots(draw, patients, count)

    def _listed(
        self, kind: str, count: int, iterate: int, known: Mapping[str, tuple[Entry, Sample]], warnings: dict[str, None]
    ) -> tuple[list[str], str] | None:
        """The names on the list for `count` shots and that list's name; None where there is none for these images.

        Shots in the list of the images come first.
        """
        if names := [name for name, (file, _) in known.items() if file.shot]:
            warnings.update(dict.fromkeys(check_shot_names(names, known, count, str(self.listing), self.root)))
            return names, self.listing.name if self.listing else ""
        path = next((path for path in self.shot_lists() if path.name == f"my{count}-shot.txt"), None)
        if path is None:
            return None
        lines, remarks = parse_shot_list(path)
        names = pick_lines(lines, remarks, path, iterate)[0 if kind == "abnormal" else 1]
        source = "/".join(path.parts[-3:])  # checkpoints keep it: the data set's folder, not what leads there
        if SEEDS in path.parents:
            source = path.relative_to(FOLDER.parent).as_posix()
            if not set(names) & set(known):  # other images under the same name, as with the phantom
                if self.obj in BENCHMARKS and not self.is_made_up:
                    fault = f"{source}: none of its {kind} images is in valid, so the shots are not the published ones"
                    warnings[f"{fault}: is the copy whole?"] = None
                return None
        remarks += check_shot_names(names, known, count, source, self.root)
        warnings.update(dict.fromkeys(remarks))
        return names, source

    def shot_lists(self) -> list[Path]:
        """The few-shot lists, the data set's own first: they win over the project's of the same name."""
        return [*list_paths(self.root / "fewshot_seed"), *list_paths(SEEDS / self.obj)]


@dataclass(frozen=True)
class Shots:
    """The few labelled images that training sees."""

    abnormal: list[Sample]  # may be empty: normal-only support
    normal: list[Sample]
    source: str  # the list file, or how they were sampled
    listed: dict[str, list[str]]

    def names(self) -> dict[str, list[str]]:
        """What is printed, logged and stored in the checkpoint: the names as a list would give them."""
        return self.listed
