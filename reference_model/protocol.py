"""How a set of weights is measured, as data: the same for all that are to be compared."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from reference_model.configs import option

CLASSIFIER = "classifier"
NETWORK_KINDS = ("inception", "dinov2", "torchscript")
"""Kinds of feature networks that come from files."""

HELD_OUT_IMAGES, TRAINING_IMAGES = "held-out", "train"

LENGTHS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.13, 0.16, 0.2, 0.25)
"""EMA lengths to measure where none are asked for."""


class FeatureSpec(NamedTuple):
    """Which feature network: its kind, and the path that it comes from, if any."""

    kind: str
    path: str


def parse_features(spec: str) -> FeatureSpec:
    """Read the name of a feature network: `classifier`, or a kind and a path with `:` between.

    Raises:
        ValueError: If it is neither.
    """
    kind, _, path = spec.partition(":")
    if spec == CLASSIFIER or (kind in NETWORK_KINDS and path):
        return FeatureSpec(kind, path)
    known = ", ".join((CLASSIFIER, *(f"{kind}:PATH" for kind in NETWORK_KINDS)))
    raise ValueError(f"features must be one of {known} (got {spec!r})")


@dataclass(frozen=True)
class Protocol:
    """What is generated to measure a set of weights; compare only scores of one protocol.

    The same seeds serve every set of weights: all of them start from the same noise with the same
    classes, so that most of the chance in a score is common to all and cancels in differences.
    """

    # Finite samples bias the distance upwards, so repeats must be of equal size.
    images: int = option("Images of one repeat.", default=1000)
    repeats: int = option("Repeats with other seeds; their spread is the error bar.", default=3)
    num_steps: int = option("Steps of the solver.", default=16)
    batch_size: int = option("Images at once; does not change them.", default=500)
    first_seed: int = option("Seed of the first image; the others follow.", default=0)
    features: str = option(
        "Network whose features are compared: classifier (trained on the data set, once), "
        "inception:FILE, dinov2:FOLDER or torchscript:FILE.",
        default=CLASSIFIER,
    )
    reference: str = option(
        "Real images to compare with: held-out, train, or a file that `statistics` wrote.",
        default=HELD_OUT_IMAGES,
    )
    held_out_loss: bool = option(
        "Also measure the denoising loss on held-out images.", default=False
    )

    def __post_init__(self) -> None:
        parse_features(self.features)
        for spec in fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, str | bool):
                continue
            least = 0 if spec.name == "first_seed" else 1
            if value < least:
                raise ValueError(f"{spec.name} must be at least {least} (got {value})")

    def seeds(self, repeat: int) -> range:
        """Seeds of one repeat, counted from 0."""
        start = self.first_seed + repeat * self.images
        return range(start, start + self.images)

    def classes(self, num_classes: int) -> list[int]:
        """Class of each image of a repeat: all classes in turn."""
        return [i % num_classes for i in range(self.images)]
