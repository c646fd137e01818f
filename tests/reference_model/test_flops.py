"""Operation counts: the paper's figures at full size, a small network by hand, the command."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from reference_model.cli import main
from reference_model.configs import NetworkConfig
from reference_model.flops import LayerCost, count
from reference_model.presets import preset


def total(costs: list[LayerCost]) -> int:
    return sum(c.total for c in costs)


@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        ("edm2-img512-xs", 45.5),
        ("edm2-img512-s", 102.2),
        ("edm2-img512-m", 180.8),
        ("edm2-img512-l", 282.2),
        ("edm2-img512-xl", 405.9),
        ("edm2-img512-xxl", 552.1),
        ("edm2-img64-s", 101.9),
        ("edm2-img64-m", 180.8),
        ("edm2-img64-l", 282.1),
        ("edm2-img64-xl", 405.9),
    ],
)
def test_totals_match_the_paper(name: str, gflops: float) -> None:
    """Table 6; elementwise operations are counted by hand, hence not to the digit."""
    assert total(count(preset(name).network)) / 1e9 == pytest.approx(gflops, rel=0.005)


def test_multiplications_of_size_s_without_overhead() -> None:
    costs = count(preset("edm2-img512-s").network)
    assert round(sum(c.macs for c in costs) / 1e9, 1) == 100.8
    # The output gain and 36 gains of blocks are among the parameters.
    assert sum(c.parameters for c in costs) == 280_212_709


def test_weight_normalisation_costs_three_operations_a_weight() -> None:
    """0.9 Gflops lie between configs C and D, which differ by it."""
    costs = count(preset("edm2-img512-s").network)
    assert sum(c.weight_norm for c in costs) / 1e9 == pytest.approx(0.9, abs=0.06)


def test_largest_size_is_convolutions_above_all() -> None:
    costs = count(preset("edm2-img512-xxl").network)
    convs = sum(c.macs for c in costs if c.kind == "conv")
    assert convs / 1e9 == pytest.approx(545.5, rel=0.005)


SMALL = NetworkConfig(
    img_resolution=8, img_channels=2, model_channels=4, channel_mult=(1, 2), num_blocks=1
)


def test_layers_of_a_small_network_by_hand() -> None:
    costs = {c.name: c for c in count(SMALL)}
    stem = costs["enc.8x8_conv"]
    assert (stem.kind, stem.output, stem.parameters) == ("conv", (4, 8, 8), 4 * 3 * 9)
    assert stem.macs == 64 * 4 * 3 * 9
    # Defined on repeated pixels, although computed without repeating them.
    assert costs["dec.8x8_up.residual.conv0"].macs == 64 * 8 * 8 * 9
    assert costs["dec.4x4_in0.attention.products"].macs == 2 * 8 * 16**2
    assert costs["embedding.noise"].macs == 4 * 8
    assert costs["concatenations"].elementwise == 16 * (16 + 12) + 64 * (12 + 8)


def test_unconditional_network_lacks_the_label_layer() -> None:
    assert not any("label" in c.name for c in count(SMALL))


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["flops", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_command_prints_layers_and_totals() -> None:
    lines = run("--preset", "edm2-img512-s").splitlines()
    assert sum(line.startswith("enc.64x64_block0.residual.conv0 ") for line in lines) == 1
    assert lines[-1].startswith("101.9 Gflops for each image and evaluation (")


def test_command_prints_json_that_adds_up() -> None:
    told = json.loads(run("--preset", "digits", "--attn-resolutions", "8,4", "--json"))
    assert told["network"]["attn_resolutions"] == [8, 4]
    assert told["total"] == sum(layer["total"] for layer in told["layers"])
    assert told["total"] == told["macs"] + told["elementwise"] + told["weight_norm"]


def test_command_takes_a_network_of_ones_own() -> None:
    own = ["--img-resolution", "8", "--img-channels", "2", "--model-channels", "4"]
    told = json.loads(run(*own, "--channel-mult", "1,2", "--num-blocks", "1", "--json"))
    assert told["total"] == total(count(SMALL))


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give --preset, or both --img-resolution and --img-channels"),
        (["--img-resolution", "28", "--img-channels", "1"], 1, "cannot be halved 3 times"),
    ],
)
def test_misuse_is_told(arguments: list[str], status: int, message: str) -> None:
    assert message in run(*arguments, status=status)
