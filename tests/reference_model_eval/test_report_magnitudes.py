"""The report's section on magnitudes: drawn from the run's record, and true to it."""

from __future__ import annotations

import json
from pathlib import Path

from reference_model.magnitude_log import MAGNITUDES_FILE
from reference_model.report_magnitudes import conclusion, magnitudes

LAYER = {
    "activation": 1.0, "activation_max": 2.0, "weight": 1.0, "weight_max": 1.0, "update": 0.0,
    "relative_update": 0.0, "resolution": 8,
}  # fmt: skip


def write(run_dir: Path, *activations: float, weight: float = 1.0) -> None:
    """A record whose decoder has twice the activations of its encoder."""
    lines = []
    for place, value in enumerate(activations):
        layers = [
            LAYER | {"name": "unet.enc.8x8_conv", "activation": value},
            LAYER | {"name": "unet.dec.8x8_in0.skip", "activation": 2 * value},
            LAYER | {"name": "unet.out.conv", "activation": 900.0},
        ]
        for layer in layers:
            layer["weight"] = weight if place else 1.0
            layer["relative_update"] = 0.01 * place
        lines.append(json.dumps({"nimg": 32 * (place + 1), "lr": 0.1, "layers": layers}))
    (run_dir / MAGNITUDES_FILE).write_text("\n".join(lines) + "\n")


def test_charts_have_a_line_for_each_level(tmp_path: Path) -> None:
    write(tmp_path, 1.0, 1.5, 3.0)
    section = magnitudes(tmp_path)
    # Three charts, each drawn for two widths.
    assert section.count("<svg") == 6
    assert section.count('class="line ema thin"') == section.count('"line ema thin dashed"') == 6
    assert "8×8" in section


def test_conclusion_says_what_moved(tmp_path: Path) -> None:
    write(tmp_path, 1.0, 3.0)
    section = magnitudes(tmp_path)
    assert "Activations changed by factors of 3.00 to 3.00" in section
    assert "Stored weights stood still." in section
    write(tmp_path, 1.0, 1.0, weight=1.25)
    section = magnitudes(tmp_path)
    assert "Activations stood still." in section
    assert "Stored weights changed by factors of 1.25 to 1.25" in section


def test_no_record_no_section(tmp_path: Path) -> None:
    assert magnitudes(tmp_path) == ""
    write(tmp_path, 1.0)  # one line shows no drift
    assert magnitudes(tmp_path) == ""
    assert conclusion([(1, 0.1, []), (2, 0.1, [])]) == ""
