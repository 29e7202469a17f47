"""Tiny real tokenizers on disk, one for each kind that the tokenizer rules tell apart.

Every function writes `tokenizer.json` and `tokenizer_config.json` as transformers expects to find them beside a
model, with exactly `vocab_size` tokens. The bytes depend on the arguments alone.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

LLAMA3_TEMPLATE = (
    "{{- bos_token }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
    "    {{- message['content'] + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n"
    "{%- endif %}\n"
)
"""Begins with the bos token, as Llama 3's own does."""

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What SmolLM2 and Qwen use."""


def write_llama(directory: Path, *, vocab_size: int = 128, chat_template: str | None = None) -> None:
    """Llama 2: sentencepiece-style BPE; `<unk>`, `<s>`, `</s>` are 0, 1, 2; no pad, no chat template."""
    special = ["<unk>", "<s>", "</s>"]
    vocab, merges = _bpe(special, ["▁", *_LETTERS], vocab_size)
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    _write(directory, tokenizer, special, config, chat_template)


def write_llama3(directory: Path, *, vocab_size: int = 128, chat_template: str | None = LLAMA3_TEMPLATE) -> None:
    """Llama 3: byte-level BPE of the generic fast class; no pad; its chat template begins with the bos token."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(special, vocab_size, last=True)
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", bos)]
    )
    config = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write(directory, tokenizer, special, config, chat_template)


def write_smollm2(directory: Path, *, vocab_size: int = 128, chat_template: str | None = CHATML_TEMPLATE) -> None:
    """SmolLM2: ChatML on a GPT-2 tokenizer whose pad is its eos, `<|im_end|>`; bos is `<|im_start|>`."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
    }
    _write(directory, _byte_level(special, vocab_size), special, config, chat_template)


def write_qwen(directory: Path, *, vocab_size: int = 128, chat_template: str | None = CHATML_TEMPLATE) -> None:
    """Qwen 2: ChatML; the pad, `<|endoftext|>`, is not the eos, `<|im_end|>`; no bos."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    _write(directory, _byte_level(special, vocab_size, last=True), special, config, chat_template)


def write_gpt_neox(
    directory: Path,
    *,
    vocab_size: int = 128,
    bos: bool = True,
    pad: str | None = None,
    chat_template: str | None = None,
) -> None:
    """GPT-NeoX: eos (and, with `bos`, bos) is `<|endoftext|>`, as in Pythia and, without `bos`, in the first OLMo."""
    special = ["<|endoftext|>", "<|padding|>"]
    config = {
        "bos_token": "<|endoftext|>" if bos else None,
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
        "tokenizer_class": "GPTNeoXTokenizer",
    }
    _write(directory, _byte_level(special, vocab_size), special, config, chat_template)


def write_gpt2(directory: Path, *, vocab_size: int = 128, chat_template: str | None = None) -> None:
    """GPT-2: bos, eos and unk are `<|endoftext|>`, the last token; no pad."""
    special = ["<|endoftext|>"]
    config = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "tokenizer_class": "GPT2Tokenizer",
    }
    _write(directory, _byte_level(special, vocab_size, last=True), special, config, chat_template)


_LETTERS = list(string.ascii_letters + string.digits + string.punctuation)
_BYTE_LEVEL_ALPHABET = [*_LETTERS, "Ġ", "Ċ"]
"""Printable ASCII, space and new line as byte-level BPE writes them: enough for text in tests."""


def _bpe(first: list[str], alphabet: list[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of `vocab_size` tokens: `first`, `alphabet`, and merges of two and three letters to fill it up."""
    tokens = [*first, *alphabet]
    letters = string.ascii_letters
    pairs = list(itertools.product(letters, letters))
    triples = ((left + right, last) for (left, right), last in itertools.product(pairs, letters))
    merges = list(itertools.islice(itertools.chain(pairs, triples), max(0, vocab_size - len(tokens))))
    tokens += [left + right for left, right in merges]
    if len(tokens) != vocab_size:
        raise ValueError(f"vocab_size must lie between {len(first) + len(alphabet)} and {len(tokens)}")
    return {token: index for index, token in enumerate(tokens)}, merges


def _byte_level(special: list[str], vocab_size: int, *, last: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer whose special tokens come first, or after all others with `last`."""
    first = [] if last else special
    vocab, merges = _bpe(first, _BYTE_LEVEL_ALPHABET, vocab_size - len(special) + len(first))
    tokenizer = Tokenizer(BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def _write(
    directory: Path, tokenizer: Tokenizer, special: list[str], config: dict[str, Any], chat_template: str | None
) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if chat_template is not None:
        config = {**config, "chat_template": chat_template}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
