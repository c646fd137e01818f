"""Equinox: track the whole model, put a reconstruction back into it.

python examples/train_equinox.py [FOLDER]
"""

import sys
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from posthoc_ema import EMA, reconstruct
from posthoc_ema.integrations.jax import put_into

optimizer = optax.adam(3e-2)


@eqx.filter_jit
def loss_of(model, key, batch, noise):
    key_x, key_y = jax.random.split(key)
    x = jax.random.normal(key_x, (batch, 4))
    y = jnp.sin(2 * x).sum(1) + noise * jax.random.normal(key_y, (batch,))
    return ((jax.vmap(model)(x) - y) ** 2).mean()


@eqx.filter_jit(donate="all-except-first")
def train_step(key, model, state):
    grads = eqx.filter_grad(loss_of)(model, key, 32, 1.0)
    updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state


def main(folder):
    model = eqx.nn.MLP(4, "scalar", 64, 1, activation=jax.nn.silu, key=jax.random.key(0))
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    ema = EMA(sigma_rel=(0.05, 0.10), snapshots=folder, every=100)
    for key in jax.random.split(jax.random.key(1), 1000):
        model, state = train_step(key, model, state)
        ema.update(model)  # leaves that are no arrays may stay in it

    losses = {}
    for sigma_rel in (None, 0.05, 0.10, 0.15):
        chosen = model if sigma_rel is None else put_into(model, reconstruct(folder, sigma_rel))
        losses[sigma_rel] = float(loss_of(chosen, jax.random.key(2), 4096, 0.0))
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
