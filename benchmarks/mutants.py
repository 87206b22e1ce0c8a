"""Break the product in one place at a time, and show that a named test notices.

    python -m benchmarks.mutants                    all of them: a table, exit code 1 if one survives or no longer fits
    python -m benchmarks.mutants --only loss.py     those of one file, or with this text in what they change
    python -m benchmarks.mutants --list             print them and run nothing

A mutant is a small change that keeps the code running: another operator, threshold, index or key. It is *killed* when
its tests fail, and *survives* when they pass: then a test is missing. Each is tried in a copy of the working tree; the
same tests must pass on the unchanged copy first. Where a mutant's text is no longer in its file exactly once, the
mutant must be written anew: that counts as a failure too.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 600  # for the tests of one mutant: longer means that it hangs, which a user would notice too
FAILED, PASSED = 1, 0  # pytest's exit codes; every other one means that no test said anything


@dataclass(frozen=True)
class Mutant:
    """One change: `old`, which stands in `file` exactly once, becomes `new`; `tests` are to fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def fits(self, root: Path) -> bool:
        """Whether the text is in the file, once."""
        path = root / self.file
        return path.is_file() and path.read_text(encoding="utf-8").count(self.old) == 1

    def __str__(self) -> str:
        return f"{self.file}: {_short(self.old)} -> {_short(self.new)}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def _mutants(file: str, tests: Sequence[str], *changes: tuple[str, str]) -> tuple[Mutant, ...]:
    """Changes of one file; tests are files of tests/unit, or of tests/ where a folder is named."""
    paths = tuple(f"tests/{name}" if "/" in name else f"tests/unit/{name}" for name in tests)
    return tuple(Mutant(file, old, new, paths) for old, new in changes)


# Each field of the key of kept tokens, as it stands in engine/features.py.
TOKEN_KEY = {
    "model": "config.name",
    "architecture": "config.architecture()",
    "weights_sha256": "self.weights.sha256",
    "fidelity": "self.fidelity",
    "quick_gelu": "uses_quick_gelu(config, pretrain, self.img_size, self.fidelity)",
    "img_size": "self.img_size",
    "precision": "str(self.autocast or torch.float32)",
    "dtype": "str(dtype)",
    "device": "self.device.type",
    "reader": "READER",
}

MUTANTS: tuple[Mutant, ...] = (
    *_mutants(
        "loss.py",
        ["test_golden_losses.py"],
        ("sign = 2 * labels - 1", "sign = 1 - 2 * labels"),  # z of the sigmoid loss
        ("z = torch.stack([-sign, sign], dim=-1)", "z = torch.stack([sign, -sign], dim=-1)"),
        ("0.5 * values.mean(dim=1) + 0.5 * values.amax(dim=1)", "0.5 * values.mean(dim=1) + values.amax(dim=1)"),
        ("with_logits(1 - normal, labels)", "with_logits(normal, labels)"),
        (".sum(dim=-1).mean()", ".mean(dim=-1).mean()"),
        ("align_corners=True", "align_corners=False"),
        ("(scores[..., 1] - scores[..., 0])", "(scores[..., 0] - scores[..., 1])"),
        ("FOCAL_GAMMA = 2", "FOCAL_GAMMA = 1"),
        ("TARGET_SMOOTHING = 1e-5", "TARGET_SMOOTHING = 1e-3"),
        ("DICE_SMOOTHING = 1.0", "DICE_SMOOTHING = 2.0"),
        ("masks > 0.5, probability, 1 - probability", "masks > 0.5, 1 - probability, probability"),
        ("(2 * overlap + DICE_SMOOTHING)", "(overlap + DICE_SMOOTHING)"),
        ("focal_loss(probability, masks) + dice_loss(", "focal_loss(probability, masks) - dice_loss("),
        ("total += upsample(layer", "total = upsample(layer"),
    ),
    *_mutants(
        "CLIP/adapter_shared.py",
        ["test_golden_adapters.py"],
        # The order of layers: which adapter reads which.
        (
            "list(features_list).index(layer) for layer in sorted",
            "sorted(features_list).index(layer) for layer in sorted",
        ),
        ("(normal - abnormal, abnormal - normal)", "(normal - abnormal, normal - abnormal)"),
        ("trunk[:, 1:] if self.reads_class_token", "trunk[:, :-1] if self.reads_class_token"),
        ('{"det": "fc2", "seg": "fc3"}', '{"det": "fc3", "seg": "fc2"}'),
        ("nhead=8", "nhead=4"),
        ("batch_first=across_tokens", "batch_first=not across_tokens"),
        ("-gradient * scores / norms**2", "-gradient * scores / norms"),
    ),
    *_mutants(
        "CLIP/transformer.py",
        ["test_golden_backbone.py", "test_golden_prompts.py"],
        ("F.silu(1.702 * x)", "F.silu(1.7 * x)"),
        ("is_causal=causal", "is_causal=False"),
        ("> position[:, None]", ">= position[:, None]"),
        ("x + self.mlp(self.ln_2(x))", "x + self.mlp(self.ln_1(x))"),
    ),
    *_mutants(
        "CLIP/model.py",
        ["test_golden_backbone.py", "test_clip.py", "test_golden_prompts.py"],
        ("start=1)", "start=0)"),
        ("antialias=True", "antialias=False"),
    ),
    *_mutants(
        "CLIP/config.py",
        ["test_clip.py", "test_model_forms.py"],
        ("0.48145466, 0.4578275, 0.40821073", "0.40821073, 0.4578275, 0.48145466"),  # the order of the channels
        ("self.layers * quarter // 4", "self.layers * quarter // 5"),
    ),
    *_mutants(
        "CLIP/clip.py",
        ["test_clip.py"],
        ('fidelity == "corrected" or img_size == config.image_size', 'fidelity == "corrected"'),
    ),
    *_mutants(
        "CLIP/tokenizer.py",
        ["test_tokenizer.py"],
        ("MERGES = 48894", "MERGES = 48893"),
        ("best = min(", "best = max("),
        ("ids[: context_length - 1]", "ids[: context_length - 2]"),
    ),
    *_mutants(
        "Prompt/CoOp.py",
        ["test_golden_prompts.py"],
        ('"middle": CONTEXTS // 2', '"middle": CONTEXTS // 4'),
        ('POSITIONS = ("end", "front", "middle")', 'POSITIONS = ("front", "end", "middle")'),
        ("INIT_STD = 0.02", "INIT_STD = 0.04"),
    ),
    *_mutants(
        "Prompt/promptChooser.py",
        ["test_golden_prompts.py"],
        ('columns["normal"], columns["abnormal"]', 'columns["abnormal"], columns["normal"]'),
        ("clip.encode_text(ids), dim=-1)", "clip.encode_text(ids), dim=0)"),
    ),
    *_mutants(
        "utils.py",
        ["test_golden_augment.py"],
        (
            "(-math.pi / 8, -math.pi / 16, math.pi / 16, math.pi / 8)",
            "(-math.pi / 8, -math.pi / 16, math.pi / 8, math.pi / 16)",
        ),
        (
            "((0.1, 0.1), (-0.1, 0.1), (-0.1, -0.1), (0.1, -0.1))",
            "((0.1, 0.1), (0.1, -0.1), (-0.1, -0.1), (-0.1, 0.1))",
        ),
        ("ZOOMS = (1.1, 1.15, 1.2, 1.3)", "ZOOMS = (1.1, 1.15, 1.25, 1.3)"),
        ('padding_mode="reflection"', 'padding_mode="border"'),
        ("flip(-1 if view == 14 else -2)", "flip(-2 if view == 14 else -1)"),
        ("mean(dim=(-3, -2), keepdim=True)", "mean(dim=(-2, -1), keepdim=True)"),
        ("0.8 + 0.4 * contrast", "0.8 + 0.4 * brightness"),
    ),
    *_mutants(
        "dataset/patients.py",
        ["test_medical_few.py", "test_check.py"],
        ("< share * 2**64", "> share * 2**64"),
    ),
    *_mutants(
        "dataset/readers/images.py",
        ["test_images.py", "test_golden_augment.py"],
        ("> (above + 0.5) / 255", "> (above - 0.5) / 255"),  # `> 127` to `>= 127`, of 255
        ("Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR"),
        ("Image.Resampling.NEAREST", "Image.Resampling.BILINEAR"),
        ("+ 128) // 257", "+ 128) // 256"),  # 16 bits to 8
        ("if greys[-1] <= above:", "if greys[-1] < above:"),
    ),
    *_mutants(
        "dataset/medical_few.py",
        ["test_medical_few.py"],
        ('[0 if kind == "abnormal" else 1]', '[1 if kind == "abnormal" else 0]'),
        ("            KINDS.index(kind),\n", "            1 - KINDS.index(kind),\n"),
        ("draw.sample(eligible, count)", "eligible[:count]"),
    ),
    *_mutants(
        "engine/metrics.py",
        ["test_metrics.py"],
        ("- 0.5 * normal\n", "- 0.0 * normal\n"),  # the tie rule of the AUROC
        ("AUPRO_LIMIT = 0.3", "AUPRO_LIMIT = 0.2"),
        ("+ (abnormal + 1) / 2, false[:-1]", "+ abnormal / 2, false[:-1]"),
        (
            "2 * true[2::2] / (true[2::2] + false[2::2] + true[-1])",
            "2 * true[2::2] / (true[2::2] + false[2::2] + false[-1])",
        ),
        ("/ false[-1] <= rate).sum()", "/ false[-1] < rate).sum()"),
        ("/ true[-1] >= rate).argmax()", "/ true[-1] > rate).argmax()"),
    ),
    *_mutants(
        "engine/calibration.py",
        ["test_calibration.py"],
        ("HEAT_QUANTILES = (0.02, 0.9995)", "HEAT_QUANTILES = (0.02, 0.99)"),
        ("called, abnormal = scores >= threshold", "called, abnormal = scores > threshold"),
        ('row["fpr"] <= rule.fpr', 'row["fpr"] < rule.fpr'),
        ('row["tpr"] >= rule.tpr', 'row["tpr"] > rule.tpr'),
        ("/ 2)\n\n\ndef threshold_metrics", ")\n\n\ndef threshold_metrics"),
    ),
    *_mutants(
        "engine/evaluation.py",
        ["test_evaluation.py"],
        (".flatten(1).amax(dim=1)", ".flatten(1).mean(dim=1)"),
        ("image_score(batch, self.dec_type)", 'image_score(batch, "mean")'),
        ("torch.arange(7, -1, -1,", "torch.arange(0, 8, 1,"),
        ("rows[[sample.mask is not None for", "rows[[sample.label == 0 for"),
    ),
    # The key of kept tokens, without each of its fields.
    *_mutants(
        "engine/features.py",
        ["test_features.py"],
        *((f'"{field}": {value},', "") for field, value in TOKEN_KEY.items()),
        ('f"{content} {self.view} {draws}"', 'f"{self.view} {draws}"'),
        ('f"{content} {self.view} {draws}"', 'f"{content} {draws}"'),
        ('f"{content} {self.view} {draws}"', 'f"{content} {self.view}"'),
    ),
    *_mutants(
        "engine/training.py",
        ["test_training.py"],
        ("shots.normal), (1, 0), jitter", "shots.normal), (0, 1), jitter"),
        ("for view in range(VIEWS) for sample in samples]", "for sample in samples for view in range(VIEWS)]"),
        ("augment(grey)[:, 0] > (above + 0.5) / 255", "augment(grey)[:, 0] > 0.5"),
        ("judged.selection_score > self.best_score", "judged.selection_score >= self.best_score"),
        ('"valid": valid}.get(self.select)', '"valid": test}.get(self.select)'),
        ("-(-epochs // 4)", "epochs // 4"),
        ("values.mean(dim=0)", "values[-1]"),
    ),
    *_mutants(
        "engine/detector.py",
        ["integration/test_golden_e2e.py", "test_training.py"],
        ("betas=(0.5, 0.999)", "betas=(0.9, 0.999)"),
        (
            'return "seg" if self.settings.pixel_metrics else "det"',
            'return "det" if self.settings.pixel_metrics else "seg"',
        ),
        ("across_tokens=corrected", "across_tokens=not corrected"),
    ),
    *_mutants(
        "engine/files/config.py",
        ["test_config.py"],
        ("if obj in PAPER:", "if obj not in PAPER:"),
        ("min(valid_left()) > 0", "max(valid_left()) > 0"),
        ('return f"{normal}shot" if normal == abnormal', 'return f"{normal}shot" if normal != abnormal'),
    ),
    *_mutants(
        "engine/files/published.py",
        ["integration/test_published.py"],
        (
            '{2: "learnable_all", 1: "learnable_abnormal", 0: "fix"}',
            '{2: "learnable_abnormal", 1: "learnable_all", 0: "fix"}',
        ),
        ("nan_to_num(nan=math.inf)", "nan_to_num(nan=0.0)"),
        ("(width, embed_dim)]", "(embed_dim, width)]"),
    ),
    *_mutants(
        "engine/files/checkpoint.py",
        ["integration/test_published.py", "integration/test_scripts.py"],
        ("== (run, started):", "!= (run, started):"),
        ("weights.sha256 == trained_on:", "weights.sha256 != trained_on:"),
    ),
    *_mutants(
        "engine/report/images.py",
        ["test_report_images.py"],
        ("heat / high * 65535", "heat / high * 255"),
        ('-abs(region["area"])', 'abs(region["area"])'),
    ),
    *_mutants(
        "engine/report/page.py",
        ["test_page.py"],
        ("(scores >= threshold).sum()", "(scores > threshold).sum()"),
        ('np.argsort(-scores, kind="stable")[:MAX_CARDS]', 'np.argsort(scores, kind="stable")[:MAX_CARDS]'),
    ),
    *_mutants(
        "engine/report/tracking.py",
        ["test_dashboard.py"],
        ("self._pictured >= every", "self._pictured > every"),
        ("WORDS[int(scores[i] >= threshold)]", "WORDS[int(scores[i] <= threshold)]"),
    ),
)


def copy_tree(target: Path) -> None:
    """The working tree's files that git knows or does not ignore, without .venv and caches."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def run_tests(root: Path, tests: Sequence[str]) -> int | None:
    """Pytest's exit code on the tests in the tree at `root`; None where they hang."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",  # bytecode of a mutant of the same second and length would stay for the next
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
    }
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, timeout=SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return None


def try_mutant(mutant: Mutant, root: Path) -> str:
    """What becomes of a mutant in the tree at `root`, which is as before afterwards."""
    if not mutant.fits(root):
        return "NO LONGER FITS"
    path = root / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code = run_tests(root, mutant.tests)
    finally:
        path.write_text(original, encoding="utf-8")
    return {FAILED: "killed", PASSED: "SURVIVED", None: "killed (hangs)"}.get(code, f"NO TEST RAN (code {code})")


def failing_anyway(root: Path, mutants: Sequence[Mutant]) -> set[tuple[str, ...]]:
    """The groups of tests that do not pass on the unchanged tree: nothing follows from these."""
    return {tests for tests in dict.fromkeys(m.tests for m in mutants) if run_tests(root, tests) != PASSED}


def try_all(mutants: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, str, float]]:
    """Each mutant, what became of it, and the seconds it took; `jobs` at a time, each in a copy of its own."""
    with tempfile.TemporaryDirectory() as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(jobs):
            copy_tree(Path(folder) / str(number))
            copies.put(Path(folder) / str(number))
        failing = failing_anyway(Path(folder) / "0", mutants)

        def work(mutant: Mutant) -> tuple[Mutant, str, float]:
            if mutant.tests in failing:
                return mutant, "FAILS ANYWAY", 0.0
            start, root = time.monotonic(), copies.get()
            try:
                return mutant, try_mutant(mutant, root), time.monotonic() - start
            finally:
                copies.put(root)

        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(work, mutants)


def main() -> int:
    """Try the mutants that the flags name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", help="mutants of this file, or with this text in what they change")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in f"{m.file}\n{m.old}\n{m.new}"]
    if not chosen:
        parser.error(f"--only {options.only}: no such mutant")
    if options.list:
        print("\n".join(map(str, chosen)))
        return 0
    print(f"{len(chosen)} mutants; first their tests on the unchanged tree", flush=True)
    failures = 0
    for mutant, outcome, seconds in try_all(chosen, options.jobs):
        failures += not outcome.startswith("killed")
        print(f"{outcome:<16} {seconds:6.1f} s  {mutant}", flush=True)
    print(f"{len(chosen) - failures} of {len(chosen)} killed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
