"""A data set on disk: its samples, splits and few-shot images. dataset/folders.py finds the files.

The six published data sets have the layout <data_path>/<obj>_AD/{valid,test}/{good,Ungood}/{img,anomaly_mask}/NAME.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from utils import InputError, prefetch, preview

from .fewshot import LETTERS, SEEDS, check_shot_names, draw_shots, list_paths, parse_shot_list, pick_names
from .folders import find_places, number, read_folders
from .layout import BENCHMARKS, FOLDER, KINDS, MADE_UP, PUBLISHED_COUNTS, Layout, load_layout, object_name
from .lists import NAMES, read_list
from .pairing import MASK_FOLDERS
from .readers.grey import NoImageError, ReadOptions, warn_once
from .readers.images import EXTENSIONS, Sample, file_kind, frames, is_deep, parse_window, read, stem
from .readers.masks import Levels, levels_note, read_mask

HASHED = "the patient, or of the name if none is recognised"
READERS = 4  # threads that read masks
SOUGHT = f"masks are sought beside the image, in folders called {', '.join(MASK_FOLDERS)} and in a list's column mask"


def equal_images(
    samples_a: Iterable[Sample], samples_b: Iterable[Sample], content_hash: Callable[[Sample], str]
) -> list[tuple[Sample, Sample]]:
    """Pairs of samples with equal content: each sample of `samples_b` with the first match in `samples_a`, if any."""
    by_hash = {content_hash(sample): sample for sample in reversed(list(samples_a))}  # the first match wins
    pairs = ((by_hash.get(content_hash(sample)), sample) for sample in samples_b)
    return [(first, second) for first, second in pairs if first]


def data_folder(obj: str, data_path: str | Path, data_root: str | Path | None = None) -> Path:
    """`data_root`, or <data_path>/<obj>_AD; raises `InputError` if it is not a folder."""
    root = Path(data_path) / f"{object_name(obj)}_AD" if data_root is None else Path(data_root)
    if not root.is_dir():
        flag = f"--obj {obj} --data_path {data_path}" if data_root is None else f"--data_root {data_root}"
        draw = f"`python -m dataset.phantom --obj {obj if obj in BENCHMARKS else 'Brain'} --out {data_path}`"
        hint = "docs/data.md says where to get the paper's data sets and how to use your own (--data_root)"
        raise InputError(f"{flag}: {root} not found; {hint}, and {draw} draws a made-up one")
    return root


@dataclass(eq=False)
class MedicalDataset:
    """A data set: its name, its folder and its files. What is read from the files is cached."""

    obj: str
    root: Path
    layout: Layout
    files: list[Sample]  # normal ones first
    listing: Path | None = None  # the list file, if there is one
    numbers: dict[str, str] | None = None  # patient -> number with --anonymous, which numbers the files, too
    left_out: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # reason -> names of images
    levels: dict[str, tuple[Levels, bool]] = field(default_factory=dict)  # sample -> (levels, by_label)
    _samples: dict[Sample, list[Sample]] = field(default_factory=dict)  # file -> result of `samples_in`
    _series: dict[Any, str] = field(default_factory=dict)  # (series, frame, hash of pixels) -> the first such sample

    @classmethod
    def open(
        cls,
        obj: str,
        data_path: str | Path,
        data_root: str | Path | None = None,
        listing: Path | None = None,
        anonymous: bool = False,
        **given: Any,  # noqa: ANN401 - fields of `Layout`
    ) -> MedicalDataset:
        """Open `data_root`, or <data_path>/<obj>_AD; raises `InputError` if it or a part of it is missing.

        A list of the images, `listing` or one of `NAMES` in the folder, replaces its layout (`dataset.lists`).
        <obj>.json in the folder or in dataset/ may describe the data set. `given` holds fields of `Layout`; those that
        are not None override that file. `anonymous` numbers files and patients. See docs/data.md.
        """
        root = listing.parent if listing else data_folder(obj, data_path, data_root)
        listing = listing or next((root / name for name in NAMES if (root / name).is_file()), None)
        layout = replace(load_layout(obj, root), **{name: value for name, value in given.items() if value is not None})
        files, numbers = read_list(listing, layout) if listing else read_folders(root, layout), None
        if anonymous:
            files, numbers = number(files)
        return cls(obj, root, layout, files, listing, numbers)

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> MedicalDataset:
        """`open` with the flags of a command line; --anonymous is optional, as some commands do not have it."""
        return cls.open(
            options.obj, options.data_path, options.data_root, options.list and Path(options.list),
            getattr(options, "anonymous", False), patient=options.patient, unmarked=options.unmarked,
            mask_above=options.mask_above, mask_labels=tuple(options.mask_labels or ()) or None,
            window=parse_window(options.window or ()), plane=options.plane,
        )  # fmt: skip

    @property
    def reading(self) -> dict[str, Any]:
        """How files are read (window, plane, formats, depth), as plain values for the checkpoint."""
        window, formats = self.layout.window, sorted({str(file_kind(file.path)) for file in self.files})
        shown = list(window) if isinstance(window, tuple) else window
        deep = {"deep": True} if self.options.deep else {}
        return {"window": shown, "plane": self.layout.plane, "formats": formats, **deep}

    @cached_property
    def pixel_metrics(self) -> bool:
        """Whether masks are used: as the JSON file says, or else if any abnormal image has one."""
        has_masks = any(file.masks for file in self.files if file.label)
        return has_masks if self.layout.pixel_metrics is None else self.layout.pixel_metrics

    @cached_property
    def options(self) -> ReadOptions:
        """How files with more than 8 bits or more than one slice are read, and which mask labels are abnormal."""
        layout, deep = self.layout, is_deep([file.path for file in self.files])
        return ReadOptions(layout.window, layout.plane, layout.mask_labels, deep)

    # --- comparison with the paper's data sets ---

    @cached_property
    def is_benchmark(self) -> bool:
        """Whether this is one of the paper's six data sets: it has the name and the published number of images.

        Its faults are then accepted, as others measured their results on the same files.
        """
        return self.obj in BENCHMARKS and not self.is_made_up and not self.other_counts

    @property
    def is_made_up(self) -> bool:
        """Whether it was drawn by dataset.phantom."""
        return (self.root / MADE_UP).is_file()

    def count(self, split: str) -> tuple[int, ...]:
        """The number of normal and of abnormal files in a split."""
        return tuple(len(self.image_files(split, label, required=False)) for label in (0, 1))

    @cached_property
    def other_counts(self) -> list[str]:
        """The splits whose numbers of images differ from the published ones, in words."""
        parts = []
        for split, accepted in PUBLISHED_COUNTS.get(self.obj, {}).items():
            images = self.count(split)
            if images not in accepted and (sum(images),) not in accepted:
                published = " or ".join(" + ".join(map(str, counts)) for counts in accepted)
                parts.append(f"{split} {' + '.join(map(str, images))} (published: {published})")
        return parts

    # --- files ---

    def image_files(self, split: str, label: int, required: bool = True) -> list[Sample]:
        """The image files of a class in a split, sorted by path, or in the order of the list if there is one.

        Raises `InputError` if there are none, unless `required` is False.
        """
        result = [file for file in self.files if (file.split, file.label) == (split, label)]
        if required and not result:
            places = {} if self.listing else find_places(self.root)
            folders = [str(folder) for folder, place in places.items() if place in ((split, label), ("", label))]
            why = f"no images ({', '.join(EXTENSIONS)}) for {split}, {KINDS[label]}"
            if divided := sum(file.label == label and file.divided for file in self.files):
                why = (f"divided by a hash of {HASHED}, none of the {divided} {KINDS[label]} images is {split}; "
                       f"give the splits folders of their own, or name them in a list (docs/data.md)")  # fmt: skip
            raise InputError(f"{self.listing or ', '.join(folders)}: {why}")
        return result

    # --- samples ---

    def samples(self, split: str) -> list[Sample]:
        """The images of a split, normal first, else ordered as in `image_files`; `valid` may lack abnormal ones.

        In `valid`, an abnormal image may lack a mask even if the data set has masks. It cannot be a shot, and is not
        used for calibration.

        Raises:
            InputError: a class has no images, a file cannot be read or, with pixel metrics, an abnormal test image has
                no mask or any abnormal image has `unclear` masks.
        """
        if self.unclear:
            raise InputError(f"{preview(self.unclear)}: their masks match several images, or share one name; "
                             f"give each image a name of its own, and its mask the same")  # fmt: skip
        result: list[Sample] = []
        for label in (0, 1):
            files = self.image_files(split, label, (split, label) != ("valid", 1))
            if label and split == "test":
                self._check_masks(files)
            workers = 1 if any(file.slice.series_uid for file in files) else READERS  # 1 keeps the first copy
            images = [sample for inside in prefetch(self.samples_in, files, workers) for sample in inside]
            if split == "test" and not images:
                why = "; ".join(self.left_out_lines() or ["no slice"])
                raise InputError(f"{self.root}: none of the {len(files)} {KINDS[label]} files of test gives an image: "
                                 f"{why}")  # fmt: skip
            result += images
        return sorted(result, key=lambda sample: sample.label)  # slices with empty masks may be normal now

    @cached_property
    def unclear(self) -> list[str]:
        """Abnormal images whose mask matches other images too, or whose masks share a name; none if there is a list."""
        abnormal = [file for file in self.files if file.label and self.pixel_metrics and not self.listing]
        images_of = Counter(mask for file in abnormal for mask in file.masks)
        return [
            str(file.path) for file in abnormal
            if any(images_of[mask] > 1 for mask in file.masks) or len(set(map(stem, file.masks))) < len(file.masks)
        ]  # fmt: skip

    def _check_masks(self, files: Sequence[Sample]) -> None:
        """Raise `InputError` if an abnormal image has no mask although the data set has masks."""
        if self.pixel_metrics and (missing := [str(file.path) for file in files if not file.masks]):
            homes = sorted({str(mask.parent) for file in self.files for mask in file.masks})
            raise InputError(
                f"{preview(missing)}: no mask ({len(missing)} of {len(files)} abnormal images); {SOUGHT}; "
                f"others lie in {preview(homes)}; `python -m dataset.check` names them all; add them, or set "
                f'"pixel_metrics": false in dataset/{self.obj}.json'
            )

    def images_in(self, file: Sample) -> list[Sample]:
        """The images in a file: one, every DICOM frame or NIfTI slice, or the slice or TIFF page that a list names.

        DICOM objects without a picture give none. Raises `InputError` for an unreadable file or a missing slice.
        """
        masks = file.masks if file.label and self.pixel_metrics else ()
        sample = replace(file, masks=masks, index=None, options=self.options, published=self.is_benchmark)
        images = [sample]
        if file_kind(file.path) != "pillow" or file.index is not None:
            try:
                inside = frames(file.path, self.options)
            except NoImageError:
                self.left_out["DICOM objects without a picture: left out"].add(file.name)
                return []
            if len(inside) > 1:
                images = [
                    replace(sample, index=index, name=f"{file.name}#{index}", listed=f"{file.listed}#{index}")
                    for index in range(len(inside))
                ]
        if file.index is not None and not 0 <= file.index < len(images):
            raise InputError(f"{self.listing}: slice {file.index} of {file.path}, which has {len(images)}")
        return images if file.index is None else images[file.index : file.index + 1]

    def samples_in(self, file: Sample) -> list[Sample]:
        """The images in a file that are used.

        Blank slices and copies within a series are left out, and so are abnormal images and slices whose mask marks
        nothing, unless `unmarked` says otherwise. Raises the errors of `images_in`.
        """
        if file not in self._samples:
            self._samples[file] = [sample for sample in map(self._judged, self.images_in(file)) if sample]
        return self._samples[file]

    def _judged(self, sample: Sample) -> Sample | None:
        """The sample, with label 0 if `unmarked` asks for it, or None if its mask or pixels exclude it."""
        unmarked, mask = self.layout.unmarked or ("abnormal" if self.is_benchmark else "out"), None
        if (self.layout.unmarked or not self.is_benchmark) and (mask := read_mask(sample)):
            self.levels[sample.name] = mask.levels, mask.by_label
            if not mask.marks(self.layout.mask_above) and unmarked != "abnormal":
                why = f"abnormal images whose mask marks nothing: --unmarked {unmarked}"
                self.left_out[why].add(sample.name)
                if unmarked == "out":
                    return None
                sample = replace(sample, label=0, masks=())
        kind = file_kind(sample.path)
        if kind == "pillow" or (kind == "nifti" and sample.masks):
            return sample
        picture = read(sample)
        if picture.is_blank and not sample.masks:
            self.left_out["slices that show nothing: left out"].add(sample.name)
            return None
        series = sample.slice.series_uid
        key = series, sample.index, hashlib.sha256(picture.image.tobytes()).digest()
        if series and self._series.setdefault(key, sample.name) != sample.name:
            self.left_out["copies of another slice of their series: left out"].add(sample.name)
            return None
        return sample

    def left_out_lines(self) -> list[str]:
        """The reasons for left-out images, and mask levels other than 0 and 255, of the files read so far.

        The masks of the paper's data sets are inspected only if `unmarked` is set.
        """
        left_out = sorted(self.left_out.items())
        lines = [f"{len(names)} {why}, such as {preview(sorted(names), 1)}" for why, names in left_out]
        total = sum((levels for levels, _ in self.levels.values()), Levels())
        by_label = any(by_label for _, by_label in self.levels.values())
        note = levels_note(total, by_label, self.layout.mask_above, self.options.mask_labels) if total else None
        return [*lines, note] if note else lines

    # --- shots ---

    def shots(self, shot_normal: int, shot_abnormal: int, iterate: int, seed: int) -> Shots:
        """The few-shot images; each class uses the list for its own number of shots.

        Without a list they are drawn at random, from different patients if enough are known, except in the paper's
        data sets. If the data set has masks, abnormal shots are drawn from the images with a mask.

        Raises:
            InputError: a list names other images, too few or none, there are too few images, or a shot has no mask.
        """
        draw = random.Random(seed if seed >= 0 else str(seed))  # Random(-5) equals Random(5)
        groups: list[list[Sample]] = [[], []]
        sources: list[str] = []
        for label, count in ((1, shot_abnormal), (0, shot_normal)):
            if count:
                known = self.known_shots(label)
                flag = "--shot" if shot_normal == shot_abnormal else f"--shot_{KINDS[label]}"
                names, source = self._listed(label, count, iterate, known) or (
                    self._drawn(label, count, draw, known, flag),
                    f"sampled with seed {seed} from the sorted names of valid/ (no list for {count} shots is used)",
                )
                groups[label] = [known[name] for name in names]
                if self.numbers is not None:
                    groups[label] = [replace(sample, listed=sample.name) for sample in groups[label]]
                sources.append(source)
                if label:
                    self._check_masks(list(dict.fromkeys(groups[label])))
        return Shots(groups[1], groups[0], ", ".join(dict.fromkeys(sources)))

    def known_shots(self, label: int) -> dict[str, Sample]:
        """The images of a class in valid, by their names in few-shot lists; raises `InputError` if there are none."""
        images = (image for file in self.image_files("valid", label) for image in self.images_in(file))
        return {image.listed: image for image in images}

    def _drawn(self, label: int, count: int, draw: random.Random, known: Mapping[str, Sample], flag: str) -> list[str]:
        """The names of `count` images, drawn from those that can be shots."""
        usable = {sample for file in self.image_files("valid", label) for sample in self.samples_in(file)}
        patients = {
            name: None if self.is_benchmark else sample.patient
            for name, sample in known.items()
            if sample in usable and (sample.masks or not (label and self.pixel_metrics))
        }
        if len(patients) < count:
            masked = " with a mask" * (len(patients) < len(known))
            why = "".join(f"; {line}" for line in self.left_out_lines())
            fault = f"valid holds only {len(patients)} {KINDS[label]} images{masked} in {self.root}"
            raise InputError(f"{flag} {count}: {fault}{why}")
        return draw_shots(draw, patients, count)

    def _listed(
        self, label: int, count: int, iterate: int, known: Mapping[str, Sample]
    ) -> tuple[list[str], str] | None:
        """The names on the list for `count` shots, and the list's name; None if there is no list for these images.

        Shots that the list of images marks take precedence. If `iterate` is negative, no list is used.
        """
        if iterate < 0:
            return None
        remarks: list[str] = []
        if names := [name for name, sample in known.items() if sample.shot]:
            source = str(self.listing and self.listing.name)
        elif path := self.shot_lists().get(f"my{count}-shot.txt"):
            lines, remarks = parse_shot_list(path)
            names = pick_names(lines, remarks, path, LETTERS[label], iterate)
            source = "/".join(path.parts[-3:])  # for checkpoints: no folders above the data set
            if SEEDS in path.parents:
                source = f"{FOLDER.name}/{source}"
                if not set(names) & set(known):  # other images with this data set's name, such as a phantom's
                    if self.obj in BENCHMARKS and not self.is_made_up:
                        why = f"none of its {KINDS[label]} images is in valid, so the shots are not the published ones"
                        warn_once(f"{source}: {why}: is the copy complete?")
                    return None
        else:
            return None
        for text in remarks + check_shot_names(names, known, count, source, self.root):
            warn_once(text)
        return names, source

    def shot_lists(self) -> dict[str, Path]:
        """The few-shot lists by file name; the data set's own take precedence over the project's."""
        paths = [*list_paths(SEEDS / self.obj), *list_paths(self.root / "fewshot_seed")]
        return {path.name: path for path in paths}


@dataclass(frozen=True)
class Shots:
    """The few labelled images that are used for training."""

    abnormal: list[Sample]  # may be empty: training with normal images only
    normal: list[Sample]
    source: str  # the list file, or how they were sampled

    @property
    def names(self) -> dict[str, list[str]]:
        """The names as in a few-shot list; they are printed, logged and stored in the checkpoint."""
        groups = {"abnormal": self.abnormal, "normal": self.normal}
        return {kind: [sample.listed for sample in group] for kind, group in groups.items()}
