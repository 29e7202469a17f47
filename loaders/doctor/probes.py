"""Trying a library: `python -m ftload.loaders.doctor.probes NAME DESCRIPTOR`, in a process of its own.

A library may raise, exit, crash or hang while it is imported; only this process is lost. The answer is one JSON object,
written to the file descriptor: `detail` and other facts, or `problem`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ..errors import FtloadError, SourceError, said_by
from ..steps.quantisation import Quantisation
from ..strategy import STRATEGIES


def main() -> None:
    """Run one probe and answer."""
    name, descriptor = sys.argv[1:]
    try:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            answer = PROBES[name]()
    except FtloadError as error:
        answer = {"problem": error.message}
    except SystemExit as error:
        answer = {"problem": f"ends the process while it is imported (exit code {error.code})"}
    except BaseException as error:  # a library that is broken raises whatever it likes
        answer = {"problem": f"{type(error).__name__}: {said_by(error)}"}
    with os.fdopen(int(descriptor), "w") as file:
        json.dump(answer, file)
    sys.stdout.flush()
    os._exit(0)  # the libraries' clean-up at exit is slow, and may fail


def _torch() -> dict[str, Any]:
    import torch

    built_for = torch.version.cuda and f"CUDA {torch.version.cuda}"
    built_for = built_for or (torch.version.hip and f"ROCm {torch.version.hip}") or None
    answer: dict[str, Any] = {"detail": f"built for {built_for or 'CPUs alone'}", "gpus": [], "gpu_problem": None}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        # torch reports a driver that is too old in a warning
        reason = said_by(Warning(said[0].message)) if said else "torch finds none"
        answer["gpu_problem"] = "torch is built without CUDA" if built_for is None else reason
        return answer
    try:
        answer["gpus"] = [_gpu(number) for number in range(torch.cuda.device_count())]
    except RuntimeError as error:
        answer["gpu_problem"] = said_by(error)
    return answer


def _gpu(number: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(number)
    # a build for other processors finds the GPU too, but can't run on it
    if float(torch.ones(64, device=f"cuda:{number}", dtype=torch.bfloat16).sum()) != 64:
        raise RuntimeError(f"GPU {number} does not add up")
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _bitsandbytes() -> dict[str, Any]:
    return {"detail": _quantisation().try_library()}


def _quantisation() -> Quantisation:
    quantisation = STRATEGIES["qlora"].quantisation
    assert quantisation is not None
    return quantisation


def _flash_attention() -> dict[str, Any]:
    importlib.import_module("flash_attn.flash_attn_interface")  # this is what loads the compiled part
    import torch

    if not torch.cuda.is_available():
        return {"detail": "imports; it runs on a GPU alone"}
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return {"problem": f"needs compute capability 8.0, the GPU has {capability[0]}.{capability[1]}"}
    function = importlib.import_module("flash_attn").flash_attn_func
    values = torch.ones(1, 16, 1, 64, device="cuda", dtype=torch.bfloat16)
    if not torch.allclose(function(values, values, values), values, atol=0.01):
        raise RuntimeError("the attention of ones is not one")
    return {"detail": "attends on the GPU"}


def _liger() -> dict[str, Any]:
    import torch
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kernels = f"kernels for {len(MODEL_TYPE_TO_APPLY_LIGER_FN)} model types"
    if not torch.cuda.is_available():
        return {"detail": f"{kernels}; they run on a GPU alone"}
    from liger_kernel.transformers import LigerRMSNorm

    values = torch.ones(1, 64, device="cuda", dtype=torch.bfloat16)
    if not torch.allclose(LigerRMSNorm(64).to("cuda", torch.bfloat16)(values), values, atol=0.01):
        raise RuntimeError("its RMS norm of ones is not one")
    return {"detail": f"{kernels}; one ran on the GPU"}


def _numba() -> dict[str, Any]:
    return {"detail": _quantisation().try_encoder()}


def _transformers() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return {"detail": f"imports {AutoModelForCausalLM.__name__} and {AutoTokenizer.__name__}"}


def _peft() -> dict[str, Any]:
    from peft import LoraConfig, PeftModel

    return {"detail": f"imports {LoraConfig.__name__} and {PeftModel.__name__}"}


def _hub() -> dict[str, Any]:
    """Ask the hub who we are: any answer shows that it can be reached, and it shows whether it knows the token."""
    from ..flags.model_page import check_endpoint
    from ..source.hub_errors import hub_errors
    from ..system.safe_text import masked

    check_endpoint()
    from huggingface_hub import constants, get_session, get_token
    from huggingface_hub.utils import build_hf_headers

    endpoint = masked(constants.ENDPOINT)
    with hub_errors("the hub", None):
        response = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(), timeout=HUB_SECONDS
        )
    if response.status_code >= 500:
        raise SourceError(f"`{endpoint}` answers `{response.status_code}`")
    # a server that is not the real hub may not know this address, and says nothing of the token then
    accepted = {200: True, 401: False}.get(response.status_code) if get_token() else None
    return {"detail": f"{endpoint} answers", "accepted": accepted}


HUB_SECONDS = 5.0


def _import(module: str, detail: str = "imports") -> Callable[[], dict[str, Any]]:
    def probe() -> dict[str, Any]:
        importlib.import_module(module)
        return {"detail": detail}

    return probe


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _torch,
    "transformers": _transformers,
    "tokenizers": _import("tokenizers"),
    "safetensors": _import("safetensors.torch"),
    "peft": _peft,
    "accelerate": _import("accelerate"),
    "bitsandbytes": _bitsandbytes,
    "numba": _numba,
    "liger-kernel": _liger,
    "triton": _import("triton.language"),
    "flash-attn": _flash_attention,
    "gguf": _import("gguf"),
    "compressed-tensors": _import("compressed_tensors.compressors"),
    "hub": _hub,
}
"""By distribution."""


if __name__ == "__main__":
    main()
