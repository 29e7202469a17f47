"""Whether CUDA can be used."""

from __future__ import annotations


def cuda_problem() -> str | None:
    """Why CUDA can't be used here; None when it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "there is no GPU that torch can use"


def first_gpu() -> tuple[str, int] | None:
    """Name and bytes of memory of the first GPU that torch can use; None without one."""
    import torch

    if cuda_problem() is not None:
        return None
    try:
        properties = torch.cuda.get_device_properties(0)
    except RuntimeError:  # a driver that finds it and can't talk to it
        return None
    return properties.name, properties.total_memory
