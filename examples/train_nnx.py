"""Flax NNX: track the state of the parameters, put a reconstruction back into the model.

python examples/train_nnx.py [FOLDER]
"""

import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from posthoc_ema import EMA, reconstruct
from posthoc_ema.integrations.jax import put_into


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.silu(self.hidden(x)))[:, 0]


def loss_of(model, key, batch, noise):
    key_x, key_y = jax.random.split(key)
    x = jax.random.normal(key_x, (batch, 4))
    y = jnp.sin(2 * x).sum(1) + noise * jax.random.normal(key_y, (batch,))
    return ((model(x) - y) ** 2).mean()


@nnx.jit
def train_step(model, optimizer, key):
    optimizer.update(model, nnx.grad(lambda m: loss_of(m, key, 32, 1.0))(model))


def main(folder):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=100)
    for key in jax.random.split(jax.random.key(0), 1000):
        train_step(model, optimizer, key)
        ema.update(nnx.state(model, nnx.Param))  # or nnx.state(model): statistics are copied

    losses = {}
    for sigma_rel in (None, 0.05, 0.10, 0.15):
        if sigma_rel is not None:
            weights = reconstruct(folder, sigma_rel)
            nnx.update(model, put_into(nnx.state(model, nnx.Param), weights))
        losses[sigma_rel] = float(loss_of(model, jax.random.key(1), 4096, 0.0))
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
