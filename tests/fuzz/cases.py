# ruff: noqa: E501 -- lists of nasty words
"""Hostile inputs: good models, tokenizers and command lines, spoilt in ways that hypothesis chooses."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLAGS = ((), ("--use_lora",), ("--use_qlora",), ("--use_lora", "--base", "copy", "--embedding_init", "reference"))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One hostile input."""

    base: str
    """Which good model it starts from, see `bases.py`."""
    what: str
    """In words, for a report."""
    plant: Callable[[Path], None]
    """Spoils a copy of the model."""
    flags: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{self.base} {' '.join(self.flags)}: {self.what}"


INTEGERS = st.one_of(
    st.sampled_from([-(2**63), -1, 0, 1, 2, 7, 2**16, 2**31, 2**53, 2**63, 2**64, 10**15, 10**30, 10**400]),
    st.integers(),
)
TEXTS = st.one_of(
    st.sampled_from(
        [
            "", " ", ".", "..", "../x", "/etc/passwd", "a\0b", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "\ud800", "%s%n",
            "model", "llama", "gpt2", "bfloat16", "float64", "nf4", "BF16", "[link](http://x)", "<script>", "{{ 7*7 }}", "`rm`", "x" * 5000,
            "model.safetensors", INDEX, "config.json", "tokenizer.json", "true", "None", "\n", "\r\n", "lm_head.weight",
        ]
    ),
    st.text(max_size=20),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), INTEGERS, st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=6,
)


def dump(value: Any) -> bytes:
    """JSON with whatever Python can write: NaN, lone surrogates, integers of any length."""
    return json.dumps(value).encode()


@st.composite
def spoilt_json(draw: st.DrawFn, document: Any) -> tuple[Any, str]:
    """A copy of a document with one to three places changed."""
    document = copy.deepcopy(document)
    said = []
    for _ in range(draw(st.integers(1, 3))):
        place, path = document, []
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            path.append(key)
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            action = draw(st.sampled_from(["replace", "replace", "remove", "add", "twin"]))
            value = draw(VALUES)
            said.append(f"{action} {path} {value!r:.60}")
            if action == "replace":
                place[key] = value
            elif action == "remove":
                del place[key]
            elif action == "add" and isinstance(place, dict):
                place[draw(TEXTS)] = value
            elif action == "add":
                place.append(value)
            elif isinstance(place, dict):
                place[draw(st.sampled_from(keys))] = copy.deepcopy(inner)
            else:
                place.extend(copy.deepcopy(place))
            break
    return document, "; ".join(said)


@st.composite
def spoilt_bytes(draw: st.DrawFn, data: bytes, span: int) -> tuple[bytes, str]:
    """Bytes changed within the first `span`, or cut, or more of them."""
    action = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "zero", "append"]))
    position = draw(st.integers(0, min(span, len(data)) - 1))
    piece = draw(st.binary(min_size=1, max_size=16))
    result = {
        "flip": data[:position] + bytes([data[position] ^ piece[0] or 1]) + data[position + 1 :],
        "cut": data[:position],
        "insert": data[:position] + piece + data[position:],
        "repeat": data[:position] + data[:position] + data[position:],
        "zero": data[:position] + bytes(len(piece)) + data[position + len(piece) :],
        "append": data + piece,
    }[action]
    return result, f"{action} at {position}"


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


def exchanged(header: dict[str, Any], data: bytes, name: str, value: bytes) -> bytes:
    """The file with other bytes in one tensor, which is flat and of one byte an element."""
    entries, parts, position = {}, [], 0
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    for key, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        part = value if key == name else data[begin:end]
        shape = [len(value)] if key == name else entry["shape"]
        entries[key] = {**entry, "shape": shape, "data_offsets": [position, position + len(part)]}
        parts.append(part)
        position += len(part)
    return joined(dump(entries), b"".join(parts))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def plant(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).write_bytes(content)

    return plant


@st.composite
def cases(draw: st.DrawFn, bases: dict[str, Path]) -> Case:
    """Any hostile input over these good models."""
    base = draw(st.sampled_from(sorted(bases)))
    root = bases[base]
    kind = draw(
        st.sampled_from(
            ["header", "header", "length", "bytes", "index", "config", "config", "generation", "tokenizer",
             "tokenizer config", "state", "yaml", "template", "words"]
        )
    )  # fmt: skip
    flags = draw(st.sampled_from(FLAGS))
    weights = sorted(root.glob("*.safetensors"))[0]
    if kind == "header":
        header, data = split(weights.read_bytes())
        header, said = draw(spoilt_json(header))
        return Case(base=base, what=said, plant=write(weights.name, joined(dump(header), data)), flags=flags)
    if kind == "length":
        header, data = split(weights.read_bytes())
        length = draw(INTEGERS)
        content = joined(dump(header), data, length)
        return Case(
            base=base,
            what=f"header length {length:.3g}" if abs(length) < 1e300 else "huge header length",
            plant=write(weights.name, content),
            flags=flags,
        )
    if kind == "bytes":
        content = weights.read_bytes()
        content, said = draw(spoilt_bytes(content, draw(st.sampled_from([16, 4000, len(content)]))))
        return Case(base=base, what=f"{weights.name}: {said}", plant=write(weights.name, content), flags=flags)
    if kind == "state":
        header, data = split(weights.read_bytes())
        states = sorted(name for name in header if ".quant_state." in name)
        if states and draw(st.booleans()):
            name = draw(st.sampled_from(states))
            begin, end = header[name]["data_offsets"]
            state, said = draw(spoilt_json(json.loads(data[begin:end])))
            content = exchanged(header, data, name, dump(state))
            return Case(base=base, what=f"{name}: {said}", plant=write(weights.name, content), flags=flags)
        # the small tensors at the start of the data
        spoilt, said = draw(spoilt_bytes(data, 2000))
        spoilt = (spoilt + bytes(len(data)))[: len(data)]
        return Case(
            base=base, what=f"data: {said}", plant=write(weights.name, joined(dump(header), spoilt)), flags=flags
        )
    if kind in ("config", "generation", "tokenizer", "tokenizer config", "index"):
        name = {
            "config": "config.json", "generation": "generation_config.json", "tokenizer": "tokenizer.json",
            "tokenizer config": "tokenizer_config.json", "index": INDEX,
        }[kind]  # fmt: skip
        path = root / name
        document = json.loads(path.read_text()) if path.exists() else {"weight_map": {}, "metadata": {}}
        if kind == "index" and draw(st.booleans()):
            document["weight_map"] = {tensor: draw(TEXTS) for tensor in list(document["weight_map"])[:3]}
        if draw(st.integers(0, 9)):
            value, said = draw(spoilt_json(document))
            content = dump(value)
        else:
            content, said = draw(spoilt_bytes(dump(document), 1000))
        return Case(base=base, what=f"{name}: {said}", plant=write(name, content), flags=flags)
    if kind == "yaml":
        text = draw(yaml_texts())
        return Case(
            base=base,
            what=f"run.yaml: {text!r:.80}",
            plant=write("run.yaml", text.encode("utf-8", "surrogatepass")),
            flags=("run.yaml", *flags),
        )
    if kind == "template":
        text = draw(templates())
        more = ("--chat_template_name", "own.jinja") if draw(st.booleans()) else ("--add_bos",)
        name = "own.jinja" if more[0] != "--add_bos" else "chat_template.jinja"
        return Case(
            base=base,
            what=f"{name}: {text!r:.80}",
            plant=write(name, text.encode("utf-8", "surrogatepass")),
            flags=(*flags, *more),
        )
    words = draw(st.lists(st.one_of(st.sampled_from(WORDS), TEXTS), min_size=1, max_size=4))
    words = [word.replace("\0", "0").encode(errors="replace").decode() for word in words]
    return Case(base=base, what=f"words {words!r:.100}", plant=lambda directory: None, flags=(*flags, *words))


WORDS = (
    "--lora_rank", "--lora_alpha", "--lora_dropout", "--max_memory", "--max_shard_size", "--seed", "--model_revision", "--config_name",
    "--tokenizer_name", "--additional_model_arguments", '{"num_hidden_layers": 3}', "--base", "link", "reference", "--embedding_init",
    "--lora_target_modules", "all-linear", "q_proj", "lm_head", "--use_dora", "--init_lora_weights", "pissa_niter_1", "--trainable_token_indices", "new", "--lora_config", "config.json", "--min_quantized", "--strict", "--allow_pickle", "--get_tokenizer_fn",
    "get_tokenizer_simple_v1", "get_tokenizer_tulu_v1", "--chat_template_name", "tulu", "zephyr", "--add_bos", "0", "-1", "1e400", "nan", "1KB", "64MB",
    "--gradient_checkpointing", "--use_liger_kernel", "--no_use_flash_attn", "--quiet", "--", "-h", "=", "--model=", "--output_dir",
)  # fmt: skip


@st.composite
def yaml_texts(draw: st.DrawFn) -> str:
    lines = draw(
        st.lists(
            st.one_of(
                st.builds("{}: {}".format, st.sampled_from(["lora_rank", "seed", "use_lora", "lora_config", "init_lora_weights", "trainable_token_indices", "model_name_or_path", "lora_target_modules", "dataset_mixer", "x"]), st.one_of(TEXTS, INTEGERS, st.floats(), VALUES.map(lambda v: json.dumps(v)))),
                st.sampled_from(
                    [
                        "a: &a [x, x, x, x]", "b: &b [*a, *a, *a, *a]", "c: &c [*b, *b, *b, *b]", "seed: *c", "!!python/object:os.system x: y",
                        "seed: !!python/object/apply:os.system [ls]", "<<: *a", "- x", "---", "...", "%YAML 9.9", "? [a]", "seed: 0x7f", "seed: 1_000",
                        "seed: 2020-01-01", "lora_rank: .inf", "\t", "key", "'", '"', "seed: {", "[" * 300, "{a: " * 300,
                    ]
                ),
                TEXTS,
            ),
            max_size=6,
        )
    )  # fmt: skip
    return "\n".join(lines)


@st.composite
def templates(draw: st.DrawFn) -> str:
    pieces = st.sampled_from(
        [
            "{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ eos_token }}", "{{ bos_token }}", "{% if true %}", "{% endif %}",
            "{% for i in range(99999) %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception('x') }}", "{{ 1/0 }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% set x = 'a' * 1000 %}", "{{ x * 1000000000 }}", "{% include 'x' %}",
            "{{ cycler.__init__.__globals__ }}", "{{ messages | tojson }}", "{% generation %}", "{% endgeneration %}", "{# ", "#}", "{{", "}}", "{%",
            "{{ lipsum(n=100) }}", "{{ namespace() }}", "{{ strftime_now('%s' * 99) }}", "{{ messages[99]['x'] }}", "{{ undefined.x }}", "\0", "\ud800",
        ]
    )  # fmt: skip
    return "".join(draw(st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=8)))
