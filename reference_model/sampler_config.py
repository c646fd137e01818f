"""Options of the samplers as data, without torch: one option of the command line for each."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from reference_model.configs import option


@dataclass(frozen=True)
class SamplerConfig:
    """Solver, noise levels and churn, by their EDM2 names; see `sampler.heun_sampler`."""

    sampler: str = option("Solver: heun (second order) or euler.", default="heun")
    num_steps: int = option("Steps of the solver.", default=32)
    sigma_min: float = option("Last noise level above zero.", default=0.002)
    sigma_max: float = option("First noise level.", default=80.0)
    rho: float = option("Larger values put more steps at low noise.", default=7.0)
    S_churn: float = option("Fresh noise over the whole run; 0: deterministic.", default=0.0)
    S_min: float = option("Lowest noise level at which noise is added.", default=0.0)
    S_max: float = option("Highest noise level at which noise is added.", default=math.inf)
    S_noise: float = option("Relative standard deviation of added noise.", default=1.0)

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the images, as JSON can hold it: no churn options without churn."""
        values = {k: v for k, v in asdict(self).items() if v != math.inf}
        if self.S_churn == 0:
            values = {k: v for k, v in values.items() if not k.startswith("S_")}
        return values
