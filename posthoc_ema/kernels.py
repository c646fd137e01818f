"""The inner loops of a pass over many files: decoding, differences, and their linear combination.

Two sets of them with the same results up to the order of summation. That of numpy is always
there; that of PyTorch is about twice as fast, and serves where PyTorch is loaded anyway.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posthoc_ema.encoding import NUMPY_DTYPE, decode_into

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Kernel(Protocol):
    """What a pass does with numbers, in threads of its own, each with one core.

    Frameworks' own threads wait for each other by spinning, which on a busy machine costs a
    hundred times the work itself.
    """

    def enter_thread(self) -> None:
        """Called first by each thread."""

    def leave(self) -> None:
        """Called last, by the main thread."""

    def differences(
        self, stored: NDArray[np.uint8], dtype: str, base: NDArray[Any], out: NDArray[Any]
    ) -> None:
        """Decoded numbers less those of the reference.

        Args:
            stored: ``[g, m * itemsize]`` bytes of ``g`` files.
            dtype: Their type: F64, F32, F16 or BF16.
            base: ``[m]`` float32 or float64.
            out: ``[g, m]`` of the same type, overwritten.
        """

    def accumulate(self, out: NDArray[Any], coefficients: NDArray[Any], rows: NDArray[Any]) -> None:
        """``out += coefficients @ rows``, for ``[k, m]``, ``[k, g]`` and ``[g, m]``."""


def fastest_kernel() -> Kernel:
    """PyTorch's if it is loaded, else numpy's."""
    torch = sys.modules.get("torch")
    return NumpyKernel() if torch is None else TorchKernel(torch)


class NumpyKernel:
    """In numpy."""

    def enter_thread(self) -> None:
        """Nothing: these loops have no threads of their own."""

    def leave(self) -> None:
        """Nothing."""

    def differences(
        self, stored: NDArray[np.uint8], dtype: str, base: NDArray[Any], out: NDArray[Any]
    ) -> None:
        """Decoded numbers less those of the reference."""
        with np.errstate(invalid="ignore"):  # damaged bytes may be anything
            if dtype in ("F32", "F64") and out.dtype == NUMPY_DTYPE[dtype]:
                np.subtract(stored.view(NUMPY_DTYPE[dtype]), base, out=out)
            else:
                decode_into(stored, dtype, out)
                np.subtract(out, base, out=out)

    def accumulate(self, out: NDArray[Any], coefficients: NDArray[Any], rows: NDArray[Any]) -> None:
        """Add a product, cut so small that BLAS starts no threads."""
        width = 512
        whole = rows.shape[1] // width * width
        with np.errstate(invalid="ignore", over="ignore"):
            cut = rows[:, :whole].reshape(len(rows), -1, width).transpose(1, 0, 2)
            product = coefficients @ cut  # (pieces, k, width)
            target = out[:, :whole].reshape(len(out), -1, width)
            target += product.transpose(1, 0, 2)
            out[:, whole:] += coefficients @ rows[:, whole:]


class TorchKernel:
    """In PyTorch.

    Args:
        torch: The module, which is loaded already.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        self._threads = torch.get_num_threads()
        self._dtypes = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
        }

    def enter_thread(self) -> None:
        """One core for this thread; the setting is also the default of new threads."""
        self._torch.set_num_threads(1)

    def leave(self) -> None:
        """Restore the default of new threads."""
        self._torch.set_num_threads(self._threads)

    def differences(
        self, stored: NDArray[np.uint8], dtype: str, base: NDArray[Any], out: NDArray[Any]
    ) -> None:
        """Decoded numbers less those of the reference."""
        bits = stored.view("<i2") if dtype == "BF16" else stored.view(NUMPY_DTYPE[dtype])
        numbers = self._torch.from_numpy(bits).view(self._dtypes[dtype])
        reference, rows = self._torch.from_numpy(base), self._torch.from_numpy(out)
        if numbers.dtype == rows.dtype:
            self._torch.sub(numbers, reference, out=rows)
        else:
            rows.copy_(numbers).sub_(reference)

    def accumulate(self, out: NDArray[Any], coefficients: NDArray[Any], rows: NDArray[Any]) -> None:
        """Add a product."""
        target, matrix = self._torch.from_numpy(out), self._torch.from_numpy(rows)
        factors = self._torch.from_numpy(coefficients)
        if len(out) == 1:  # a matrix-vector product is much the faster
            target[0].addmv_(matrix.t(), factors[0])
        else:
            target.addmm_(factors, matrix)
