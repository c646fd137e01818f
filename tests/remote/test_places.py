"""What names a place: paths, URLs, and what looks like one and is not."""

from __future__ import annotations

import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import run_python
from stores import ObjectStore

from posthoc_ema import EMA, SnapshotError, SnapshotStore, SnapshotWriteError, reconstruct
from posthoc_ema.places import RemotePath, as_place


def weights(step: float) -> dict[str, np.ndarray]:
    return {"w": np.full(5, float(step))}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("run/ema", "run/ema"),
        ("C:\\run\\ema", "C:\\run\\ema"),
        ("C:/run", "C:/run"),
        ("file:///run/ema", "/run/ema"),
        ("file:///a%20folder/ema", "/a folder/ema"),
        ("file://localhost/run", "/run"),
        ("local:///run", "/run"),
        ("a:b/c", "a:b/c"),
        ("run/s3:/b", "run/s3:/b"),
    ],
)
def test_local_paths(text: str, path: str) -> None:
    assert as_place(text) == Path(path)
    assert SnapshotStore(text).path == Path(path)


@pytest.mark.parametrize("made", [Path, str, PureWindowsPath])
def test_a_url_that_lost_a_slash(made: type) -> None:
    with pytest.raises(ValueError, match=r"s3:.bucket.run looks like a URL that lost a slash"):
        EMA(snapshots=made(Path("s3://bucket/run")), every=1)


def test_a_folder_with_such_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    assert as_place("s3:/bucket") == Path("s3:/bucket")


@pytest.mark.parametrize("url", ["file://other/run", "file://run"])
def test_files_of_other_machines(url: str) -> None:
    with pytest.raises(ValueError, match=r"names no local file; write file:///"):
        SnapshotStore(url)


def test_names_of_a_url(memory: str) -> None:
    place = as_place(f"{memory}/ema/")
    assert isinstance(place, RemotePath)
    assert (str(place), place.name, str(place.parent)) == ("memory://runs/ema", "ema", memory)
    assert str(place / "a" / "b") == "memory://runs/ema/a/b"
    assert place / "a" == as_place("memory:///runs/ema").with_name("ema") / "a"
    assert place / "a" != place / "b"
    assert repr(SnapshotStore(place)) == "SnapshotStore('memory://runs/ema')"


def test_an_object_with_a_file_system(tmp_path: Path) -> None:
    """As universal_pathlib has it, whose local paths stay local."""
    fs = ObjectStore()
    assert str(as_place(fs.at("/run/ema"))) == "objects:///run/ema"
    EMA(snapshots=fs.at("/run/ema")).update(weights(1))
    local = SimpleNamespace(fs=SimpleNamespace(protocol=("file", "local")), path=str(tmp_path))
    assert as_place(local) == tmp_path


def test_options_of_the_file_system(endpoint: str, bucket: str) -> None:
    options = {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": endpoint}}
    store = SnapshotStore(f"{bucket}/ema", storage_options=options)
    ema = EMA(snapshots=store, every=1)
    ema.update(weights(1))
    assert reconstruct(store, 0.1).params["w"].tolist() == [1] * 5
    assert store.path.fs.key == "k"
    with pytest.raises(ValueError, match="storage_options are for URLs, and run/ema is a local"):
        SnapshotStore("run/ema", storage_options=options)


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'posthoc-ema\[remote\]'.*s3fs"):
        reconstruct("s3://bucket/run", 0.1)


def test_without_the_package_of_a_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ModuleNotFoundError, match=r"gs://bucket/run cannot be opened.*gcsfs"):
        SnapshotStore("gs://bucket/run")


def test_an_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        SnapshotStore("nowhere://bucket/run")


def test_local_folders_need_no_fsspec(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from posthoc_ema import EMA, reconstruct, SnapshotStore\n"
        "ema = EMA(snapshots=sys.argv[1], every=1)\n"
        "for step in (1, 2): ema.update({'w': np.full(3, float(step))})\n"
        "reconstruct(sys.argv[1], 0.07, out=sys.argv[1] + '-out').params\n"
        "SnapshotStore('file://' + sys.argv[1]).verify()\n"
        "if len(sys.argv) > 2: SnapshotStore('memory://run')\n"
        "print('fsspec' in sys.modules)"
    )
    assert run_python("-c", code, str(tmp_path / "ema")).startswith("False")
    assert run_python("-c", code, str(tmp_path / "ema2"), "url").startswith("True")


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients have exceptions of their own; they come out as ours, with the URL."""
    options = {
        "key": "k", "secret": "s", "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"},
        "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1},
    }  # fmt: skip
    store = SnapshotStore("s3://bucket/run", storage_options={**options})
    monkeypatch.setattr(type(store.path.fs), "retries", 1)
    ema = EMA(snapshots=store, every=1)
    with pytest.raises(SnapshotWriteError, match="cannot write snapshots to s3://bucket/run"):
        ema.update(weights(1))
    with pytest.raises(SnapshotError, match=r"cannot list s3://bucket/run: .*credentials"):
        store.list()
