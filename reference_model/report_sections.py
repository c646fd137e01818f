"""The report's sections around the explorer: each says what one sees and what follows from it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from reference_model.charts import number, plus_minus
from reference_model.metrics import mean_and_error
from reference_model.report_charts import FAR, loss_chart, percent, quality_chart
from reference_model.report_explorer import SIGMA
from reference_model.report_grids import command_for
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


def header(run: Run) -> str:
    """Headline, summary and key figures."""
    net, record = run.config.network, run.record
    where = escape(f"{run.run_dir.name} · {run.config.data} · config {net.config}")
    eyebrow = f'<p class="eyebrow">Run report · {where}</p>'
    if record is None or record.best is None:
        command = escape(f"python -m reference_model sweep --run-dir {run.run_dir}")
        return f"""<header>{eyebrow}
<h1>A training run whose EMA length is still to be chosen</h1>
<p class="lede">Its snapshots allow any length. Measure some, and this page shows which is best:</p>
<pre><code>{command}</code></pre></header>"""

    best, raw = record.best, record.raw
    worst = max(record.averages, key=lambda m: m.distance)
    figures = [
        ("Best EMA length", f"{best.sigma_rel:.4g}", f"of training time ({SIGMA})"),
        (
            "Distance to real images",
            number(best.distance),
            f'<span class="rawtext">raw weights {number(raw.distance)}</span>' if raw else "",
        ),
        (
            "A wrong length costs up to",
            f"{number(worst.distance / best.distance, 2)} ×",
            f"the distance, at {SIGMA} {worst.sigma_rel:.4g}",
        ),
        _error_figure(record),
    ]
    items = "".join(
        f"<div><dt>{title}</dt><dd>{value}<small>{note}</small></dd></div>"
        for title, value, note in figures
    )
    steps = run.config.total_nimg // run.config.batch_size
    times = len({t for t, _ in record.inputs_at(record.end)})
    made = len(record.averages)
    seconds, count = record.reconstruct_seconds
    together = f", in one pass of {number(seconds, 2)} s" if count == made else ""
    return f"""<header>{eyebrow}
<h1>{headline(record)}</h1>
<p class="lede">One training run of {steps:,} steps kept snapshots at {times} times. Averages of
{made} different lengths were made from them afterwards{together}, without training again, and each
was measured. This page shows what the length is worth, and how far averages made afterwards can be
trusted.</p>
<dl class="figures">{items}</dl></header>"""


def headline(record: SweepRecord) -> str:
    """The main finding in one sentence, and not more than the measurements carry."""
    best, raw = record.best, record.raw
    assert best is not None  # asked for only where something was measured
    if raw is None:
        return f"The best average of this run’s weights has length {best.sigma_rel:.4g}"
    gain, error = paired_difference(raw, best)
    if gain > 2 * error:
        ratio = number(raw.distance / best.distance, 2)
        return (
            f"The best average of this run’s weights makes images {ratio} times closer to real "
            "ones than the raw weights do. Its length was chosen after training."
        )
    if gain < -2 * error:
        return "On this run, raw weights beat every average measured"
    return "On this run, averaging changes less than the measurement can resolve"


def quality(run: Run, record: SweepRecord) -> str:
    """Curve of quality against EMA length, with what it says."""
    best, averages = record.best, record.averages
    assert best is not None  # as above
    edge = ""
    if len(averages) > 2 and best in (averages[0], averages[-1]):
        which = "shortest" if best is averages[0] else "longest"
        edge = (
            f'<p class="notice">The best length is the {which} one measured: a better one may lie '
            "beyond. Measure more with <code>sweep --sigma-rel</code>.</p>"
        )
    real = ""
    if record.real:
        drawn = "dotted" if min(record.real) > best.distance / FAR else "below the figure"
        real = (
            "Zero is out of reach: as many real training images, compared with the same held-out "
            f"ones, score {number(mean_and_error(record.real)[0])} ({drawn}), because both sets "
            "are finite. "
        )
    protocol, judge = record.settings["protocol"], record.settings["judge"]
    return f"""<section id="quality"><h2>Quality against EMA length</h2>
<p>{" ".join(conclusions(record))}</p>{edge}
{quality_chart(record)}
<p class="caption">Dots: mean of {protocol["repeats"]} repeats of {protocol["images"]:,} images,
with its standard error; thin lines: the single repeats. In each repeat all lengths start from the
same noise, so that thin lines move together: what separates them is chance in the noise, the shape
they share is not. {real}Distances are Fréchet distances between generated and
{judge["reference_images"]:,} real images, in {judge["features"]} features of the
{escape(judge["network"])}. The thick part of the axis holds the lengths that cannot be told apart
from the best. This is one training run; another would move the curve. Select a dot to see its
images below.</p>
<details><summary>All numbers</summary><div class="scroll">{_table(record)}</div></details>
</section>"""


def conclusions(record: SweepRecord) -> list[str]:
    """What the curve says, as sentences; differences within the noise are not called any."""
    best, raw, averages = record.best, record.raw, record.averages
    assert best is not None  # as above
    against = f"; the raw weights at the end of training {_score(raw)}" if raw else ""
    score = f"<strong>{_score(best)}</strong>"
    sentences = [f"The best average, {SIGMA} {best.sigma_rel:.4g}, scores {score}{against}."]
    for end, word in ((averages[0], "short"), (averages[-1], "long")):
        if clearly_worse(end, best):
            cost = f"{100 * (end.distance / best.distance - 1):.0f} %"
            worse = ", worse than no average at all" if raw and clearly_worse(end, raw) else ""
            sentences.append(f"Too {word} an average, {end.sigma_rel:.4g}, costs {cost}{worse}.")
    equal = [m for m in averages if not clearly_worse(m, best)]
    if len(equal) > 1:
        sentences.append(
            f"Lengths from {equal[0].sigma_rel:.4g} to {equal[-1].sigma_rel:.4g} cannot be told "
            "apart from the best by this measurement."
        )
    return sentences


def training(run: Run) -> str:
    """Loss over training."""
    if len(run.stats) < 2:
        return ""
    last = run.stats[-1]
    bad = sum(line.get("bad_gradients", 0) for line in run.stats)
    steps = run.config.stats_nimg // run.config.batch_size
    return f"""<section id="training"><h2>Training</h2>
{loss_chart(run.stats)}
<p class="caption">Each point is a mean over {steps} steps; the largest values, at the start, are
cut off. Noise levels are weighted by the network’s own uncertainty, so the loss can be negative.
After {last["nimg"]:,} images the learning rate was {number(last["lr"], 2)};
{f"{bad:,}" if bad else "no"} gradient values were NaN or infinite.</p></section>"""


def facts(run: Run) -> str:
    """What was run, on what, for how long."""
    config, net, record = run.config, run.config.network, run.record
    size = f"{net.img_resolution}×{net.img_resolution}×{net.img_channels}"
    tracks = ", ".join(f"{s:g}" for s in config.ema_sigma_rel)
    rows = {
        "Network": f"config {net.config}, {_count_parameters(run):,} parameters, images of {size}",
        "Training": f"{config.total_nimg:,} images in batches of {config.batch_size}, "
        f"learning rate {config.ref_lr:g}, seed {config.seed}",
        "Averages kept": f"σ_rel {tracks}, every {config.snapshot_nimg:,} images",
    }
    if run.stats:
        rows["Training took"] = _duration(run.stats[-1]["seconds"])
    if record is not None and record.imaged:
        protocol, judge = record.settings["protocol"], record.settings["judge"]
        seconds = sum(m.seconds for m in record.imaged)
        rows["Measuring took"] = (
            f"{_duration(seconds)} for {len(record.imaged)} sets of weights with "
            f"{protocol['images'] * protocol['repeats']:,} images each, of "
            f"{2 * protocol['num_steps'] - 1} network evaluations"
        )
        rows["Feature network"] = f"{judge['network']}, {judge['features']} features" + (
            f"; trained on {judge['train_images']:,} images, {100 * judge['accuracy']:.1f} % of "
            f"the {judge['held_out_images']:,} held-out ones right"
            if judge["accuracy"] is not None
            else ""
        )
    if record is not None:
        machine = record.machine
        rows["Machine"] = (
            f"{machine.get('processor')}, {machine.get('platform')}; CPU threads: "
            f"{machine.get('threads')}"
        )
        names = ("posthoc-ema", "torch", "numpy", "python")
        rows["Versions"] = ", ".join(f"{n} {machine[n]}" for n in names if n in machine)
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{escape(value).replace("σ_rel", SIGMA)}</td></tr>'
        for name, value in rows.items()
    )
    return (
        '<section id="facts"><h2>Facts</h2><div class="scroll">'
        f'<table class="facts">{body}</table></div></section>'
    )


def what_next(run: Run) -> str:
    """Commands that continue from here, and the same in one's own loop."""
    record, where = run.record, escape(str(run.run_dir))
    best = "0.1"
    generate = f"python -m reference_model generate --run-dir {run.run_dir} --sigma-rel 0.1 "
    generate += f"--out {run.run_dir}/samples"
    if record is not None and record.best is not None and record.best_of_all is not None:
        best = f"{record.best.sigma_rel!r}"
        generate = command_for(run.run_dir, record.best_of_all)
    return f"""<section id="next"><h2>What to type next</h2>
<p>With this run:</p>
<pre data-copy><code><span class="c"># more samples from the best that was measured</span>
{escape(generate)}

<span class="c"># other lengths; what is measured already is kept</span>
python -m reference_model sweep --run-dir {where} --sigma-rel 0.06,0.07,...,0.14

<span class="c"># at earlier times; with guidance by another average; of single tensors</span>
python -m reference_model sweep --run-dir {where} --times 4
python -m reference_model sweep --run-dir {where} --sigma-rel {best} \\
  --guidance 1,1.5,2 --guidance-sigma-rel 0.25
python -m reference_model sweep --run-dir {where} --sensitivity

<span class="c"># what the snapshots allow, and how exactly: for snapshots of any model</span>
posthoc-ema list {where}/ema
posthoc-ema error {where}/ema --sigma-rel 0.01,0.02,...,0.25

<span class="c"># weights of any length as a plain safetensors file</span>
posthoc-ema reconstruct {where}/ema --sigma-rel {best} --out {where}/best.safetensors</code></pre>
<p>In a training loop of your own, with a PyTorch, JAX or numpy model:</p>
<pre data-copy><code>from posthoc_ema import EMA, reconstruct

ema = EMA(sigma_rel=(0.05, 0.10), snapshots="run/ema", every=1000)
for batch in loader:
    loss = model(batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ema.update(model)

<span class="c"># any time later, in another process, without the training code</span>
weights = reconstruct("run/ema", sigma_rel={best})
model.load_state_dict(weights.state_dict())
print(weights.predicted_error)</code></pre></section>"""


def footer(run: Run) -> str:
    """How to make the page again, and where the method comes from."""
    command = escape(f"python -m reference_model report --run-dir {run.run_dir}")
    return (
        f"Made by <code>{command}</code> from the run’s files. Method: Karras et al. 2024, "
        "“Analyzing and Improving the Training Dynamics of Diffusion Models”, arXiv 2312.02696."
    )


def _error_figure(record: SweepRecord) -> tuple[str, str, str]:
    title = "Error of reconstruction"
    true = [m.direct.error for m in record.averages if m.direct is not None]
    predicted = [m.predicted_error for m in record.averages if m.predicted_error is not None]
    note = f"predicted: at most {percent(max(predicted))}" if predicted else "not predicted"
    if true:
        return title, f"≤ {percent(max(true))}", f"of the weights; {note}"
    if predicted:
        return title, f"≤ {percent(max(predicted))}", "of the weights, as predicted"
    return "Snapshots used", str(len(record.inputs_at(record.end))), "to make each average"


def _table(record: SweepRecord) -> str:
    more = [name for name in record.measures if name not in (DISTANCE, AGREEMENT)]
    titles: tuple[str, ...] = (
        "Weights",
        "Distance",
        "± std. error",
        "Read as asked",
        "Predicted",
        "True error",
    )
    titles += tuple(escape(name.capitalize()) for name in more)
    rows = []
    for m in [*([record.raw] if record.raw else []), *record.averages]:
        cells = (
            "raw" if m.sigma_rel is None else f"{SIGMA} {m.sigma_rel:.4g}",
            number(m.distance),
            number(m.error, 2),
            f"{100 * m.mean(AGREEMENT)[0]:.1f} %" if AGREEMENT in m.scores else "–",
            percent(m.predicted_error) if m.predicted_error is not None else "–",
            percent(m.direct.error) if m.direct else "–",
            *(plus_minus(*m.mean(name)) for name in more),
        )
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return f'<table class="num"><tr>{head}</tr>{"".join(rows)}</table>'


def _score(m: Measurement) -> str:
    return plus_minus(m.distance, m.error)


def _count_parameters(run: Run) -> int:
    import torch

    from reference_model.precond import Denoiser

    with torch.device("meta"):
        return Denoiser(run.config.network).num_parameters()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
