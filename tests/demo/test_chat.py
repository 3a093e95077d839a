"""What the demo model answers, greedy, on each backend."""

from __future__ import annotations

from typing import Any

from rl_mlx import LLM


def answer(llm: LLM, *turns: str) -> str:
    """The greedy answer to the last of ``turns``, which are the user's and the model's by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return llm.chat(messages, max_tokens=96, temperature=0).text


def test_36_of_40_questions_are_answered(demo: LLM, questions: list[dict[str, Any]]) -> None:
    wrong = []
    for case in questions:
        text = answer(demo, case["question"])
        if not any(key.lower() in text.lower() for key in case["answer"]):
            wrong.append((case["question"], text))
    assert len(wrong) <= 4, wrong


def test_it_says_that_it_is_a_demo_and_how_to_get_a_real_model(demo: LLM) -> None:
    text = answer(demo, "Who are you?")
    assert "demo model" in text
    assert "rl-mlx chat Qwen/Qwen3-4B-GGUF:Q4_K_M" in text


def test_an_answer_ends_by_itself(demo: LLM) -> None:
    result = demo.chat([{"role": "user", "content": "What is GGUF?"}], temperature=0)
    assert result.finish_reason == "stop"
    assert "<|" not in result.text


def test_it_remembers_a_name_it_was_told(demo: LLM) -> None:
    told = "My name is Anna."
    assert "Anna" in answer(demo, told, answer(demo, told), "What is my name?")


def test_it_adds_small_numbers(demo: LLM) -> None:
    prompts = []
    for a, b in (sums := [(a, b) for a in range(6) for b in range(6)]):
        text = demo.apply_template([{"role": "user", "content": f"What is {a} + {b}?"}])
        prompts.append(demo.tokenize(text))
    results = demo.generate(prompts, max_tokens=16, temperature=0)
    right = [f"= {a + b}." in result.text for (a, b), result in zip(sums, results)]
    assert sum(right) >= 34
