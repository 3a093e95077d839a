"""Every template: the format that is found for it, and its own rendered answers read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rl_mlx.text.router import Format, Routed, Router, collect
from rl_mlx.text.template import ChatTemplate

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Its name."},
            "days": {"type": "integer", "description": "How many."},
            "opts": {
                "type": "object",
                "description": "More.",
                "properties": {"a": {"type": "array", "items": {"type": "number"}}},
                "additionalProperties": {"type": "string"},
            },
            "metric": {"type": "boolean", "description": "Or not."},
        },
        "required": ["city"],
    },
}
NOW = {
    "name": "now",
    "description": "The time.",
    "parameters": {"type": "object", "properties": {}, "required": []},
}
TOOLS = [
    {"type": "function", "function": WEATHER},
    {"type": "function", "function": NOW},
]
FULL = {"city": 'Par"is\nX é', "days": 3, "opts": {"a": [1.5, 2]}, "metric": True}
SMALL = {"city": "Rome"}

FOUND = {
    "Apertus-8B-Instruct": "apertus",
    "Apriel-1.6-15b-Thinker-fixed": "apriel",
    "Bielik-11B-v3.0-Instruct": "hermes",
    "ByteDance-Seed-OSS": "seed",
    "Cohere2MoE": "cohere",
    "CohereForAI-c4ai-command-r-plus-tool_use": "command-r",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "cohere",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "GLM-5.2": "glm",
    "GigaChat3-10B-A1.8B": "gigachat3",
    "GigaChat3.1-10B-A1.8B": "gigachat",
    "HuggingFaceTB-SmolLM3-3B": "plain",
    "Kimi-K2-Instruct": "kimi",
    "Kimi-K2-Thinking": "kimi",
    "LFM2-8B-A1B": "lfm2",
    "LFM2.5-Instruct": "lfm2",
    "MiMo-VL": "hermes",
    "MiniMax-M2": "minimax",
    "MiroThinker": "mirothinker",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen-coder",
    "NVIDIA-Nemotron-Nano-v2": "nemotron",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen-coder",
    "Qwen3.5-4B": "qwen-coder",
    "Reka-Edge": "hermes",
    "StepFun3.5-Flash": "qwen-coder",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek",
    "deepseek-ai-DeepSeek-V3.1": "deepseek",
    "deepseek-ai-DeepSeek-V3.2": "dsml",
    "deepseek-ai-DeepSeek-V4": "dsml",
    "fireworks-ai-llama-3-firefunction-v2": "firefunction",
    "google-gemma-2-2b-it": "plain",
    "google-gemma-4-31B-it": "gemma",
    "google-gemma-4-31B-it-interleaved": "gemma",
    "ibm-granite-granite-3.3-2B-Instruct": "granite",
    "ibm-granite-granite-4.0": "hermes",
    "llama-cpp-deepseek-r1": "deepseek",
    "llama-cpp-rwkv-world": "plain",
    "meetkai-functionary-medium-v3.1": "functionary-v3.1",
    "meetkai-functionary-medium-v3.2": "functionary-v3.2",
    "meta-llama-Llama-3.1-8B-Instruct": "llama",
    "meta-llama-Llama-3.2-3B-Instruct": "llama",
    "meta-llama-Llama-3.3-70B-Instruct": "llama",
    "microsoft-Phi-3.5-mini-instruct": "plain",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "moonshotai-Kimi-K2": "kimi",
    "openai-gpt-oss-120b": "harmony",
    "stepfun-ai-Step-3.5-Flash": "qwen-coder",
    "unsloth-Apriel-1.5": "apriel",
    "unsloth-mistral-Devstral-Small-2507": "mistral",
    "upstage-Solar-Open-100B": "solar",
}
# Templates that say nothing of calls in an assistant's message, or (MiroThinker) need a program
# that other engines alone run: their formats are tested with hand-written answers below.
SILENT = {
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2-8B-A1B",
    "LFM2.5-Instruct",
    "MiroThinker",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "google-gemma-2-2b-it",
    "ibm-granite-granite-3.3-2B-Instruct",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}
ONE_CALL = {
    "GigaChat3-10B-A1.8B",
    "GigaChat3.1-10B-A1.8B",
    "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct",
    "openai-gpt-oss-120b",
}
# Their history of a plain answer is not what they have the model write.
UNLIKE = {
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NVIDIA-Nemotron-Nano-v2",
}
# These put content into the same message as calls, and reasoning in front of it.
WITH_CONTENT = {
    "Bielik-11B-v3.0-Instruct",
    "ByteDance-Seed-OSS",
    "GLM-4.6",
    "GLM-4.7-Flash",
    "GLM-5.2",
    "Kimi-K2-Thinking",
    "MiniMax-M2",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "Qwen-Qwen3-0.6B",
    "Qwen3.5-4B",
    "StepFun3.5-Flash",
    "google-gemma-4-31B-it",
    "google-gemma-4-31B-it-interleaved",
    "stepfun-ai-Step-3.5-Flash",
}
ENDS = re.compile(
    r"<EOS>|<\|im_end\|>|<\|e[o]t_id\|>|<\|eom_id\|>|<｜end▁of▁sentence｜>|<seed:eos>|\[e~\["
    r"|<turn\|>|<\|tool_response>|<\|end_of_text\|>|<SPECIAL_12>|<\|END_OF_TURN_TOKEN\|>|<sep>"
    r"|<\|assistant_end\|>|<end_of_turn>|\n?<\|end\|>\n"
)
TAG = re.compile(r"<[^<>\n]*>")


def answer_of(template: ChatTemplate, message: dict[str, Any]) -> tuple[str, str]:
    """The prompt's end and the answer, as the template would have the model write the message."""
    user = [{"role": "user", "content": "Weather?"}]
    prompt = template.render(user, TOOLS, True)
    whole = template.render([*user, message], TOOLS, False)
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole))
    )
    # Where the two differ inside of a tag, the answer begins with the tag.
    same = next((m.start() for m in TAG.finditer(whole) if m.start() < same < m.end()), same)
    return whole[:same], ENDS.split(whole[same:])[0]


def routed_by(form: Format, chunks: list[str], tail: str) -> Routed:
    router = Router(form, tools=TOOLS, prompt_tail=tail)
    return collect([p for chunk in chunks for p in router.feed(chunk)] + router.flush())


def templates(shared: Path) -> dict[str, str]:
    return {path.stem: path.read_text("utf-8") for path in (shared / "templates").glob("*.jinja")}


@pytest.mark.shared
def test_every_template_has_its_format(shared: Path) -> None:
    found = {name: Format.of(source).name for name, source in templates(shared).items()}
    assert found == FOUND


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(set(FOUND) - SILENT))
def test_a_rendered_call_is_read_back(shared: Path, name: str) -> None:
    source = (shared / "templates" / f"{name}.jinja").read_text("utf-8")
    extra = {"functions": json.dumps(TOOLS), "datetime": "now"}
    template = ChatTemplate(source, {"bos_token": "<BOS>", "eos_token": "<EOS>", **extra})
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": tool, "arguments": args}}
        for i, (tool, args) in enumerate((("get_weather", FULL), ("get_weather", SMALL)))
    ]
    calls = calls[:1] if name in ONE_CALL else calls
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": calls}
    if name in WITH_CONTENT:
        message |= {"content": "Look.", "reasoning_content": "Um."}
    tail, answer = answer_of(template, message)
    form = Format.of(source)
    routed = routed_by(form, [answer], tail)
    assert [(call.name, json.loads(call.arguments)) for call in routed.calls] == [
        ("get_weather", FULL),
        ("get_weather", SMALL),
    ][: len(calls)]
    expected = ("Um.", "Look.") if name in WITH_CONTENT else ("", "")
    if name not in UNLIKE:
        assert (routed.reasoning.strip(), routed.content.strip()) == expected
    for size in (1, 7):
        chunks = [answer[i : i + size] for i in range(0, len(answer), size)]
        assert routed_by(form, chunks, tail) == routed


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(set(FOUND) - UNLIKE))
def test_a_rendered_answer_is_content(shared: Path, name: str) -> None:
    source = (shared / "templates" / f"{name}.jinja").read_text("utf-8")
    extra = {"functions": json.dumps(TOOLS), "datetime": "now", "tool": {}}
    template = ChatTemplate(source, {"bos_token": "<BOS>", "eos_token": "<EOS>", **extra})
    prompt = template.render([{"role": "user", "content": "Hi"}])
    whole = template.render(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A <b> c."}],
        add_generation_prompt=False,
    )
    same = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
    same = next((m.start() for m in TAG.finditer(whole) if m.start() < same < m.end()), same)
    answer = ENDS.split(whole[same:])[0]
    routed = routed_by(Format.of(source), [answer], whole[:same])
    assert (routed.content.strip(), routed.calls) == ("A <b> c.", ())
