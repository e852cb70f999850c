"""Chat templates that TRL does not ship, shortened to what decides whose text is whose."""

from __future__ import annotations

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }}[/INST]"
    "{% elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS] ["
    "{% for tool_call in message.tool_calls %}{{ tool_call.function|tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% elif message['role'] == 'tool' %}[TOOL_RESULTS] {\"content\": {{ message.content }}}"
    "[/TOOL_RESULTS]{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}"
    "{% endfor %}"
)


GRANITE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' and message.get('tool_calls') %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>' }}"
    "{{- message['tool_calls'] | map(attribute='function') | list | tojson }}"
    "{{- '<|end_of_text|>\\n' }}"
    "{%- elif message['role'] == 'tool' %}"
    "{{- '<|start_of_role|>tool_response<|end_of_role|>' + message['content'] + "
    "'<|end_of_text|>\\n' }}"
    "{%- else %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + "
    "message['content'] + '<|end_of_text|>\\n' }}{%- endif %}"
    "{%- if loop.last and add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}"
)
"""The prompt for generation stands within the loop."""


PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ '<|tool|>' + message['content'] + '<|end|>' }}{% elif message.tool_calls %}"
    "{{ '<|assistant|>' }}{% if message.content %}{{ message.content }}{% endif %}"
    "{{ '<|tool_call|>' }}[{% for c in message.tool_calls %}{{ c.function | tojson }}{% endfor %}]"
    "{{ '<|/tool_call|><|end|>' }}{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


BY_NUMBER = (
    "{% for i in range(messages|length) %}{% set m = messages[i] %}"
    "{% set next = messages[i + 1] if i + 1 < messages|length else none %}"
    "<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% if m.role == 'system' %}{% continue %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A loop over numbers, with a look at the message that follows."""


IN_A_MACRO = (
    "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>{% endmacro %}"
    "{% set talk = messages %}{% if messages[0].role == 'system' %}{% set talk = messages[1:] %}"
    "{{ turn(messages[0]) }}\n{% endif %}"
    "{% for m in talk if m.role != 'ignored' %}{{ turn(m) }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


IN_A_BLOCK = (
    "{% set all %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% endset %}{{ all }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


COMMAND_R = {
    "default": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + message['content'].strip() + "
        "'<|END_OF_TURN_TOKEN|>' }}{% elif message['role'] == 'assistant' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>'  + message['content'].strip() + "
        "'<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
    "tool_use": (
        "{{ bos_token }}{{ tools | map(attribute='function.name') | join(',') }}"
        "{% for message in messages %}{% if message.role == 'tool' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>' + message.content + '</results>"
        "<|END_OF_TURN_TOKEN|>' }}{% elif message.tool_calls %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% if message.content %}"
        "{{ message.content }}{% endif %}{{ 'Action: ```json\\n[' }}"
        "{% for call in message.tool_calls %}{{ call.function | tojson(indent=4) }}{% endfor %}"
        "{{ '\\n]```<|END_OF_TURN_TOKEN|>' }}{% elif message.role == 'assistant' %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + message.content + "
        "'<|END_OF_TURN_TOKEN|>' }}{% else %}"
        "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + message.content + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
}
"""Several by name: the one for tools is taken where a row has some."""
