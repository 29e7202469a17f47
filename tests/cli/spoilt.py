"""Ways to spoil a good model, and what `ftload prepare` says of it then."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..conftest import ROWS
from ..parity.models import write_model

WEIGHT = "model.layers.1.mlp.up_proj.weight"
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way to spoil a good model, and what is said then."""

    spoil: Callable[[Path], object]
    culprit: str
    hint: str | None
    code: int = 4
    flags: tuple[str, ...] = field(default=())


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


def rewrite(directory: Path, config: Any, class_name: str) -> None:
    """Put a random model of another class in the place of the weights and the configuration."""
    import transformers

    getattr(transformers, class_name)(config).save_pretrained(directory)


def shards(directory: Path) -> list[Path]:
    """Split the weights into shards, with an index."""
    (directory / FILE).unlink()
    write_model(directory, "llama", vocab_size=ROWS, dtype="bfloat16", shards=True)
    return sorted(directory.glob("model-*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def spoil_t5(directory: Path) -> None:
    from transformers import T5Config

    config = T5Config(vocab_size=ROWS, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    rewrite(directory, config, "T5ForConditionalGeneration")


def spoil_bert(directory: Path, class_name: str) -> None:
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    rewrite(directory, config, class_name)


def spoil_classifier(directory: Path) -> None:
    from transformers import LlamaConfig

    rewrite(directory, LlamaConfig.from_pretrained(directory), "LlamaForSequenceClassification")


def spoil_gptq(directory: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            outs, ins = tensors.pop(name).shape
            stem = name.removesuffix("weight")
            tensors[f"{stem}qweight"] = torch.zeros(ins // 8, outs, dtype=torch.int32)
            tensors[f"{stem}qzeros"] = torch.zeros(1, outs // 8, dtype=torch.int32)
            tensors[f"{stem}scales"] = torch.ones(1, outs, dtype=torch.float16)
            tensors[f"{stem}g_idx"] = torch.zeros(ins, dtype=torch.int32)

    edit_weights(directory, pack)
    edit_json(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})


def spoil_fp8(directory: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_weights(directory, pack)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_json(directory / "config.json", quantization_config=quantization)


def spoil_8_bit(directory: Path) -> None:
    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            tensors[f"{name.removesuffix('weight')}SCB"] = torch.ones(tensors[name].shape[0])
            tensors[f"{name}_format"] = torch.tensor(0, dtype=torch.uint8)
            tensors[name] = tensors[name].to(torch.int8)

    edit_weights(directory, pack)
    edit_json(directory / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})


def spoil_pickle(directory: Path) -> None:
    torch.save(load_file(directory / FILE), directory / "pytorch_model.bin")
    (directory / FILE).unlink()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('the pickle ran')",))


def spoil_pickle_with_code(directory: Path) -> None:
    (directory / FILE).unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({WEIGHT: _Evil()}))


def spoil_lacking_and_extra(directory: Path) -> None:
    edit_weights(directory, lambda t: t.update(stray=t.pop(WEIGHT)))


def set_weight(value: float, name: str = WEIGHT) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name][3, 5] = value

        edit_weights(directory, change)

    return spoil


def in_float32(value: float, name: str = WEIGHT) -> Callable[[Path], None]:
    """All weights in float32, which are cast, and one value among them."""

    def spoil(directory: Path) -> None:
        edit_weights(directory, lambda t: t.update({key: tensor.float() for key, tensor in t.items()}))
        set_weight(value, name)(directory)

    return spoil


def cast_weight(dtype: torch.dtype, name: str = WEIGHT) -> Callable[[Path], None]:
    return lambda directory: edit_weights(directory, lambda t: t.update({name: t[name].mul(100).to(dtype)}))


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return spoil


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


CASES = {
    "empty directory": Case(
        spoil=lambda d: [path.unlink() for path in d.iterdir()], culprit="/source/model`", hint="config.json"
    ),
    "weights alone": Case(
        spoil=remove("config.json", "tokenizer.json", "tokenizer_config.json"), culprit="/source/model`",
        hint="config.json",
    ),
    "no config.json": Case(spoil=remove("config.json"), culprit="`config.json`", hint="config.json"),
    "no weights": Case(spoil=remove(FILE), culprit="holds no weights", hint=FILE),
    "an adapter": Case(
        spoil=lambda d: [remove("config.json", FILE)(d), write("adapter_config.json", "{}")(d)],
        culprit="`config.json`", hint="adapter",
    ),
    "truncated": Case(spoil=lambda d: truncate(d / FILE), culprit=f"`{FILE}` is truncated", hint="download it again"),
    "truncated shard": Case(
        spoil=lambda d: truncate(shards(d)[1]), culprit="`model-00002-of-", hint="download it again"
    ),
    "empty file": Case(spoil=write(FILE, ""), culprit=f"`{FILE}` is 0 bytes", hint="download it again"),
    "LFS pointer": Case(
        spoil=write(FILE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        culprit=f"`{FILE}` is a Git LFS pointer", hint="git lfs pull",
    ),
    "shard missing": Case(
        spoil=lambda d: shards(d)[1].unlink(), culprit=f"is listed in `{INDEX}` but missing", hint="again"
    ),
    "index is no JSON": Case(
        spoil=lambda d: [shards(d), write(INDEX, "{")(d)], culprit=f"`{INDEX}` is not valid JSON", hint="incomplete"
    ),
    "wrong shape": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.update({WEIGHT: t[WEIGHT][:-8].clone()})),
        culprit=f"tensor `{WEIGHT}` has shape [88, 64], the configuration asks for [96, 64]",
        hint="belong together",
    ),
    "missing key": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.pop(WEIGHT)), culprit=f"lacks tensor `{WEIGHT}`", hint="config.json"
    ),
    "unexpected key": Case(
        spoil=lambda d: edit_weights(d, lambda t: t.update(stray=torch.zeros(3))),
        culprit="has the unexpected tensor `stray`", hint="config.json",
    ),
    "missing and unexpected keys": Case(
        spoil=spoil_lacking_and_extra, culprit=f"lacks tensor `{WEIGHT}`; has the unexpected tensor `stray`",
        hint="config.json",
    ),
    "T5": Case(spoil=spoil_t5, culprit="`T5ForConditionalGeneration`, not a causal language model", hint="CausalLM"),
    "BERT for masked LM": Case(
        spoil=lambda d: spoil_bert(d, "BertForMaskedLM"), culprit="`BertForMaskedLM`", hint="CausalLM"
    ),
    "BERT": Case(
        spoil=lambda d: spoil_bert(d, "BertModel"), culprit="lacks tensor `cls.predictions.", hint="config.json"
    ),
    "classifier": Case(spoil=spoil_classifier, culprit="`LlamaForSequenceClassification`", hint="CausalLM"),
    "config.json is no JSON": Case(
        spoil=write("config.json", '{"model_type": '), culprit="/model/config.json`", hint="download"
    ),
    "config.json is a list": Case(spoil=write("config.json", "[]"), culprit="/model/config.json`", hint="download"),
    "config.json is empty": Case(spoil=write("config.json", "{}"), culprit="/model/config.json`", hint="transformers"),
    "unknown model_type": Case(
        spoil=lambda d: edit_json(d / "config.json", model_type="quux"), culprit="`quux`", hint="transformers"
    ),
    "bad value in config.json": Case(
        spoil=lambda d: edit_json(d / "config.json", hidden_size="many"), culprit="/model/config.json`",
        hint="transformers",
    ),
    "heads don't divide": Case(
        spoil=lambda d: edit_json(d / "config.json", num_attention_heads=0), culprit="/model/config.json`",
        hint="transformers",
    ),
    "pickle": Case(spoil=spoil_pickle, culprit="`pytorch_model.bin`", hint="--allow_pickle"),
    "pickle with code": Case(
        spoil=spoil_pickle_with_code, flags=("--allow_pickle",), culprit="`pytorch_model.bin`", hint="safetensors"
    ),
    "pickle of garbage": Case(
        spoil=lambda d: [remove(FILE)(d), write("pytorch_model.bin", "no pickle")(d)], flags=("--allow_pickle",),
        culprit="`pytorch_model.bin`", hint="safetensors",
    ),
    "NaN": Case(
        spoil=set_weight(float("nan")), flags=("--use_qlora",), culprit=f"tensor `{WEIGHT}` of `{FILE}`", hint="damaged"
    ),
    "infinity": Case(
        spoil=set_weight(float("-inf")), flags=("--use_qlora",), culprit=f"tensor `{WEIGHT}` of `{FILE}`",
        hint="damaged",
    ),
    "NaN in a file that is copied whole": Case(
        spoil=set_weight(float("nan")), culprit=f"tensor `{WEIGHT}` of `{FILE}` holds NaN or infinity", hint="damaged"
    ),
    "infinity in a file that is linked": Case(
        spoil=set_weight(float("inf")), flags=("--base", "link"),
        culprit=f"tensor `{WEIGHT}` of `{FILE}` holds NaN or infinity", hint="damaged",
    ),
    "NaN in a tensor that is cast": Case(
        spoil=in_float32(float("nan")), culprit=f"tensor `{WEIGHT}` of `{FILE}` holds NaN or infinity", hint="damaged"
    ),
    "NaN in what is not quantised": Case(
        spoil=set_weight(float("nan"), "lm_head.weight"), flags=("--use_qlora",),
        culprit=f"tensor `lm_head.weight` of `{FILE}` holds NaN or infinity", hint="damaged",
    ),
    "float32 beyond bfloat16": Case(
        spoil=in_float32(3.4e38), culprit=f"tensor `{WEIGHT}` of `{FILE}` holds float32 values beyond the range of "
        "bfloat16", hint="in bfloat16 they would be infinite",
    ),
    "float32 beyond bfloat16, quantised": Case(
        spoil=in_float32(-3.4e38), flags=("--use_qlora",),
        culprit=f"tensor `{WEIGHT}` of `{FILE}` holds float32 values beyond the range of bfloat16",
        hint="in bfloat16 they would be infinite",
    ),
    "int8 without a word in config.json": Case(
        spoil=cast_weight(torch.int8),
        culprit=f"tensor `{WEIGHT}` of `{FILE}` holds int8, where the model has bfloat16",
        hint="quantised in a way that its config.json does not tell",
    ),
    "int8 that would be quantised": Case(
        spoil=cast_weight(torch.int8), flags=("--use_qlora",),
        culprit=f"tensor `{WEIGHT}` of `{FILE}` holds int8, where the model has bfloat16", hint="does not tell",
    ),
    "bool": Case(
        spoil=cast_weight(torch.bool, "model.norm.weight"), flags=("--use_lora",),
        culprit=f"tensor `model.norm.weight` of `{FILE}` holds bool, where the model has bfloat16",
        hint="does not tell",
    ),
    "GPTQ": Case(spoil=spoil_gptq, culprit="is already quantised (`gptq`)", hint="16-bit"),
    "FP8 without scales": Case(
        spoil=spoil_fp8, culprit="_proj.weight_scale_inv`) are missing", hint="the checkpoint is incomplete"
    ),
    "8-bit": Case(spoil=spoil_8_bit, culprit="is stored in 8 bits (LLM.int8)", hint="--dequantize"),
    "no tokenizer": Case(
        spoil=remove("tokenizer.json", "tokenizer_config.json"), culprit="/model` holds no tokenizer",
        hint="--tokenizer_name_or_path",
    ),
    "tokenizer is no JSON": Case(
        spoil=write("tokenizer.json", '{"version": '), culprit="/model/tokenizer.json`", hint="download"
    ),
    "tokenizer of nothing": Case(
        spoil=write("tokenizer.json", "{}"), culprit="/model", hint="--tokenizer_name_or_path"
    ),
    "tokenizer_config.json is no JSON": Case(
        spoil=write("tokenizer_config.json", "x"), culprit="/model/tokenizer_config.json`", hint="download"
    ),
    "bad value in generation_config.json": Case(
        spoil=write("generation_config.json", '{"max_new_tokens": "many"}'), culprit="/model/generation_config.json`",
        hint="delete it",
    ),
    "generation_config.json is no JSON": Case(
        spoil=write("generation_config.json", "{"), culprit="/model/generation_config.json`", hint="download"
    ),
}  # fmt: skip
