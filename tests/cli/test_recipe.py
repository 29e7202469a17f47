"""`ftload recipe`: the file for a trainer, where it goes, and what is refused. Open Instruct's is run by bash here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Result

Ftload = Callable[..., Result]

FINETUNE = """if model_path:
    snapshot_download(model_path, revision=args.model_revision)
"""
"""What Open Instruct's script does with its model's name, in two lines."""


def prepared(ftload: Ftload, llama: Path, output: Path, *flags: str | Path) -> Path:
    result = ftload("prepare", "--model", llama, "--lora_rank", "4", "--output_dir", output, "--quiet", *flags)
    assert result.code == 0, result.err
    return output


def run_recipe(recipe: Path, checkout: Path) -> tuple[str, list[str]]:
    """The script that a recipe hands to `accelerate launch`, and the words after it: as bash reads them."""
    (checkout / "open_instruct").mkdir(parents=True)
    (checkout / "open_instruct" / "finetune.py").write_text(FINETUNE)
    (checkout / "bin").mkdir()
    accelerate = checkout / "bin" / "accelerate"
    accelerate.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > words\n')
    accelerate.chmod(0o755)
    environment = {**os.environ, "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", recipe], cwd=checkout, env=environment, check=True, timeout=60)
    launch, mixed, bf16, script, *words, end = (checkout / "words").read_text().split("\0")
    assert (launch, mixed, bf16, end) == ("launch", "--mixed_precision", "bf16", "")
    return script, words


def test_open_instruct_is_given_its_own_flags(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    flags = ["--use_qlora", "--learning_rate", "1e-4", "--chat_template_name", "tulu", "--add_bos", "--packing", "true"]
    out = prepared(ftload, llama, tmp_path / "a 'b' $HOME", *flags, "--use_flash_attn", "false", "--strict", "false")
    data = tmp_path / "chats.jsonl"
    data.write_text("{}\n")
    result = ftload("recipe", out, "--for", "open-instruct", "--data", data)
    assert result.code == 0, result.err
    recipe = tmp_path / "recipe.sh"
    recipe.write_text(result.out)
    script, words = run_recipe(recipe, tmp_path / "checkout")
    assert script == "open_instruct/finetune_directory.py"
    assert (tmp_path / "checkout" / script).read_text() == "if model_path:\n    pass  # a directory\n"
    # no --chat_template_name, no --add_bos, no --use_flash_attn, and nothing of ftload's own
    assert words == [
        *("--model_name_or_path", str(out), "--use_lora", "true", "--use_qlora", "true"),
        *("--output_dir", f"{out}-trained", "--exp_name", "finetune", "--dataset_mixer_list", str(data), "1.0"),
        *("--learning_rate", "0.0001", "--lora_rank", "4", "--packing", "true"),
    ]
    comments = result.out.replace("\n#   ", " ")
    assert "ends with HFValidationError for a directory: the first command copies it without that call." in comments
    assert (
        "\n# - FlashAttention is taken wherever it is installed: there is no --use_flash_attn any more.\n" in comments
    )


def test_a_path_stays_a_comment_and_a_word(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = prepared(ftload, llama, tmp_path / "one\ntouch two", "--use_lora", "--base", "copy")
    recipe = tmp_path / "recipe.sh"
    result = ftload("recipe", out, "--for", "open-instruct", "--output", recipe)
    assert (result.code, recipe.stat().st_mode & 0o777) == (0, 0o644), result.err
    _, words = run_recipe(recipe, tmp_path / "checkout")
    assert words[:2] == ["--model_name_or_path", str(out)]
    assert not (tmp_path / "checkout" / "two").exists()


def test_an_original_is_named_and_the_tokenizer_taken_from_the_directory(
    ftload: Ftload, llama: Path, tmp_path: Path
) -> None:
    out = prepared(ftload, llama, tmp_path / "out", "--use_lora")
    recipe = tmp_path / "recipe.sh"
    assert ftload("recipe", out, "--for", "open-instruct", "--output", recipe).code == 0
    _, words = run_recipe(recipe, tmp_path / "checkout")
    assert words[:6] == [
        *("--model_name_or_path", str(llama), "--tokenizer_name_or_path", str(out), "--use_lora", "true")
    ]
    assert words[words.index("--dataset_mixer_list") :][:3] == [
        *("--dataset_mixer_list", "allenai/tulu-3-sft-personas-algebra", "1.0")
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--lora_target_modules", "q_proj"), "--lora_target_modules"),
        (("--lora_config", "{lora}"), "--lora_config"),
        (("--lora_config", "{lora}", "--lora_target_modules", "q_proj"), "--lora_target_modules --lora_config"),
    ],
)
def test_what_open_instruct_can_not_train_is_refused(
    flags: tuple[str, ...], named: str, ftload: Ftload, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "lora.yaml").write_text("r: 4\ntarget_modules: [v_proj]\n")
    words = [word.replace("{lora}", str(tmp_path / "lora.yaml")) for word in flags]
    out = prepared(ftload, llama, tmp_path / "out", "--use_lora", *words)
    result = ftload("recipe", out, "--for", "open-instruct")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"error: Open Instruct can't train `{out}`: it was prepared with {named}; finetune.py makes a plain adapter of "
        "its own, of seven names\n"
        f"hint: prepare it without {named}, or take --for trl, which trains the prepared adapter\n"
    )
    assert (
        f"Open Instruct can't train it: it was prepared with {named}; finetune.py makes a plain adapter of its own"
        in (out / "README.md").read_text()
    )


def test_the_card_says_what_trainers_must_be_told(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    card = (prepared(ftload, llama, tmp_path / "out", "--use_qlora") / "README.md").read_text()
    assert (
        """Open Instruct:

```sh
accelerate launch --mixed_precision bf16 open_instruct/finetune.py \\
  --model_name_or_path path/to/this/directory \\
  --use_lora true \\
  --use_qlora true
```
"""
        in card
    )


def test_json_is_one_document(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = prepared(ftload, llama, tmp_path / "out")
    result = ftload("recipe", out, "--for", "open-instruct", "--json")
    document = json.loads(result.out)
    assert list(document) == ["trainer", "directory", "file", "text", "launch", "notes", "tested"]
    assert (document["file"], document["launch"]) == ("open-instruct.sh", "bash open-instruct.sh")
    assert document["text"] == ftload("recipe", out, "--for", "open-instruct").out
    assert document["notes"][0] == "Run it in a checkout of Open Instruct."


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["--for", "nobody"], 2, "`--for nobody`: no such trainer", "known are "),
        (
            ["--for", "open-instruct", "--data", "no.jsonl"],
            3,
            "`--data no.jsonl`: no such file",
            "give a .json or .jsonl file of conversations, or a hub id",
        ),
        (["--for", "open-instruct", "--output", "{out}"], 8, "`{out}` exists", "choose another --output"),
    ],
)
def test_what_can_not_be_made(
    ftload: Ftload, llama: Path, tmp_path: Path, words: list[str], code: int, message: str, hint: str
) -> None:
    out = prepared(ftload, llama, tmp_path / "out")
    result = ftload("recipe", out, *(word.format(out=out) for word in words), "--json")
    error = json.loads(result.out)["error"]
    assert (result.code, error["message"]) == (code, message.format(out=out))
    assert error["hint"].startswith(hint)


def test_a_report_that_was_changed_is_refused(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    out = prepared(ftload, llama, tmp_path / "out")
    path = out / "ftload_report.json"
    for name, value in {"learning_rate": "fast", "per_device_train_batch_size": [1], "dataset_mixer_list": "x"}.items():
        shutil.copy(path, tmp_path / "kept")
        report = json.loads(path.read_text())
        report["arguments"][name]["value"] = value
        path.write_text(json.dumps(report))
        result = ftload("recipe", out, "--for", "open-instruct")
        assert result.code == 4
        assert f"`ftload_report.json`: `{name}` is {value!r}, which is no " in result.err
        shutil.copy(tmp_path / "kept", path)


def test_there_must_be_a_report(ftload: Ftload, llama: Path, tmp_path: Path) -> None:
    assert ftload("recipe", llama, "--for", "open-instruct").code == 4
    result = ftload("recipe", tmp_path / "none", "--for", "open-instruct")
    assert (result.code, result.err.splitlines()[0]) == (3, f"error: `{tmp_path / 'none'}` does not exist")
