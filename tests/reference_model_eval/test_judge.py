"""The judge: other feature networks, unequal classes, references, and early refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference_model.configs import TrainConfig
from reference_model.data import Dataset, load_dataset
from reference_model.demo import QUICK
from reference_model.encoders import PIXELS
from reference_model.feature_set import FeatureSet
from reference_model.generate import generate
from reference_model.held_out_loss import LEVELS, LOSS, loss_at_levels
from reference_model.judge import Judge
from reference_model.metrics import frechet_distance
from reference_model.pictures import Pictures
from reference_model.precision_recall import precision_recall
from reference_model.precond import build_model
from reference_model.presets import preset
from reference_model.protocol import Protocol
from reference_model.reference_images import class_cycle, draw_images

# torch deprecates TorchScript, which is the form in which people have Inception's weights.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

FEW = Protocol(images=40, repeats=2, num_steps=1, batch_size=40)


class Corners(nn.Module):
    """Four features: means of the quarters of an image."""

    def forward(self, images: Tensor) -> Tensor:
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2)
        return quarters.mean(dim=1).flatten(1)


@pytest.fixture(scope="module")
def corners(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "corners.pt"
    torch.jit.save(torch.jit.script(Corners()), str(path))
    return f"torchscript:{path}"


def config_for(data: object, label_dim: int = 0, **values: Any) -> TrainConfig:
    base = preset("digits-tiny")
    network = replace(base.network, label_dim=label_dim)
    return replace(base, data=str(data), network=network, **values)


def tiny_network(label_dim: int = 0) -> Any:
    torch.manual_seed(0)
    return build_model(
        img_resolution=8, img_channels=1, label_dim=label_dim, model_channels=16,
        channel_mult=(1,), attn_resolutions=(),
    )  # fmt: skip


def pictures(folder: Path, classes: int = 0, count: int = 80) -> Path:
    """8×8 images in an NPZ file; classes are unequal, and each is brighter than the one before."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 100, (count, 1, 8, 8))
    arrays = {}
    if classes:
        arrays["labels"] = labels = np.sort(rng.geometric(0.5, count) - 1).clip(0, classes - 1)
        images = images + 40 * labels.reshape(-1, 1, 1, 1)
    np.savez(folder / "set.npz", images=images.astype(np.uint8), **arrays)
    return folder / "set.npz"


def test_images_without_classes_are_measured_by_another_network(tmp_path: Path, corners: str):
    config = config_for(pictures(tmp_path))
    judge = Judge(config, replace(FEW, features=corners), tmp_path, progress=False)
    described = judge.describe()
    assert (described["network"], described["features"]) == ("torchscript", 4)
    assert described["accuracy"] is None
    assert not list(tmp_path.glob("classifier-*"))
    seen = []
    score = judge.score(tiny_network(), lambda images, read_as: seen.append((images, read_as)))
    assert [len(images) for images, _ in seen] == [40, 40]
    assert all(len(read_as) == 0 for _, read_as in seen)
    assert score.agreement == ()
    real = load_dataset(config.data, "held_out").read()
    sets = []
    for images in (real, seen[1][0]):
        sets.append(FeatureSet(4, "torchscript", judge.digest))
        sets[-1].update(Corners()(images).double().numpy())
    # Float32 sums inside and outside of TorchScript may differ by their last bits.
    expected = frechet_distance(sets[1].statistics, sets[0].statistics)
    assert score.distances[1] == pytest.approx(expected, rel=1e-5)
    both = precision_recall(sets[0].sample, sets[1].sample)
    assert (score.more["precision"][1], score.more["recall"][1]) == both
    assert set(score.more) == {"precision", "recall"}
    assert max(judge.score_real().distances) < min(score.distances)
    assert judge.real_images(judge.classes[:30].tolist()).shape == (30, 1, 8, 8)


def test_the_features_of_real_images_are_computed_once(
    tmp_path: Path, corners: str, monkeypatch: pytest.MonkeyPatch
):
    config, protocol = config_for(pictures(tmp_path)), replace(FEW, features=corners)
    first = Judge(config, protocol, tmp_path, progress=False)
    (cached,) = tmp_path.glob("reference-*.npz")

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("described again")

    monkeypatch.setattr(Pictures, "describe", refuse)
    again = Judge(config, protocol, tmp_path, progress=False)
    assert again.score(tiny_network()) == first.score(tiny_network())
    with pytest.raises(AssertionError, match="described again"):  # another set of real images
        Judge(config, replace(protocol, reference="train"), tmp_path, progress=False)
    # The same file, given by path.
    by_path = replace(protocol, reference=str(cached))
    monkeypatch.undo()
    given = Judge(config_for("digits"), by_path, tmp_path / "other", progress=False)
    assert given.score(tiny_network()) == first.score(tiny_network())
    # Who compares records sees what was compared with, not where it was kept.
    assert given.describe()["reference"] == first.describe()["reference"]
    train = Judge(config, replace(protocol, reference="train"), tmp_path, progress=False)
    assert train.describe()["reference"] != first.describe()["reference"]
    assert not (tmp_path / "other").exists()


def test_a_reference_of_another_network_is_refused(tmp_path: Path, corners: str):
    other = FeatureSet(4, "dinov2", "abc")
    other.update(np.random.default_rng(0).standard_normal((50, 4)))
    other.save(tmp_path / "ref.npz")
    protocol = replace(FEW, features=corners, reference=str(tmp_path / "ref.npz"))
    with pytest.raises(ValueError, match=r"ref\.npz cannot be compared with: .*dinov2 \(abc\)"):
        Judge(config_for("digits"), protocol, tmp_path, progress=False)


def test_training_images_as_reference_are_held_against_held_out_ones(tmp_path: Path, corners: str):
    protocol = replace(FEW, features=corners, reference="train")
    judge = Judge(config_for("digits"), protocol, tmp_path, progress=False)
    assert judge.describe()["reference_images"] == judge.describe()["train_images"] == 1347
    # Were the drawn images among those compared with, 40 of 40 would lie in the real manifold.
    assert max(judge.score_real().more["precision"]) < 1
    held_out = Judge(
        config_for("digits"), replace(protocol, reference="held-out"), tmp_path, progress=False
    )
    assert held_out.describe()["reference_images"] == 450


def test_held_out_loss_is_measured_where_it_is_asked_for(tmp_path: Path, corners: str):
    config = config_for("digits")
    protocol = replace(FEW, features=corners, held_out_loss=True)
    net = tiny_network()
    score = Judge(config, protocol, tmp_path, progress=False).score(net)
    held_out = load_dataset("digits", "held_out")
    count = 40 // len(LEVELS)  # as many evaluations as a repeat has images
    expected = [loss_at_levels(net, held_out, PIXELS, count=count, seed=s).mean for s in (0, 40)]
    # The same float32 operations, in other batches.
    assert score.more[LOSS] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"held_out=0\): there are no held-out images"):
        Judge(replace(config, held_out=0.0), protocol, tmp_path, progress=False)


def test_too_few_images_are_refused_before_anything_is_done(tmp_path: Path, corners: str):
    config = config_for("digits")
    with pytest.raises(ValueError, match=r"4 features needs at least 5 images .* \(got 4\)"):
        Judge(config, replace(FEW, images=4, features=corners), tmp_path, progress=False)
    small = config_for(pictures(tmp_path, count=16))
    with pytest.raises(ValueError, match=r"at least 5 real images \(got 4 as held-out ones\); "):
        Judge(small, replace(FEW, features=corners), tmp_path, progress=False)
    Judge(small, replace(FEW, features=corners, reference="train"), tmp_path, progress=False)


def test_unequal_classes_are_generated_as_often_as_they_occur(tmp_path: Path):
    config = config_for(pictures(tmp_path, classes=4, count=400), label_dim=4)
    judge = Judge(config, FEW, tmp_path, progress=False)
    labels = load_dataset(config.data).labels.numpy()
    shares = np.bincount(labels) / len(labels)
    assert shares.max() > 2 * shares.min()
    counts = np.bincount(judge.classes.numpy(), minlength=4)
    assert counts.sum() == 40
    np.testing.assert_allclose(counts / 40, shares, atol=1 / 40)  # rounded to whole images
    score = judge.score_real()
    assert min(score.agreement) > 0.6  # the classes overlap in brightness; chance is 0.4
    assert judge.real_images([3, 0, 3]).shape == (3, 1, 8, 8)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([5, 5, 5], [0, 1, 2, 0, 1, 2, 0]),
        ([7, 5, 4], [0, 1, 2, 0, 1, 2, 0]),  # not very unequal
        ([5, 0, 5], [0, 2, 0, 2, 0, 2, 0]),  # no image of class 1 was seen in training
        ([40], [0] * 7),
    ],
)
def test_classes_come_in_turn(shares: list[int], expected: list[int]):
    assert class_cycle(np.array(shares), 7).tolist() == expected


def test_real_images_are_drawn_in_the_same_mixture():
    labels = np.repeat([0, 1, 2], [50, 20, 3])
    rng = np.random.default_rng(0)
    for wanted, expected in [
        ((10, 5, 0), (10, 5, 0)),
        ((40, 40, 0), (20, 20, 0)),  # only 20 there are of class 1
        ((12, 6, 6), (6, 3, 3)),
    ]:
        chosen = draw_images(labels, np.repeat([0, 1, 2], wanted), rng)
        assert len(set(chosen.tolist())) == len(chosen)
        assert tuple(np.bincount(labels[chosen], minlength=3)) == expected
    # A class without any image in this half cannot be drawn, and the others are.
    assert len(draw_images(labels, np.array([0, 0, 3]), rng)) == 2


def test_a_generated_folder_is_read_back_without_grid_and_magnification(run_dir: Path):
    from reference_model.evaluate import open_images
    from reference_model.sampler_config import SamplerConfig

    options: dict[str, Any] = {"sampler": SamplerConfig(num_steps=2), "progress": False}
    out = run_dir / "images"
    generate(run_dir, out, range(12), sigma_rel=0.1, classes=[0, 5], scale=4, **options)
    found = open_images(out)
    assert isinstance(found, Pictures)
    assert len(found) == 12
    assert found.dataset.labels.tolist() == [0, 5] * 6
    generate(run_dir, out / "plain", range(12), sigma_rel=0.1, classes=[0, 5], scale=1, **options)
    plain = open_images(out / "plain")
    assert isinstance(plain, Pictures)
    every = np.arange(12)
    assert torch.equal(found.read(every), plain.read(every))
    (out / "seed000003.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"seed000003\.png cannot be read as an image"):
        open_images(out)


def test_parts_of_a_set_are_those_of_processes(corners: str):
    from reference_model.feature_files import load_features

    network = load_features(corners, (1, 8, 8))
    digits = Pictures(load_dataset("digits", "held_out"))
    whole = digits.describe(network)
    merged = digits.describe(network, part=(3, 3))
    for i in (1, 2):
        merged.merge(digits.describe(network, part=(i, 3)))
    assert len(merged) == len(whole) == 450
    # Sums of 450 float64 terms in another order.
    np.testing.assert_allclose(
        merged.statistics.covariance, whole.statistics.covariance, rtol=1e-10
    )
    with pytest.raises(ValueError, match=r"part must be \(i, n\) with 1 <= i <= n \(got \(4, 3\)"):
        digits.describe(network, part=(4, 3))


def test_a_large_set_is_read_in_part_and_told_apart_by_a_sample(monkeypatch: pytest.MonkeyPatch):
    from reference_model import pictures as module

    digits = Pictures(load_dataset("digits", "held_out"))
    images, _ = digits.some()
    assert torch.equal(images, digits.dataset.read())
    monkeypatch.setattr(module, "IN_MEMORY", 100)
    some, some_labels = digits.some()
    assert len(some) == len(some_labels) == 100
    assert set(some_labels.tolist()) == set(range(10))
    monkeypatch.setattr(module, "FINGERPRINT_BYTES", 10 * 64)
    members = digits.dataset.members
    prints = {
        Pictures(Dataset(digits.dataset.source, chosen)).fingerprint
        for chosen in (members, members[:-1], members[::-1].copy(), members.copy())
    }
    assert len(prints) == 3  # the last is the first


def test_quick_demo_scores_have_every_measure(finished_demo: Path):
    judge = Judge(preset("digits-tiny"), QUICK.protocol, finished_demo, progress=False)
    score = judge.score_real()
    assert len(score.distances) == len(score.agreement) == QUICK.protocol.repeats
    assert {name: len(values) for name, values in score.more.items()} == {
        "precision": QUICK.protocol.repeats, "recall": QUICK.protocol.repeats,
    }  # fmt: skip
    assert judge.accuracy is not None
    assert judge.accuracy > 0.9
