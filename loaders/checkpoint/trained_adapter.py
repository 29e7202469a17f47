"""An adapter that lies where the model does: what was trained into it is no part of what is prepared from the model."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..source.file_names import ADAPTER_FILE
from ..source.source import Source
from .safetensors_header import read_header

_READ_BYTES = 4 * 1024 * 1024


def find_trained_adapter(source: Source) -> str | None:
    """The adapter_config.json of an adapter beside the model; None where there is none, or nothing was trained into it.

    Of a local adapter, B is read until something in it is not zero; one on a hub counts as trained.
    """
    return next((config for config in source.adapters if not _is_untrained(source, config)), None)


def _is_untrained(source: Source, config: str) -> bool:
    """Whether B of every layer is zero, as LoRA begins (arXiv:2106.09685, section 4.1)."""
    if source.kind != "local":
        return False
    path = source.root / Path(config).with_name(ADAPTER_FILE)
    try:
        with path.open("rb") as file:

            def read(begin: int, end: int) -> bytes:
                file.seek(begin)
                return file.read(end - begin)

            tensors = [
                tensor for tensor in read_header(path.name, path.stat().st_size, read) if ".lora_B." in tensor.name
            ]
            pieces = (
                read(begin, min(begin + _READ_BYTES, tensor.end))
                for tensor in tensors
                for begin in range(tensor.begin, tensor.end, _READ_BYTES)
            )
            return bool(tensors) and not any(piece.strip(b"\0") for piece in pieces)
    except (OSError, CheckpointError):  # whatever it is, it was not written by ftload
        return False
