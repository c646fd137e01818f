"""Exchanging and deleting files of a folder together, whenever a kill comes.

New files are prepared in a hidden folder. A journal then says what is to be done; until it is
there, nothing has happened, and from then on everything will.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from posthoc_ema.draft import sync_directory, write_text_atomically

REWRITTEN = ".rewritten"
"""Hidden folder of files that shall take the place of others of their names."""

JOURNAL = ".rewritten.json"
"""What is to be done."""


def exchange(
    folder: Path,
    going: Sequence[str],
    new: Sequence[str],
    moving: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Delete files, put those prepared in their places, and move others.

    Args:
        folder: Where.
        going: Names of files to delete, in this order.
        new: Names of files prepared in :data:`REWRITTEN`.
        moving: Names of files to move, and those they shall have.
    """
    journal = folder / JOURNAL
    if new or moving:
        work = {"delete": list(going), "replace": list(new), "move": dict(moving)}
        write_text_atomically(journal, json.dumps(work))
    for name in new:
        source = folder / REWRITTEN / name
        if source.exists():  # else it was exchanged before a kill
            os.replace(source, folder / name)
    for name in going:
        (folder / name).unlink(missing_ok=True)
    for name, place in moving.items():
        if (folder / name).exists():
            os.replace(folder / name, folder / place)
    for changed in {folder, *((folder / place).parent for place in moving.values())}:
        sync_directory(changed)
    journal.unlink(missing_ok=True)
    shutil.rmtree(folder / REWRITTEN, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish an exchange that was killed, or forget what it had prepared."""
    journal = folder / JOURNAL
    if journal.exists():
        work = json.loads(journal.read_text(encoding="utf-8"))
        exchange(folder, work["delete"], work["replace"], work.get("move", {}))
    elif (folder / REWRITTEN).exists():
        shutil.rmtree(folder / REWRITTEN, ignore_errors=True)
