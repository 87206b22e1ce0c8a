"""`--model_name hf-hub:owner/name` and `python -m CLIP.download` against a server that speaks the hub's protocol.

huggingface_hub reads its environment when it is imported, which the process that forks for each command has not done.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from CLIP.clip import create_model
from CLIP.config import ModelConfig
from tests.conftest import tiny_state
from tests.helpers.commands import Commands
from tests.helpers.hub_server import COMMIT, HubServer, hub_server
from tests.helpers.weights import open_clip_config, save_hugging_face

TINY = ModelConfig.load("ViT-tiny-14-56")
Run = Callable[..., subprocess.CompletedProcess[str]]
# Prints where the config and the weights were found, then numbers of the model.
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two repositories: Hugging Face's form, and open_clip's beside files of timm's that must not be taken."""
    folder = tmp_path_factory.mktemp("repositories")
    save_hugging_face(tiny_state(), TINY, folder / "hf")
    (folder / "open_clip").mkdir()
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps(open_clip_config(TINY)))
    (folder / "open_clip" / "config.json").write_text('{"architecture": "vit_tiny"}')
    torch.save(tiny_state(), folder / "open_clip" / "open_clip_pytorch_model.bin")
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "bert"}')
    return {
        "me/tiny": folder / "hf", "me/open": folder / "open_clip", "me/bert": folder / "bert",
        "openai/clip-vit-large-patch14-336": folder / "hf",
    }  # fmt: skip


@pytest.fixture
def server(folders: dict[str, Path]) -> Iterator[HubServer]:
    with hub_server(folders) as running:
        yield running


@pytest.fixture
def run(command: Commands, server: HubServer, tmp_path: Path) -> Run:
    """Start a module (`CLIP.download`) or, where the first word has a line break, a program."""

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


def one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr.splitlines()[-1]


def test_a_model_of_the_hub_is_fetched_once_then_read_offline(server: HubServer, run: Run, folders) -> None:
    first = run(LOAD, "hf-hub:me/tiny")
    assert first.returncode == 0, first.stderr
    source, sha256, number, _ = first.stdout.split()
    assert source == "me/tiny/model.safetensors"
    clip = create_model(str(folders["me/tiny"]), "openai", 42)
    assert (sha256, float(number)) == (clip.info.sha256, float(clip.text.text_projection.double().sum()))
    server.log.clear()
    assert run(LOAD, "hf-hub:me/tiny").stdout == first.stdout
    assert run(LOAD, "hf-hub:me/tiny", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert not server.log  # nothing was asked for again


def test_open_clip_s_files_come_before_others_of_the_repository(run: Run) -> None:
    result = run(LOAD, "hf-hub:me/open@" + COMMIT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"me/open@{COMMIT}/open_clip_pytorch_model.bin ")


def test_a_dropped_connection_is_resumed(server: HubServer, run: Run) -> None:
    server.drops = 1
    result = run("CLIP.download", "hf-hub:me/tiny")
    if result.returncode:  # huggingface_hub before 1.0 leaves another attempt to the user
        one_line(result, "run this again")
        result = run("CLIP.download", "hf-hub:me/tiny")
    assert result.returncode == 0, result.stderr
    gets = [wanted for method, name, wanted in server.log if (method, name) == ("GET", "model.safetensors")]
    assert len(gets) == 2
    assert not gets[0]
    assert int(gets[1].removeprefix("bytes=").split("-")[0]) > 100_000


def test_damaged_files_are_noticed(server: HubServer, run: Run) -> None:
    server.wrong_bytes = True
    one_line(run("CLIP.download", "hf-hub:me/open"), "wrong SHA-256", "delete")


def test_what_the_hub_refuses_is_one_line(server: HubServer, run: Run) -> None:
    one_line(run(LOAD, "hf-hub:me/none"), "hf-hub:me/none", "RepositoryNotFound")
    one_line(run(LOAD, "hf-hub:me/tiny@other"), "RevisionNotFound")
    one_line(run(LOAD, "hf-hub:a b/c"), "hf-hub:a b/c")
    one_line(run(LOAD, "hf-hub:me/bert"), "bert is another family")
    server.gated = ("me/tiny",)
    one_line(run(LOAD, "hf-hub:me/tiny"), "hf-hub:me/tiny", "GatedRepo")


def test_without_network_and_without_the_package(run: Run) -> None:
    one_line(run(LOAD, "hf-hub:me/tiny", HF_HUB_OFFLINE="1"), "not in the cache")
    one_line(run("import sys; sys.modules['huggingface_hub'] = None\n" + LOAD, "hf-hub:me/tiny"), "pip install")


# The official address is replaced by one that nobody answers at.
DOWNLOAD = """
import sys
from dataclasses import replace
from pathlib import Path
from utils import run_cli
def main():
    from CLIP import download, weights
    download.ModelConfig.load = staticmethod(lambda name, load=download.ModelConfig.load: replace(
        load(name), urls={"openai": sys.argv[1]}))
    import time
    time.sleep = lambda seconds: None
    download.CKPT_FOLDER = weights.CKPT_FOLDER = Path(sys.argv[2])
    code = download.main(["ViT-L-14-336", *sys.argv[3:]])
    print(weights.find_weights("ViT-L-14-336", "openai").source)
    return code
run_cli(main)
"""
NOBODY = f"http://user:secret@127.0.0.1:9/{'0' * 64}/ViT-L-14-336px.pt"


def test_the_hub_stands_in_where_the_official_address_cannot_be_reached(run: Run, tmp_path: Path, folders) -> None:
    out = tmp_path / "own" / "file"
    result = run(DOWNLOAD, NOBODY, tmp_path / "ckpt", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "http://***@127.0.0.1:9/" in result.stderr
    assert "secret" not in result.stderr + result.stdout
    assert result.stdout.splitlines()[-1] == "openai/clip-vit-large-patch14-336/model.safetensors"
    assert out.read_bytes() == (folders["me/tiny"] / "model.safetensors").read_bytes()
    one_line(run(DOWNLOAD, NOBODY, tmp_path, "--url", NOBODY, "--out", tmp_path / "f"), "cannot reach")  # by hand
