"""The report of a run: one self-contained HTML page, made from the run's files alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from reference_model import report_sections
from reference_model.charts import plus_minus
from reference_model.checkpoint import STATS_FILE, RunDirError, load_config, write_atomically
from reference_model.configs import TrainConfig
from reference_model.report_explorer import explorer
from reference_model.report_grids import grids, losses, sensitivity
from reference_model.report_magnitudes import magnitudes
from reference_model.sheets import REAL, SAMPLES, SHEET_COLUMNS, Pixels, read_sheet
from reference_model.sweep_record import SweepRecord, load_record

REPORT_FILE = "report.html"
MAX_PIXEL_BYTES = 6 << 20
"""Of all images on the page; as PNG in base64 they take about as much."""


@dataclass(frozen=True)
class Run:
    """Everything that the report is made of.

    Attributes:
        run_dir: Directory of the run.
        config: What it was started with.
        stats: Lines of its statistics.
        record: Its sweep, if there was one.
        sheets: Images by set of weights: `Point.label`, that with ``direct_`` before it, ``real``.
    """

    run_dir: Path
    config: TrainConfig
    stats: list[dict[str, Any]]
    record: SweepRecord | None
    sheets: Mapping[str, Pixels]


def load_run(run_dir: str | os.PathLike[str]) -> Run:
    """Read a run's files.

    Raises:
        RunDirError: If there is no run, or a file cannot be understood.
    """
    run_dir = Path(run_dir)
    config, record = load_config(run_dir), load_record(run_dir)
    stats_path = run_dir / STATS_FILE
    lines = stats_path.read_text().splitlines() if stats_path.exists() else []
    try:
        stats = [json.loads(line) for line in lines]
    except ValueError as error:
        raise RunDirError(f"{stats_path} has a line that is not JSON: {error}") from error
    sheets: dict[str, Pixels] = {}
    if record is not None:
        shown = [record.raw, *record.averages, record.best_of_all]
        names = [REAL, *dict.fromkeys(m.point.label for m in shown if m is not None)]
        for name in [*names, *(f"direct_{n}" for n in names)]:
            path = run_dir / SAMPLES / f"{name}.png"
            images = read_sheet(path, len(record.shown), SHEET_COLUMNS)
            if images is not None:
                sheets[name] = images
    return Run(run_dir, config, stats, record, _within_budget(sheets))


def _within_budget(sheets: dict[str, Pixels]) -> dict[str, Pixels]:
    """As many whole rows of each sheet as a page may hold, one at least."""
    rows = -(-max((len(images) for images in sheets.values()), default=0) // SHEET_COLUMNS)
    size = sum(images.nbytes for images in sheets.values())
    while rows > 1 and size > MAX_PIXEL_BYTES:
        rows -= 1
        sheets = {name: images[: rows * SHEET_COLUMNS] for name, images in sheets.items()}
        size = sum(images.nbytes for images in sheets.values())
    return sheets


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run's directory.

    Args:
        run_dir: Directory of a run; what it holds so far decides what the page shows.

    Returns:
        Path of the page. It asks for nothing from elsewhere: one file to keep or send.

    Raises:
        RunDirError: If there is no run.
    """
    run = load_run(run_dir)
    path = run.run_dir / REPORT_FILE
    page = render(run).encode()
    write_atomically(path, lambda file: file.write(page))
    return path


def render(run: Run) -> str:
    """The page's HTML."""
    sections = [report_sections.header(run)]
    states: list[dict[str, Any]] = []
    if run.record is not None and run.record.best is not None:
        record = run.record
        sections.append(report_sections.quality(run, record))
        sections += grids(run, record)
        sections.append(explorer(run, record))
        states = [
            {
                "sigma": float(f"{m.sigma_rel:.4g}"),
                "about": f"distance {plus_minus(m.distance, m.error)}"
                + (" · the best" if m is record.best else ""),
            }
            for m in record.averages
        ]
    elif run.record is not None:
        sections += [losses(run.record), sensitivity(run.record)]
    sections += [report_sections.training(run), magnitudes(run.run_dir)]
    sections.append(report_sections.facts(run))
    sections.append(report_sections.what_next(run))

    return page(
        f"{run.run_dir.name} · EMA length", "\n".join(sections), report_sections.footer(run), states
    )


def page(title: str, body: str, footer: str, states: Sequence[Mapping[str, Any]] = ()) -> str:
    """Put sections into the page that all reports share.

    Args:
        title: Of the window, as plain text.
        body: HTML of the sections.
        footer: HTML below them.
        states: What the slider of an explorer chooses from.
    """
    template = resources.files("reference_model").joinpath("report_template.html").read_text()
    parts = {
        "title": escape(title),
        "body": body,
        "footer": footer,
        # "</script>" inside the data would end the script element that holds it.
        "data": json.dumps(list(states)).replace("</", "<\\/"),
    }
    for name, text in parts.items():
        template = template.replace("{{" + name + "}}", text)
    return template
