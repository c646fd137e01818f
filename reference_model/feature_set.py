"""What is kept of the features of a set of images: enough to compare it, little enough to share."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from reference_model.checkpoint import write_atomically
from reference_model.metrics import FeatureStatistics

SAMPLE = 10_000
"""So many feature vectors of a set, the first ones, are kept for precision and recall."""

VERSION = 1


class FeatureSet:
    """Moments of all feature vectors of a set of images, and the first `SAMPLE` vectors themselves.

    Parts of a set, from other processes or machines, are merged in any order: the moments are then
    those of one pass over everything, up to rounding.

    Args:
        dim: Length of a feature vector.
        network: Name of the feature network.
        digest: Identifies that network; sets under another are not comparable.

    Attributes:
        statistics: Moments of everything seen.
    """

    def __init__(self, dim: int, network: str, digest: str) -> None:
        self.network, self.digest = network, digest
        self.statistics = FeatureStatistics(dim)
        self._sample: list[NDArray[np.float32]] = []

    def __len__(self) -> int:
        return self.statistics.count

    @property
    def sample(self) -> NDArray[np.float32]:
        """At most `SAMPLE` feature vectors, `[N, dim]`."""
        return np.concatenate([np.empty((0, self.statistics.dim), np.float32), *self._sample])

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change with what was seen."""
        sha = hashlib.sha256(f"{self.network} {self.digest}".encode())
        for array in self.statistics.to_arrays().values():
            sha.update(array.tobytes())
        return sha.hexdigest()[:12]

    def update(self, features: ArrayLike) -> None:
        """Add a batch of feature vectors.

        Args:
            features: Finite values, shape `[N, dim]`.

        Raises:
            ValueError: If the shape is wrong or a value is not finite.
        """
        batch = np.asarray(features)
        self.statistics.update(batch)
        self._keep(batch)

    def merge(self, other: FeatureSet) -> None:
        """Add everything that another set has seen; it stays unchanged.

        Args:
            other: A set of the same feature network.

        Raises:
            ValueError: If it is of another network.
        """
        self.check_network(other.network, other.digest)
        self.statistics.merge(other.statistics)
        self._keep(other.sample)

    def check_network(self, network: str, digest: str) -> None:
        """Refuse to be compared with what another network says.

        Raises:
            ValueError: If the names or digests differ.
        """
        if (network, digest) != (self.network, self.digest):
            raise ValueError(
                f"these are features of {self.network} ({self.digest}), and those of {network} "
                f"({digest}): only features of one and the same network can be compared"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an NPZ file; a crash leaves the old one or the new one.

        Args:
            path: File to write. Its folder is made if need be.
        """
        about = {"version": VERSION, "network": self.network, "digest": self.digest}
        content = io.BytesIO()
        arrays: dict[str, Any] = {
            "about": np.array(json.dumps(about, sort_keys=True)),
            "sample": self.sample,
            **self.statistics.to_arrays(),
        }
        np.savez(content, **arrays)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), lambda file: file.write(content.getvalue()))

    @staticmethod
    def is_file(path: str | os.PathLike[str]) -> bool:
        """Whether a file is what `save` writes, as far as the names inside tell."""
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return {"about.npy", "scatter.npy"} <= set(archive.namelist())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureSet:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is missing, damaged, or something else.
        """
        try:
            content = io.BytesIO(Path(path).read_bytes())
            with np.load(content, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                if about["version"] != VERSION:
                    raise ValueError(f"format version {about['version']}, this reads {VERSION}")
                statistics = FeatureStatistics.from_arrays(arrays)
                made = cls(statistics.dim, about["network"], about["digest"])
                made.statistics = statistics
                made._keep(arrays["sample"])
        except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} cannot be read as statistics of features ({error}); "
                "`python -m reference_model statistics` writes such files"
            ) from error
        return made

    def _keep(self, features: NDArray[np.floating]) -> None:
        room = SAMPLE - sum(map(len, self._sample))
        if room > 0 and len(features):
            self._sample.append(np.array(features[:room], np.float32))
