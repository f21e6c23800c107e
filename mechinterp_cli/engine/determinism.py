"""The same bits every time on the same machine, where the config asks for it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use algorithms that repeat their bits (and no TF32), and put the settings back.

    Where PyTorch has none for an operation, it warns and goes on; a run puts the warning into its manifest.

    Args:
        wanted: False leaves everything as it is.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads this when its handle is made, so it must stand before the first CUDA call
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    only_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module whose attribute is a property, which mypy does not see
    fill = memory.fill_uninitialized_memory
    precision = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # nothing uninitialised is read; filling costs time
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
        memory.fill_uninitialized_memory = fill
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def determinism_state(wanted: bool) -> dict[str, Any]:
    """The settings that decide whether bits repeat, as they stand now: for the manifest.

    Args:
        wanted: What the config asks for.
    """
    return {
        "wanted": wanted,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cublas_workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
