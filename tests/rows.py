"""A row of every kind as it lies in a file, and a chat template that marks what the assistant says."""

from __future__ import annotations

GOOD = '{"prompt": "1+1=", "completion": "2"}\n'
CLASS = '{"text": "a", "label": "yes"}\n'
CHAT_LINE = '{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}\n'
MARKED = (  # tests.tiny.TEMPLATE that says what the assistant says
    "{% for m in messages %}<s>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
