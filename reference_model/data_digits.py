"""The handwritten digits that come with this package.

They are the 1,797 images of the test set of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0), as scikit-learn's
`load_digits` has them: 8×8 pixels, each the number of ink dots, 0 to 16, in a 4×4 cell.
"""

from __future__ import annotations

from importlib import resources

import numpy as np

from reference_model.configs import DIGITS
from reference_model.data_source import Source


def open_digits() -> Source:
    """Load the digits.

    Ink counts of 0 to 16 are stretched to 0 to 255 by round(255/16 · count), so that pixels
    use the range that image data uses everywhere.

    Returns:
        All 1,797 images, uint8 `[1, 8, 8]` each, with ten classes.

    Source:
        UCI Optical Recognition of Handwritten Digits, https://doi.org/10.24432/C50P49.
    """
    with resources.files("reference_model").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file)
        ink, labels = stored["images"], stored["labels"]
    images = np.rint(ink * (255 / 16)).astype(np.uint8)[:, None]
    return Source(
        where=DIGITS,
        size=len(images),
        shape=(1, 8, 8),
        read=lambda indices: images[indices],
        labels=labels.astype(np.int64),
    )
