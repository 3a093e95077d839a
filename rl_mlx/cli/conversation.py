"""What was said so far: the messages, how they are saved, and how they are read back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rl_mlx.errors import DestinationExists, FormatError, InvalidRequest, ModelNotFound
from rl_mlx.types import Message, SamplingParams

FORMAT = "rl-mlx chat"
MAX_FILE = 64 << 20


@dataclass
class Conversation:
    """A system message, the turns after it, and how answers are sampled."""

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    params: SamplingParams = field(default_factory=SamplingParams)
    file: Path | None = None
    """Where it was saved or loaded last; only that file is written over."""

    def prompt(self) -> list[Message]:
        """All messages, the system one first."""
        first: list[Message] = []
        if self.system:
            first.append({"role": "system", "content": self.system})
        return first + self.messages

    def drop_oldest(self) -> int:
        """Forget the oldest question and its answer; returns how many messages went."""
        turns = [i for i, m in enumerate(self.messages) if m.get("role") == "user"]
        end = turns[1] if len(turns) > 1 else len(self.messages)
        del self.messages[:end]
        return end

    def set_param(self, name: str, text: str) -> None:
        """Set a field of ``SamplingParams`` from what was typed; raises ``InvalidRequest``."""
        value: Any = None
        if text.casefold() != "none":
            try:
                value = json.loads(text)
            except ValueError:
                value = text
        if name == "logit_bias":
            raise InvalidRequest("logit_bias cannot be set here")
        if name == "stop" and not isinstance(value, list):
            value = [] if value is None else [text]
        self.params = SamplingParams.of(self.params, **{name: value})

    def changed_params(self) -> dict[str, Any]:
        """The fields of ``params`` that are not at their defaults."""
        plain = SamplingParams()
        return {
            f.name: getattr(self.params, f.name)
            for f in fields(SamplingParams)
            if getattr(self.params, f.name) != getattr(plain, f.name)
        }

    def save(self, path: Path, model: str) -> None:
        """Write it as JSON; raises ``DestinationExists`` for a file that is not this
        conversation's.
        """
        if path.exists() and path != self.file:
            raise DestinationExists(f"{path} exists; choose another name")
        document = {
            "format": FORMAT,
            "model": model,
            "system": self.system,
            "params": self.changed_params(),
            "messages": self.messages,
        }
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
        self.file = path

    def load(self, path: Path) -> str:
        """Become the conversation in a file; returns the name of the model it was held with.

        Raises ``ModelNotFound`` where there is no file, ``FormatError`` for one that ``save`` did
        not write, and leaves this conversation as it was then.
        """
        try:
            if path.stat().st_size > MAX_FILE:
                raise FormatError(f"{path} is too large for a saved conversation")
            document = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, IsADirectoryError):
            raise ModelNotFound(f"there is no file {path}") from None
        except (ValueError, RecursionError):
            document = None
        if not _is_saved(document):
            raise FormatError(f"{path} is not a conversation that /save wrote")
        self.params = SamplingParams.of(**document["params"])
        self.system, self.messages, self.file = document["system"], document["messages"], path
        return str(document["model"])


def _is_saved(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and document.get("format") == FORMAT
        and isinstance(document.get("system"), (str, type(None)))
        and isinstance(document.get("params"), dict)
        and isinstance(document.get("model"), str)
        and isinstance(document.get("messages"), list)
        and all(
            isinstance(m, dict)
            and m.get("role") in ("user", "assistant")
            and isinstance(m.get("content"), str)
            and isinstance(m.get("reasoning_content", ""), str)
            for m in document["messages"]
        )
    )
