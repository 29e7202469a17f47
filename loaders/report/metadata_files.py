"""What stands beside the weights in an output: tokenizer, configurations, index, model card and, last, the report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..plan.plan import Plan
from ..source.file_names import REPORT_FILE
from ..source.license import CARD_FILE
from ..system.durable import disk_errors, hash_file, hash_files, sync_file
from ..system.quiet import quiet_transformers
from ..tokenizer.tokenizer import save_tokenizer
from ..write.run import Run
from ..write.written import Written
from .document import Report, WrittenFile
from .json_values import to_json
from .model_card import model_card
from .report import adapter_base, adapter_revision, build_report, data_bytes


def write_report(run: Run, plan: Plan, written: Written) -> Report:
    """Write everything beside the weights, the report last; returns it."""
    stage, watch = run.staging.stage, run.watch
    with watch.stage("save"), disk_errors(stage):
        with quiet_transformers():
            tokenizer = _save_tokenizer(plan, stage)
            _save_config(plan, stage)
        if plan.adapter is not None and plan.targets is not None:
            for name in tokenizer:  # an adapter is loaded and shared by itself too
                (stage / "adapter" / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(stage / name, stage / "adapter" / name)
            config = plan.adapter.config(plan.targets, base=adapter_base(plan), revision=adapter_revision(plan))
            _write_json(stage / "adapter" / "adapter_config.json", config)
        if [file.path for file in plan.model_files] not in ([], ["model.safetensors"]):
            _write_json(stage / "model.safetensors.index.json", _index(plan))
    with watch.stage("hash"), disk_errors(stage):
        paths = [path for path in sorted(stage.rglob("*")) if path.is_file()]
        known = {stage / name: digest for name, digest in written.hashes.items()}
        sizes = {path: path.stat().st_size for path in paths if path not in known}
        known |= hash_files(sizes, watch.progress)
        files = tuple(_written(path, stage, known[path]) for path in paths)
    base = stage if plan.base == "copy" else plan.checkpoint.source.root
    report = build_report(
        plan, fingerprint=run.fingerprint, base=base, files=files, timings=watch.stages, written=written
    )
    with disk_errors(stage):
        (stage / CARD_FILE).write_text(model_card(report), encoding="utf-8")
        files = sorted([*files, _written(stage / CARD_FILE, stage)], key=lambda file: file.path)
        report = replace(report, files=tuple(files))
        for path in stage.rglob("*"):
            sync_file(path)
        _write_json(stage / REPORT_FILE, to_json(report))
        sync_file(stage / REPORT_FILE)
        sync_file(stage)
    return report


def _save_tokenizer(plan: Plan, stage: Path) -> tuple[str, ...]:
    """Write the tokenizer's files, code of its own among them; returns their names."""
    before = set(stage.rglob("*"))
    save_tokenizer(plan.tokenizer, stage)
    new = set(stage.rglob("*")) - before
    return tuple(sorted(path.relative_to(stage).as_posix() for path in new if path.is_file()))


def _save_config(plan: Plan, stage: Path) -> None:
    """The configuration; of a base that is another's it tells tools that look here which model that is."""
    root = plan.checkpoint.source.root
    plan.config.save_pretrained(stage)
    if plan.base == "copy" and plan.skeleton.model.can_generate():
        try:
            plan.generation_config.save_pretrained(stage)
        except ValueError:
            # transformers refuses to write settings that contradict each other, which it was ready to read
            path = root / "generation_config.json"
            if path.exists():
                changes = {} if plan.padding.id is None else {"pad_token_id": plan.padding.id}
                _write_json(stage / path.name, {**json.loads(path.read_text(encoding="utf-8")), **changes})
    if plan.request.trust_remote_code:
        for code in root.glob("*.py"):
            shutil.copyfile(code, stage / code.name)


def _index(plan: Plan) -> dict[str, Any]:
    outputs = {
        output.name: (file.path, output) for file in plan.model_files for step in file.steps for output in step.outputs
    }
    return {
        "metadata": {
            "total_parameters": sum(output.parameters for _, output in outputs.values()),
            "total_size": data_bytes(output for _, output in outputs.values()),
        },
        "weight_map": {name: outputs[name][0] for name in sorted(outputs)},
    }


def json_text(value: Any) -> str:
    """A JSON value as ftload's files hold it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def _written(path: Path, root: Path, sha256: str | None = None) -> WrittenFile:
    name = path.relative_to(root).as_posix()
    return WrittenFile(path=name, bytes=path.stat().st_size, sha256=sha256 or hash_file(path))
