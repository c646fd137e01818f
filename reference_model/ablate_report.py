"""The report of an ablation: one self-contained page, and the same numbers as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from reference_model.ablate import AblationPlan
from reference_model.ablate_charts import activation_chart, quality_chart, weight_chart
from reference_model.ablate_checks import Check, checks
from reference_model.ablate_pool import Failure
from reference_model.ablate_results import NEAR_BEST, Outcome, gather
from reference_model.charts import number, plus_minus
from reference_model.checkpoint import write_atomically
from reference_model.machine import describe_machine
from reference_model.report import page

REPORT_FILE = "ablate.html"
RESULTS_FILE = "ablate.json"
SIGMA = "σ<sub>rel</sub>"


def write_ablation(
    plan: AblationPlan, out: str | os.PathLike[str], failures: Sequence[Failure] = ()
) -> dict[str, Any]:
    """Write `ablate.html` and `ablate.json` from the finished runs of a plan.

    Args:
        plan: What was asked for.
        out: Directory of the ablation.
        failures: Runs that failed.

    Returns:
        What `ablate.json` holds: "plan", "variants" (`Outcome.to_dict`), "checks", "failures" and
        "machine".

    Raises:
        RunDirError: If the runs cannot be compared.
    """
    out = Path(out)
    outcomes = gather(plan, out)
    found = checks(outcomes)
    results = {
        "plan": plan.to_dict(),
        "variants": [o.to_dict(plan.fixed_sigma_rel) for o in outcomes],
        "checks": [asdict(check) for check in found],
        "failures": [{**asdict(f), "log": str(f.log)} for f in failures],
        "machine": describe_machine(),
    }
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    html = render(plan, outcomes, found, failures)
    write_atomically(out / RESULTS_FILE, lambda file: file.write(text.encode()))
    write_atomically(out / REPORT_FILE, lambda file: file.write(html.encode()))
    written: dict[str, Any] = json.loads(text)
    return written


def render(
    plan: AblationPlan,
    outcomes: Sequence[Outcome],
    found: Sequence[Check],
    failures: Sequence[Failure] = (),
) -> str:
    """HTML of the page."""
    sections = [_header(plan, outcomes, failures)]
    if outcomes:
        sections += [_quality(plan, outcomes), _magnitudes(outcomes), _expectations(found)]
    sections.append(_facts(plan))
    footer = (
        "Made by <code>python -m reference_model ablate</code> from the files of its runs. Method: "
        "Karras et al. 2024, “Analyzing and Improving the Training Dynamics of Diffusion Models”, "
        "arXiv 2312.02696, Table 1."
    )
    return page(f"{plan.preset} · ablation", "\n".join(sections), footer)


def error_bars(outcomes: Sequence[Outcome]) -> str:
    """What an error bar is, in words."""
    counts = {len(o.seeds) for o in outcomes}
    if counts == {1}:
        return (
            "standard errors over repeats of generation: each variant was trained with one seed, "
            "and how much another seed would change is not known"
        )
    if 1 in counts:
        return "standard errors over seeds; over repeats of generation where there is one seed"
    return "standard errors over seeds"


def _header(plan: AblationPlan, outcomes: Sequence[Outcome], failures: Sequence[Failure]) -> str:
    eyebrow = f'<p class="eyebrow">Ablation · {escape(plan.preset)}</p>'
    notices = "".join(f'<p class="notice">{escape(str(f))}</p>' for f in failures)
    missing = [v.name for v in plan.variants if v.name not in {o.name for o in outcomes}]
    if missing:
        notices += f'<p class="notice">Without a finished run: {", ".join(missing)}.</p>'
    if not outcomes:
        return f"<header>{eyebrow}<h1>No run has finished</h1>{notices}</header>"
    best = min(outcomes, key=lambda o: o.best.mean)
    return f"""<header>{eyebrow}
<h1>{len(outcomes)} variants, each at its own best EMA length</h1>
<p class="lede">All saw {plan.total_nimg:,} images of the same data in training, with the same
seeds, and were measured with the same noise and the same classifier. Lowest distance to real
images:
<strong>{best.name}</strong> ({escape(best.variant.about)}),
{plus_minus(best.best.mean, best.best.error)} at {SIGMA} {best.best_sigma_rel:g}.</p>
{notices}</header>"""


def _quality(plan: AblationPlan, outcomes: Sequence[Outcome]) -> str:
    fixed = plan.fixed_sigma_rel
    head = ("Variant", "Parameters", f"Best {SIGMA}", "Distance there",
            f"Lengths within {100 * (NEAR_BEST - 1):.0f} %", f"Distance at {fixed:g}",
            "Its cost", "Worst length costs", "Raw weights")  # fmt: skip
    rows = [_row(o, fixed) for o in outcomes]
    edge = (
        "<p>* The best length is the shortest or longest that was measured: give more by "
        "<code>--sigma-rel</code>.</p>"
        if any(o.best_at_edge for o in outcomes)
        else ""
    )
    seeds = "".join(
        f"<li>{o.name}: {', '.join(f'{s:g}' for s in o.best_by_seed)}</li>"
        for o in outcomes
        if len(set(o.best_by_seed)) > 1
    )
    differ = (
        f"<details><summary>Seeds that disagree about the best length</summary><ul>{seeds}</ul>"
        "</details>"
        if seeds
        else ""
    )
    return f"""<section id="quality"><h2>Quality, and what the wrong EMA length costs</h2>
{quality_chart(outcomes, fixed)}
<p class="caption">Dots mark the best length of each variant, the dotted line {SIGMA} {fixed:g}.
Error bars, here of the best alone, are {error_bars(outcomes)}.</p>
{_table(head, rows)}{edge}{differ}
<p class="caption">Comparing variants at one fixed length confounds what a change does to the
network with what it does to the best length; the paper compares each at its own best.</p>
</section>"""


def _row(o: Outcome, fixed: float) -> tuple[str, ...]:
    low, high = o.good_lengths
    raw = sum(o.raw) / len(o.raw)
    return (
        f"{o.name} <small>{escape(o.variant.about)}</small>",
        f"{o.parameters:,}",
        f"{o.best_sigma_rel:g}" + ("*" if o.best_at_edge else ""),
        plus_minus(o.best.mean, o.best.error),
        f"{low:g}" if low == high else f"{low:g} to {high:g}",
        plus_minus(o.at(fixed).mean, o.at(fixed).error),
        f"{number(o.cost(fixed))}\u00a0×",
        f"{number(o.cost(o.worst_sigma_rel))} × at {o.worst_sigma_rel:g}",
        number(raw),
    )


def _magnitudes(outcomes: Sequence[Outcome]) -> str:
    recorded = [o for o in outcomes if len(o.drift.nimg) > 1]
    if not recorded:
        return ""
    head = ("Variant", "Activations at the start", "at the end", "Stored weights at the start",
            "at the end", "by the law")  # fmt: skip
    rows = [
        (
            o.name,
            number(o.drift.activation[0]),
            number(o.drift.activation[-1]),
            number(o.drift.weight[0]),
            number(o.drift.weight[-1]),
            number(o.drift.law[-1] * o.drift.weight[0]) if o.drift.law else "",
        )
        for o in recorded
    ]
    return f"""<section id="magnitudes"><h2>Magnitudes over training</h2>
<h3>Activations</h3>{activation_chart(outcomes)}
<h3>Stored weights</h3>{weight_chart(outcomes)}
{_table(head, rows)}
<p class="caption">Means over the levels of the network, of the network in training. The start is
the first step, before any update. Dotted: √(1 + Σα²), what stored weights follow where they are
normalised at use and nothing else holds them.</p></section>"""


def _expectations(found: Sequence[Check]) -> str:
    if not found:
        return ""
    rows = [
        (escape(c.statement), c.expected, c.seen, "yes" if c.holds else "<strong>no</strong>")
        for c in found
    ]
    return f"""<section id="theory"><h2>What theory expects, and what was seen</h2>
{_table(("", "expected", "seen", "as expected"), rows)}
<p class="caption">A short training of a small network may well differ: the paper’s drift of A to C
took millions of images at their low learning rates.</p></section>"""


def _facts(plan: AblationPlan) -> str:
    p = plan.protocol
    rows = {
        "Preset": plan.preset + (f", on {plan.data}" if plan.data else ""),
        "Training": f"{plan.total_nimg:,} images, seeds {', '.join(map(str, plan.seeds))}",
        "Measured with": f"{p.repeats} × {p.images:,} images, {p.num_steps} solver steps, "
        f"{p.features}, against {p.reference} images",
        "EMA lengths": ", ".join(f"{s:g}" for s in plan.lengths),
    }
    items = "".join(f"<tr><th>{k}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return (
        f'<section id="facts"><h2>Settings</h2><table class="facts">{items}</table>'
        "<p>Every run is an ordinary one, in a folder of its name beside this page: "
        "<code>python -m reference_model report</code> shows it alone.</p></section>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_together(cell)}</td>' for cell in row)}</tr>"
                   for row in rows)  # fmt: skip
    return f'<div class="scroll"><table class="num"><tr>{top}</tr>{body}</table></div>'


def _together(cell: str) -> str:
    """Keep numbers together with what belongs to them, on one line."""
    return cell.replace(" ± ", "\u00a0±\u00a0").replace(" × at ", "\u00a0× at\u00a0")
