"""Chat templates: a conversation as the prompt that a model was trained on, rendered in Jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from ryzen_compile.errors import RyzenError, UsageError

Message = Mapping[str, Any]
"""`{"role": "user", "content": "text"}`; templates may use further keys."""


def render_chat(template: str, messages: Sequence[Message], *, special_tokens: Mapping[str, str], source: str) -> str:
    """Return the prompt of a conversation up to the start of the model's reply.

    The template has the same variables as in Transformers: `messages`, `add_generation_prompt`, the special tokens by name, and
    the functions `raise_exception` and `strftime_now`. It runs in a sandbox, since a template comes with a model.

    Raises:
        UsageError: A message has no role.
        RyzenError: Jinja is not installed, or the template is invalid or rejects the conversation.
    """
    try:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise RyzenError(f"chat templates need Jinja: {error}", hint="pip install 'ryzen-compile[text]'") from error
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message:
            raise UsageError(f"message {index} has no role", hint='write {"role": "user", "content": "..."}')
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
    try:
        compiled = environment.from_string(template)
        return str(compiled.render(messages=list(messages), add_generation_prompt=True, **special_tokens))
    except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
        raise RyzenError(
            f"the chat template of {source} fails: {error}", hint="check the roles and the order of the messages"
        ) from error


def _raise_template_error(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
