"""The chat template that a tokenizer gets: its own, a built-in one or a file's; with `--add_bos`, bos comes first."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decision import Decision
from ..errors import CheckpointError, UsageError
from .chat_templates import TEMPLATES
from .rendering import Turns, look_at_turns, render

if TYPE_CHECKING:
    from jinja2 import TemplateSyntaxError
    from transformers import PreTrainedTokenizerBase

    from .loading import TokenizerKind


OWN = "the tokenizer's own"
"""In decisions, the chat template that a tokenizer was loaded with."""
_GREETING = [{"role": "user", "content": "Hi"}]
_BEGINS_WITH_BOS = re.compile(r"\s*(\{#.*?#\}\s*)*\{\{[-+]?\s*bos_token\b", re.DOTALL)
"""A template whose first output, comments aside, is `bos_token`."""


def set_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, *, function: str, unknown_is_own: bool
) -> tuple[str | None, list[Decision]]:
    """Set the chat template that `--chat_template_name` asks for; None leaves the tokenizer's own.

    Returns the name of the one that is set, None for the tokenizer's own, and decisions. With `unknown_is_own`, an
    unknown name leaves the tokenizer's own, which is what `function`, the value of `--get_tokenizer_fn`, does.

    Raises `UsageError` for an unknown name otherwise, and for a file that can't be read or is no template.
    """
    if name is None:
        return None, []
    if name.endswith(".jinja"):
        tokenizer.chat_template = _read_template(tokenizer, Path(name).expanduser())
        return name, []
    if name in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[name]
        return name, []
    if unknown_is_own:
        reason = f"the name is not known, and `{function}` keeps {OWN} then; known are {', '.join(TEMPLATES)}"
        return None, [Decision(what="chat_template_name", requested=name, effective=OWN, reason=reason)]
    raise UsageError(
        f"there is no chat template `{name}`; there are {', '.join(f'`{known}`' for known in TEMPLATES)}",
        hint="pass one of them or a .jinja file, or leave out --chat_template_name to keep the tokenizer's own",
    )


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
        raise UsageError(f"the chat template `{path}` {_not_valid(error)}", hint=hint) from error
    return template


def prefix_with_bos(tokenizer: PreTrainedTokenizerBase, kind: TokenizerKind) -> list[str]:
    """Prefix the chat template, or each of several, with the bos token. Returns warnings.

    Raises `UsageError` where there is no chat template or no bos token, or a template begins with it already.
    """
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
        if (_render_greeting(tokenizer, template) or "").startswith(bos):
            warnings.append(
                f"`--add_bos`: what the chat template renders begins with `{bos}` already, and now does so twice"
            )
    prefixed = {name: "{{ bos_token }}" + template for name, template in templates.items()}
    tokenizer.chat_template = prefixed if isinstance(own, dict) else prefixed["default"]
    return warnings


def check_template(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """What the tokenizer's chat template makes of conversations; None where it has none.

    Raises `CheckpointError` where it, or another of several by name, is no valid template, and what `render` raises.
    """
    from jinja2 import TemplateSyntaxError

    own: Any = tokenizer.chat_template
    for named in own.values() if isinstance(own, dict) else ():
        _render_greeting(tokenizer, named)
    if not own:
        return None
    try:
        return look_at_turns(tokenizer)
    except TemplateSyntaxError as error:
        raise _own_not_valid(error) from error


def _render_greeting(tokenizer: PreTrainedTokenizerBase, template: str) -> str | None:
    """The shortest conversation, rendered by a template that came with the tokenizer; None where that raises."""
    from jinja2 import TemplateSyntaxError

    try:
        return render(tokenizer, [_GREETING], template)[0].text
    except TemplateSyntaxError as error:
        raise _own_not_valid(error) from error


def _own_not_valid(error: TemplateSyntaxError) -> CheckpointError:
    message = f"the tokenizer's chat template {_not_valid(error)}"
    return CheckpointError(message, hint="pass another with --chat_template_name")


def _not_valid(error: TemplateSyntaxError) -> str:
    return f"is not valid, line {error.lineno}: {str(error.message).rstrip('.')}"
