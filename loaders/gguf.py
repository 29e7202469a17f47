"""GGUF files, dequantised by transformers into an ordinary checkpoint.

transformers builds the whole model to do so: memory is that of the model in bfloat16, not of a chunk.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

from .environment import quiet_transformers
from .errors import CheckpointError, MissingRequirementError, said_by
from .source import Source, resolve_source


def dequantise(source: Source, directory: Path) -> Source:
    """Write the model of a `.gguf` file into `directory`, in bfloat16 safetensors, and return it as a local source.

    Raises `MissingRequirementError` without the `gguf` package, `CheckpointError` for a file that transformers can't
    use.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise MissingRequirementError("reading GGUF files needs the `gguf` package", hint="pip install 'ftload[gguf]'")
    name = source.gguf_file
    try:
        # its conversion draws a progress bar that no setting turns off
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                source.root,
                gguf_file=name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
            )
            model.save_pretrained(directory)
    except (ValueError, KeyError, IndexError, OSError, RuntimeError, NotImplementedError, TypeError) as error:
        raise CheckpointError(
            f"`{source.model}` can't be dequantised: {said_by(error)}",
            hint="is it a whole GGUF file of a language model?",
        ) from error
    return replace(resolve_source(str(directory), None), model=source.model)
