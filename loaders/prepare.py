"""Preparing a model, from the flags to the finished directory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import nf4
from .checkpoint import fetch_config, open_checkpoint
from .environment import quiet_transformers, require
from .errors import MissingRequirementError, OutputError, ResourceError
from .gguf import dequantise
from .lora import adapter_config
from .model_card import model_card
from .model_config import load_config, load_generation_config
from .plan import Plan, make_plan
from .processes import Processes, join_processes
from .report import REPORT_FILE, adapter_base, build_report, data_bytes
from .request import Decision, Request, resolve_request
from .skeleton import build_skeleton
from .source import Source, config_file_names, resolve_source, tokenizer_file_names
from .strategy import STRATEGIES
from .stream import Progress, Written, disk_errors, hash_file, sync_file, write_tensors
from .tokenizer import PreparedTokenizer, prepare_tokenizer, resolve_tokenizer_source, save_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .arguments import Arguments


class Timings:
    """Seconds spent in each stage, and word of it to whoever watches."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that comes again adds up."""
        self._progress.stage(name)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """All that is known before anything is written."""

    arguments: Arguments
    source: Source
    """As the user named it; the plan's checkpoint may lie elsewhere, for a GGUF file."""
    plan: Plan
    tokenizer: PreparedTokenizer
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]


def prepare(arguments: Arguments, progress: Progress) -> dict[str, Any] | None:
    """Plan and write the output directory; returns the report that was written into it.

    Of several processes (see `processes.py`) each writes its share; all but the first return None.
    Raises `FtloadError` for whatever a user can mend; then nothing is left behind.
    """
    timings = Timings(progress)
    request = resolve_request(arguments)
    processes = join_processes()
    report = None
    with processes.failing_together():
        _check_output(request)
        with _sibling_directory(request.output) as work:
            prepared = make_ready(arguments, request, work, timings)
            encode = nf4.encode
            if prepared.plan.encodes:
                # not part of the plan: importing numba takes a while, and nothing that is planned depends on it
                with timings.stage("encoder"):
                    encode, decisions = _choose_encoder()
                prepared = dataclasses.replace(prepared, decisions=(*prepared.decisions, *decisions))
            if arguments.own.strict:
                check_strict(prepared.decisions)
            stage = work / "output"
            with disk_errors(stage):
                stage.mkdir()
                _check_space(prepared.plan, stage)
            stage = processes.agree_on(stage)
            share = _write_weights(prepared.plan, processes, encode, stage, timings, progress)
            written = Written.all_of(processes.gather("written", dataclasses.asdict(share)))
            if processes.rank == 0:
                report = _finish(prepared, written, stage, timings)
                _publish(stage, request)
            processes.gather("published", True)
    return report


def make_ready(arguments: Arguments, request: Request, work: Path, timings: Timings) -> Prepared:
    """Everything up to the plan. Reads headers, not weights; `work` is used for what a GGUF file is turned into."""
    strategy = STRATEGIES[request.strategy]
    require(strategy.packages, purpose=f"`{strategy.name}`")
    options = arguments.tokenizer
    with timings.stage("resolve"):
        name, revision, warnings = resolve_tokenizer_source(
            tokenizer_name_or_path=options.tokenizer_name_or_path,
            tokenizer_revision=options.tokenizer_revision,
            tokenizer_name=options.tokenizer_name,
            model=request.model,
            model_revision=request.revision,
        )
        source = resolve_source(request.model, request.revision)
        same = (name, revision) == (request.model, request.revision)
        tokenizer_source = source if same else resolve_source(name, revision)
        _check_apart(request.output, source, tokenizer_source)
    decisions: list[Decision] = []
    if source.kind != "hub" and request.revision is not None:
        decisions.append(
            Decision(
                what="model_revision", requested=request.revision, effective="none",
                reason="the model is local: it has no revisions",
            )
        )  # fmt: skip

    config = None
    if source.kind != "gguf":
        with timings.stage("config"):
            config = _read_config(request, source)
    with timings.stage("tokenizer"):
        tokenizer_source.fetch(
            tokenizer_file_names(tokenizer_source.files, trust_remote_code=request.trust_remote_code)
        )
        tokenizer = prepare_tokenizer(
            tokenizer_source.root,
            get_tokenizer_fn=options.get_tokenizer_fn,
            use_fast=options.use_fast,
            trust_remote_code=request.trust_remote_code,
            chat_template_name=options.chat_template_name,
            add_bos=options.add_bos,
            name=name,
            gguf_file=tokenizer_source.gguf_file,
        )
    weights = source
    if source.kind == "gguf":
        with timings.stage("dequantise"):
            weights = dequantise(source, work / "gguf")
    with timings.stage("headers"):
        checkpoint = open_checkpoint(weights, allow_pickle=request.allow_pickle)
    with timings.stage("plan"):
        config, config_warnings = config or _read_config(request, weights)
        skeleton = build_skeleton(
            checkpoint, config, trust_remote_code=request.trust_remote_code,
            tokenizer_size=tokenizer.facts()["size"],
        )  # fmt: skip
        plan = make_plan(request, strategy, checkpoint, skeleton)
    return Prepared(
        arguments=arguments,
        source=source,
        plan=plan,
        tokenizer=tokenizer,
        decisions=(*decisions, *tokenizer.decisions, *plan.decisions),
        warnings=(*source.notes, *warnings, *config_warnings, *tokenizer.warnings, *plan.warnings),
    )


def _choose_encoder() -> tuple[nf4.Encoder, tuple[Decision, ...]]:
    problem = nf4.numba_problem()
    if problem is None:
        return nf4.encode, ()
    decision = Decision(what="nf4_encoder", requested="numba", effective="bitsandbytes", reason=problem)
    return nf4.encode_with_bitsandbytes, (decision,)


def check_strict(decisions: tuple[Decision, ...]) -> None:
    """Raise `MissingRequirementError` when anything is done otherwise than it was asked for."""
    other = [decision for decision in decisions if decision.effective != decision.requested]
    if other:
        listed = "; ".join(f"{d.what}: {d.requested} → {d.effective} ({d.reason})" for d in other)
        raise MissingRequirementError(
            f"`--strict`: not as requested: {listed}",
            hint="ask for what is possible here, or leave out --strict",
        )


def _read_config(request: Request, source: Source) -> tuple[PretrainedConfig, tuple[str, ...]]:
    """The model's configuration, or the one of `--config_name`, and warnings; its code comes with it."""
    fetch_config(source)
    load_generation_config(source.root)  # written much later: an error must come now
    if request.trust_remote_code:
        source.fetch(file.path for file in source.files if file.path.endswith(".py"))
    root = source.root
    if request.config_name is not None:
        other = resolve_source(request.config_name, request.revision)
        fetch_config(other)
        root = other.root
    return load_config(root, overrides=request.config_overrides, trust_remote_code=request.trust_remote_code)


def _check_output(request: Request) -> None:
    output = request.output
    with disk_errors(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise OutputError(f"`{output}` exists and is not a directory", hint="choose another --output_dir")
        if not output.exists() or not any(output.iterdir()):
            return
        if not request.overwrite:
            raise OutputError(
                f"`{output}` exists and is not empty", hint="choose another --output_dir, or pass --overwrite"
            )
        if not (output / REPORT_FILE).exists():
            raise OutputError(
                f"`{output}` was not written by ftload: it holds no `{REPORT_FILE}`",
                hint="--overwrite deletes only what ftload wrote: remove the directory yourself",
            )


def _check_apart(output: Path, source: Source, tokenizer_source: Source) -> None:
    """An output is renamed into place as a whole: what stood there before, with all that is in it, is deleted."""
    kept = {
        "the model itself": source.root,
        "the tokenizer itself": tokenizer_source.root,
        "the current directory": Path.cwd(),
        "your home": Path.home(),
    }
    for what, path in kept.items():
        if path.resolve().is_relative_to(output.resolve()):
            raise OutputError(f"`{output}` is or holds {what}", hint="choose another --output_dir")


def _check_space(plan: Plan, directory: Path) -> None:
    linked = plan.request.base == "link"
    needed = sum(file.size for file in plan.files if not (linked and file.layout is None))
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ResourceError(
            f"`{plan.request.output.parent}` has {free / 1e9:.1f} GB free, the tensors take {needed / 1e9:.1f} GB",
            hint="free some disk space, or choose another --output_dir",
        )


@contextlib.contextmanager
def _sibling_directory(output: Path) -> Iterator[Path]:
    """A fresh directory beside the output, on the same disk, that is gone in the end whatever happens.

    Parents that had to be made for it are removed again when they are left empty.
    """
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        with disk_errors(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{output.name[:40]}.ftload-", dir=output.parent))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def _write_weights(
    plan: Plan, processes: Processes, encode: nf4.Encoder, stage: Path, timings: Timings, progress: Progress
) -> Written:
    if plan.model_files:
        with timings.stage("fetch"):
            sizes = {file.path: file.bytes for file in plan.checkpoint.source.files}
            progress.expect(bytes=sum(sizes[name] for name in plan.checkpoint.weight_files), tensors=0)
            plan.checkpoint.source.fetch(
                plan.checkpoint.weight_files, lambda count: progress.advance(bytes=count, tensors=0)
            )
    with timings.stage("write"):
        return write_tensors(plan, processes.share(plan.files), encode, stage, progress)


def _finish(prepared: Prepared, written: Written, stage: Path, timings: Timings) -> dict[str, Any]:
    """Everything beside the weights, the report last."""
    plan, source = prepared.plan, prepared.source
    with timings.stage("save"), disk_errors(stage):
        with quiet_transformers():
            save_tokenizer(prepared.tokenizer, stage)
            if plan.base == "copy":
                _save_config(prepared, stage)
        if plan.adapter_file is not None and plan.targets is not None:
            config = adapter_config(
                plan.targets,
                rank=plan.request.lora_rank,
                alpha=plan.request.lora_alpha,
                dropout=plan.request.lora_dropout,
                base=adapter_base(plan, source),
                revision=source.commit if plan.base == "reference" else None,
            )
            _write_json(stage / "adapter" / "adapter_config.json", config)
        if [file.path for file in plan.model_files] not in ([], ["model.safetensors"]):
            _write_json(stage / "model.safetensors.index.json", _index(plan))
    with timings.stage("hash"), disk_errors(stage):
        files = [_file_entry(path, stage, written.hashes) for path in sorted(stage.rglob("*")) if path.is_file()]
    used = [file.path for file in source.files if file.path in _used_files(prepared)]
    report = build_report(
        plan,
        arguments=prepared.arguments,
        source=source,
        source_files=used,
        tokenizer=prepared.tokenizer.facts(),
        warnings=prepared.warnings,
        decisions=prepared.decisions,
        files=files,
        timings=timings.seconds,
        written=written,
    )
    with disk_errors(stage):
        (stage / "README.md").write_text(model_card(report), encoding="utf-8")
        report["files"] = sorted(
            [*files, _file_entry(stage / "README.md", stage, written.hashes)], key=lambda entry: entry["path"]
        )
        for path in stage.rglob("*"):
            sync_file(path)
        _write_json(stage / REPORT_FILE, report)
        sync_file(stage / REPORT_FILE)
        sync_file(stage)
    return report


def _used_files(prepared: Prepared) -> set[str]:
    source, plan = prepared.source, prepared.plan
    if source.gguf_file is not None:
        return {source.gguf_file}
    return {
        *config_file_names(source.files),
        *plan.checkpoint.weight_files,
        *tokenizer_file_names(source.files),
    }


def _save_config(prepared: Prepared, stage: Path) -> None:
    plan = prepared.plan
    model, root = plan.skeleton.model, plan.checkpoint.source.root
    config = plan.skeleton.config
    config.dtype = "bfloat16"
    config.architectures = [type(model).__name__]
    if plan.quantization_config is not None:
        config.quantization_config = plan.quantization_config
    config.save_pretrained(stage)
    if model.can_generate():
        try:
            load_generation_config(root).save_pretrained(stage)
        except ValueError:
            # transformers refuses to write settings that contradict each other, which it was ready to read
            if (root / "generation_config.json").exists():
                shutil.copyfile(root / "generation_config.json", stage / "generation_config.json")
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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _file_entry(path: Path, root: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    return {"path": name, "bytes": path.stat().st_size, "sha256": hashes.get(name) or hash_file(path)}


def _publish(stage: Path, request: Request) -> None:
    """Move the finished directory into place: one rename, and an older output is put aside until it succeeded.

    What has come to stand there in the meantime is not replaced, unless `--overwrite` allows it.
    """
    output = request.output
    _check_output(request)
    with disk_errors(output):
        stage.chmod(0o777 & ~_umask())
        aside = stage.parent / "replaced"
        try:
            if request.overwrite and output.exists():
                output.rename(aside)
            stage.rename(output)  # an empty directory gives way, any other stays
        except BaseException:
            if aside.exists() and not output.exists():
                aside.rename(output)
            raise
        sync_file(output.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
