"""The inner loops of a pass over many files: page sums, decoding, and the linear combination.

Two sets of them with the same results up to the order of summation. That of numpy is always
there; that of PyTorch is two to three times as fast, and serves where PyTorch is loaded anyway.
"""

from __future__ import annotations

import sys
from threading import local
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from posthoc_ema.encoding import NUMPY_DTYPE, decode_into, page_numbers

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

    def page_numbers(self, pages: NDArray[np.uint8]) -> NDArray[np.float64]:
        """One number for each page of 4 KiB, see :class:`posthoc_ema.encoding.PageDigest`."""

    def decode_into(self, raw: NDArray[np.uint8], dtype: str, out: NDArray[Any]) -> None:
        """Convert stored bytes to floats, see :func:`posthoc_ema.encoding.decode_into`."""

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

    def page_numbers(self, pages: NDArray[np.uint8]) -> NDArray[np.float64]:
        """One number for each page."""
        return page_numbers(pages)

    def decode_into(self, raw: NDArray[np.uint8], dtype: str, out: NDArray[Any]) -> None:
        """Convert stored bytes to floats."""
        decode_into(raw, dtype, out)

    def accumulate(self, out: NDArray[Any], coefficients: NDArray[Any], rows: NDArray[Any]) -> None:
        """Add a product, cut so small that BLAS starts no threads."""
        width = 512
        whole = rows.shape[1] // width * width
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
        self._local = local()
        self._dtypes = {
            "F64": torch.float64,
            "F32": torch.float32,
            "F16": torch.float16,
            "BF16": torch.bfloat16,
        }
        self._multipliers = torch.arange(1, 2048, 2, dtype=torch.float64)

    def enter_thread(self) -> None:
        """One core for this thread; the setting is also the default of new threads."""
        self._torch.set_num_threads(1)
        self._local.words = self._torch.empty(256, 1024, dtype=self._torch.float64)

    def leave(self) -> None:
        """Restore the default of new threads."""
        self._torch.set_num_threads(self._threads)

    def page_numbers(self, pages: NDArray[np.uint8]) -> NDArray[np.float64]:
        """One number for each page."""
        if not hasattr(self._local, "words"):
            return page_numbers(pages)  # the rest of a stream, in the main thread
        words = self._torch.from_numpy(pages.view(np.int32)).view(-1, 1024)
        numbers = np.empty(len(words))
        for start in range(0, len(words), 256):
            part = words[start : start + 256]
            double = self._local.words[: len(part)]
            double.copy_(part)
            numbers[start : start + 256] = self._torch.mv(double, self._multipliers).numpy()
        return numbers

    def decode_into(self, raw: NDArray[np.uint8], dtype: str, out: NDArray[Any]) -> None:
        """Convert stored bytes to floats."""
        bits = raw.view("<i2") if dtype == "BF16" else raw.view(NUMPY_DTYPE[dtype])
        stored = self._torch.from_numpy(bits).view(self._dtypes[dtype])
        self._torch.from_numpy(out).copy_(stored)

    def accumulate(self, out: NDArray[Any], coefficients: NDArray[Any], rows: NDArray[Any]) -> None:
        """Add a product."""
        target, matrix = self._torch.from_numpy(out), self._torch.from_numpy(rows)
        factors = self._torch.from_numpy(coefficients)
        if len(out) == 1:  # a matrix-vector product is much the faster
            target[0].addmv_(matrix.t(), factors[0])
        else:
            target.addmm_(factors, matrix)
