"""An adapter on a hub, which names its base there and the revision of it."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.test_prepare_sources import run_on
from tests.hub import LoopbackHub
from tests.merge.adapters import merge_by_peft, write_adapter
from tests.merge.test_merge import SIMPLE
from tests.parity.compare import assert_same_tensors


def test_an_adapter_on_the_hub(llama: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    write_adapter(llama, adapter, r=4, target_modules=["q_proj", "v_proj"])
    merge_by_peft(llama, tmp_path / "reference", adapter)
    config = adapter / "adapter_config.json"
    named = {"base_model_name_or_path": "org/model", "revision": "v1"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **named}))
    with LoopbackHub() as hub:
        base = hub.add("org/model", llama, tags=("v1",))
        hub.add("org/model", {"config.json": b"{}"})  # what the branch holds by now
        commit = hub.add("org/adapter", adapter)
        report = run_on(hub, tmp_path, "--merge_adapter", "org/adapter", "--output_dir", "out", *SIMPLE)
    assert_same_tensors(tmp_path / "out", tmp_path / "reference")
    source = report["source"]
    assert (source["model"], source["revision"], source["commit"]) == ("org/model", "v1", base)
    (merged,) = source["merged"]
    assert (merged["adapter"], merged["path"], merged["commit"]) == ("org/adapter", None, commit)
    assert (merged["base"], merged["base_revision"], merged["tensors"]) == ("org/model", "v1", 4)
