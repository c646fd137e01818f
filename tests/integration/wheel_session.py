"""What a user without any framework does with the installed wheel; run by test_wheel.py."""

import numpy as np

from posthoc_ema import EMA, PowerFunction, reconstruct

rng = np.random.default_rng(0)
features = rng.standard_normal((256, 8))
labels = features @ np.arange(8.0)

weights = {"layer.weight": np.zeros(8, np.float32), "layer.bias": np.zeros((), np.float32)}
ema = EMA(snapshots="run/ema", every=50)
history = []
for _ in range(400):
    batch = rng.integers(0, 256, 32)
    error = features[batch] @ weights["layer.weight"] + weights["layer.bias"] - labels[batch]
    weights["layer.weight"] -= 0.05 * (features[batch].T @ error / 32).astype(np.float32)
    weights["layer.bias"] -= np.float32(0.05 * error.mean())
    ema.update(weights)
    history.append(weights["layer.weight"].copy())

result = reconstruct("run/ema", sigma_rel=0.07)
true = PowerFunction(0.07).weights(np.arange(1, 401)) @ np.stack(history)
rms = float(np.sqrt(np.mean((result.params["layer.weight"] - true) ** 2) / np.mean(true**2)))

for framework in ("torch", "jax", "matplotlib", "pytest"):
    try:
        __import__(framework)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{framework} can be imported: this environment is not clean")

print("names", *result.state_dict())
print("relative error", rms)
