"""Snapshots that are stored as what remains after a prediction from earlier ones.

A decoded snapshot is a linear function of what the files hold: S_i = q_i + Σ p_ij S_j. So any
combination of snapshots is a combination of stored numbers, Σ x_i S_i = Σ c_i q_i, and needs no
decoding one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from posthoc_ema.encoding import block_bits
from posthoc_ema.errors import MissingInputError
from posthoc_ema.snapshot_file import Snapshot

if TYPE_CHECKING:
    from numpy.typing import NDArray


def connected(
    snapshots: Sequence[Snapshot],
) -> tuple[list[Snapshot], list[MissingInputError]]:
    """Snapshots with those that they were predicted from found, and an error where one is not."""
    by_header = {snapshot.digests["header"]: snapshot for snapshot in snapshots}
    done: dict[str, Snapshot] = {}
    found: list[Snapshot] = []
    broken: list[Snapshot] = []
    waiting = sorted(snapshots, key=lambda s: s.t)
    while waiting:
        later = []
        for snapshot in waiting:
            if all(link.header in done for link in snapshot.links):
                inputs = tuple((link.coefficient, done[link.header]) for link in snapshot.links)
                refined = inputs[0][1].nbytes if snapshot.refines else 0
                found.append(replace(snapshot, inputs=inputs, nbytes=snapshot.nbytes + refined))
                done[snapshot.digests["header"]] = found[-1]
            else:
                later.append(snapshot)
        if len(later) == len(waiting):
            broken = later
            break
        waiting = later
    problems = []
    for snapshot in broken:
        lost = next((link for link in snapshot.links if link.header not in by_header), None)
        cause = f"{lost.name}, which is missing or was replaced" if lost else "another such file"
        problems.append(
            MissingInputError(
                f"{snapshot.path} cannot be decoded: it is stored as its difference from a "
                f"prediction that needs {cause}. Restore that file, or delete this one to go on "
                "without it"
            )
        )
    return found, problems


def with_inputs(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    """The snapshots and all that they were predicted from, each after its inputs."""
    found: dict[str, Snapshot] = {}
    pending = list(snapshots)[::-1]
    while pending:
        snapshot = pending.pop()
        key = snapshot.digests["header"]
        if key in found:
            continue
        missing = [s for _, s in snapshot.inputs if s.digests["header"] not in found]
        if missing:
            pending += [snapshot, *missing]
        else:
            found[key] = snapshot
    return list(found.values())


def is_residual(snapshot: Snapshot, name: str) -> bool:
    """Whether the file holds one tensor as what remains after its prediction."""
    return block_bits(snapshot.entries[name].dtype) is not None


def stored_coefficients(
    files: Sequence[Snapshot], coefficients: NDArray[np.float64], name: str
) -> NDArray[np.float64]:
    """Coefficients of what files hold, from those of the snapshots.

    Args:
        files: ``n``, each after its inputs, see :func:`with_inputs`.
        coefficients: ``[k, n]`` of the decoded snapshots.
        name: A tensor: another may be stored whole where this one is not.

    Returns:
        ``[k, n]``.
    """
    row_of = {snapshot.digests["header"]: row for row, snapshot in enumerate(files)}
    out = coefficients.copy()
    for row in range(len(files) - 1, -1, -1):
        if is_residual(files[row], name):
            for factor, other in files[row].inputs:
                out[:, row_of[other.digests["header"]]] += factor * out[:, row]
    return out
