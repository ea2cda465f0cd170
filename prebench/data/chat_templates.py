"""Chat templates of LLaVA's published recipes, as Jinja: what its conversation class writes, in transformers' form."""

from __future__ import annotations

from typing import Any, Literal

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_TEXTS = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
)


def _images(separator: str) -> str:
    """Return the template of a turn's pictures; the separator stands behind each where a text follows."""
    picture = (
        "{% if part['type'] == 'image' %}{{ '<image>' }}"
        "{% if message['content'] | selectattr('type', 'equalto', 'text') | list %}{{ '" + separator + "' }}{% endif %}"
        "{% endif %}"
    )
    return (
        "{% if message['content'] is not string %}{% for part in message['content'] %}"
        + picture
        + "{% endfor %}{% endif %}"
    )


VICUNA = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}{{ \"" + _SYSTEM + ' " }}{% endif %}'
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}" + _TEXTS + "{{ ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' }}" + _images("\\n") + _TEXTS + "{{ ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}" + _TEXTS + "{{ eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Of LLaVA-1.5 with Vicuna (its `v1`): pictures first in their turn, `USER: ... ASSISTANT: ...</s>`."""

PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + _images("") + "{% else %}" + _TEXTS + "{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
"""Of LLaVA's align stage (its `plain`): picture, caption, line break; the question is left out."""


def chat_template(processor: Any, prompt: Literal["chat", "plain"]) -> str:
    """Return the template that a source's examples are rendered with."""
    template: str = PLAIN if prompt == "plain" else processor.chat_template
    return template
