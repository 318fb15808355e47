"""Floating-point operations of a row, and how many a second a device can do at most."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.batch import Batch, num_rows, select, to_device
from pipeline.losses.objective import Objective

MAX_ROWS = 64
TERA = 1e12
PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250, "tf32": 1125, "float32": 75, "float64": 37},
    "H200": {"bfloat16": 989, "tf32": 494, "float32": 67, "float64": 67},
    "H100 PCIe": {"bfloat16": 756, "tf32": 378, "float32": 51, "float64": 51},
    "H100": {"bfloat16": 989, "tf32": 494, "float32": 67, "float64": 67},
    "A100": {"bfloat16": 312, "tf32": 156, "float32": 19.5, "float64": 19.5},
    "L40S": {"bfloat16": 362, "tf32": 183, "float32": 91.6},
    "L4": {"bfloat16": 121, "tf32": 60, "float32": 30.3},
    "A10": {"bfloat16": 125, "tf32": 62.5, "float32": 31.2},
}
"""TFLOP/s of dense matrices by what they are computed in, from the makers' data sheets."""


def flops_per_row(objective: Objective, batch: Batch, device: torch.device) -> float | None:
    """What a forward and backward pass take for a row of the batch, the mean of 64 at most.

    By torch's formulas for matrix products and convolutions, of which attention and recurrent
    layers are made here; None for a model that has none of these, or fails. `objective` is used up:
    not the one that is trained, nor a copy, whose hooks may change what they were made for.
    """
    rows = torch.arange(min(num_rows(batch), MAX_ROWS))
    counter = FlopCounterMode(display=False)
    try:
        here = to_device(select(batch, rows), device)
        with _plain_operations(), counter:
            numerators, _ = objective.to(device)(here)
            numerators.sum().backward()
    except Exception:  # whatever custom code does here, it is no reason not to train
        return None
    return counter.get_total_flops() / len(rows) or None


@contextlib.contextmanager
def _plain_operations() -> Iterator[None]:
    """Neither compiled nor fused: torch has no formula for some fused operations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TF32 acceleration")  # of oneDNN, which is off here
        with _eager():
            yield


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Without kernels of vendors."""
    with (
        torch.compiler.set_stance("force_eager"),
        torch.backends.cudnn.flags(enabled=False),
        torch.backends.mkldnn.flags(enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def peak_flops(device_name: str, precision: torch.dtype) -> float | None:
    """FLOP/s that a device can do at most in the precision; None where that is not known."""
    words = device_name.replace("-", " ").split()
    computed_in = str(precision).removeprefix("torch.")
    if precision == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        computed_in = "tf32"
    for model, peaks in PEAKS.items():
        if set(model.split()) <= set(words) and computed_in in peaks:
            return peaks[computed_in] * TERA
    return None
