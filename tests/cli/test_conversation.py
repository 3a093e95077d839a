"""The conversation, saved and read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_mlx.cli.conversation import Conversation
from rl_mlx.errors import DestinationExists, FormatError, InvalidRequest, ModelNotFound
from rl_mlx.types import SamplingParams


def talk() -> Conversation:
    conversation = Conversation(system="Be brief.", params=SamplingParams(temperature=0, seed=7))
    for i in range(3):
        conversation.messages.append({"role": "user", "content": f"q{i}"})
        conversation.messages.append({"role": "assistant", "content": f"ä{i}"})
    return conversation


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    one, other = talk(), Conversation()
    one.save(tmp_path / "c.json", "demo")
    assert other.load(tmp_path / "c.json") == "demo"
    assert (other.system, other.messages, other.params) == (one.system, one.messages, one.params)
    other.messages.pop()
    other.save(tmp_path / "c.json", "demo")  # its own file
    with pytest.raises(DestinationExists):
        Conversation().save(tmp_path / "c.json", "demo")
    assert "ä0" in (tmp_path / "c.json").read_text("utf-8")


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "\xff", "[" * 50_000, '{"format": "rl-mlx chat"}',
     '{"format": "rl-mlx chat", "model": "m", "system": null, "params": {}, "messages": [3]}',
     '{"format": "rl-mlx chat", "model": "m", "system": null, "params": {}, '
     '"messages": [{"role": "system", "content": "x"}]}'],
)  # fmt: skip
def test_what_is_no_conversation(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text, "latin-1")
    conversation = talk()
    before = list(conversation.messages)
    with pytest.raises(FormatError, match="not a conversation"):
        conversation.load(tmp_path / "c.json")
    assert conversation.messages == before


def test_bad_parameters_in_a_file(tmp_path: Path) -> None:
    conversation = talk()
    conversation.save(tmp_path / "c.json", "demo")
    document = json.loads((tmp_path / "c.json").read_text("utf-8"))
    document["params"] = {"temperature": -1}
    (tmp_path / "c.json").write_text(json.dumps(document))
    with pytest.raises(InvalidRequest, match="temperature"):
        conversation.load(tmp_path / "c.json")
    assert conversation.system == "Be brief."


@pytest.mark.parametrize("name", ["none.json", "", "x" * 300])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises((ModelNotFound, OSError)):
        Conversation().load(tmp_path / name)


def test_params() -> None:
    conversation = Conversation()
    for name, text in [("temperature", "0"), ("max_tokens", "12"), ("stop", "END"), ("seed", "3")]:
        conversation.set_param(name, text)
    expected = {"temperature": 0, "max_tokens": 12, "stop": ("END",), "seed": 3}
    assert conversation.changed_params() == expected
    conversation.set_param("max_tokens", "none")
    conversation.set_param("stop", "none")
    assert conversation.changed_params() == {"temperature": 0, "seed": 3}
    for name, text in [("temperature", "hot"), ("top_p", "2"), ("nonsense", "1"), ("seed", "1.5")]:
        with pytest.raises(InvalidRequest):
            conversation.set_param(name, text)


def test_drop_forgets_whole_turns() -> None:
    conversation = talk()
    assert conversation.drop_oldest() == 2
    assert conversation.messages[0] == {"role": "user", "content": "q1"}
    assert [conversation.drop_oldest() for _ in range(3)] == [2, 2, 0]
    assert conversation.prompt() == [{"role": "system", "content": "Be brief."}]
