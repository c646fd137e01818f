"""Plain numpy: logistic regression by hand, averaged.

python examples/train_numpy.py [FOLDER]
"""

import sys
import tempfile

import numpy as np

from posthoc_ema import EMA, reconstruct


def main(folder):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=8)
    weights = {"w": np.zeros(8, np.float32), "b": np.zeros(1, np.float32)}
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=100, unit="examples")

    def example(n):
        x = rng.normal(size=(n, 8))
        return x, rng.random(n) < 1 / (1 + np.exp(-x @ truth))

    def probability(w, x):
        return 1 / (1 + np.exp(-(x @ w["w"] + w["b"])))

    seen, batch = 0, 4
    for _ in range(500):
        x, y = example(batch)
        error = probability(weights, x) - y
        weights["w"] -= 0.3 * (error @ x / batch).astype(np.float32)
        weights["b"] -= 0.3 * error.mean(keepdims=True).astype(np.float32)
        seen += batch
        ema.update(weights, t=seen)  # any unit that increases

    x, y = example(20_000)
    losses = {}
    for sigma_rel in (None, 0.05, 0.10, 0.20):
        w = weights if sigma_rel is None else reconstruct(folder, sigma_rel).params
        p = probability(w, x)
        losses[sigma_rel] = float(-np.log(np.where(y, p, 1 - p)).mean())
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
