"""Spells conversations with tool calls, and what is learnt of them."""

from __future__ import annotations

import json
from typing import Any

from support.tokens import (
    turns,
)

ARGUMENTS = {"city": "Paris", "n": 2}


def calls(*names: str, text: bool = False) -> list[dict[str, Any]]:
    """Calls of tools, as OpenAI has them; the arguments an object or (as there) its JSON text."""
    arguments = json.dumps(ARGUMENTS) if text else ARGUMENTS
    return [
        {"id": f"call_{i}", "type": "function", "function": {"name": n, "arguments": arguments}}
        for i, n in enumerate(names)
    ]


def talk(
    content: str | None = "", *names: str, text: bool = False, absent: bool = False
) -> list[dict[str, Any]]:
    """A question, a call, what the tool said, an answer; and thanks."""
    made = calls(*names or ("weather",), text=text)
    message = {"role": "assistant", "content": content, "tool_calls": made}
    if absent:
        del message["content"]
    answers = [
        {"role": "tool", "name": c["function"]["name"], "tool_call_id": c["id"], "content": "SUNNY"}
        for c in made
    ]
    before = [{"role": "user", "content": "Rain?"}, message, *answers]
    return [*before, *turns("", "No rain.", "Thanks", "Bye")[1:]]


JSON_CALL = '{"name": "weather", "arguments": {"city": "Paris", "n": 2}}'


TAGGED = f"<tool_call>\n{JSON_CALL}\n</tool_call>"


WITH_PARAMETERS = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=n>\n2\n"
    "</parameter>\n</function>\n</tool_call>"
)


GLM_CALL = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
    "<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)


GEMMA_CALL = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,n:2}<tool_call|>'


DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Paris", "n": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


CALLED: dict[str, list[str]] = {
    "qwen2_5": [f"{TAGGED}<|im_end|>", "No rain.<|im_end|>", "Bye<|im_end|>"],
    "qwen3_instruct_2507": [f"{TAGGED}<|im_end|>", "No rain.<|im_end|>", "Bye<|im_end|>"],
    "qwen3": [
        f"{TAGGED}<|im_end|>",
        "No rain.<|im_end|>",
        "<think>\n\n</think>\n\nBye<|im_end|>",
    ],
    "qwen3_5_nothink": [f"{WITH_PARAMETERS}<|im_end|>", "No rain.<|im_end|>", "Bye<|im_end|>"],
    "qwen3_5_think": [
        f"{WITH_PARAMETERS}<|im_end|>",
        "No rain.<|im_end|>",
        "\n</think>\n\nBye<|im_end|>",
    ],
    "glm4moe": [
        f"\n<think></think>\n{GLM_CALL}<|observation|>",
        "\n<think></think>\nNo rain.<|user|>",
        "\n<think></think>\nBye<|endoftext|>",
    ],
    "gptoss": [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris", "n": 2}'
        "<|call|>",
        "<|channel|>final<|message|>No rain.<|end|>",
        "<|channel|>final<|message|>Bye<|return|>",
    ],
    "gemma4": [GEMMA_CALL, "No rain.<turn|>", "Bye<turn|>"],
    "gemma4_v3": [GEMMA_CALL, "No rain.<turn|>", "Bye<turn|>"],
    "gemma4_v5": [GEMMA_CALL, "No rain.<turn|>", "Bye<turn|>"],
    "lfm2_v2": [
        "<|tool_call_start|>[weather(city='Paris', n=2)]<|tool_call_end|><|im_end|>",
        "No rain.<|im_end|>",
        "Bye<|im_end|>",
    ],
    "llama3_1": [
        '{"name": "weather", "parameters": {"city": "Paris", "n": 2}}<|eot_id|>',
        "No rain.<|eot_id|>",
        "Bye<|eot_id|>",
    ],
    "llama3_2": [
        '{"name": "weather", "parameters": {"city": "Paris", "n": 2}}<|eot_id|>',
        "No rain.<|eot_id|>",
        "Bye<|eot_id|>",
    ],
    "deepseekv3": [
        f"{DEEPSEEK_CALL}<｜end▁of▁sentence｜>",
        "No rain.<｜end▁of▁sentence｜>",
        "Bye<｜end▁of▁sentence｜>",
    ],
}
"""What is learnt of `talk`, by the template's name."""


SPELLINGS: dict[str, list[dict[str, Any]]] = {
    "null": talk(None),
    "empty": talk(""),
    "absent": talk(absent=True),
    "arguments as text": talk("", text=True),
    "arguments as text, absent": talk(absent=True, text=True),
}


NO_CALLS = (
    "cohere", "cohere2", "llama3", "gemma", "gemma3", "lfm2", "qwen2_5_vl", "phi3", "phi3_5",
    "deepseek_r1_distill",
)  # fmt: skip
"""Templates that leave calls of tools out."""
