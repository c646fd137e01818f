"""Exchanging and deleting files of a folder together, whenever a kill comes.

New files are prepared in a hidden folder. A journal then says what is to be done; until it is
there, nothing has happened, and from then on everything will.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from posthoc_ema.tensorfile import sync_directory, write_text_atomically

REWRITTEN = ".rewritten"
"""Hidden folder of files that shall take the place of others of their names."""

JOURNAL = ".rewritten.json"
"""What is to be done."""


def exchange(folder: Path, going: Sequence[str], new: Sequence[str]) -> None:
    """Delete files, and put those prepared in their places.

    Args:
        folder: Where.
        going: Names of files to delete.
        new: Names of files prepared in :data:`REWRITTEN`.
    """
    journal = folder / JOURNAL
    if new:
        write_text_atomically(journal, json.dumps({"delete": list(going), "replace": list(new)}))
    for name in new:
        source = folder / REWRITTEN / name
        if source.exists():  # else it was exchanged before a kill
            os.replace(source, folder / name)
    for name in going:
        (folder / name).unlink(missing_ok=True)
    sync_directory(folder)
    journal.unlink(missing_ok=True)
    shutil.rmtree(folder / REWRITTEN, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish an exchange that was killed, or forget what it had prepared."""
    journal = folder / JOURNAL
    if journal.exists():
        work = json.loads(journal.read_text(encoding="utf-8"))
        exchange(folder, work["delete"], work["replace"])
    elif (folder / REWRITTEN).exists():
        shutil.rmtree(folder / REWRITTEN, ignore_errors=True)
