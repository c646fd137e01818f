"""The part of the report that follows the slider: samples, profiles, and whether to trust them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from reference_model.charts import number
from reference_model.report_charts import (
    EXACT,
    coefficient_chart,
    error_chart,
    percent,
    profile_chart,
)
from reference_model.report_images import sheet
from reference_model.sheets import REAL, SHEET_COLUMNS, Pixels
from reference_model.sweep_record import AGREEMENT, DirectCheck, Measurement, SweepRecord

if TYPE_CHECKING:
    from reference_model.report import Run

SIGMA = "σ<sub>rel</sub>"
SAMPLES_INTRODUCTION = """<section id="samples"><h2>The same noise at every EMA length</h2>
<p>Each place holds the same noise and the same class in both grids and at every length: what
changes while you drag is due to the weights alone. Watch specks in the background, broken strokes,
and digits that turn into others.</p></section>"""
DIFFERENCE_GAIN = 8
STRIP_IMAGES = 20


def explorer(run: Run, record: SweepRecord) -> str:
    """The slider and everything that it changes; the best length is selected at first."""
    averages = record.averages
    assert record.best is not None  # the page has this part only where something was measured
    index = averages.index(record.best)
    shortest, longest = averages[0].sigma_rel, averages[-1].sigma_rel
    control = f"""<div class="control"><label for="length"><span>EMA length</span>
<span class="value">{SIGMA} =
<output id="length-value" for="length">{record.best.sigma_rel:.4g}</output></span>
<output id="length-about" for="length"></output></label>
<input type="range" id="length" min="0" max="{len(averages) - 1}" step="1" value="{index}">
<div class="ends"><span aria-hidden="true">{shortest:g} · short</span>
<label class="toggle"><input type="checkbox" id="bright"> brighten dark pixels</label>
<span aria-hidden="true">long · {longest:g}</span></div></div>"""
    if len(averages) < 2:
        control = ""
    pictures = samples(run, record, index)
    parts = [
        SAMPLES_INTRODUCTION if pictures else "",
        control,
        pictures,
        profiles(record, index),
        trust(run, record, index),
    ]
    return f'<div class="explorer">{"".join(parts)}</div>'


def samples(run: Run, record: SweepRecord, index: int) -> str:
    """Images of the same noise from raw weights and from every average."""
    shown = [
        (i, m, run.sheets[m.point.label])
        for i, m in enumerate(record.averages)
        if m.point.label in run.sheets
    ]
    if not shown:
        return ""
    real_images = run.sheets.get(REAL)
    real = ""
    if real_images is not None:
        grid = sheet(real_images[:STRIP_IMAGES], SHEET_COLUMNS, alt="real images")
        real = (
            '<div class="strips"><figure><figcaption>Real images<small>held out, for comparison'
            f"</small></figcaption>{grid}</figure></div>"
        )
    classes = ""
    if record.shown[:SHEET_COLUMNS] == tuple(range(SHEET_COLUMNS)):
        names = "".join(f"<span>{c}</span>" for c in range(SHEET_COLUMNS))
        classes = f'<div class="classes" aria-hidden="true">{names}</div>'
    states = "".join(
        f'<div class="{_state(i, index)}" data-state="{i}">{_grid(record, m, images)}</div>'
        for i, m, images in shown
    )
    raw, raw_images = "", run.sheets.get(record.raw.point.label) if record.raw else None
    if raw_images is not None and record.raw is not None:
        grid = _grid(record, record.raw, raw_images)
        raw = f"<figure><h3>Raw weights</h3>{classes}{grid}</figure>"
    return f"""<div class="pair">{raw}
<figure class="average"><h3>Average of the length selected</h3>{classes}{states}</figure></div>
{real}"""


def _grid(record: SweepRecord, m: Measurement, images: Pixels) -> str:
    """Samples, outlined where the classifier reads another class than was asked for."""
    pairs = zip(record.shown, m.read_as[: len(images)], strict=False)
    wrong = [i for i, (asked, read) in enumerate(pairs) if asked != read]
    name = "raw weights" if m.sigma_rel is None else f"EMA length {m.sigma_rel:g}"
    grid = sheet(images, SHEET_COLUMNS, wrong, alt=f"{len(images)} samples, {name}")
    if AGREEMENT not in m.scores:
        return grid
    overall = percent(1 - m.mean(AGREEMENT)[0])
    return (
        f"{grid}<figcaption>Outlined: {len(wrong)} of {len(images)} that the classifier does not "
        f"read as the class asked for; {overall} of all images measured.</figcaption>"
    )


def profiles(record: SweepRecord, index: int) -> str:
    """What an average weights, which snapshots there are, and how they combine."""
    inputs = record.inputs_at(record.end)
    tracks = sorted({sigma_rel for _, sigma_rel in inputs})
    times = len({t for t, _ in inputs})
    keys = "".join(
        f"<li>{_key(_track_marks(k % 4))}snapshots of {SIGMA} {sigma_rel:g}</li>"
        for k, sigma_rel in enumerate(tracks)
    )
    kept = " and ".join(f"{s:g}" for s in tracks)
    return f"""<section id="profiles"><h2>What this average contains</h2>
<p>An average of power-function profile weights the training history as drawn: nothing of the start,
most of the end. The bar marks mean and standard deviation of that weighting, as fractions of
training; the standard deviation is {SIGMA}. Short averages still follow the noise of the last
steps; long ones remember weights that training has left behind.</p>
{_select(profile_chart(record), index)}
<p class="caption">Marks on the axis: the {times} times at which averages of length {kept} were
kept, {number(record.snapshot_bytes / 1e6, 2)} MB in all. Any other length is put together from
these, with the following coefficients.</p>
<ul class="legend">{keys}</ul>
{_select(coefficient_chart(record), index)}
<p class="caption">They sum to one; their scale follows the length selected. Lengths shorter than
those kept are extrapolated, with large coefficients of both signs, and are less exact.</p>
</section>"""


def _track_marks(style: int) -> str:
    return (
        f'<path class="line track{style}" d="M2 6H16"/>'
        f'<circle class="dot track{style}" cx="18" cy="6" r="4"/>'
    )


def trust(run: Run, record: SweepRecord, index: int) -> str:
    """Predicted error of reconstruction, beside the true one where it is known."""
    if not any(m.predicted_error for m in record.averages):
        return ""
    checked = [(m, m.direct) for m in record.averages if m.direct is not None]
    legend = ["true", "predicted", "paper", "raw"] if checked else ["predicted", "raw"]
    strips = "".join(_strips(run, m, i, index) for i, m in enumerate(record.averages))
    if strips:
        strips += (
            '<p class="caption">The same noise through both sets of weights. Differences are '
            f"amplified {DIFFERENCE_GAIN} times; black is equal.</p>"
        )
    return f"""<section id="trust"><h2>Is it the average that training would have kept?</h2>
<p>{_trust_words(checked)}</p>
<ul class="legend">{"".join(f"<li>{_key(KEYS[n][0])}{KEYS[n][1]}</li>" for n in legend)}</ul>
{_select(error_chart(record), index)}
<p class="caption">Both axes are logarithmic. At the lengths that were stored, the reconstruction is
the stored average, bit for bit. The dotted line gives the errors a scale: it is how far each
average is from the raw weights.</p>
{strips}</section>"""


def _trust_words(checked: list[tuple[Measurement, DirectCheck]]) -> str:
    words = (
        "Every reconstruction predicts its own error, from how far the weights moved between "
        "snapshots. "
    )
    if not checked:
        return words + (
            "This run kept no averages to compare with: train with "
            "<code>--direct-sigma-rel</code> to have the truth beside the prediction."
        )
    words += (
        "This run is small enough to have kept every length during training as well, which a large "
        "one cannot afford, so that the truth is known. "
    )
    inexact = [(m, d) for m, d in checked if d.error > EXACT and m.predicted_error]
    if inexact:
        ratios = [(m.predicted_error or 0.0) / d.error for m, d in inexact]
        gain = float(np.exp(np.mean([np.log(d.paper_error / d.error) for _, d in inexact])))
        words += (
            f"Predicted errors are {number(min(ratios), 2)} to {number(max(ratios), 2)} times the "
            f"true ones; the paper’s own solve is {number(gain, 2)} times less exact (geometric "
            "mean)."
        )
    return words


def _strips(run: Run, m: Measurement, i: int, index: int) -> str:
    """Samples from reconstructed and tracked weights, and their difference."""
    made = run.sheets.get(m.point.label)
    tracked = run.sheets.get(f"direct_{m.point.label}")
    if made is None or tracked is None or m.direct is None:
        return ""
    made, tracked = made[:STRIP_IMAGES], tracked[:STRIP_IMAGES]
    difference = np.abs(made.astype(np.int16) - tracked.astype(np.int16))
    amplified = np.minimum(difference * DIFFERENCE_GAIN, 255).astype(np.uint8)
    mean = f"mean {number(m.direct.pixel_difference, 2)} of 255 grey levels"
    rows = (
        (made, "Reconstructed afterwards", f"from snapshots, {SIGMA} {m.sigma_rel:g}"),
        (tracked, "Kept during training", "the truth"),
        (amplified, "Difference", mean),
    )
    figures = "".join(
        f"<figure><figcaption>{title}<small>{note}</small></figcaption>"
        f"{sheet(images, SHEET_COLUMNS, alt=title)}</figure>"
        for images, title, note in rows
    )
    strips = f'<div class="strips">{figures}</div>'
    return f'<div class="{_state(i, index)}" data-state="{i}">{strips}</div>'


KEYS = {
    "true": ('<circle class="dot ema" cx="12" cy="6" r="4.5"/>', "true error"),
    "predicted": (
        '<path class="line predicted" d="M0 6H24"/>'
        '<path class="dot predicted" d="M12 .5l5.5 5.5l-5.5 5.5l-5.5 -5.5Z"/>',
        "error that the reconstruction predicts of itself",
    ),
    "paper": (
        '<path class="line paper thin" d="M0 6H24"/><path class="dot paper" d="M12 1l5 8.7h-10Z"/>',
        "true error of the paper’s solve",
    ),
    "raw": ('<path class="line raw dotted" d="M0 6H24"/>', "distance from the raw weights"),
}


def _key(marks: str) -> str:
    """A legend's sample of a series."""
    return f'<span class="key"><svg viewBox="0 0 24 12" aria-hidden="true">{marks}</svg></span>'


def _state(i: int, selected: int) -> str:
    return "state on" if i == selected else "state"


def _select(markup: str, index: int) -> str:
    """Show one state before the page's script runs, or where it may not."""
    return markup.replace(
        f'class="state" data-state="{index}"', f'class="state on" data-state="{index}"'
    )
