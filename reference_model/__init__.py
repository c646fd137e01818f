"""EDM2's magnitude-preserving diffusion network, trained with `posthoc_ema` as any user would.

All configs, A to G, of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models" (arXiv:2312.02696). `python -m reference_model --help` lists what it can do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reference_model.precond import Denoiser as Denoiser
    from reference_model.precond import build_model as build_model
    from reference_model.sampler import generate_images as generate_images
    from reference_model.sampler import heun_sampler as heun_sampler

__all__ = ["Denoiser", "build_model", "generate_images", "heun_sampler"]

_HOME = {
    "Denoiser": "precond",
    "build_model": "precond",
    "generate_images": "sampler",
    "heun_sampler": "sampler",
}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import: `--help` and the configuration tables do without it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
