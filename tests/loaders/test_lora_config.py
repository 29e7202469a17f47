"""The adapter that flags and the file of `--lora_config` ask for, as fields of PEFT's `LoraConfig`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ftload.loaders.errors import UsageError
from ftload.loaders.flags.command_line import parse_arguments
from ftload.loaders.flags.lora_config import (
    HONOURED,
    JSON_BYTES,
    LEFT_ALONE,
    NO_INITIALISATIONS,
    REFUSED,
    read_lora_config,
)
from ftload.loaders.flags.request import Request, resolve_request
from ftload.loaders.flags.strict import check_strict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.fuzz.cases import VALUES, dump


def requested(line: str, adapter: str = "--use_lora") -> Request:
    return resolve_request(parse_arguments(["m", *adapter.split(), *shlex.split(line)]))


def refusal(line: str, adapter: str = "--use_lora") -> tuple[str, str | None]:
    with pytest.raises(UsageError) as caught:
        requested(line, adapter)
    assert "\n" not in caught.value.message
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("", {}),
        ("--lora_rank 8 --lora_alpha 32 --lora_dropout 0 --lora_target_modules q_proj", {}),
        ("--use_dora false --use_rslora=false --init_lora_weights true", {}),
        ("--use_dora --use_rslora", {"use_dora": True, "use_rslora": True}),
        ("--init_lora_weights pissa_niter_16", {"init_lora_weights": "pissa_niter_16"}),
        ("--init_lora_weights false", {"init_lora_weights": False}),
        ("--lora_modules_to_save lm_head embed_tokens", {"modules_to_save": ["lm_head", "embed_tokens"]}),
        ("--lora_target_parameters mlp.experts.down_proj", {"target_parameters": ["mlp.experts.down_proj"]}),
        ("--trainable_token_indices 12 0", {"trainable_token_indices": [12, 0]}),
        ("--trainable_token_indices new", {"trainable_token_indices": "new"}),
        (
            "--use_rslora --init_lora_weights orthogonal --trainable_token_indices 5",
            {"init_lora_weights": "orthogonal", "trainable_token_indices": [5], "use_rslora": True},
        ),
    ],
)
def test_what_flags_ask_for(line: str, settings: dict[str, Any]) -> None:
    request = requested(line)
    assert request.lora_settings == settings
    assert list(request.lora_settings) == sorted(settings)
    assert request.decisions == ()


@pytest.mark.parametrize(
    "words",
    [
        "--lora_config lora.yaml",
        "--use_dora",
        "--use_rslora",
        "--init_lora_weights olora",
        "--lora_modules_to_save lm_head",
        "--lora_target_parameters a.b",
        "--trainable_token_indices new",
    ],
)
def test_what_is_for_adapters_alone(words: str) -> None:
    message = f"`{words.partition(' ')[0]}` is for adapters"
    assert refusal(words, adapter="") == (message, "pass --use_lora or --use_qlora as well")


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            "--init_lora_weights orthogonal --lora_rank 7",
            "PEFT refuses this adapter: Orthogonal initialization requires the LoRA rank to be even, got 7 instead",
            "leave out or change one of them",
        ),
        (
            "--lora_target_parameters a.b --lora_experts 4",
            "`--lora_experts` and `target_parameters` are two ways of naming what is adapted",
            "give --lora_experts RANK to adapt all experts, or --lora_target_parameters to name them",
        ),
        (
            "--lora_target_parameters a.b --use_dora",
            "PEFT refuses this adapter: lora.ParamWrapper does not work with use_dora=True",
            "leave out or change one of them",
        ),
    ],
)
def test_what_contradicts(line: str, message: str, hint: str) -> None:
    assert refusal(line) == (message, hint)


# `--lora_config`


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are written, and the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_peft(folder: Path, **fields: Any) -> Path:
    """The adapter_config.json that PEFT writes."""
    from peft import LoraConfig

    LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="org/model", revision="main", **fields).save_pretrained(
        str(folder)
    )
    return folder / "adapter_config.json"


def test_every_field_of_peft_is_in_one_group() -> None:
    from peft import LoraConfig

    groups = [*HONOURED, *REFUSED, *LEFT_ALONE]
    assert len(groups) == len({*groups})
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= {*groups}


def test_each_default_is_that_of_peft() -> None:
    from peft import LoraConfig

    ours = {name: field.default for group in (HONOURED, REFUSED) for name, field in group.items()}
    theirs = dataclasses.asdict(LoraConfig())
    assert {name: ours[name] for name in theirs if name in ours} == {
        name: value for name, value in theirs.items() if name in ours
    }
    for name, field in HONOURED.items():
        assert field.default is None or field.accepts(field.default), name


FIELDS: dict[str, Any] = {
    "r": 6,
    "target_modules": ["q_proj", "v_proj"],
    "exclude_modules": ["model.layers.1.self_attn.q_proj"],
    "lora_alpha": 12,
    "lora_dropout": 0.25,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "rank_pattern": {r"layers\.0\..*q_proj": 4, "v_proj": 2},
    "alpha_pattern": {"v_proj": 1.5},
    "trainable_token_indices": {"embed_tokens": [3, 1]},
    "target_parameters": ["mlp.experts.down_proj"],
    "ensure_weight_tying": True,
}
"""Values that PEFT takes together, none of them its default."""


@pytest.mark.parametrize(
    "fields",
    [
        FIELDS,
        *({name: value} for name, value in FIELDS.items() if name != "layers_pattern"),
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*layers\.0\..*"},
        {"lora_bias": True, "bias": "all", "init_lora_weights": False},
        {"init_lora_weights": False, "layers_to_transform": 1, "layers_pattern": ["layers", "h"]},
        {"init_lora_weights": "pissa_niter_0", "trainable_token_indices": [7]},
        {"target_modules": [], "target_parameters": ["a.b"]},
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_peft_makes_the_same_of_what_is_asked_for_as_of_the_file(
    fields: dict[str, Any], kind: str, written: Path
) -> None:
    from peft import LoraConfig

    path = by_peft(written, **fields)
    if kind == "yaml":
        path = written / "lora.yaml"
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    request = requested(f"--lora_config {path}")
    targets = None if request.lora_targets is None else list(request.lora_targets)
    asked = {
        "r": request.lora_rank,
        "lora_alpha": request.lora_alpha,
        "lora_dropout": request.lora_dropout,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        **request.lora_settings,
    }
    if kind == "yaml":
        # what the file does not name is as the flags say
        asked |= {name: HONOURED[name].default for name in ("r", "lora_alpha", "lora_dropout") if name not in fields}
    assert LoraConfig(**asked).to_dict() == LoraConfig(**fields).to_dict()
    assert list(request.lora_settings) == sorted(request.lora_settings)
    assert request.decisions == ()


def test_what_a_file_does_not_name_is_as_the_flags_say(written: Path) -> None:
    (written / "lora.yaml").write_text("use_dora: true\n")
    request = requested("--lora_config lora.yaml")
    plain = requested("")
    assert request.lora_settings == {"use_dora": True}
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
        assert getattr(request, name) == getattr(plain, name)
    assert request.arguments.report()["lora_config"] == {"value": "lora.yaml", "origin": "cli"}


def test_what_says_nothing_is_no_setting(written: Path) -> None:
    empty = {"modules_to_save": [], "exclude_modules": [], "trainable_token_indices": {}, "rank_pattern": None}
    (written / "lora.json").write_text(json.dumps({"layers_to_transform": [], "loftq_config": None, **empty}))
    assert requested("--lora_config lora.json").lora_settings == {}


def test_a_flag_that_is_given_goes_before_the_file(written: Path) -> None:
    path = by_peft(written, **FIELDS)
    request = requested(
        f"--lora_config {path} --lora_rank 8 --lora_alpha 12 --lora_target_modules v_proj q_proj "
        "--use_rslora=false --init_lora_weights olora --trainable_token_indices new --lora_modules_to_save embed_tokens"
    )
    assert (request.lora_rank, request.lora_alpha, request.lora_dropout) == (8, 12, 0.25)
    assert request.lora_targets == ("v_proj", "q_proj")
    kept = {name: value for name, value in FIELDS.items() if name not in ("r", "lora_alpha", "lora_dropout")}
    del kept["target_modules"], kept["use_rslora"]
    assert request.lora_settings == kept | {
        "init_lora_weights": "olora",
        "trainable_token_indices": "new",
        "modules_to_save": ["embed_tokens"],
    }
    assert [(one.what, one.requested, one.effective, one.reason) for one in request.decisions] == [
        ("lora_config", theirs, ours, f"`{flag}` is given beside `{path}`, and goes before it")
        for flag, theirs, ours in (
            ("lora_rank", "r 6", "r 8"),
            ("lora_modules_to_save", "modules_to_save lm_head", "modules_to_save embed_tokens"),
            (
                "trainable_token_indices",
                'trainable_token_indices {"embed_tokens": [3, 1]}',
                "trainable_token_indices new",
            ),
            ("use_rslora", "use_rslora true", "use_rslora false"),
            ("init_lora_weights", "init_lora_weights gaussian", "init_lora_weights olora"),
        )
    ]
    check_strict(request.decisions)  # it was asked for


def test_a_regular_expression_gives_way_to_names(written: Path) -> None:
    (written / "lora.yaml").write_text("target_modules: .*q_proj\n")
    request = requested("--lora_config lora.yaml")
    assert (request.lora_targets, request.lora_settings) == (None, {"target_modules": ".*q_proj"})
    request = requested("--lora_config lora.yaml --lora_target_modules all-linear")
    assert (request.lora_targets, request.lora_settings) == (("all-linear",), {})
    assert [one.news for one in request.decisions] == [
        "lora_config: target_modules .*q_proj → target_modules all-linear"
    ]


def test_the_order_of_names_says_nothing(written: Path) -> None:
    (written / "lora.yaml").write_text("target_modules: [q_proj, v_proj]\nlora_alpha: 16.0\n")
    request = requested("--lora_config lora.yaml --lora_target_modules v_proj q_proj --lora_alpha 16")
    assert (request.lora_targets, request.decisions) == (("v_proj", "q_proj"), ())


def test_a_flag_in_a_run_goes_before_the_file_too(written: Path) -> None:
    (written / "lora.yaml").write_text("r: 6\n")
    (written / "run.yaml").write_text("use_lora: true\nlora_rank: 10\nlora_config: lora.yaml\n")
    request = resolve_request(parse_arguments(["m", "run.yaml"]))
    assert request.lora_rank == 10
    assert [one.requested for one in request.decisions] == ["r 6"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: 0", "`r` in `F` takes an int of at least 1, not `0`"),
        ("r: 8.0", "`r` in `F` takes an int of at least 1, not `8.0`"),
        ("r: true", "`r` in `F` takes an int of at least 1, not `true`"),
        ("r: '8'", "`r` in `F` takes an int of at least 1, not `8`"),
        ("lora_alpha: .nan", "`lora_alpha` in `F` takes a finite number, not `NaN`"),
        ("lora_alpha: 1" + "0" * 400, f"`lora_alpha` in `F` takes a finite number, not `1{'0' * 76}...`"),
        ("lora_alpha: false", "`lora_alpha` in `F` takes a finite number, not `false`"),
        ("lora_dropout: 1", "`lora_dropout` in `F` takes a number of at least 0 and below 1, not `1`"),
        (
            "target_modules: [q, 1]",
            '`target_modules` in `F` takes a list of names or a regular expression, not `["q", 1]`',
        ),
        ("target_modules: '('", "`target_modules` in `F` takes a list of names or a regular expression, not `(`"),
        ("exclude_modules: ''", "`exclude_modules` in `F` takes a list of names or a regular expression, not ``"),
        ("bias: true", "`bias` in `F` takes none, all or lora_only, not `true`"),
        ("use_dora: 1", "`use_dora` in `F` takes true or false, not `1`"),
        ("use_rslora: 'true'", "`use_rslora` in `F` takes true or false, not `true`"),
        ("modules_to_save: lm_head", "`modules_to_save` in `F` takes a list of names, not `lm_head`"),
        ("target_parameters: ['']", '`target_parameters` in `F` takes a list of names, not `[""]`'),
        (r'modules_to_save: ["a\nb"]', r'`modules_to_save` in `F` takes a list of names, not `["a\nb"]`'),
        ("init_lora_weights: 1", "`init_lora_weights` in `F` takes true, false or a name, not `1`"),
        (
            "init_lora_weights: Gaussian",
            "`init_lora_weights` in `F` is true, gaussian, orthogonal, pissa, pissa_niter_N (N up to 9999) or olora, "
            "not `Gaussian`",
        ),
        (
            "layers_to_transform: -1",
            "`layers_to_transform` in `F` takes an int of at least 0 or a list of such, not `-1`",
        ),
        ("layers_pattern: ['[']", '`layers_pattern` in `F` takes a name or a list of names, not `["["]`'),
        (
            "rank_pattern: {q: 0}",
            '`rank_pattern` in `F` takes a mapping of regular expressions to ints of at least 1, not `{"q": 0}`',
        ),
        (
            "rank_pattern: {'*q': 1}",
            '`rank_pattern` in `F` takes a mapping of regular expressions to ints of at least 1, not `{"*q": 1}`',
        ),
        (
            "alpha_pattern: [q]",
            '`alpha_pattern` in `F` takes a mapping of regular expressions to finite numbers, not `["q"]`',
        ),
        (
            "trainable_token_indices: [1, 1]",
            "`trainable_token_indices` in `F` takes a list of ids of tokens, none twice, or a mapping of names to such "
            "lists, not `[1, 1]`",
        ),
        (
            "trainable_token_indices: {wte: [-1]}",
            "`trainable_token_indices` in `F` takes a list of ids of tokens, none twice, or a mapping of names to such "
            'lists, not `{"wte": [-1]}`',
        ),
        ("peft_type: IA3", "`peft_type` in `F` is `IA3`, and ftload prepares LORA alone"),
        ("task_type: SEQ_CLS", "`task_type` in `F` is `SEQ_CLS`, and ftload prepares CAUSAL_LM alone"),
        ("use_dorra: true", "unknown field `use_dorra` in `F` (nearest: `use_dora` or `use_bdlora`)"),
        (
            "lora_rank: 8\nuse_dora: no",
            "unknown field `lora_rank` in `F` (nearest: `r`)",
        ),
        (
            "r: x\neva_config: {rho: 1.0}\nkasa_config: null",
            "`r` in `F` takes an int of at least 1, not `x`; `eva_config` in `F` can't be honoured: EVA starts from "
            "the activations of data, and ftload reads none",
        ),
        ("r: 8\nr: 9", "`F` holds an object in which `r` has two values, on lines 1 and 2"),
        ("[r]: 8", "`F` holds a list or mapping inside a list"),
        ("r: !!int ''", "`F` holds a value that its tag does not allow"),
        ("r: 0x" + "f" * 5000, "`F` holds a value that its tag does not allow"),
        ("- r", "`F` must hold `field: value` lines"),
        ("", "`F` must hold `field: value` lines"),
        ("r: [", "`F`, line 1 is not YAML: expected the node content, but found '<stream end>'"),
        (
            "r: !!python/name:os.system",
            "`F`, line 1 holds the tag `tag:yaml.org,2002:python/name:os.system`, which is not accepted",
        ),
        ("a: " + "[" * 500, "`F` is nested too deeply"),
        ("a: &a [*a]", "`F` holds more than 10000 values, counting what its aliases repeat"),
    ],
)
def test_what_a_yaml_file_cannot_say(text: str, message: str, written: Path) -> None:
    (written / "F").write_text(text, encoding="utf-8")
    assert refusal("--lora_config F")[0] == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "`F.json`, line 1 is not JSON: Expecting value"),
        (b'{"r": 8,\n}', "`F.json`, line 2 is not JSON: Expecting property name enclosed in double quotes"),
        (b"[8]", "`F.json` is not a JSON object"),
        (b'{"r": 8, "r": 8}', "`F.json` holds an object that holds `r` twice"),
        (b'{"lora_alpha": NaN}', "`F.json` holds an object that holds NaN, which is not JSON"),
        (b'{"lora_alpha": 1e999}', "`lora_alpha` in `F.json` takes a finite number, not `Infinity`"),
        (b'{"r": 1' + b"0" * 5000 + b"}", "`F.json` is not a JSON object"),
        (b'{"a": ' * 100_000, "`F.json` is not a JSON object"),
        (b'{"modules_to_save": ["\\ud800"]}', r'`modules_to_save` in `F.json` takes a list of names, not `["\ud800"]`'),
        (b'{"r": "\xe9"}', "`F.json` is not UTF-8 text: byte 7 can't be decoded"),
        (b" " * (JSON_BYTES + 1), "`F.json` is larger than 4096 KiB, too large for the configuration of an adapter"),
    ],
    ids=range(11),
)
def test_what_a_json_file_cannot_say(data: bytes, message: str, written: Path) -> None:
    (written / "F.json").write_bytes(data)
    assert refusal("--lora_config F.json")[0] == message


def test_files_that_cannot_be_read(written: Path) -> None:
    (written / "folder.json").mkdir()
    for name, why in (
        ("none.json", "no such file or directory"),
        ("folder.json", "is a directory"),
        ("'a\0.yaml'", "not a path"),
    ):
        shown = name.strip("'").replace("\0", r"\x00")
        assert refusal(f"--lora_config {name}")[0] == f"`{shown}` can't be read: {why}"
    secret = "https://user:hf_abcdefghijklmnopqrst@host/lora.json"
    assert (
        refusal(f"--lora_config {secret}")[0] == "`https://***@host/lora.json` can't be read: no such file or directory"
    )
    message = refusal("--lora_config '\udce9.json'")[0]
    assert message.endswith("is not valid UTF-8")


# What can't be honoured, in PEFT's own files


def value_of(field: str) -> Any:
    """What PEFT would not take for the default."""
    from peft import EvaConfig
    from peft.tuners.lora import config

    values: dict[str, Callable[[], Any]] = {
        "alora_invocation_tokens": lambda: [1, 2],
        "arrow_config": lambda: config.ArrowConfig(),
        "corda_config": lambda: config.CordaConfig(),
        "eva_config": EvaConfig,
        "kasa_config": lambda: config.KasaConfig(),
        "layer_replication": lambda: [(0, 2), (1, 3)],
        "lora_ga_config": lambda: config.LoraGAConfig(),
        "megatron_config": lambda: {"hidden_size": 8},
        "megatron_core": lambda: "another.core",
        "monteclora_config": lambda: config.MontecloraConfig(),
        "qalora_group_size": lambda: 32,
        "use_bdlora": lambda: config.BdLoraConfig(target_modules_bd_a=["q_proj"]),
        "use_qalora": lambda: True,
        "velora_config": lambda: config.VeloraConfig(),
    }
    return values[field]()


@pytest.mark.parametrize("field", sorted({*REFUSED} - {"loftq_config", "runtime_config"}))
@pytest.mark.filterwarnings("ignore:`(eva|corda|loftq)_config` specified but will be ignored")
def test_what_cannot_be_honoured(field: str, written: Path) -> None:
    from peft import LoraConfig

    if field not in {found.name for found in dataclasses.fields(LoraConfig)}:
        pytest.skip("this PEFT has no such field")
    path = by_peft(written, **{field: value_of(field)})
    message, hint = refusal(f"--lora_config {path}")
    assert message == f"`{field}` in `{path}` can't be honoured: {REFUSED[field].reason}"
    assert hint == f"leave `{field}` out"


@pytest.mark.parametrize("text", ["loftq_config: {loftq_bits: 4}", "runtime_config: {ephemeral_gpu_offload: true}"])
def test_what_peft_writes_in_no_file(text: str, written: Path) -> None:
    (written / "lora.yaml").write_text(text)
    field = text.partition(":")[0]
    assert refusal("--lora_config lora.yaml")[0].startswith(f"`{field}` in `lora.yaml` can't be honoured: ")


@pytest.mark.parametrize("name", sorted(NO_INITIALISATIONS))
def test_initialisations_that_cannot_be_had(name: str, written: Path) -> None:
    (written / "lora.yaml").write_text(f"init_lora_weights: {name}")
    message = f"can't be `{name}`: {NO_INITIALISATIONS[name]}"
    assert refusal("--lora_config lora.yaml")[0] == f"`init_lora_weights` in `lora.yaml` {message}"
    with pytest.raises(UsageError) as caught:
        parse_arguments(["--init_lora_weights", name])
    assert caught.value.message == f"`init_lora_weights` {message}"


def test_the_page_tells_of_every_field() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "flags.md").read_text(encoding="utf-8")
    section = page.partition("## `--lora_config`")[2].partition("\n## ")[0]
    for name in (*HONOURED, *REFUSED, *LEFT_ALONE, *NO_INITIALISATIONS):
        assert f"`{name}`" in section, name


# PEFT's words

PEFT_REFUSES = "PEFT refuses this adapter: "


def words_of_peft(error: ValueError) -> str:
    return PEFT_REFUSES + str(error).strip().removesuffix(".")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ".*q_proj", "layers_to_transform": 1},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": ".*q_proj", "layers_pattern": "layers"},
        {"layers_pattern": ["layers"]},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
        {"lora_bias": True, "use_dora": True},
    ],
    ids=" ".join,
)
def test_fields_that_do_not_go_together_in_pefts_words(fields: dict[str, Any], written: Path) -> None:
    from peft import LoraConfig

    (written / "lora.yaml").write_text(yaml.safe_dump(fields))
    with pytest.raises(ValueError, match=r"layers|lora_bias") as caught:
        LoraConfig(**fields)
    message = words_of_peft(caught.value)
    assert refusal("--lora_config lora.yaml") == (message, "leave out or change one of them")


@pytest.mark.parametrize("field", ["use_dora", "lora_bias"])
def test_parameters_do_not_go_with_some_fields_in_pefts_words(field: str, written: Path) -> None:
    from peft import LoraConfig, get_peft_model

    (written / "lora.yaml").write_text(f"{field}: true\ntarget_parameters: [weight]\n")
    model: Any = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not work") as caught:
        get_peft_model(model, LoraConfig(target_modules=[], target_parameters=["0.weight"], **{field: True}))
    assert refusal("--lora_config lora.yaml")[0] == words_of_peft(caught.value)


def test_an_odd_rank_is_not_orthogonal_in_pefts_words(written: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="even") as caught:
        get_peft_model(model, LoraConfig(r=3, target_modules=["0"], init_lora_weights="orthogonal"))
    assert refusal("--lora_rank 3 --init_lora_weights orthogonal")[0] == words_of_peft(caught.value)
    # which ranks there are then depends on the model
    (written / "lora.yaml").write_text("r: 3\nrank_pattern: {q_proj: 4}\ninit_lora_weights: orthogonal\n")
    assert requested("--lora_config lora.yaml").lora_rank == 3


def test_layers_are_named_or_parameters_are(written: Path) -> None:
    (written / "lora.yaml").write_text("target_modules: []\n")
    message = "`target_modules` is empty, and there are no `target_parameters`: nothing would be adapted"
    assert refusal("--lora_config lora.yaml") == (message, "name layers with --lora_target_modules")
    (written / "lora.yaml").write_text("target_modules: []\ntarget_parameters: [a.b]\n")
    assert requested("--lora_config lora.yaml").lora_targets == ()


def test_a_file_of_names_by_thousands(written: Path) -> None:
    """Every layer of a mixture by its whole name, as PEFT writes a list that `all-linear` was made to."""
    names = [
        f"model.layers.{n}.mlp.experts.{e}.{p}_proj" for n in range(48) for e in range(128) for p in ("up", "down")
    ]
    (written / "adapter_config.json").write_text(json.dumps({"target_modules": names}, indent=2))
    assert read_lora_config("adapter_config.json") == {"target_modules": names}


# At random

WORDS = st.one_of(
    VALUES,
    st.lists(st.one_of(st.integers(0, 9), st.sampled_from(["q_proj", "all-linear", "(", "a|b"])), max_size=3),
    st.dictionaries(
        st.sampled_from(["q_proj", ".*", "[", "a.b"]), st.one_of(st.integers(-1, 9), st.floats()), max_size=2
    ),
    st.sampled_from(["none", "all", "pissa", "pissa_niter_4", "loftq", "LORA", "q_proj", "all-linear", ".*_proj"]),
)
DOCUMENTS = st.dictionaries(
    st.sampled_from([*HONOURED] * 4 + [*REFUSED, *LEFT_ALONE, "lora_rank", "x"]), WORDS, max_size=4
)


@given(document=DOCUMENTS, as_json=st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_file_is_what_peft_takes_or_a_usage_error(document: dict[str, Any], as_json: bool, written: Path) -> None:
    """And PEFT refuses what is refused here in its words, nothing else."""
    from peft import LoraConfig

    name = "lora.json" if as_json else "lora.yaml"
    (written / name).write_bytes(dump(document))
    try:
        fields = read_lora_config(name)
    except UsageError as error:
        assert error.message.isprintable()
        return
    said = None
    try:
        requested(f"--lora_config {name}")
    except UsageError as error:
        said = error.message
    if fields.get("target_modules") == ["all-linear"]:
        fields["target_modules"] = "all-linear"
    try:
        config = LoraConfig(**fields)
    except ValueError as error:
        assert said == words_of_peft(error)
        return
    assert said is None or not said.startswith((f"{PEFT_REFUSES}The", f"{PEFT_REFUSES}When", f"{PEFT_REFUSES}`"))
    assert {name: value for name, value in config.to_dict().items() if name in fields} == {
        name: {*value} if name in ("target_modules", "exclude_modules") and isinstance(value, list) else value
        for name, value in fields.items()
    }
