"""A data set on disk: its samples, its splits and its few shots. Where they lie is dataset/layout.py's matter.

The six published data sets lie as <data_path>/<obj>_AD/{valid,test}/{good,Ungood}/{img,anomaly_mask}/NAME
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import InputError, prefetch, preview, warn

from .entries import Entry, read_folders
from .fewshot import SEEDS, check_shot_names, draw_shots, list_paths, parse_shot_list, pick_lines
from .layout import BENCHMARKS, FOLDER, KINDS, MADE_UP, PUBLISHED_COUNTS, Layout, described, object_name
from .lists import find_list, read_list
from .pairing import MASK_FOLDERS
from .readers.grey import NoImageError, ReadOptions
from .readers.images import EXTENSIONS, Sample, file_kind, frames, is_deep, parse_window, read, stem
from .readers.masks import Levels, levels_note, read_mask

if TYPE_CHECKING:
    import argparse

HASHED = "the patient, or of the name where none is recognised"
READERS = 4  # threads that read masks
SOUGHT = f"masks are sought beside the image and in folders called {', '.join(MASK_FOLDERS)}"
# Why something is no sample.
UNMARKED_MASK = "abnormal images whose mask marks nothing"
EMPTY_SLICE = "slices that show nothing"
NO_IMAGE = "DICOM objects without a picture"
COPY = "copies of another slice of their series"


def equal_images(
    samples_a: Iterable[Sample],
    samples_b: Iterable[Sample],
    content_hash: Callable[[Sample], str] = Sample.content_hash,
) -> list[tuple[Sample, Sample]]:
    """Samples of the second list whose file equals one of the first, byte for byte, each with the first such one.

    `content_hash` lets a caller that has the hashes already (a token store) save the reading.
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


@dataclass(eq=False)
class MedicalDataset:
    """A data set: its name, its folder and how that is laid out. What is read of the folder is kept."""

    obj: str
    root: Path
    layout: Layout
    entries: list[Entry]
    listing: Path | None = None  # the list that they come from
    left_out: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # why -> names of no samples
    levels: dict[str, tuple[Levels, bool]] = field(default_factory=dict)  # sample -> its mask's, and if they are labels
    _known: dict[Any, Any] = field(default_factory=dict)  # samples of files, and copies in series

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

    @cached_property
    def pixel_metrics(self) -> bool:
        """Whether the data set has masks that are used."""
        has_masks = any(entry.masks for entry in self.entries if entry.kind == "abnormal")
        return has_masks if self.layout.pixel_metrics is None else self.layout.pixel_metrics

    @cached_property
    def options(self) -> ReadOptions:
        """How files with more than 8 bits or more than one slice are read, and what counts in masks."""
        layout, deep = self.layout, is_deep([entry.path for entry in self.entries])
        return ReadOptions(layout.window, layout.plane, layout.mask_labels, deep)

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

        `InputError` where there are none although some are `required`.
        """
        result = [entry for entry in self.entries if (entry.split, entry.kind) == (split, kind)]
        if required and not result:
            folders = self.layout.folders(split, kind)
            where = ", ".join(str(self.root / folder) for folder in folders) or str(self.listing or self.root)
            if divided := sum(entry.kind == kind and entry.divided for entry in self.entries):
                fault = f"{where}: divided by a hash of {HASHED}, none of the {divided} {kind} images is {split}"
                raise InputError(f"{fault}; give the splits folders of their own, or write a list (docs/data.md)")
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
        ambiguous = [
            f"{file.path} ({len(file.masks)} masks fit {images} images of that name)"
            for file in ([] if self.listing else files)  # a list means what it says
            if (images := max((len(self._images_of[mask]) for mask in file.masks), default=0)) > 1
            or len({stem(mask) for mask in file.masks}) < len(file.masks)
        ]
        return [str(file.path) for file in files if not file.masks], ambiguous

    @cached_property
    def _images_of(self) -> dict[Path, set[Path]]:
        """The abnormal images of each mask."""
        result = defaultdict(set)
        for entry in self.entries:
            for mask in entry.masks if entry.kind == "abnormal" else []:
                result[mask].add(entry.path)
        return result

    def _check_masks(self, files: Sequence[Entry], kind: str, may_lack_mask: bool = False) -> None:
        """`InputError` where an abnormal image has no mask of its own."""
        if kind == "normal" or not self.pixel_metrics:
            return
        missing, ambiguous = self.mask_problems(files)
        if missing and not may_lack_mask:
            homes = sorted({str(mask.parent) for file in self.entries for mask in file.masks})
            raise InputError(
                f"{preview(missing)}: no mask ({len(missing)} of {len(files)} abnormal images); {SOUGHT}; "
                f"others lie in {preview(homes)}; `python -m dataset.check` names them all; add them, or set "
                f'"pixel_metrics": false in dataset/{self.obj}.json'
            )
        if ambiguous:
            raise InputError(f"{preview(ambiguous)}: give each image a name of its own, and its mask the same")

    def samples_in(self, file: Entry, judged: bool = True) -> list[Sample]:
        """The samples in a file: one, or of a DICOM series and a NIfTI volume one for each frame and slice.

        DICOM objects without a picture give none. Where they are `judged`, slices that show nothing and
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
            file.path, KINDS.index(file.kind), tuple(masks), file.name, file.patient,
            options=self.options, published=self.is_benchmark, kind=file.word,
        )  # fmt: skip
        samples = [sample]
        if file_kind(file.path) != "pillow":
            try:
                inside = frames(file.path, self.options)
            except NoImageError:
                self.left_out[NO_IMAGE].add(file.name)
                return []
            if len(inside) > 1:
                samples = [replace(sample, index=frame.index, name=f"{file.name}#{frame.index}") for frame in inside]
        for mask in masks:
            if file_kind(mask) != "pillow" and (count := len(frames(mask, self.options))) != len(samples):
                raise InputError(f"{mask}: {count} slices, but {file.path} has {len(samples)}: no mask of it")
        if file.index is not None and not 0 <= file.index < len(samples):
            raise InputError(f"{self.listing}: slice {file.index} of {file.path}, which has {len(samples)}")
        return samples if file.index is None else samples[file.index : file.index + 1]

    def _judged(self, sample: Sample, series: str) -> Sample | None:
        """A sample by what its mask and, of DICOM and NIfTI, its picture shows; None where it is left out."""
        unmarked, mask = self.layout.unmarked or ("abnormal" if self.is_benchmark else "out"), None
        if (self.layout.unmarked or not self.is_benchmark) and (mask := read_mask(sample)):
            self.levels[sample.name] = mask.levels, mask.by_label
            if not mask.marks(self.layout.mask_above) and unmarked != "abnormal":
                self.left_out[UNMARKED_MASK].add(sample.name)
                if unmarked == "out":
                    return None
                sample = replace(sample, label=0, masks=())
        kind = file_kind(sample.path)
        if kind == "pillow" or (kind == "nifti" and sample.masks):
            return sample
        picture = read(sample)
        if picture.is_blank and not sample.masks:
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
        total = sum((levels for levels, _ in self.levels.values()), Levels())
        by_label = any(by_label for _, by_label in self.levels.values())
        return levels_note(total, by_label, self.layout.mask_above, self.options.mask_labels) if total else None

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
            why = "".join(f"; {line}" for line in (*self.left_out_lines(), self.levels_line()) if line)
            fault = f"valid holds only {len(patients)} {kind} images{masked} in {self.root}"
            raise InputError(f"--{flag} {count}: {fault}{why}")
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
