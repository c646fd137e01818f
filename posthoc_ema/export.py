"""Where other programs expect weights: a file of ``torch.save``, a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from posthoc_ema.draft import sync_directory, write_atomically
from posthoc_ema.errors import StructureError
from posthoc_ema.places import Place, RemotePath, as_place
from posthoc_ema.tensorfile import SUFFIX, read_header

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_WEIGHTS = (*TORCH_SUFFIXES, SUFFIX, ".index.json", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
_NAMES = ("model", "diffusion_pytorch_model", "adapter_model")


def is_torch_file(out: str | Place | None) -> bool:
    """Whether a result shall be a file of ``torch.save``."""
    return out is not None and str(out).endswith(TORCH_SUFFIXES)


def save_torch(state: Mapping[str, Any], path: Place) -> None:
    """Write a state dict that ``torch.load(path, weights_only=True)`` reads, durably.

    Tied tensors are stored once, as PyTorch itself does.
    """
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: torch.save(dict(state), file))


class ModelFolder:
    """A model as Hugging Face libraries keep it, whose like is wanted with other weights.

    Args:
        path: The folder, with a configuration beside its weights.

    Raises:
        ValueError: If it is none.
    """

    def __init__(self, path: str | Path) -> None:
        place = as_place(path)
        if not isinstance(place, Path):
            raise ValueError(f"like={path} must be a local folder; copy it there first")
        self.path = place
        if not any(self.path.glob("*config.json")):
            raise ValueError(
                f"like={path} holds no config.json; give the folder of a model that "
                "save_pretrained wrote"
            )
        found = [n for n in _NAMES if any(self.path.glob(f"{n}*{SUFFIX}*"))]
        self.stem = found[0] if found else _NAMES[0]

    def weights(self, out: Place) -> Place:
        """The file of weights in a folder of this kind; shards and index are named after it."""
        if out.resolve() == self.path.resolve():
            raise ValueError(f"out={out} is the model that shall be copied; give another folder")
        return out / f"{self.stem}{SUFFIX}"

    def check(self, names: Collection[str]) -> None:
        """The model must hold every tensor, or it would not be this model.

        Raises:
            StructureError: If names differ; tied ones, which are stored once, may be missing.
        """
        files = sorted(self.path.glob(f"{self.stem}*{SUFFIX}"))
        expected = {name for file in files for name in read_header(file).entries}
        strange, missing = sorted(set(names) - expected), sorted(expected - set(names))
        if files and (strange or missing):
            raise StructureError(
                f"{self.path} is another model: it has {len(missing)} tensors that the snapshots "
                f"lack{_some(missing)}, and lacks {len(strange)} of theirs{_some(strange)}"
            )

    def copy_to(self, out: Place) -> None:
        """Copy all but the weights: configuration, tokenizer, what else there is."""
        for file in sorted(self.path.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name[:1] != ".":
                if isinstance(out, RemotePath):
                    (out / file.name).upload(file)
                else:
                    shutil.copyfile(file, out / file.name)
        sync_directory(out)


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
