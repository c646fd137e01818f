"""JAX and Optax: averages in the optimiser's state, updated inside a compiled scan.

python examples/train_optax.py [FOLDER]
"""

import sys
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import optax

from posthoc_ema import reconstruct
from posthoc_ema.integrations.jax import SnapshotWriter, put_into
from posthoc_ema.integrations.optax import averaged, ema_state

optimizer = averaged(optax.adam(1e-2), sigma_rel=(0.05, 0.10))


def loss_of(params, key, batch, noise):
    key_x, key_y = jax.random.split(key)
    x = jax.random.normal(key_x, (batch, 4))
    y = jnp.sin(2 * x).sum(1) + noise * jax.random.normal(key_y, (batch,))
    predicted = jax.nn.silu(x @ params["hidden"] + params["bias"]) @ params["out"]
    return ((predicted - y) ** 2).mean()


@partial(jax.jit, donate_argnums=(0, 1))
def hundred_steps(params, state, key):
    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss_of)(params, key, 32, 1.0)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), jax.random.split(key, 100))[0]


def main(folder):
    keys = jax.random.split(jax.random.key(0), 22)
    hidden, out = jax.random.normal(keys[-1], (4, 64)), jax.random.normal(keys[-2], (64,))
    params = {"hidden": hidden / 2, "bias": jnp.zeros(64), "out": out / 8}
    state = optimizer.init(params)  # saved with your checkpoint, averages and time are too
    writer = SnapshotWriter((0.05, 0.10), folder, every=100)
    for key in keys[:20]:
        params, state = hundred_steps(params, state, key)
        writer(ema_state(state), params)

    losses = {}
    for sigma_rel in (None, 0.02, 0.05, 0.10, 0.15):
        chosen = params if sigma_rel is None else put_into(params, reconstruct(folder, sigma_rel))
        losses[sigma_rel] = float(loss_of(chosen, jax.random.key(1), 4096, 0.0))
        print(f"sigma_rel {sigma_rel or 'raw weights'}: loss {losses[sigma_rel]:.4f}")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
