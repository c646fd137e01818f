"""Arrays of the framework that wrote the snapshots, made from their bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from posthoc_ema.encoding import as_numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAMEWORKS = ("numpy", "torch", "jax")


def check_framework(framework: str) -> str:
    """The name itself, if it can be imported.

    Raises:
        ValueError: If the name is unknown.
        ModuleNotFoundError: If the framework is not installed.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"framework must be one of {', '.join(FRAMEWORKS)} (got {framework!r})")
    try:
        __import__(framework)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"the snapshots come from {framework}, which is not installed; install it, or ask for "
            'framework="numpy"'
        ) from None
    return framework


def average_to_framework(values: NDArray[Any], dtype: str, framework: str) -> Any:
    """An averaged tensor; pairs of reals become complex where the model's type is complex."""
    if dtype.startswith("C"):
        values = values.view(np.complex128 if values.dtype == np.float64 else np.complex64)[..., 0]
    if framework == "torch":
        import torch

        return torch.from_numpy(values)
    if framework == "jax":
        return _to_jax(values)
    return values


def copy_to_framework(
    raw: NDArray[np.uint8], dtype: str, shape: tuple[int, ...], framework: str
) -> Any:
    """A copied tensor in its own type, from its bytes."""
    if framework == "torch":
        import torch

        if not raw.size:  # torch cannot make a tensor from no bytes
            return torch.empty(shape, dtype=_torch_dtype(dtype))
        return torch.from_numpy(raw).view(_torch_dtype(dtype)).reshape(shape)
    values = as_numpy(raw, dtype, shape)
    return _to_jax(values) if framework == "jax" else values


def _to_jax(values: NDArray[Any]) -> Any:
    import jax
    import jax.numpy as jnp

    # Where x64 is off JAX cuts 64-bit values to 32 bits, with a warning for each tensor.
    return jnp.asarray(values.astype(jax.dtypes.canonicalize_dtype(values.dtype)))


def _torch_dtype(dtype: str) -> Any:
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
        "BOOL": "bool", "C64": "complex64", "C128": "complex128",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    }  # fmt: skip
    return getattr(torch, names[dtype])
