"""Write the golden tables, all or those named: `PYTHONPATH=tests python -m precompute [NAME]...`.

A few minutes for all, most of it for `paper_accuracy`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from precompute.tables import TABLES

FOLDER = Path(__file__).parents[1] / "golden"

for name in sys.argv[1:] or TABLES:
    table = TABLES[name]()
    text = json.dumps(table, indent=None, separators=(", ", ": "))
    # A row per line: differences between two versions stay readable.
    text = text.replace("], [", "],\n[").replace('}, "', '},\n"')
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(f"wrote {name}.json ({len(text) // 1024} KiB)")
