"""The words: what a request is, what may happen to it, and what comes out.

A caller's options become ``SamplingParams``; prompt ids and params make a ``Request``; a backend
answers with ``Event``s, the last of which (``Finished`` or ``Failed``) is the only terminal one.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypedDict, get_args

from rl_mlx.errors import InvalidRequest, RlMlxError

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
Terminal = Literal["finished", "cancelled", "failed"]


class Message(TypedDict, total=False):
    """One turn of a conversation, as chat templates and OpenAI clients know it."""

    role: str
    content: Any
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


# name -> (lowest, highest, whether it may equal the lowest)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, True),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 100.0, False),
    "frequency_penalty": (-100.0, 100.0, True),
    "presence_penalty": (-100.0, 100.0, True),
    "xtc_probability": (0.0, 1.0, True),
    "xtc_threshold": (0.0, 0.5, True),
    "dry_multiplier": (0.0, 100.0, True),
    "dry_base": (1.0, 100.0, True),
}
_COUNTS: dict[str, int] = {
    "max_tokens": 0,
    "top_k": 0,
    "penalty_window": 0,
    "dry_allowed_length": 1,
    "dry_window": 0,
    "logprobs": 0,
}
MAX_LOGPROBS = 100


GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "gbnf"]
MAX_GRAMMAR = 2**20


@dataclass(frozen=True)
class Grammar:
    """What an answer must be: its form is checked here, its meaning when it is compiled.

    ``text`` is a JSON Schema (an object, draft 7 or 2020-12), a regular expression for the whole
    answer, a Lark grammar (as llguidance has them) or a GBNF grammar (as llama.cpp has them);
    ``json_object`` takes none. Raises ``InvalidRequest``.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            kinds = ", ".join(get_args(GrammarKind))
            raise InvalidRequest(f"unknown kind of grammar {self.kind!r}; known are {kinds}")
        if not isinstance(self.text, str) or bool(self.text) == (self.kind == "json_object"):
            raise InvalidRequest(
                "a grammar of kind json_object has no text"
                if self.kind == "json_object"
                else f"a grammar of kind {self.kind} needs its text, not {self.text!r}"
            )
        if len(self.text) > MAX_GRAMMAR:
            raise InvalidRequest(f"a grammar has at most {MAX_GRAMMAR} characters")
        if self.kind == "json_schema":
            try:
                schema = json.loads(self.text)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"the JSON Schema is no JSON: {error}") from None
            if not isinstance(schema, dict):
                raise InvalidRequest("a JSON Schema must be an object")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Every field is checked when it is made; a bad one raises
    ``InvalidRequest``.

    ``temperature=0`` is greedy. ``top_k=0``, ``top_p=1`` and ``min_p=0`` switch those filters off;
    a ``top_k`` at or above the vocabulary keeps everything. Filters apply in the order penalties,
    bias, DRY, temperature, top-k, top-p, min-p, XTC. ``repetition_penalty`` is CTRL's (Keskar et
    al. 2019); ``frequency_penalty`` and ``presence_penalty`` are OpenAI's; all three look at the
    last ``penalty_window`` tokens, prompt included for the first and answer only for the others.
    ``max_tokens=None`` goes on to the end of the context.
    """

    max_tokens: int | None = None
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_window: int = 256
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = 1024
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, (low, high, closed) in _RANGES.items():
            _check_number(name, getattr(self, name), low, high, closed=closed)
        for name, lowest in _COUNTS.items():
            _check_count(name, getattr(self, name), lowest)
        if self.logprobs is not None and self.logprobs > MAX_LOGPROBS:
            raise InvalidRequest(f"logprobs must be at most {MAX_LOGPROBS}, not {self.logprobs}")
        if self.seed is not None:
            _check_count("seed", self.seed, None)
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for token, bias in self.logit_bias.items():
            _check_count("logit_bias token", token, 0)
            _check_number(f"logit_bias[{token}]", bias, -1e9, 1e9, closed=True)

    @classmethod
    def of(cls, params: SamplingParams | None = None, /, **options: Any) -> SamplingParams:
        """``params`` (or the defaults) with ``options`` put over it; an unknown option raises."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = (
                    f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
                )
                raise InvalidRequest(f"unknown sampling option {name!r}; {hint}")
        return replace(params, **options) if params is not None else cls(**options)


def _check_number(name: str, value: Any, low: float, high: float, *, closed: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number, not {value!r}")
    if value > high or value < low or (value == low and not closed):
        bracket = "at least" if closed else "above"
        raise InvalidRequest(
            f"{name} must be {bracket} {low:g} and at most {high:g}, not {value:g}"
        )


def _check_count(name: str, value: Any, lowest: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number, not {value!r}")
    if lowest is not None and value < lowest:
        raise InvalidRequest(f"{name} must be at least {lowest}, not {value}")


def _stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise InvalidRequest(f"stop must be non-empty strings, not {text!r}")
    return stops


class Matcher(Protocol):
    """How far one answer has come in its grammar (``sample/grammar.py``)."""

    def mask(self) -> Any:
        """Tokens that may come next: uint32 ``[ceil(vocab / 32)]``, the lowest bit first."""

    def advance(self, token: int) -> None:
        """The answer goes on with this token."""

    def forced(self) -> list[int]:
        """The tokens that must come next."""

    @property
    def done(self) -> bool:
        """Whether the answer must end here."""

    def copy(self) -> Matcher:
        """One that goes its own way from here on."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a backend is asked to do: continue ``prompt`` (token ids, at least one).

    ``matcher`` keeps the answer to ``params.grammar``, where there is one.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    eos_ids: frozenset[int] = frozenset()
    priority: int = 0
    matcher: Matcher | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of the chosen token and of the likeliest, before the filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timings:
    """Seconds and counts of one request, as measured where the tokens are made.

    ``queued``: submission to the first prefill step. ``prefill``: from then to the first token.
    ``decode``: from the first token to the last. ``reused`` prompt tokens came from a prefix
    already in the cache; ``prefix_broke`` is the first one that was not known there, if any.
    Of ``drafted`` tokens ``accepted`` were right; ``speculation_gain`` is the estimated speed with
    drafts over that without.
    """

    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    prompt_tokens: int = 0
    reused: int = 0
    prefix_broke: int | None = None
    generated: int = 0
    forwards: int = 0
    drafted: int = 0
    accepted: int = 0
    speculation_gain: float = 1.0

    @property
    def first_token(self) -> float:
        """Seconds from submission to the first token."""
        return self.queued + self.prefill

    @property
    def tokens_per_second(self) -> float:
        """Generation speed after the first token; 0 where nothing can be said."""
        return (self.generated - 1) / self.decode if self.generated > 1 and self.decode > 0 else 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prefill speed over the tokens that were computed, not reused."""
        return (self.prompt_tokens - self.reused) / self.prefill if self.prefill > 0 else 0.0


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` prompt tokens are in the cache."""

    done: int
    total: int


@dataclass(frozen=True)
class Token:
    """One more token of the answer."""

    id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Finished:
    """Terminal: the answer is complete, or was cancelled."""

    reason: FinishReason
    timings: Timings


@dataclass(frozen=True)
class Failed:
    """Terminal: the request died of ``error``; others are not touched."""

    error: RlMlxError


Event = Progress | Token | Finished | Failed


@dataclass(frozen=True)
class Usage:
    """Token counts as API clients know them."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. ``progress`` is set while the prompt is read, before the first
    text. ``stop`` is the stop string that ended the answer, at its end.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    progress: Progress | None = None
    finish_reason: FinishReason | None = None
    stop: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Result:
    """A whole answer. ``text`` excludes a matched stop string; ``token_ids`` are all that were
    generated. ``stop`` is the stop string that ended it, if one did.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None = None
    stop: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """What ``llm.info`` says. Sizes in bytes; ``bits_per_weight`` over all tensors as they lie in
    memory.
    """

    name: str
    path: str
    architecture: str
    parameters: int
    bits_per_weight: float
    context: int
    vocab: int
    hidden: int
    layers: int
    backend: str
    device: str
    dtype: str
    weight_bytes: int
    kv_bytes_per_token: int
    memory_budget: int
    notes: tuple[str, ...] = ()
