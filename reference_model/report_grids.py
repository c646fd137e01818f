"""Sections of the report about what was measured beyond one curve."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from reference_model.charts import number, plus_minus
from reference_model.held_out_loss import LOSS
from reference_model.points import Point, PointGuide, describe_guide
from reference_model.report_explorer import SIGMA
from reference_model.report_grid_charts import (
    curves_chart,
    guidance_table,
    measure_chart,
    sensitivity_chart,
)
from reference_model.report_images import sheet
from reference_model.sheets import SHEET_COLUMNS
from reference_model.sweep_record import (
    AGREEMENT,
    DISTANCE,
    Measurement,
    SweepRecord,
    clearly_worse,
    paired_difference,
)

if TYPE_CHECKING:
    from reference_model.report import Run


def grids(run: Run, record: SweepRecord) -> list[str]:
    """The sections for which the record holds something."""
    sections = [measures(record), times(record), guidance(run, record), sensitivity(record)]
    return [section for section in sections if section]


def measures(record: SweepRecord) -> str:
    """Curves of the other measures."""
    wanted = [
        name
        for name in record.measures
        if name not in (DISTANCE, AGREEMENT) and sum(name in m.scores for m in record.averages) > 1
    ]
    if not wanted:
        return ""
    charts = "".join(measure_chart(record.averages, record.raw, name) for name in wanted)
    return f"""<section id="measures"><h2>Other measures</h2>
<p>The same weights by other measures, with standard errors over the repeats. They need not agree on
one best length: each looks at something else.</p>
<div class="pair">{charts}</div></section>"""


def losses(record: SweepRecord) -> str:
    """The curve of the held-out loss, of a run whose images were not measured."""
    measured = [m for m in record.measurements if m.point.plain and LOSS in m.scores]
    end = max((m.point.t for m in measured if m.sigma_rel is not None), default=0.0)
    averages = [m for m in measured if m.point.t == end and m.sigma_rel is not None]
    if len(averages) < 2:
        return ""
    best = min(averages, key=lambda m: m.mean(LOSS)[0])
    return f"""<section id="loss"><h2>Held-out loss against EMA length</h2>
<p>The lowest, {plus_minus(*best.mean(LOSS))}, is that of {SIGMA} {best.sigma_rel:.4g}. It is the
denoising error on held-out images: no image was generated, and the length with the best images may
be another.</p>
<div class="pair">{measure_chart(averages, record.find(Point(None, end)), LOSS)}</div></section>"""


def times(record: SweepRecord) -> str:
    """Curves at several times in training."""
    curves = {_count(t): record.curve(t) for t in record.times if len(record.curve(t)) > 1}
    if len(curves) < 2:
        return ""
    rows = []
    for name, curve in curves.items():
        best = min(curve, key=lambda m: m.distance)
        equal = [m.sigma_rel or 0.0 for m in curve if not clearly_worse(m, best)]
        span = f"{equal[0]:.3g}" + (f" to {equal[-1]:.3g}" if len(equal) > 1 else "")
        distance = plus_minus(best.distance, best.error)
        rows.append(
            f"<tr><td>{name}</td><td>{best.sigma_rel:.3g}</td><td>{distance}</td><td>{span}</td></tr>"
        )
    titles = ("Images seen", f"Best {SIGMA}", "Distance", "Not clearly worse")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f"""<section id="times"><h2>The same question earlier in training</h2>
<p>{_drift(list(curves.values()))} All curves come from the snapshots of one training run: averages
as of any earlier time can be made as well, from the snapshots up to then.</p>
{curves_chart(curves, "Fréchet distance against EMA length at several times in training")}
<p class="caption">One line for each time, the latest the strongest; a diamond marks the best length
measured. Lengths are fractions of the training up to that time, so that an optimum that stays in
place grows longer in images.</p>
<div class="scroll"><table class="num"><tr>{head}</tr>{"".join(rows)}</table></div></section>"""


def _drift(curves: list[list[Measurement]]) -> str:
    first, last = (min(curve, key=lambda m: m.distance) for curve in (curves[0], curves[-1]))
    gain = first.distance / last.distance
    words = (
        f"From {_count(first.point.t)} to {_count(last.point.t)} images, the best distance went "
        f"from {plus_minus(first.distance, first.error)} to "
        f"{plus_minus(last.distance, last.error)}, {number(gain, 2)} times as "
        f"{'near' if gain > 1 else 'far'}."
    )
    # Each must be worse in the other's place, or the measurement does not tell them apart.
    moved = [
        next((m for m in curve if m.sigma_rel == other.sigma_rel), None)
        for curve, other in ((curves[0], last), (curves[-1], first))
    ]
    told_apart = all(
        m is not None and clearly_worse(m, best)
        for m, best in zip(moved, (first, last), strict=True)
    )
    if first.sigma_rel == last.sigma_rel:
        return words + f" The best length stayed at {last.sigma_rel:.3g}."
    verb = "moved" if told_apart else "did not move by more than the noise allows to say:"
    return words + f" The best length {verb} from {first.sigma_rel:.3g} to {last.sigma_rel:.3g}."


def guidance(run: Run, record: SweepRecord) -> str:
    """Strength × EMA length, one table for each guide."""
    if not record.guided:
        return ""
    unguided, best_guided = record.best, min(record.guided, key=lambda m: m.distance)
    tables: dict[str, dict[float, dict[float, Measurement]]] = {}
    for m in record.guided:
        guide = m.point.guide
        assert guide is not None  # of a guided measurement
        of_guide = tables.setdefault(_guide_name(m, guide), {})
        of_guide.setdefault(m.sigma_rel or 0.0, {})[guide.guidance] = m
    alone = {m.sigma_rel: m for m in record.averages}
    for rows in tables.values():
        for sigma_rel, row in rows.items():
            if sigma_rel in alone:
                row[1.0] = alone[sigma_rel]
    strengths = sorted({w for rows in tables.values() for row in rows.values() for w in row})
    best = min((m for rows in tables.values() for row in rows.values() for m in row.values()),
               key=lambda m: m.distance)  # fmt: skip
    parts = "".join(
        f"<h3>Guide: {_in_html(name)}</h3>"
        + guidance_table(dict(sorted(rows.items())), strengths, best)
        for name, rows in tables.items()
    )
    return f"""<section id="guidance"><h2>Guidance by another average</h2>
<p>A worse network shows which way to go: images are pushed away from what it would make, with
strength <i>w</i>; 1 is no guidance. {_guidance_words(unguided, best_guided)}</p>
{_guidance_lines(tables)}
{parts}
<p class="caption">Fréchet distance ± standard error; the darker the cell, the lower. Outlined: the
lowest of all. Rows are the EMA length of the network that is guided.</p>
{_guided_sheets(run, unguided, best_guided)}
<pre data-copy><code>{escape(command_for(run.run_dir, best_guided))}</code></pre></section>"""


def _guide_name(m: Measurement, guide: PointGuide) -> str:
    # A guide of the same length as what it guides has a table of its own, not one for each.
    same = guide.sigma_rel == m.sigma_rel
    words = describe_guide(guide, m.point.t)
    return words.replace(f"σ_rel {guide.sigma_rel:.4g}", "same σ_rel", 1) if same else words


def _in_html(words: str) -> str:
    """Words for people, with σ_rel set as everywhere on the page."""
    return escape(words).replace("σ_rel", SIGMA)


def _guidance_lines(tables: Mapping[str, Mapping[float, Mapping[float, Measurement]]]) -> str:
    """Curves against length, one for each strength, with the guide that serves each point best."""
    curves: dict[str, dict[float, Measurement]] = {}
    cells = ((w, s, m) for rows in tables.values() for s, row in rows.items()
             for w, m in row.items())  # fmt: skip
    for w, sigma_rel, m in sorted(cells, key=lambda cell: cell[:2]):
        curve = curves.setdefault(f"w {w:g}", {})
        if sigma_rel not in curve or m.distance < curve[sigma_rel].distance:
            curve[sigma_rel] = m
    listed = {name: list(curve.values()) for name, curve in curves.items() if len(curve) > 1}
    if not listed:
        return ""
    chart = curves_chart(listed, "Fréchet distance against EMA length, by strength of guidance")
    return (
        f"{chart}<p class='caption'>One line for each strength, the strongest darkest, with the "
        "guide that serves each point best.</p>"
    )


def _guidance_words(unguided: Measurement | None, guided: Measurement) -> str:
    words = f"The best guided average scores {plus_minus(guided.distance, guided.error)}"
    guide = guided.point.guide
    assert guide is not None  # of a guided measurement
    words += (
        f" ({SIGMA} {guided.sigma_rel:.3g}, w = {guide.guidance:g}, guide: "
        f"{_in_html(describe_guide(guide, guided.point.t))})"
    )
    if unguided is None:
        return f"{words}."
    gain, error = paired_difference(unguided, guided)
    text = f"the best without guidance {plus_minus(unguided.distance, unguided.error)}"
    if gain > 2 * error:
        return f"{words}, {text}: guidance is worth {100 * gain / unguided.distance:.0f} %."
    if gain < -2 * error:
        return f"{words}, {text}: here guidance costs more than it gives."
    return f"{words}, {text}: the measurement cannot tell them apart."


def _guided_sheets(run: Run, unguided: Measurement | None, guided: Measurement) -> str:
    """Samples of the best point with and without guidance, of the same noise."""
    figures = []
    for m, title in ((unguided, "Best without guidance"), (guided, "Best with guidance")):
        images = None if m is None else run.sheets.get(m.point.label)
        if m is None or images is None:
            return ""
        grid = sheet(images, SHEET_COLUMNS, alt=title)
        figures.append(f"<figure><h3>{title}</h3>{grid}</figure>")
    return f'<div class="pair">{"".join(figures)}</div>'


def sensitivity(record: SweepRecord) -> str:
    """What single groups of tensors of another length do."""
    found: dict[tuple[str, Point], dict[str, list[Measurement]]] = {}
    for m in record.measurements:
        if len(m.point.changed) == 1:
            for measure in (LOSS, DISTANCE):
                groups = found.setdefault((measure, replace(m.point, changed=())), {})
                if measure in m.scores:
                    groups.setdefault(m.point.changed[0][0], []).append(m)
    parts = []
    for (measure, point), groups in found.items():
        base = record.find(point)
        if groups and base is not None and measure in base.scores:
            parts.append(_sensitivity_part(base, groups, measure))
    if not parts:
        return ""
    return f"""<section id="sensitivity"><h2>Do all tensors want the same length?</h2>
<p>One group of tensors at a time is averaged over another length; all others keep theirs. Where
single changes gain much, a network’s parts train at different speeds; in the paper’s final
configuration none gains anything.</p>{"".join(parts)}</section>"""


def _sensitivity_part(
    base: Measurement, groups: Mapping[str, list[Measurement]], measure: str
) -> str:
    mean = base.mean(measure)[0]
    all_changes = [m for group in groups.values() for m in group]
    gains = []
    for m in all_changes:
        change, error = paired_difference(m, base, measure)
        if change < -2 * error:
            gains.append((change, m))
    words = (
        f"Of {len(all_changes)} changes, none lowers the {measure} by more than two standard "
        "errors."
    )
    if gains:
        change, m = min(gains, key=lambda gain: gain[0])
        pattern, length = m.point.changed[0]
        words = (
            f"{len(gains)} of {len(all_changes)} changes lower the {measure} by more than two "
            f"standard errors; the largest, <code>{escape(pattern)}</code> at {length:.3g}, by "
            f"{number(100 * -change / abs(mean), 2)} %. With so many comparisons, a few pass by "
            "chance."
        )
    lengths = sorted({m.point.changed[0][1] for m in all_changes})
    keys = "".join(
        f'<li><span class="key"><svg viewBox="0 0 24 12" aria-hidden="true"><path class="line '
        f'track{k % 4}" d="M0 6H24"/><circle class="dot track{k % 4}" cx="12" cy="6" r="4"/></svg>'
        f"</span>{SIGMA} {length:.3g} instead of {base.sigma_rel:.3g}</li>"
        for k, length in enumerate(lengths)
    )
    return f"""<p>{words}</p><ul class="legend">{keys}</ul>
{sensitivity_chart(base, groups, measure)}
<p class="caption">Change of the {measure} ({plus_minus(*base.mean(measure))} where all tensors have
length {base.sigma_rel:.3g}) with the standard error of that change, paired over the repeats.
Dots: shorter averages; diamonds: longer ones.</p>"""


def command_for(run_dir: Path, m: Measurement) -> str:
    """Command that makes images like those measured, of a point at the end of training."""
    where = shlex.quote(str(run_dir))
    words = [f"python -m reference_model generate --run-dir {where}"]
    words.append("--raw" if m.sigma_rel is None else f"--sigma-rel {m.sigma_rel!r}")
    guide = m.point.guide
    if guide is not None:
        words.append(f"--guidance {guide.guidance:g} --guidance-sigma-rel {guide.sigma_rel!r}")
        if guide.run_dir:
            words.append(f"--guidance-run-dir {shlex.quote(guide.run_dir)}")
        if guide.run_dir or guide.t != m.point.t:
            words.append(f"--guidance-t {guide.t:.0f}")
        if guide.interval is not None:
            words.append(f"--guidance-interval {guide.interval[0]:g},{guide.interval[1]:g}")
    words.append(f"--out {where}/best")
    return " ".join(words)


def _count(images: float) -> str:
    """Images seen, short: 512Ki for powers of two, else 500,000."""
    if images >= 1024 and images % 1024 == 0:
        return f"{images / 1024:,.0f}Ki"
    return f"{images:,.0f}"
