"""Writes pickles as the official EDM2 code does, from stand-in classes, in a process of its own.

    python edm2_worker.py FOLDER PROTOCOL... < run.json

The reading process must not have the modules that the pickles name: ``torch_utils.persistence`` and
``dnnlib.util`` are made here, on the fly. Standard input holds ``{file: {name: values}}``; each
protocol gets a folder of its name, what torch.save makes of the same the folder ``saved``, and a
file ``….npz`` for each pickle holds the state dict.
"""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch


class EasyDict(dict):  # type: ignore[type-arg]
    """A mapping with its entries as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("the reader executed it")


def module(name: str, **members: Any) -> None:
    found = sys.modules[name] = types.ModuleType(name)
    for key, value in members.items():
        setattr(found, key, value)
        value.__module__, value.__qualname__ = name, key


module("torch_utils")
module("dnnlib")
module("dnnlib.util", EasyDict=EasyDict)
module("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj)


class Persistent:
    """Pickles as its attributes and the source of its class."""

    def __reduce__(self) -> Any:
        state = dict(self.__dict__)
        meta = EasyDict(
            type="class",
            version=6,
            module_src="import os\nos.environ['EXECUTED'] = 'yes'\n" * 300,
            class_name=type(self).__name__,
            state=state,
        )
        return (_reconstruct_persistent_obj, (meta,))


class Layer(Persistent, torch.nn.Module):
    """A weight, as magnitude-preserving layers have."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


class Fourier(Persistent, torch.nn.Module):
    """Two buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("freqs", torch.randn(64, generator=generator))
        self.register_buffer("phases", torch.rand(64, generator=generator))
        self.register_buffer("passing", torch.zeros(3), persistent=False)


class Network(Persistent, torch.nn.Module):
    """Layers in a ModuleDict, a Fourier embedding, a gain without dimensions, a tied weight."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.img_resolution = 64
        self.sigma_data = np.float32(0.5)
        self.emb_fourier = Fourier()
        self.enc = torch.nn.ModuleDict({"64x64_conv": Layer(weights["enc"])})
        self.dec = torch.nn.ModuleDict({"64x64_block0": Layer(weights["dec"])})
        self.dec["tied"] = self.enc["64x64_conv"]
        self.out_gain = torch.nn.Parameter(weights["gain"])
        self.out_conv = torch.nn.Linear(3, 2, bias=False)
        self.out_conv.weight.data = weights["out"]


class Preconditioned(Persistent, torch.nn.Module):
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.use_fp16 = True
        self._init_kwargs = EasyDict(unet=EasyDict(channels=64), device=torch.device("cpu"))
        self.unet = Network(weights)


class Encoder(Persistent):
    def __init__(self) -> None:
        self.scale = np.float32(0.5) / np.arange(1, 5, dtype=np.float32)


def snapshot(weights: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: torch.tensor(values, dtype=torch.float32) for name, values in weights.items()}
    network = Preconditioned(tensors).half().eval().requires_grad_(False)
    return EasyDict(
        encoder=Encoder(), ema=network, dataset_kwargs=EasyDict(path="x.zip"), loss_fn=Encoder()
    )


def state_dict(network: Any) -> dict[str, Any]:
    """Names and values that ``load_state_dict`` of the network takes."""
    return {name: value.float().numpy() for name, value in network.state_dict().items()}


def main() -> None:
    top = Path(sys.argv[1])
    for name, weights in json.load(sys.stdin).items():
        data = snapshot(weights)
        for protocol in sys.argv[2:]:
            folder = top / protocol
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / name, "wb") as file:
                pickle.dump(data, file, int(protocol))
        (top / "saved").mkdir(exist_ok=True)
        torch.save(data, top / "saved" / name)  # storages beside the pickle, not inside
        np.savez(top / f"{name}.npz", **state_dict(data["ema"]))


if __name__ == "__main__":
    main()
