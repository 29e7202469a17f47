"""The tokenizer: loaded, made ready for training, described and saved.

Four functions say how it is made ready; they differ in which special tokens they set and which chat template they
take. All of them work on what transformers loaded: a class that brings special tokens of its own, as GPT-NeoX's
does, has them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import CheckpointError, UsageError, said_by
from ..source.source import Source, tokenizer_file_names
from ..system.quiet import quiet_transformers
from .chat_templates import TEMPLATES
from .loading import TokenizerKind, kind_of, load_tokenizer
from .rendering import Turns, look_at_turns, render

if TYPE_CHECKING:
    from jinja2 import TemplateSyntaxError
    from transformers import PreTrainedTokenizerBase


PAD = "<pad>"
"""The pad token that is added where there is none to use."""


_PAD_IS_EOS = "training that masks padding ignores where texts end"


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedTokenizer:
    """A tokenizer that is ready for training, and how it came to be so."""

    tokenizer: PreTrainedTokenizerBase
    chat_template_name: str | None
    """The built-in name or the file that the chat template was taken from; None for the tokenizer's own."""
    turns: Turns | None
    """What the chat template makes of conversations; None where there is no template."""
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """Return what the report says of the tokenizer: plain JSON; `size` counts all tokens, added ones too."""
        tokenizer = self.tokenizer
        return {
            "class": type(tokenizer).__name__,
            "size": len(tokenizer),
            "pad_token": tokenizer.pad_token,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token": tokenizer.bos_token,
            "padding_side": tokenizer.padding_side,
            "model_max_length": tokenizer.model_max_length,
            "chat_template_sha256": template_hash(tokenizer.chat_template),
            "chat_template_name": self.chat_template_name,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """What the tokenizer flags ask for."""

    function: str
    name: str
    """The tokenizer's name as the user gave it."""
    use_fast: bool
    template: str | None
    """Value of `--chat_template_name`."""
    add_bos: bool


def resolve_tokenizer_source(
    *,
    tokenizer_name_or_path: str | None,
    tokenizer_revision: str | None,
    tokenizer_name: str | None,
    model: str,
    model_revision: str | None,
) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the tokenizer's name, its revision and warnings; what is not given is the model's.

    `tokenizer_name` is the deprecated name of `tokenizer_name_or_path`. Raises `UsageError` when they disagree.
    """
    warnings: list[str] = []
    if tokenizer_name is not None:
        if tokenizer_name_or_path not in (None, tokenizer_name):
            raise UsageError(
                f"`tokenizer_name` is `{tokenizer_name}`, but `tokenizer_name_or_path` is `{tokenizer_name_or_path}`",
                hint="leave out --tokenizer_name, which is deprecated",
            )
        warnings.append("`tokenizer_name` is deprecated: use `tokenizer_name_or_path`")
    name = tokenizer_name_or_path or tokenizer_name or model
    revision = tokenizer_revision or model_revision
    if name != model and revision != model_revision:
        warnings.append(
            f"the tokenizer, `{name}` at `{revision}`, differs from the model, `{model}` at "
            f"`{model_revision or 'its default revision'}`, in name and revision"
        )
    return name, revision, tuple(warnings)


_MAX_FILE_BYTES = 100_000_000
"""Of one file of a tokenizer; the largest that are known have 35 MB, and reading takes several times as much memory."""


def fetch_tokenizer(source: Source, *, trust_remote_code: bool) -> None:
    """Have the files that a tokenizer may need. Raises `CheckpointError` for one that is too large."""
    names = tokenizer_file_names(source.files, trust_remote_code=trust_remote_code)
    for file in source.files:
        if file.path in names and file.bytes > _MAX_FILE_BYTES:
            raise CheckpointError(f"`{file.path}` of the tokenizer is {file.bytes} bytes long")
    source.fetch(names)


def prepare_tokenizer(
    root: Path,
    *,
    get_tokenizer_fn: str,
    use_fast: bool,
    trust_remote_code: bool,
    chat_template_name: str | None,
    add_bos: bool,
    name: str,
    gguf_file: str | None = None,
) -> PreparedTokenizer:
    """Load the tokenizer of the directory `root`, or of its `gguf_file`, and make it ready as `get_tokenizer_fn` says.

    `name` is the tokenizer's name as the user gave it; some rules look for `olmo` in it. Nothing is fetched, printed
    or asked.

    Raises:
        UsageError: the flags are wrong, or don't fit this tokenizer or each other.
        CheckpointError: there is no tokenizer that can be loaded, or it needs `trust_remote_code`.
        MissingRequirementError: loading it takes a package that is not installed.
    """
    make_ready = _FUNCTIONS.get(get_tokenizer_fn)
    if make_ready is None:
        raise UsageError(
            f"`get_tokenizer_fn` is `{get_tokenizer_fn}`, which is not known",
            hint=f"choose one of {', '.join(_FUNCTIONS)}",
        )
    options = _Options(
        function=get_tokenizer_fn, name=name, use_fast=use_fast, template=chat_template_name, add_bos=add_bos
    )
    with quiet_transformers():
        tokenizer = load_tokenizer(root, use_fast=use_fast, trust_remote_code=trust_remote_code, gguf_file=gguf_file)
        kind = kind_of(tokenizer, root if gguf_file is None else None)
        return make_ready(tokenizer, kind, options)


def save_tokenizer(prepared: PreparedTokenizer, directory: Path) -> tuple[str, ...]:
    """Write the tokenizer's files into `directory` and return their names, sorted, relative to it.

    The same tokenizer always gives the same bytes. Raises `CheckpointError` for settings that can't be written.
    """
    try:
        with quiet_transformers():
            paths = prepared.tokenizer.save_pretrained(directory)
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the tokenizer can't be saved: {said_by(error)}", hint="is its configuration whole?"
        ) from error
    return tuple(sorted(Path(path).relative_to(directory).as_posix() for path in paths))


def _simple_v1(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: _Options) -> PreparedTokenizer:
    reason = f"`{options.function}` leaves the chat template as it was loaded"
    decisions = [_branch(options, kind, "left as loaded")]
    if options.template is not None:
        decisions.append(
            Decision(
                what="chat_template_name", requested=options.template, effective="the tokenizer's own", reason=reason
            )
        )
    if options.add_bos:
        decisions.append(Decision(what="add_bos", requested="true", effective="false", reason=reason))
    return _finish(tokenizer, kind, options, None, decisions, [])


def _tulu_v1(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: _Options) -> PreparedTokenizer:
    if kind.is_llama:
        wanted: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": PAD}
        lacking = sorted(set(wanted.values()) - tokenizer.get_vocab().keys())
        if len(lacking) > 1:
            raise UsageError(
                f"`{options.function}` does not fit the tokenizer of `{options.name}`: it is a {kind.words} whose "
                f"vocabulary lacks {', '.join(f'`{token}`' for token in lacking)}",
                hint=f"leave out --get_tokenizer_fn, which is `{DEFAULT_FUNCTION}` then",
            )
        tokenizer.add_special_tokens(wanted)
        done = "bos `<s>`, eos `</s>`, unk `<unk>` and pad `<pad>` set"
    elif kind.is_gpt_neox:
        done = _ready_gpt_neox(tokenizer, options, needs_add_bos=True)
    elif kind.is_fast and tokenizer.pad_token is None:
        done = _add_pad(tokenizer)
    else:
        done = _kept_pad(tokenizer)
    return _with_template(tokenizer, kind, options, [_branch(options, kind, done)], unknown_is_own=True)


def _tulu_v2_1(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: _Options) -> PreparedTokenizer:
    return _tulu_v2(tokenizer, kind, options, needs_add_bos=True)


def _tulu_v2_2(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: _Options) -> PreparedTokenizer:
    # a template is a name or a file: the directories that lead to a file don't name it
    template_is_olmo = options.template is not None and "olmo" in Path(options.template).name.lower()
    if "olmo" in options.name.lower():
        _check_olmo(options, template_is_olmo=template_is_olmo)
    return _tulu_v2(tokenizer, kind, options, needs_add_bos=not template_is_olmo)


def _check_olmo(options: _Options, *, template_is_olmo: bool) -> None:
    subject = f"the tokenizer's name, `{options.name}`, contains `olmo`"
    if not options.use_fast:
        raise UsageError(f"{subject}: it needs the fast tokenizer", hint="leave out --use_fast false")
    if options.template is None:
        return
    if template_is_olmo and options.add_bos:
        raise UsageError(
            f"{subject}, and so does `{options.template}`: such chat templates write the bos token themselves",
            hint="leave out --add_bos",
        )
    if not template_is_olmo and not options.add_bos:
        raise UsageError(
            f"{subject}: the chat template `{options.template}` needs `--add_bos`",
            hint="pass --add_bos, or leave out --chat_template_name to keep the tokenizer's own",
        )


def _tulu_v2(
    tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind, options: _Options, *, needs_add_bos: bool
) -> PreparedTokenizer:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        done = _kept_pad(tokenizer)
    elif kind.is_gpt_neox:
        done = _ready_gpt_neox(tokenizer, options, needs_add_bos=needs_add_bos)
    elif kind.is_llama or kind.is_fast:
        done = _add_pad(tokenizer)
    else:
        done = _kept_pad(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UsageError(
            f"`{options.function}` leaves pad and eos of `{options.name}` the same token, "
            f"`{tokenizer.eos_token}`: {_PAD_IS_EOS}",
            hint="give its tokenizer_config.json a pad token of its own, or pass another --get_tokenizer_fn",
        )
    return _with_template(tokenizer, kind, options, [_branch(options, kind, done)], unknown_is_own=False)


DEFAULT_FUNCTION = "get_tokenizer_tulu_v2_2"


_FUNCTIONS: dict[str, Callable[[PreTrainedTokenizerBase, TokenizerKind, _Options], PreparedTokenizer]] = {
    "get_tokenizer_simple_v1": _simple_v1,
    "get_tokenizer_tulu_v1": _tulu_v1,
    "get_tokenizer_tulu_v2_1": _tulu_v2_1,
    DEFAULT_FUNCTION: _tulu_v2_2,
}


def _ready_gpt_neox(tokenizer: PreTrainedTokenizerBase, options: _Options, *, needs_add_bos: bool) -> str:
    if tokenizer.bos_token is not None:
        return _add_pad(tokenizer)
    if needs_add_bos and not options.add_bos:
        raise UsageError(
            f"`{options.function}` needs `--add_bos` for `{options.name}`, a GPT-NeoX tokenizer without a bos token",
            hint="pass --add_bos",
        )
    tokenizer.bos_token = tokenizer.eos_token
    return f"there was no bos token: the eos token, `{tokenizer.eos_token}`, becomes it"


def _add_pad(tokenizer: PreTrainedTokenizerBase) -> str:
    before, size = tokenizer.pad_token, len(tokenizer)
    is_eos = before is not None and before == tokenizer.eos_token
    tokenizer.add_special_tokens({"pad_token": PAD})
    had = "there was no pad token" if before is None else f"the pad token was {'the eos token, ' * is_eos}`{before}`"
    # the number that add_special_tokens returns counts tokens of the vocabulary as well
    how = "added" if len(tokenizer) > size else "in the vocabulary already"
    return f"{had}: it becomes `{PAD}`, {how}, id {tokenizer.pad_token_id}"


def _kept_pad(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.pad_token is None:
        return "no pad token, and none added"
    return f"the pad token stays `{tokenizer.pad_token}`"


def _branch(options: _Options, kind: TokenizerKind, done: str) -> Decision:
    # nothing is done otherwise than asked: it is there to say which branch of the function was taken
    return Decision(
        what="get_tokenizer_fn",
        requested=options.function,
        effective=options.function,
        reason=f"{kind.words}; {done}",
    )


def _with_template(
    tokenizer: PreTrainedTokenizerBase,
    kind: TokenizerKind,
    options: _Options,
    decisions: list[Decision],
    *,
    unknown_is_own: bool,
) -> PreparedTokenizer:
    name = options.template
    warnings: list[str] = []
    if name is None:
        pass
    elif name.endswith(".jinja"):
        tokenizer.chat_template = _read_template(tokenizer, Path(name).expanduser())
    elif name in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[name]
    elif unknown_is_own:
        decisions.append(
            Decision(
                what="chat_template_name",
                requested=name,
                effective="the tokenizer's own",
                reason=f"the name is not known, and `{options.function}` keeps the tokenizer's own then; known are "
                + ", ".join(TEMPLATES),
            )
        )
        name = None
    else:
        raise UsageError(
            f"there is no chat template `{name}`; there are {', '.join(f'`{known}`' for known in TEMPLATES)}",
            hint="pass one of them or a .jinja file, or leave out --chat_template_name to keep the tokenizer's own",
        )
    if options.add_bos:
        warnings += _add_bos(tokenizer, kind)
    return _finish(tokenizer, kind, options, name, decisions, warnings)


_GREETING = [{"role": "user", "content": "Hi"}]


def _read_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    from jinja2 import TemplateSyntaxError

    hint = "it must be a Jinja chat template in UTF-8"
    try:
        template = path.read_text(encoding="utf-8")
        render(tokenizer, [_GREETING], template)
    except OSError as error:
        raise UsageError(f"can't read the chat template `{path}`: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the chat template `{path}` is not UTF-8 text: {error.reason}", hint=hint) from error
    except TemplateSyntaxError as error:
        message = f"the chat template `{path}` is not valid, line {error.lineno}: {str(error.message).rstrip('.')}"
        raise UsageError(message, hint=hint) from error
    return template


_BEGINS_WITH_BOS = re.compile(r"\s*(\{#.*?#\}\s*)*\{\{[-+]?\s*bos_token\b", re.DOTALL)
"""A template whose first output, comments aside, is `bos_token`."""


def _add_bos(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind) -> list[str]:
    """Prefix the chat template, or each of several, with the bos token. Returns warnings."""
    bos: Any = tokenizer.bos_token
    own = tokenizer.chat_template
    if not own:
        raise UsageError(
            "`--add_bos` prefixes the chat template, and the tokenizer has none", hint="pass --chat_template_name"
        )
    if bos is None:
        hint = "leave out --add_bos"
        if kind.is_gpt_neox:
            hint += ", or pass --get_tokenizer_fn get_tokenizer_tulu_v1, which makes the eos token the bos token"
        raise UsageError("`--add_bos` needs a bos token, and the tokenizer has none", hint=hint)
    templates = own if isinstance(own, dict) else {"default": own}
    warnings: list[str] = []
    for template in templates.values():
        if _BEGINS_WITH_BOS.match(template) or template.lstrip().startswith(bos):
            raise UsageError(
                f"`--add_bos`: the chat template begins with the bos token, `{bos}`, already",
                hint="leave out --add_bos",
            )
        if (_rendered(tokenizer, template) or "").startswith(bos):
            warnings.append(
                f"`--add_bos`: what the chat template renders begins with `{bos}` already, and now does so twice"
            )
    prefixed = {name: "{{ bos_token }}" + template for name, template in templates.items()}
    tokenizer.chat_template = prefixed if isinstance(own, dict) else prefixed["default"]
    return warnings


def _rendered(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The shortest of conversations by a template that came with the tokenizer, None if it won't have that."""
    from jinja2 import TemplateSyntaxError

    try:
        return render(tokenizer, [_GREETING], template)[0].text
    except TemplateSyntaxError as error:
        raise _not_valid(error) from error


def _turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    from jinja2 import TemplateSyntaxError

    try:
        return look_at_turns(tokenizer)
    except TemplateSyntaxError as error:
        raise _not_valid(error) from error


def _not_valid(error: TemplateSyntaxError) -> CheckpointError:
    message = f"the tokenizer's chat template is not valid, line {error.lineno}: {str(error.message).rstrip('.')}"
    return CheckpointError(message, hint="pass another with --chat_template_name")


def _finish(
    tokenizer: PreTrainedTokenizerBase,
    kind: TokenizerKind,
    options: _Options,
    template: str | None,
    decisions: list[Decision],
    warnings: list[str],
) -> PreparedTokenizer:
    if not options.use_fast and kind.is_fast:
        reason = "transformers 5 loads the same tokenizer, the fast one, either way"
        decisions.append(Decision(what="use_fast", requested="false", effective="true", reason=reason))
    if tokenizer.eos_token is None:
        warnings.append("the tokenizer has no eos token: a model can't learn from it where a text ends")
    if tokenizer.pad_token is None:
        warnings.append("the tokenizer has no pad token: texts of different lengths can't share a batch")
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.append(f"pad and eos are the same token, `{tokenizer.eos_token}`: {_PAD_IS_EOS}")
    own: Any = tokenizer.chat_template
    for named in own.values() if isinstance(own, dict) else ():
        _rendered(tokenizer, named)
    if not own:
        warnings.append("the tokenizer has no chat template: training on conversations needs one")
    return PreparedTokenizer(
        tokenizer=tokenizer,
        chat_template_name=template,
        turns=_turns(tokenizer) if own else None,
        decisions=tuple(decisions),
        warnings=tuple(warnings),
    )


def template_hash(template: str | dict[str, str] | None) -> str | None:
    """The sha256 of a chat template, or of several by name; None for none."""
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
