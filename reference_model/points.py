"""What a sweep measures: points, each one set of weights and what guides it, and grids of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any


@dataclass(frozen=True)
class PointGuide:
    """An average that guides another.

    Attributes:
        guidance: w; 1 is no guidance.
        sigma_rel: EMA length of the guide.
        t: Time of the guide's average, in images.
        run_id: Run whose snapshots it is made from, as they name it.
        interval: Noise levels `(lo, hi]` at which it acts; `None`: all.
        run_dir: Where that run lies; empty for the run that is swept. Says where to read, not
            what: the same run elsewhere is the same guide.
    """

    guidance: float
    sigma_rel: float
    t: float
    run_id: str
    interval: tuple[float, float] | None = None
    run_dir: str = field(default="", compare=False)


@dataclass(frozen=True)
class Point:
    """One set of weights, with what guides it: two equal points are the same measurement.

    Attributes:
        sigma_rel: EMA length; `None` for the raw weights.
        t: Time of the average, in images seen.
        guide: What guides it; one of strength 1 is none.
        changed: Tensors averaged over another length, as pairs of a name pattern and that length;
            the first match decides.
    """

    sigma_rel: float | None
    t: float
    guide: PointGuide | None = None
    changed: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.sigma_rel is None and self.changed:
            raise ValueError("raw weights have no EMA length that some tensors could differ from")
        if self.guide is not None and self.guide.guidance == 1:
            object.__setattr__(self, "guide", None)
        object.__setattr__(self, "t", float(self.t))

    @property
    def plain(self) -> bool:
        """Whether these are weights of one length, or raw ones, with no guide."""
        return self.guide is None and not self.changed

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts plain points first, by time, then length; raw weights before averages.

        Points with changed tensors have one place: a stable sort keeps the network's order.
        """
        g = self.guide
        guide = () if g is None else (g.run_id, g.t, g.interval or (), g.sigma_rel, g.guidance)
        return bool(self.changed), bool(guide), guide, self.t, self.sigma_rel or 0.0

    @property
    def label(self) -> str:
        """Name for files, different for different points: `raw_t=…` or `sigma_rel=0.1_t=…`."""
        parts = ["raw" if self.sigma_rel is None else f"sigma_rel={self.sigma_rel!r}"]
        parts.append(f"t={self.t!r}".removesuffix(".0"))
        if self.guide is not None:
            g = self.guide
            parts += [f"guidance={g.guidance!r}", f"by={g.run_id}", f"{g.sigma_rel!r}", f"{g.t!r}"]
            parts += [] if g.interval is None else [f"in={g.interval[0]!r},{g.interval[1]!r}"]
        parts += [f"{pattern}={length!r}" for pattern, length in self.changed]
        return "_".join(parts).replace("*", "+").replace("/", "+")

    def describe(self, end: float | None = None) -> str:
        """Words for people, as `σ_rel 0.1, w 2 by σ_rel 0.25`; the time only if not `end`."""
        words = ["raw weights" if self.sigma_rel is None else f"σ_rel {self.sigma_rel:.4g}"]
        if self.t != end:
            words.append(f"after {self.t:,.0f} images")
        if self.guide is not None:
            words.append(f"w {self.guide.guidance:g} by {describe_guide(self.guide, self.t)}")
        words += [f"{pattern} at {length:.4g}" for pattern, length in self.changed]
        return ", ".join(words)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Point:
        """Read what `dataclasses.asdict` and JSON made of a point.

        Raises:
            KeyError, TypeError: If it is none.
        """
        guide = data["guide"]
        if guide is not None:
            interval = guide["interval"]
            guide = PointGuide(**{**guide, "interval": None if interval is None else (*interval,)})
        changed = tuple((str(pattern), float(length)) for pattern, length in data["changed"])
        return cls(data["sigma_rel"], data["t"], guide, changed)


def describe_guide(guide: PointGuide, t: float | None = None) -> str:
    """Words for the network that guides, without its strength; its time only if not `t`."""
    words = f"σ_rel {guide.sigma_rel:.4g}"
    if guide.run_dir:
        words += f" of {guide.run_dir}"
    if guide.t != t:
        words += f" after {guide.t:,.0f} images"
    if guide.interval is not None:
        words += f", σ in ({guide.interval[0]:g}, {guide.interval[1]:g}]"
    return words


def grid(
    sigma_rels: Iterable[float],
    times: Iterable[float],
    guides: Sequence[PointGuide | None] = (None,),
) -> list[Point]:
    """All combinations, each once; a network that would guide itself is left out.

    Args:
        sigma_rels: EMA lengths.
        times: Times of the averages, in images.
        guides: What guides; `None` for nothing. Guides of strength 1 are all the same: none.

    Returns:
        Points, those of one time together, from short to long.
    """
    points = (
        Point(s, t, guide)
        for t, s, guide in product(sorted(set(times)), sorted(set(sigma_rels)), guides)
        if guide is None
        or guide.guidance == 1
        or guide.run_dir
        or (guide.sigma_rel, guide.t) != (s, t)
    )
    return list(dict.fromkeys(points))


def sensitivity(base: Point, groups: Iterable[str], sigma_rels: Iterable[float]) -> list[Point]:
    """The base, and for each group of tensors the base with that group at each other length.

    Args:
        base: Plain point of the length that all other tensors keep.
        groups: Name patterns, as of :func:`group_tensors`.
        sigma_rels: Lengths to give one group at a time.
    """
    others = [s for s in sorted(set(sigma_rels)) if s != base.sigma_rel]
    return [base, *(replace(base, changed=((g, s),)) for g in groups for s in others)]


def group_tensors(names: Iterable[str], by: str = "block") -> list[str]:
    """Name patterns that divide a network's averaged tensors.

    Args:
        names: Of the tensors.
        by: `"layer"`: the tensors of one layer together; `"block"`: those of one block.

    Returns:
        Patterns in the order of the names. The uncertainty head has none: it serves training
        alone, so that its average changes no image.
    """
    parts = (name.split(".") for name in names if not name.startswith("logvar."))
    # unet.enc.14x14_block0.residual.conv0.weight: the first three name the block.
    groups = (p[:-1] if by == "layer" else p[: min(3, len(p) - 1)] for p in parts)
    return list(dict.fromkeys(".".join([*group, "*"]) for group in groups))
