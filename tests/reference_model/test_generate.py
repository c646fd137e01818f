"""The command generate: guidance, what is kept and what is refused, parts, and interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from reference_model import averages
from reference_model import generate as module
from reference_model.averages import Weights, load_networks
from reference_model.cli import main
from reference_model.generate import ABOUT, generate
from reference_model.guidance import Guide

SIZE = ["--batch-size", "8", "--total-nimg", "48", "--snapshot-nimg", "16", "--quiet"]


def run(*arguments: str, status: int = 0, **env: str) -> str:
    result = CliRunner().invoke(main, list(arguments), env=env)
    if result.exit_code != status:
        raise AssertionError(f"exit status {result.exit_code}: {result.output}") from (
            result.exception
        )
    return result.output


def train(run_dir: Path, *options: str) -> Path:
    run("train", "--preset", "digits-tiny", "--run-dir", str(run_dir), *SIZE, *options)
    return run_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "main")


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "u", "--label-dim", "0", "--model-channels", "4")


@pytest.fixture
def base(trained: Path, tmp_path: Path) -> list[str]:
    base = ["generate", "--run-dir", str(trained), "--out", str(tmp_path), "--sigma-rel", "0.08"]
    return [*base, "--seeds", "0-4", "--class", "0-9", "--num-steps", "3", "--quiet"]


def pictures(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image).astype(int)
    return found


def times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.glob("seed*.png")}


def difference(a: dict[str, Any], b: dict[str, Any]) -> int:
    """Largest difference of two sets of pictures, in levels of 255."""
    assert a.keys() == b.keys()
    return max(int(abs(a[name] - b[name]).max()) for name in a)


def test_guidance_reconstructs_both_lengths_in_one_pass(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    original = averages.reconstruct

    def count(snapshots: Any, lengths: Any, **options: Any) -> Any:
        passes.append(list(lengths))
        return original(snapshots, lengths, **options)

    monkeypatch.setattr(averages, "reconstruct", count)
    run(*base, "--guidance", "2", "--guidance-sigma-rel", "0.25")
    assert passes == [[0.08, 0.25]]
    guided = pictures(tmp_path)
    run(*base, "--overwrite")
    assert difference(guided, pictures(tmp_path)) > 1


def test_guides_may_be_other_times_other_runs_and_several(
    base: list[str], unconditional: Path, tmp_path: Path
) -> None:
    options = ["--guidance", "2", "--guidance-t", "16"]
    more = f"guidance=1.5 run-dir={unconditional} sigma-rel=0.1 interval=0.1,10"
    run(*base, *options, "--guide", more)
    with Image.open(tmp_path / "seed000003.png") as image:
        assert image.text["class"] == "3"  # type: ignore[attr-defined]
        about = json.loads(image.text[ABOUT])  # type: ignore[attr-defined]
    assert about["seed"] == about["class"] == 3
    assert about["weights"]["sigma_rel"] == 0.08
    first, second = about["guides"]["1"], about["guides"]["2"]
    assert first["weights"] == {**about["weights"], "t": 16}
    assert (first["guidance"], first["interval"]) == (2, None)
    assert second["weights"]["run_id"] != about["weights"]["run_id"]
    assert (second["guidance"], second["interval"]) == (1.5, [0.1, 10])


def test_images_of_guidance_are_those_of_the_formula(
    trained: Path, unconditional: Path, tmp_path: Path
) -> None:
    """A guide of strength 1 changes nothing, and main and guide exchange roles at strength 0."""
    main_, guide = Weights(trained, 0.08), Weights(trained, 0.25)
    made: dict[str, Any] = {}
    for name, weights, guides in (
        ("plain", main_, []),
        ("one", main_, [Guide(guide, 1.0)]),
        ("zero", guide, [Guide(main_, 0.0)]),
    ):
        generate(trained, tmp_path / name, [0, 1], sigma_rel=weights.sigma_rel, guides=guides,
                 classes=[3], progress=False)  # fmt: skip
        made[name] = pictures(tmp_path / name)
    assert difference(made["plain"], made["one"]) == 0
    assert difference(made["plain"], made["zero"]) <= 1  # rounding of D + (0 − 1)(D − D_guide)


def test_what_is_there_is_kept_and_what_is_damaged_is_made_anew(
    base: list[str], tmp_path: Path
) -> None:
    assert run(*base) == f"Wrote {tmp_path / 'grid.png'}\n"
    before, then = pictures(tmp_path), times(tmp_path)
    (tmp_path / "seed000001.png").unlink()
    torn = tmp_path / "seed000003.png"
    torn.write_bytes(torn.read_bytes()[:-40])
    assert run(*base).endswith("grid.png (3 were there)\n")
    # Made in a batch of two instead of five: sums may differ in the last bit.
    assert difference(before, pictures(tmp_path)) <= 1
    now = times(tmp_path)
    kept = {name for name in then if then[name] == now[name]}
    assert kept == {f"seed{s:06d}.png" for s in (0, 2, 4)}


def test_more_seeds_may_follow(base: list[str], tmp_path: Path) -> None:
    run(*base)
    assert run(*base, "--seeds", "0-6").endswith("(5 were there)\n")
    assert len(times(tmp_path)) == 7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sigma-rel", "0.1"], "weights.sigma_rel 0.08, now 0.1"),
        (["--num-steps", "4"], "sampler.num_steps 3, now 4"),
        (["--sampler", "euler"], "sampler.sampler heun, now euler"),
        (["--S-churn", "5"], "sampler.S_churn None, now 5.0"),
        (["--class", "7"], "class 0, now 7"),
        (["--guidance", "2", "--guidance-sigma-rel", "0.2"], "guides.1 None, now"),
    ],
)
def test_images_of_other_options_are_not_mixed(
    base: list[str], tmp_path: Path, options: list[str], named: str
) -> None:
    run(*base)
    before = pictures(tmp_path)
    output = run(*base, *options, status=1)
    assert "seed000000.png was made with other options" in output
    assert named in output
    assert difference(before, pictures(tmp_path)) == 0
    run(*base, *options, "--overwrite")
    assert difference(before, pictures(tmp_path)) > 0


def test_options_that_change_no_image_are_not_compared(base: list[str], tmp_path: Path) -> None:
    run(*base)
    assert run(*base, "--batch-size", "2", "--S-noise", "1.1").endswith("(5 were there)\n")


def test_an_interruption_leaves_whole_images(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.image_batches

    def stops(*arguments: Any, **options: Any) -> Any:
        yield next(original(*arguments, **options))
        raise OSError("power failure")

    monkeypatch.setattr(module, "image_batches", stops)
    assert "power failure" in run(*base, "--batch-size", "2", status=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seed000000.png", "seed000001.png"]
    monkeypatch.undo()
    assert run(*base, "--batch-size", "2").endswith("(2 were there)\n")


def test_an_image_is_never_half_written(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: Any, file: Any, *arguments: Any, **options: Any) -> None:
        file.write(b"\x89PNG")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    assert "no space left" in run(*base, status=1)
    assert list(tmp_path.glob("*.png")) == []


def test_parts_make_the_whole_and_the_last_one_the_grid(
    base: list[str], trained: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*base, "--out", str(whole))
    assert run(*base, "--out", str(parts), "--part", "2/2") == f"Wrote 2 images to {parts}\n"
    assert sorted(times(parts)) == ["seed000001.png", "seed000003.png"]
    # What torchrun sets for the first of two processes.
    output = run(*base, "--out", str(parts), RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert output == f"Wrote {parts / 'grid.png'}\n"
    assert difference(pictures(whole), pictures(parts)) <= 1  # batches of other sizes
    assert not list(parts.glob("grid.part*"))


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--guidance", "2"], 2, "the guide is the network itself"),
        (["--guidance-sigma-rel", "0.2"], 2, "add --guidance, such as"),
        (["--guidance", "2", "--guidance-interval", "3"], 2, "'3' is not of the form LO,HI"),
        (["--guide", "guidance=2 length=0.2"], 2, "'length=0.2' is none of guidance=..., sigma-"),
        (["--guide", "sigma-rel=0.2"], 2, "does not say how strong: add guidance=..."),
        (["--part", "3/2"], 1, "part must be (i, n) with 1 <= i <= n (got (3, 2))"),
        (["--part", "2"], 2, "'2' is not of the form I/N"),
        (["--seeds", "1,1"], 1, "seeds must be at least one, each named once"),
        (["--class", "10"], 1, "classes must lie in 0..9"),
        (["--guidance", "2", "--guidance-t", "999"], 1, "999"),
        (["--guidance", "2", "--guidance-run-dir", "nowhere"], 1, "start a run with"),
    ],
)
def test_misuse_is_explained(
    base: list[str], options: list[str], status: int, message: str
) -> None:
    output = " ".join(run(*base, *options, status=status).split())
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"network": {"img_channels": 3}}, "has img_channels=3 and cannot guide one with img_ch"),
        ({"encoder": "latents"}, "has encoder=latents and cannot guide one with encoder=rgb"),
    ],
)
def test_a_guide_for_other_images_is_refused(
    base: list[str], tmp_path: Path, field: dict[str, Any], message: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((Path(base[2]) / "config.json").read_text())
    network = {**config["network"], **field.get("network", {})}
    config = {**config, **field, "network": network}
    (other / "config.json").write_text(json.dumps(config))
    output = run(*base, "--guidance", "2", "--guidance-run-dir", str(other), status=1)
    assert message in " ".join(output.split())


def test_raw_weights_of_two_runs_are_not_mixed(
    trained: Path, unconditional: Path, tmp_path: Path
) -> None:
    """Neither the time nor any option tells them apart."""
    options = ["--out", str(tmp_path), "--raw", "--seeds", "0", "--num-steps", "1", "--quiet"]
    run("generate", "--run-dir", str(trained), *options)
    output = run("generate", "--run-dir", str(unconditional), *options, status=1)
    assert "was made with other options (weights.run_id " in " ".join(output.split())


def test_raw_weights_have_no_other_time() -> None:
    with pytest.raises(ValueError, match="t must be None"):
        Weights(Path("run"), None, t=16)


def test_the_same_weights_are_loaded_for_each_request(trained: Path) -> None:
    wanted = [
        Weights(trained, s, t) for s, t in ((0.1, None), (None, None), (0.1, 16), (0.1, None))
    ]
    first, raw, early, again = (net.state_dict() for net in load_networks(wanted))
    name = next(iter(n for n in first if n.endswith("weight")))
    assert (first[name] == again[name]).all()
    assert (first[name] != raw[name]).any()
    assert (first[name] != early[name]).any()
