"""What must not change: a fixed set of small commands, and the numbers that they write.

    python -m tests.helpers.net record FOLDER [--checkout PATH]     run the commands with the code of a checkout
    python -m tests.helpers.net compare FOLDER OTHER                which numbers differ, and which are gone

The data are made once, by the first recording, in FOLDER/../data. Numbers depend on the processor, so recordings are
compared on one machine and are not kept in the repository.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
TINY = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", 42, "--device", "cpu"]
TRAININGS: dict[str, list[object]] = {
    "released": ["--obj", "Brain", "--shot", 2],
    "corrected": ["--obj", "Brain", "--shot", 2, "--fidelity", "corrected", "--visionA", "MCNNFC"],
    "attention": ["--obj", "Brain", "--shot", 1, "--visionA", "MViTFC", "--cache", "disk"],
    "attention_corrected": ["--obj", "Brain", "--shot", 1, "--visionA", "MViTFC", "--fidelity", "corrected"],
    "chest": ["--obj", "Chest", "--shot", 2, "--loss_type", "softmax", "--dec_type", "both"],
    "off": ["--obj", "Chest", "--shot", 1, "--cache", "off", "--text_mood", "fix", "--contrast_mood", "no"],
    "valid": ["--obj", "Brain", "--shot", 2, "--select", "valid", "--eval_every", 2, "--features_list", 4, 2],
    "unequal": ["--obj", "Brain", "--shot_normal", 3, "--shot_abnormal", 1, "--seed", 7, "--select", "last"],
    "max": ["--obj", "Chest", "--shot", 1, "--dec_type", "max", "--text_mood", "learnable_abnormal"],
    "busi": ["--obj", "breast", "--data_root", "{data}/BreastBUSI_AD", "--shot", 4, "--batch_size", 12],
    "dicom": ["--obj", "ct", "--data_root", "{data}/dicom", "--shot", 2],
    "nifti": ["--obj", "mri", "--data_root", "{data}/nifti", "--shot", 2],
}


def make_data(data: Path) -> None:
    """Write phantoms, the sample of BUSI, DICOM series and NIfTI volumes as labelled folders."""
    import nibabel  # noqa: PLC0415

    from dataset import phantom  # noqa: PLC0415
    from tests.helpers.scans import dicom_series, mni  # noqa: PLC0415

    data.mkdir(parents=True)
    phantom.write(data, ["Brain", "Chest"], valid=6, test=10, seed=0, size=64)
    shutil.copytree(ROOT / "data/sample/BreastBUSI_AD", data / "BreastBUSI_AD", ignore=shutil.ignore_patterns("*.md"))
    volume = mni(data / "template.nii.gz", zooms=(8.0, 8.0, 8.0))
    dicom_series(data / "series", volume)
    for split in ("valid", "test"):
        for k, kind in enumerate(("normal", "abnormal")):
            dicom_series(data / f"dicom/{split}/{kind}/P{split}{k}", volume, f"P{split}{k}", shuffle=k)
            folder = data / f"nifti/{split}/{kind}"
            folder.mkdir(parents=True)
            values = volume.get_fdata().astype(np.int16)
            if k:
                values[4:9, 5:11, :] += 700
            nibabel.Nifti1Image(values, volume.affine).to_filename(folder / f"patient_{split}{k}.nii.gz")


def commands(data: Path) -> Iterator[tuple[str, list[object]]]:
    """Name and words of every command, in order."""
    for name, flags in TRAININGS.items():
        words = [str(word).format(data=data) for word in flags]
        if "--data_root" not in words and "--select" not in words:
            words += ["--select", "test"]  # the default only for the paper's data sets, not for phantoms
        paths = ["--data_path", data, "--save_path", f"{name}/ckpt", "--run_dir", f"{name}/runs", "--exp_name", "run"]
        yield f"train {name}", ["train.py", *TINY, *words, *paths, "--epoch", 3, "--cache_dir", f"{name}/store"]
        ckpt = ["--ckpt", f"{name}/runs/run/best.pth", "--device", "cpu"]
        where = words[: 4 if "--data_root" in words else 2]  # --obj and, if it is given, --data_root
        tested = ["--out_json", f"{name}/test.json", "--save_scores", f"{name}/scores.npz"]
        yield f"test {name}", ["test.py", "--data_path", data, *where, *ckpt, *tested]
    released = "released/runs/run/best.pth"
    again = ["--obj", "Brain", "--data_path", data, "--out_json", "released/kept.json"]
    yield "kept scores", ["test.py", *again, "--scores", "released/scores.npz"]
    export = ["-m", "engine.checkpoint", "export", released, "exported.pth"]
    yield "export", export
    model = ["--model_name", "ViT-tiny-14-56", "--pretrain", "random", "--img_size", 42, "--device", "cpu"]
    imported = ["--obj", "Brain", "--data_path", data, "--ckpt", "exported.pth", "--out_json", "imported.json"]
    yield "import", ["test.py", *imported, *model]
    run = ["--data_path", data, "--save_path", "resume/ckpt", "--run_dir", "resume/runs", "--exp_name", "run"]
    start = [*TINY, *TRAININGS["released"], "--select", "test", *run, "--epoch", 1, "--cache_dir", "released/store"]
    yield "start", ["train.py", *start]
    yield "resume", ["train.py", "--resume", "resume/runs/run", "--epoch", 3]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "train.py"]
    run = ["--data_path", data, "--save_path", "two/ckpt", "--run_dir", "two/runs", "--exp_name", "run"]
    shared = ["--select", "test", *run, "--epoch", 3, "--cache_dir", "two/store"]
    yield "two processes", [*two, *TINY, *TRAININGS["corrected"], *shared]
    for name, source in (("png", "Brain_AD/test/Ungood/img"), ("dicom", "series"), ("nifti", "template.nii.gz")):
        out = ["--out", f"predicted_{name}", "--ckpt", released, "--device", "cpu"]
        yield f"predict {name}", ["predict.py", *out, data / source]
    grid = [*TINY, "--data_path", data, "--obj", "Brain", "Chest", "--epoch", 2, "--out", "results"]
    for table in ("main", "cross", "baselines"):
        yield table, ["reproduce.py", "--table", table, "--shots", 1, "--seeds", 111, *grid]


def record(folder: Path, checkout: Path) -> None:
    """Run every command in `folder`; a command that fails is reported and does not stop the others."""
    data = folder.resolve().parent / "data"
    if not data.exists():
        make_data(data)
    folder.mkdir(parents=True)
    environment = {**os.environ, "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    for name, words in commands(data):
        line = [str(checkout / str(word)) if str(word).endswith(".py") else str(word) for word in words]
        done = subprocess.run(
            [sys.executable, *line], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        (folder / f"{name.replace(' ', '_')}.log").write_text(done.stdout + done.stderr)
        print(f"{name}: {done.returncode}" + f"  {done.stderr.strip()[-300:]}" * bool(done.returncode), flush=True)


def numbers(path: Path) -> dict[str, float]:
    """Every number in a file, by its place in the file; only sums for volumes and scores."""
    if path.suffix == ".json":
        return dict(leaves(json.loads(path.read_text())))
    if path.suffix == ".jsonl":
        return dict(leaves([json.loads(line) for line in path.read_text().splitlines()]))
    if path.suffix == ".csv":
        rows = list(csv.DictReader(path.read_text().splitlines()))
        return {f"{i} {k}": float(v) for i, row in enumerate(rows) for k, v in row.items() if is_number(v)}
    if path.name.endswith(".nii.gz"):
        import nibabel  # noqa: PLC0415

        values = nibabel.load(path).get_fdata()
        return {"sum": float(values.sum()), "squares": float((values**2).sum())}
    with np.load(path) as arrays:
        return {"scores": float(np.abs(arrays["patch_scores"].astype(np.float64)).sum())}


def leaves(value: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers in nested dicts and lists, by path; times and intervals of the image AUC are skipped."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in pairs:
        yield from leaves(item, f"{name}/{key}")
    if isinstance(value, int | float) and "seconds" not in name and "/auc_ci95" not in name:
        yield name, float(value)


def is_number(text: str | None) -> bool:
    """Whether the text of a cell is a number."""
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def compare(first: Path, second: Path) -> int:
    """Print the differences; return the number of files that differ."""
    patterns = ("*/test.json", "*.json", "released/kept.json", "*/runs/run/metrics.jsonl", "*/runs/run/result.json")
    patterns += ("*/scores.npz", "predicted_*/*.csv", "predicted_*/**/*.nii.gz", "results/*.csv", "results/*.json")
    files = sorted({path.relative_to(first) for pattern in patterns for path in first.glob(pattern)})
    bad = 0
    for file in files:
        if not (second / file).is_file():
            print(f"{file}: gone")
            bad += 1
            continue
        before, after = numbers(first / file), numbers(second / file)
        gone = [key for key in before if key not in after]
        other = [key for key in before if key in after and before[key] != after[key]]
        bad += bool(gone or other)
        words = [f"{key}: {before[key]!r} -> {after[key]!r}" for key in other[:5]] + [
            f"{key}: gone" for key in gone[:5]
        ]
        print(f"{file}: {len(before)} numbers, {len(other)} differ, {len(gone)} gone", *words, sep="\n    ")
    print(f"{len(files)} files, {bad} differ")
    return bad


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    recorder = actions.add_parser("record")
    recorder.add_argument("folder", type=Path)
    recorder.add_argument("--checkout", type=Path, default=ROOT)
    comparer = actions.add_parser("compare")
    comparer.add_argument("folder", type=Path)
    comparer.add_argument("other", type=Path)
    options = parser.parse_args()
    if options.action == "record":
        record(options.folder, options.checkout.resolve())
    else:
        sys.exit(bool(compare(options.folder, options.other)))


if __name__ == "__main__":
    main()
