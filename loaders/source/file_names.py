"""The names of a model's files: its configuration, its tokenizer, its adapters."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch

from .source import SourceFile

CHAT_TEMPLATES = "additional_chat_templates"
"""The one sub-folder that can be part of a tokenizer; all others are ignored."""

TOKENIZER_PATTERNS = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*vocab*.txt", "*merges*.txt", f"{CHAT_TEMPLATES}/*.jinja",
)  # fmt: skip
"""What a tokenizer's files are called, in the libraries that save them."""

REPORT_FILE = "ftload_report.json"
"""Of a prepared directory, written last."""
ADAPTER_FILE = "adapter_model.safetensors"
"""An adapter's weights, as PEFT calls them."""
PREPARED_ADAPTER_CONFIG = "adapter/adapter_config.json"
"""What PEFT reads of an adapter, in a directory that ftload prepared."""
ADAPTER_CONFIGS = ("adapter_config.json", PREPARED_ADAPTER_CONFIG)
"""Where an adapter lies beside a model, or in a directory that ftload prepared."""

MAX_SIDE_FILE_BYTES = 16 * 1024 * 1024
"""A JSON file that is larger is a log or data, not configuration, unless its name says that it is the tokenizer's."""


def config_file_names(files: Iterable[SourceFile]) -> tuple[str, ...]:
    """The files that describe the model."""
    return tuple(file.path for file in files if file.path in ("config.json", "generation_config.json"))


def tokenizer_file_names(files: Iterable[SourceFile], *, trust_remote_code: bool = False) -> tuple[str, ...]:
    """The files that a tokenizer may need; with `trust_remote_code`, the Python files too."""

    def is_needed(file: SourceFile) -> bool:
        if file.path.endswith(".py"):
            return trust_remote_code
        if file.path.endswith(".index.json") or not any(fnmatch(file.path, p) for p in TOKENIZER_PATTERNS):
            return False
        own = "token" in file.path or "vocab" in file.path or not file.path.endswith(".json")
        return own or file.bytes <= MAX_SIDE_FILE_BYTES

    return tuple(file.path for file in files if is_needed(file))
