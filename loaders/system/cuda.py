"""Whether CUDA can be used."""

from __future__ import annotations


def cuda_problem() -> str | None:
    """Why CUDA can't be used here; None when it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "there is no GPU that torch can use"
