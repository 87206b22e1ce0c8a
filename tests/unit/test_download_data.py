"""The paper's data sets from an archive: dropped connections, MVFA's archives, refused archives."""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import download, layout
from dataset.medical_few import MedicalDataset
from tests.helpers.hub_server import HubServer, hub_server
from utils import InputError


def files(obj: str) -> dict[str, bytes]:
    """Files of a small data set in BMAD's form, by their paths in the archive."""
    result, rng = {}, np.random.default_rng(len(obj))
    for split, kind, i in [(s, k, i) for s in ("train", "valid", "test") for k in ("good", "Ungood") for i in range(3)]:
        if (split, kind) != ("train", "Ungood"):
            for part in ("img", "label"):
                picture = io.BytesIO()
                noise, lesion = rng.integers(0, 255, (99, 99), dtype=np.uint8), np.eye(99, dtype=np.uint8) * 255
                values = noise if part == "img" else lesion
                Image.fromarray(values).save(picture, "PNG")
                result[f"{obj}/{split}/{kind}/{part}/{i:05d}_{i}.png"] = picture.getvalue()
    return result


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "bmad.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in {**files("Brain"), **files("Chest"), "__MACOSX/Brain/test/._x.png": b"x"}.items():
            packed.writestr(f"BMAD/{name}", content)
    return path


@pytest.fixture
def server(archive, monkeypatch, tmp_path) -> Iterator[HubServer]:
    """Serves the archive; the first connection drops half way."""
    (tmp_path / "served").mkdir()
    content = archive.read_bytes()
    (tmp_path / "served/bmad.zip").write_bytes(content)
    with hub_server({"me/bmad": tmp_path / "served"}) as running:
        running.drops = 1
        monkeypatch.setattr(download, "URL", f"{running.address}/me/bmad/resolve/main/bmad.zip")
        monkeypatch.setattr(download, "SHA256", hashlib.sha256(content).hexdigest())
        yield running


def test_only_the_requested_data_set_is_unpacked_and_checked(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(layout.PUBLISHED_COUNTS, "Brain", {"valid": ((3, 3),), "test": ((3, 3),)})
    code = download.main(["Brain", "--out", str(tmp_path / "data")])
    output = capsys.readouterr().out
    assert code == 0, output
    ranges = [wanted for method, _, wanted in server.log if method == "GET"]
    assert [bool(part) for part in ranges] == [False, True]  # the download was resumed
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["Brain_AD", "bmad.zip"]
    assert "CC BY-NC-SA 4.0" in output
    assert "counts as published: valid 3 + 3; test 3 + 3" in output
    dataset = MedicalDataset.open("Brain", tmp_path / "data")
    assert len(dataset.samples("test")) == 6
    assert all(sample.masks for sample in dataset.samples("test") if sample.label)
    with pytest.raises(InputError, match="Brain_AD is there already"):
        download.main(["Brain", "--out", str(tmp_path / "data")])


def test_wrong_checksum_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SHA256", "0" * 64)
    with pytest.raises(InputError, match="SHA-256"):
        download.main(["Brain", "--out", str(tmp_path / "data")])
    assert not (tmp_path / "data/Brain_AD").exists()


@pytest.mark.parametrize("fault", ["outside", "cut", "another data set", "no room", "bomb", "a lie"])
def test_bad_archives_are_refused(archive, tmp_path, monkeypatch, fault):
    obj = "Liver" if fault == "another data set" else "Brain"
    if fault in ("outside", "bomb", "a lie"):
        with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as packed:
            name = "BMAD/Brain/../../../x.png" if fault == "outside" else "Brain/test/x.png"
            packed.writestr(name, bytes(10**8 if fault == "bomb" else 1001))
    if fault == "a lie":
        archive.write_bytes(archive.read_bytes().replace((1001).to_bytes(4, "little"), (5).to_bytes(4, "little")))
    elif fault == "cut":
        archive.write_bytes(archive.read_bytes()[:-2000])
    elif fault == "no room":
        monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="--out .* needs" if fault == "no room" else r"bmad\.zip"):
        download.main([obj, "--archive", str(archive), "--out", str(tmp_path / "data")])
    assert not list((tmp_path / "data").glob("*"))
    assert not list(tmp_path.rglob("x.png"))


def test_mvfa_archive_without_its_links(tmp_path):
    with tarfile.open(tmp_path / "Brain.tar.gz", "w:gz") as tar:
        for name, content in files("Brain").items():
            info = tarfile.TarInfo(name.replace("Brain/", "Brain_AD/").replace("/label/", "/anomaly_mask/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"Brain_AD/test/good/img/{kind!r}.png")
            info.type, info.linkname = kind, "/etc/hosts"
            tar.addfile(info)
    download.main(["Brain", "--archive", str(tmp_path / "Brain.tar.gz"), "--out", str(tmp_path / "data")])
    assert {path.name for path in (tmp_path / "data/Brain_AD").iterdir()} == {"train", "valid", "test"}
    assert len(list((tmp_path / "data/Brain_AD/test/good/img").iterdir())) == 3  # links are skipped
