"""Other EMA libraries, for comparison only: installed apart from the environment, loaded by file.

``python -m benchmarks.peers`` (``make bench-peers``) installs them under ``benchmarks/.peers``.
One of them, the distribution ``pytorch-posthoc-ema``, has the same import name as this library.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parent / ".peers"


@dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        requirement: What pip installs.
        module: What is imported from it.
        file: Load only this file, under the name of ``module``; None for a normal import.
        alone: Install it without its requirements, which are torch (that of the environment
            must stay) or not needed for what is measured.
    """

    requirement: str
    module: str
    file: str | None = None
    alone: bool = True


PEERS = {
    "ema-pytorch": Peer("ema-pytorch==0.8.3", "ema_pytorch"),
    "pytorch-posthoc-ema": Peer("pytorch-posthoc-ema==1.0.10", "posthoc_ema"),
    "timm": Peer("timm==1.0.31", "timm_model_ema", file="timm/utils/model_ema.py"),
    "diffusers": Peer("diffusers==0.42.1", "diffusers.training_utils", alone=False),
}


_loaded: dict[str, ModuleType] = {}


class NotInstalledError(Exception):
    """The peer is not there; ``make bench-peers`` installs it."""


def load(name: str) -> ModuleType:
    """Import a peer beside this library.

    Raises:
        NotInstalledError: If it was not installed.
    """
    peer, folder = PEERS[name], FOLDER / name
    if not folder.is_dir():
        raise NotInstalledError(f"{name} is not installed (make bench-peers)")
    if name not in _loaded:
        _loaded[name] = _load_file(peer, folder) if peer.file else _load_module(peer, folder)
    return _loaded[name]


def _load_file(peer: Peer, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(peer.module, folder / str(peer.file))
    if spec is None or spec.loader is None:
        raise NotInstalledError(f"{folder / str(peer.file)} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _load_module(peer: Peer, folder: Path) -> ModuleType:
    """A normal import, during which this library's modules step aside if the names collide."""
    package = peer.module.partition(".")[0]
    ours = {key: sys.modules.pop(key) for key in _modules_of(package)}
    # First where a name of ours is meant to be found there; else last, so that what the
    # environment has (numpy, safetensors) comes from there.
    sys.path.insert(0 if ours else len(sys.path), str(folder))
    try:
        return importlib.import_module(peer.module)
    finally:
        if ours:
            sys.path.remove(str(folder))
            for key in _modules_of(package):
                del sys.modules[key]
            sys.modules.update(ours)


def _modules_of(package: str) -> list[str]:
    return [key for key in sys.modules if key == package or key.startswith(f"{package}.")]


def install() -> None:
    """Install all peers with pip, each into a folder of its own."""
    for name, peer in PEERS.items():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade"]
        command += ["--target", str(FOLDER / name), *(["--no-deps"] if peer.alone else [])]
        print(f"installing {peer.requirement} into {FOLDER / name}", flush=True)
        subprocess.run([*command, peer.requirement], check=True)


if __name__ == "__main__":
    install()
