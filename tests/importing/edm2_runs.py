"""Runs of the official code's kind: pickles written by another process, and what they hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPES = {"enc": (40, 60), "dec": (64, 60), "gain": (), "out": (2, 3)}
NAMES = {
    "enc": "unet.enc.64x64_conv.weight",
    "dec": "unet.dec.64x64_block0.weight",
    "gain": "unet.out_gain",
    "out": "unet.out_conv.weight",
}
"""Names in the network's state dict."""

Weights = dict[str, NDArray[np.float64]]


def write_pickles(folder: Path, run: Mapping[str, Weights], protocols: Sequence[int]) -> None:
    """Files by name, in a folder for each protocol."""
    plain = {name: {k: v.tolist() for k, v in weights.items()} for name, weights in run.items()}
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("edm2_worker.py")), str(folder)]
        + [str(protocol) for protocol in protocols],
        input=json.dumps(plain),
        text=True,
        check=True,
    )


def state_dict(folder: Path, name: str) -> dict[str, Any]:
    """What the network in a pickle says its state dict is."""
    with np.load(folder / f"{name}.npz") as stored:
        return dict(stored)


def random_weights(rng: np.random.Generator) -> Weights:
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
