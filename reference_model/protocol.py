"""How a set of weights is measured, as data: the same for all that are to be compared."""

from __future__ import annotations

from dataclasses import dataclass, fields

from reference_model.configs import option


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

    def __post_init__(self) -> None:
        for spec in fields(self):
            least = 0 if spec.name == "first_seed" else 1
            value = getattr(self, spec.name)
            if value < least:
                raise ValueError(f"{spec.name} must be at least {least} (got {value})")

    def seeds(self, repeat: int) -> range:
        """Seeds of one repeat, counted from 0."""
        start = self.first_seed + repeat * self.images
        return range(start, start + self.images)

    def classes(self, num_classes: int) -> list[int]:
        """Class of each image of a repeat: all classes in turn."""
        return [i % num_classes for i in range(self.images)]
