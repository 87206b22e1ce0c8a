"""`--model_name hf-hub:owner/name` and `python -m CLIP.download` against a server that speaks the hub's protocol.

huggingface_hub reads its environment on import. The server that forks the commands does not import it for this reason.
"""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from CLIP.clip import create_model
from CLIP.config import ModelConfig
from tests.helpers.commands import Commands, fine, refused
from tests.helpers.hub_server import HubServer, hub_server
from tests.helpers.weights import save_hugging_face

TINY = ModelConfig.load("ViT-tiny-14-56")
Run = Callable[..., subprocess.CompletedProcess[str]]
# Prints source and hash of the weights, then numbers of the model.
LOAD = """
import sys
from utils import run_cli
def main():
    from CLIP.weights import find_weights
    found = find_weights(sys.argv[1], "openai")
    from CLIP.clip import create_model
    clip = create_model(sys.argv[1], "openai", 42)
    print(found.source, found.sha256, float(clip.text.text_projection.double().sum()), clip.quick_gelu)
run_cli(main)
"""
# OpenAI's URL cannot be reached; prints the hash of the weights that a run then finds.
FALL_BACK = """
import pathlib, sys
from CLIP import download, weights
from utils import Unreachable, run_cli
def unreachable(*_):
    raise Unreachable("cannot reach the address")
def main():
    download.download = unreachable
    download.CKPT_FOLDER = weights.CKPT_FOLDER = pathlib.Path(sys.argv[1])
    download.main(["ViT-L-14-336"])
    print(weights.find_weights("ViT-L-14-336", "openai").sha256)
run_cli(main)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Repositories in Hugging Face's form; one holds a model of another family."""
    folder = tmp_path_factory.mktemp("repositories")
    save_hugging_face(TINY, folder / "hf")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    return {
        "me/tiny": folder / "hf", "me/bert": folder / "bert", "openai/clip-vit-large-patch14-336": folder / "hf",
    }  # fmt: skip


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[HubServer]:
    with hub_server(folders) as running:
        yield running


@pytest.fixture
def run(command: Commands, server: HubServer, tmp_path: Path) -> Run:
    """Runs a module (`CLIP.download`) or, if the first word contains a line break, a program."""

    def run(program: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        if "\n" in program:
            (tmp_path / "program.py").write_text(program)
            program = str(tmp_path / "program.py")
        shared = {
            "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf_home"), "no_proxy": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        return command(program, *arguments, env={**shared, **environment})

    return run


def test_hub_model_is_fetched_once_then_read_offline(server: HubServer, run: Run, folders) -> None:
    first = run(LOAD, "hf-hub:me/tiny")
    fine(first)
    source, sha256, number, _ = first.stdout.split()
    assert source == "me/tiny/model.safetensors"
    clip = create_model(str(folders["me/tiny"]), "openai", 42)
    assert (sha256, float(number)) == (clip.info.sha256, float(clip.text.text_projection.double().sum()))
    server.log.clear()
    assert run(LOAD, "hf-hub:me/tiny").stdout == first.stdout
    assert run(LOAD, "hf-hub:me/tiny", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert not server.log  # nothing was requested again


def test_hub_errors_are_reported(server: HubServer, run: Run) -> None:
    refused(run(LOAD, "hf-hub:me/none"), "hf-hub:me/none", "RepositoryNotFound")
    refused(run(LOAD, "hf-hub:me/tiny@other"), "RevisionNotFound")
    refused(run(LOAD, "hf-hub:me/bert"), "bert")
    refused(run(LOAD, "hf-hub:me/tiny", HF_HUB_OFFLINE="1"), "not in the cache")
    server.gated = ("me/tiny",)
    refused(run(LOAD, "hf-hub:me/tiny"), "hf-hub:me/tiny", "GatedRepo")


def test_hub_is_the_fallback_for_an_unreachable_url(run: Run, folders, tmp_path: Path) -> None:
    result = run(FALL_BACK, tmp_path)
    fine(result)
    assert "from the hub instead" in result.stderr
    assert result.stdout.split()[-1] == create_model(str(folders["me/tiny"]), "openai", 42).info.sha256
    assert (tmp_path / "ViT-L-14-336px.pt").is_file()
