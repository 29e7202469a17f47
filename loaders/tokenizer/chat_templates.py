"""The chat templates that have a name, as Jinja.

A template gets `messages` (dicts with `role` and `content`), `add_generation_prompt`, `bos_token` and `eos_token`.
"""

from __future__ import annotations

_CONCATENATION = """\
{%- for message in messages -%}
    {%- if not loop.first -%}{{ '<separator>' }}{%- endif -%}
    {{- message['content'] -}}
{%- endfor -%}
{%- if not add_generation_prompt -%}{{ eos_token }}{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    "simple_concat_with_space": _CONCATENATION.replace("<separator>", " "),
    "simple_concat_with_new_line": _CONCATENATION.replace("<separator>", r"\n"),
    "simple_chat": """\
{%- for message in messages -%}
    {%- if not loop.first -%}{{ '\\n\\n' }}{%- endif -%}
    {{- message['role'] | capitalize + ': ' + message['content'] -}}
{%- endfor -%}
{%- if not add_generation_prompt -%}{{ eos_token }}{%- endif -%}
""",
    "assistant_message_only": """\
{%- for message in messages if message['role'] == 'assistant' -%}
    {{- message['content'] -}}
{%- endfor -%}
""",
    # turns of other roles, such as `tool` and `environment`, are left out, as by Open Instruct's templates so named
    "zephyr": """\
{%- for message in messages if message['role'] in ('system', 'user', 'assistant') -%}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] -}}{{ eos_token }}{{ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
""",
    "tulu": """\
{%- for message in messages -%}
    {%- if message['role'] in ('system', 'user', 'assistant') -%}
        {{- '<|' + message['role'] + '|>\\n' + message['content'] -}}
        {%- if message['role'] == 'assistant' -%}{{ eos_token }}{%- endif -%}
        {%- if not (loop.last and message['role'] == 'assistant') -%}{{ '\\n' }}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
""",
}
"""Every built-in template by the name that `--chat_template_name` takes."""
