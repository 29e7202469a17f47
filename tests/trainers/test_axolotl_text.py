"""The text of axolotl's recipe: values come from the flags, and nothing from outside becomes a key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from ftload.loaders.report.handed_over import hand_over
from ftload.loaders.report.outputs import read_report
from ftload.loaders.trainers.interface import Handover
from ftload.loaders.trainers.recipe_text import recipe_text
from ftload.loaders.trainers.registry import TRAINERS

HOSTILE = 'it\'s\n"a": {x} # \\ [b]: \u2028 - ${c}'
AXOLOTL = TRAINERS["axolotl"]


@pytest.fixture(scope="module")
def qlora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Handover:
    from ftload.cli.app import run

    out = tmp_path_factory.mktemp("prepared") / "out"
    words = ["prepare", str(llama), "--use_qlora", "--lora_rank", "4", "--output_dir", str(out), "--quiet"]
    assert run([*words, "--max_seq_length", "96", "--gradient_checkpointing", "--use_flash_attn", "false"]) == 0
    return hand_over(read_report(out), str(out), data="org/chats")


def keys(handover: Handover, **flags: Any) -> dict[str, Any]:
    handover = dataclasses.replace(handover, flags=dataclasses.replace(handover.flags, **flags))
    return yaml.safe_load(recipe_text(AXOLOTL, handover, "axolotl.yaml"))


def test_every_setting_comes_from_the_flags(qlora: Handover) -> None:
    found = keys(qlora, learning_rate=1e-4, num_train_epochs=3, warmup_ratio=0.5, packing=True, max_train_steps=7)
    assert found == {
        "base_model": qlora.directory,
        "tokenizer_config": qlora.directory,
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_model_dir": qlora.adapter,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_mlp_kernel": False,
        "lora_embedding_kernel": False,
        "attn_implementation": "eager",
        "datasets": [
            {"path": "org/chats", "split": "train", "type": "chat_template", "field_messages": "messages"},
        ],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": f"{qlora.directory}-trained-data",
        "sequence_len": 96,
        "excess_length_strategy": "truncate",
        "sample_packing": True,
        "val_set_size": 0.0,
        "output_dir": f"{qlora.directory}-trained",
        "bf16": True,
        "fp16": False,
        "num_epochs": 3,
        "max_steps": 7,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.5,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optimizer": "paged_adamw_32bit",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": 42,
        "logging_steps": 10,
        "save_strategy": "no",
    }


def test_whatever_comes_from_outside_stays_a_value(qlora: Handover) -> None:
    hostile = dataclasses.replace(
        qlora, directory=HOSTILE, model=HOSTILE, by_reference=True, revision=HOSTILE, adapter=HOSTILE,
        output_dir=HOSTILE, messages=HOSTILE, data=(HOSTILE, HOSTILE + ".json"),
    )  # fmt: skip
    found = keys(hostile, dataset_mixer_list=[HOSTILE, "1.0", HOSTILE + ".json", "1.0"], with_tracking=True,
                 wandb_project_name=HOSTILE)  # fmt: skip
    for key in ("base_model", "tokenizer_config", "revision_of_model", "lora_model_dir", "output_dir", "wandb_project"):
        assert found[key] == HOSTILE
    assert [(one["path"], one.get("ds_type")) for one in found["datasets"]] == [
        (HOSTILE, None),
        (HOSTILE + ".json", "json"),
    ]
    assert {one["field_messages"] for one in found["datasets"]} == {HOSTILE}
    assert found.keys() == {*keys(qlora), "revision_of_model", "wandb_project", "wandb_entity"}


def test_a_base_elsewhere_is_named_and_its_tokenizer_taken_from_the_directory(qlora: Handover) -> None:
    lora = dataclasses.replace(qlora, model="org/base", revision="c0ffee", by_reference=True, quantised=False)
    found = keys(lora)
    assert (found["base_model"], found["revision_of_model"]) == ("org/base", "c0ffee")
    assert (found["tokenizer_config"], found["adapter"]) == (qlora.directory, "lora")
    assert "load_in_4bit" not in found
    assert found["optimizer"] == "adamw_torch_fused"


def test_what_axolotl_cannot_take_is_refused(qlora: Handover) -> None:
    assert AXOLOTL.refusal(qlora) is None
    experts = AXOLOTL.refusal(dataclasses.replace(qlora, quantised_experts=True))
    assert experts is not None
    assert experts.reason == (
        "its experts are 4-bit, which transformers loads after `import ftload.register`, from 5.17 on; axolotl 0.19 "
        "requires transformers 5.16.1"
    )
    unknown = AXOLOTL.refusal(dataclasses.replace(qlora, max_length=None))
    assert unknown is not None
    assert "512 tokens" in unknown.reason


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": None, "quantised": False}, "Norms, embeddings and head are made float32"),
        ({}, "load_in_4bit is needed, though the base is 4-bit as it is stored"),
        ({"attention": "sdpa", "attention_asked": "flash_attention_2"}, "set attn_implementation to flash_attention_2"),
    ],
)
def test_what_it_does_otherwise_is_said(qlora: Handover, changes: dict[str, Any], said: str) -> None:
    assert said in " ".join(AXOLOTL.notes(dataclasses.replace(qlora, **changes)))
