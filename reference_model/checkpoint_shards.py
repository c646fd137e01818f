"""Sharded tensors on their way to files, each written by who holds it, and back.

A state is nested dicts and lists of tensors and plain values. Of a tensor that processes hold by
rows (a DTensor of FSDP2) each process writes its rows; the state itself keeps a place for it.
Rows are read back for any number of processes, or for none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_PLACE = "sharded tensor"


@dataclass(frozen=True)
class Rows:
    """A tensor in pieces along its first dimension.

    Attributes:
        shape: Shape of the whole.
        pieces: First row and rows of each piece.
    """

    shape: tuple[int, ...]
    pieces: Sequence[tuple[int, Tensor]]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return some of the rows, by default all, as a new tensor."""
        stop = self.shape[0] if stop is None else stop
        result = self.pieces[0][1].new_empty(stop - start, *self.shape[1:])
        for first, rows in self.pieces:
            begin, end = max(first, start), min(first + len(rows), stop)
            if begin < end:
                result[begin - start : end - start] = rows[begin - first : end - first]
        return result


def split(state: Any) -> tuple[Any, dict[int, tuple[int, Tensor]]]:
    """Take the sharded tensors out of a state.

    Returns:
        The state with places in their stead, alike in all processes; and by number of the place
        the first row and rows that this process holds.
    """
    held: dict[int, tuple[int, Tensor]] = {}

    def take(value: Any) -> Any:
        if not is_sharded(value):
            return value
        number = len(held)
        held[number] = own_rows(value)[0], value.to_local().detach()
        return {_PLACE: number, "shape": list(value.shape)}

    return _map(state, take), held


def join(state: Any, shards: Sequence[Mapping[int, tuple[int, Tensor]]]) -> Any:
    """Put `Rows` into the places of a state that `split` made."""

    def fill(value: Any) -> Any:
        if not (isinstance(value, dict) and _PLACE in value):
            return value
        return Rows(tuple(value["shape"]), [shard[value[_PLACE]] for shard in shards])

    return _map(state, fill)


def whole(state: Any) -> Any:
    """Return a state with tensors in place of all `Rows`."""
    return _map(state, lambda value: value.read() if isinstance(value, Rows) else value)


def like(value: Any, target: Any) -> Any:
    """Return a tensor, or `Rows`, divided among processes as another tensor is."""
    if not is_sharded(target):
        return value.read() if isinstance(value, Rows) else value
    from torch.distributed.tensor import DTensor

    start, stop = own_rows(target)
    rows = value.read(start, stop) if isinstance(value, Rows) else value[start:stop].clone()
    return DTensor.from_local(
        rows.to(target.device),
        target.device_mesh,
        target.placements,
        run_check=False,
        shape=target.shape,
        stride=target.stride(),
    )


def is_sharded(value: Any) -> bool:
    """Whether a value is a tensor of which this process holds a part."""
    return isinstance(value, Tensor) and hasattr(value, "to_local")


def own_rows(tensor: Any) -> tuple[int, int]:
    """First and last row, exclusive, that this process holds: even chunks, the last ones short."""
    count, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    rows = tensor.shape[0]
    chunk = -(-rows // count)
    return min(rank * chunk, rows), min((rank + 1) * chunk, rows)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild nested dicts and lists with changed values; what `change` changed is not entered."""
    changed = change(value)
    if changed is not value:
        return changed
    if isinstance(value, Mapping):
        return {key: _map(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map(inner, change) for inner in value]
    return value
