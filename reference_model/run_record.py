"""What a run directory says about its run beside the config: its data, and each of its starts."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reference_model.data_source import Source
from reference_model.machine import describe_machine

DATA_FILE = "data.json"
"""What the data set was when the run was started."""
STARTS_FILE = "starts.jsonl"
"""One line for each process group that trained the run: when, where, with what."""

SAMPLE = 64
"""Images that the digest of a data set covers, spread evenly over the set."""


def describe_data(source: Source) -> dict[str, Any]:
    """Describe a data set such that another, or a changed one, is told apart.

    Args:
        source: The set; `SAMPLE` of its images are read.

    Returns:
        Plain data: size, shape, classes, kind, and a digest of these, of all classes, of what is
        held out, and of the sample. Wherever the set lies and in whichever files, it is the same.

    Raises:
        ValueError: If an image cannot be read.
    """
    described: dict[str, Any] = {
        "images": source.size,
        "shape": list(source.shape),
        "classes": source.num_classes,
        "latents": source.latent,
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for array in (source.labels, source.held_out):
        # The length in front, so that nothing can pass for its neighbour.
        content = b"" if array is None else np.ascontiguousarray(array).tobytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    sample = np.unique(np.linspace(0, source.size - 1, SAMPLE).astype(np.int64))
    digest.update(np.ascontiguousarray(source.read(sample)).tobytes())
    return {**described, "digest": digest.hexdigest()}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in words how two descriptions of data differ; nothing if they do not."""
    if then.get("digest") == now["digest"]:
        return ""
    named = [
        f"{name}={now[name]} (then {then.get(name)})"
        for name in now
        if name != "digest" and now[name] != then.get(name)
    ]
    return ", ".join(named) or "other images or classes, of the same number and shape"


def record_start(run_dir: Path, **about: Any) -> None:
    """Add a line about this process to the run's list of starts.

    Args:
        run_dir: Directory of the run.
        **about: What else there is to say, as plain data.
    """
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **about,
        "command": sys.argv,
        "machine": {
            "host": platform.node(),
            **describe_machine(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }
    with (run_dir / STARTS_FILE).open("a") as file:
        print(json.dumps(line), file=file)
