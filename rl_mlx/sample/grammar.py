"""Structured output: which tokens may come next, so that an answer follows a grammar.

The work is llguidance's (https://github.com/guidance-ai/llguidance): Earley parsing with a lexer of
regex derivatives, walked along a trie of the vocabulary's bytes.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance import gbnf_to_lark

from rl_mlx.errors import EngineError, InvalidRequest
from rl_mlx.sample.schema import Schema, locate, nested_id
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Grammar

Mask = npt.NDArray[np.uint32]
# Between the tokens of JSON: a space, or a new line and its indent. A lost model writes blanks.
_WHITESPACE = r"(\x20|\x0D?\x0A[\x20\x09]{0,20})"
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|x([89a-fA-F][0-9a-fA-F])|.)", re.S)
_CACHED = 32


class Compiler:
    """Compiles grammars for one vocabulary; safe from many threads.

    ``vocab_size`` is the width of the model's logits, where that is more than the tokenizer has.
    The vocabulary is prepared with the first grammar (0.8 s for 152,000 tokens); compiled grammars
    are kept, the latest few of them.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = max(vocab_size or 0, tokenizer.vocab_size)
        self._lock = Lock()
        self._kept: OrderedDict[Grammar, Constraint] = OrderedDict()

    def compile(self, grammar: Grammar) -> Constraint:
        """The constraint that a grammar is. Raises ``InvalidRequest`` for one that is wrong, that
        no answer can satisfy, or that needs what is not supported; of a JSON Schema it names the
        keyword's path.
        """
        with self._lock:
            constraint = self._kept.pop(grammar, None) or self._constraint(grammar)
            self._kept[grammar] = constraint
            if len(self._kept) > _CACHED:
                self._kept.popitem(last=False)
            return constraint

    def _constraint(self, grammar: Grammar) -> Constraint:
        return Constraint(self._matcher(grammar), frozenset(self._vocabulary.eos_tokens))

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        try:
            grammar.text.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the grammar has lone surrogates, which are no text") from None
        if grammar.kind in ("json_schema", "json_object"):
            try:
                return self._of_schema(json.loads(grammar.text or '{"type": "object"}'))
            except RecursionError:
                raise InvalidRequest("the JSON Schema cannot be used: nested too deep") from None
        if grammar.kind == "regex":
            source = llguidance.LLMatcher.grammar_from_regex(grammar.text)
        elif grammar.kind == "lark":
            source = llguidance.LLMatcher.grammar_from_lark(grammar.text)
        else:
            source = llguidance.LLMatcher.grammar_from_lark(_lark(grammar.text))
        matcher = self._made(source)
        if matcher.is_error():
            name = {"regex": "regular expression", "lark": "Lark grammar"}.get(grammar.kind)
            reason = _reason(matcher.get_error())
            raise InvalidRequest(f"the {name or 'GBNF grammar'} cannot be used: {reason}")
        return matcher

    def _of_schema(self, schema: Schema) -> llguidance.LLMatcher:
        path = nested_id(schema)
        if path is not None:
            raise InvalidRequest(f"the JSON Schema's {path} is not supported; refer to #/$defs")
        matcher = self._made(_schema_source(schema))
        if not matcher.is_error():
            return matcher

        def error_of(part: Schema) -> str | None:
            tried = self._made(_schema_source(part))
            return _reason(tried.get_error()) if tried.is_error() else None

        path, reason = locate(schema, error_of)
        if reason.startswith("Unimplemented keys"):
            raise InvalidRequest(f"the JSON Schema's {path} is not supported")
        if reason.startswith("oneOf"):
            reason = "it is not certain that only one of them can fit; use anyOf"
        raise InvalidRequest(f"the JSON Schema cannot be used at {path}: {reason}")

    def _made(self, source: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._vocabulary, source, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # where nothing can begin, that is seen only here
        return matcher

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        vocabulary: Any = _Vocabulary(self._tokenizer, self.vocab_size)
        ends = sorted(self._tokenizer.eos_ids) or [vocabulary.eos_token_id]
        return llguidance.LLTokenizer(vocabulary, eos_token=ends)


class Constraint:
    """A compiled grammar, from which any number of answers can start."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: frozenset[int]) -> None:
        self._matcher = matcher
        self._ends = ends

    def start(self) -> Matcher:
        """For one answer, from its first token on."""
        return Matcher(self._matcher.deep_copy(), self._ends)


class Matcher:
    """How far one answer has come in its grammar. The token that ends it is one of its tokens."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: frozenset[int], past: int = 0) -> None:
        self._matcher = matcher
        self._ends = ends
        # An end after the last possible text, 0 or 1: llguidance takes it, but cannot take it back.
        self._past = past

    def mask(self) -> Mask:
        """Which tokens may come next: uint32 ``[ceil(vocab / 32)]``, the lowest bit first.

        Ends of the answer are among them where it may end. Bits past the vocabulary say nothing.
        Raises ``EngineError`` where the grammar takes more work than llguidance's limits allow.
        Other threads run meanwhile.
        """
        bits: Mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return bits

    def advance(self, token: int) -> None:
        """The answer goes on with ``token``, which the mask must allow (else ``EngineError``)."""
        if _is_closed(self._matcher) and token in self._ends and not self._past:
            self._past = 1
        elif self._past or not self._matcher.consume_token(token):
            self._check()
            raise EngineError(f"token {token} does not follow the grammar")

    def allowed(self, tokens: Sequence[int]) -> int:
        """How many of ``tokens`` (a draft) may follow, one after the other."""
        if self._past:
            return 0
        count = int(self._matcher.validate_tokens(list(tokens)))
        if count < len(tokens) and tokens[count] in self._ends:
            after = self._matcher.deep_copy()
            after.try_consume_tokens(list(tokens[:count]))
            count += _is_closed(after)
        return count

    def rollback(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        past = min(self._past, count)
        if count > past and not self._matcher.rollback(count - past):
            self._check()
        self._past -= past

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as the grammar leaves no choice."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def done(self) -> bool:
        """Whether the answer must end here."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> Matcher:
        """One that goes its own way from here on."""
        return Matcher(self._matcher.deep_copy(), self._ends, self._past)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EngineError(f"the grammar failed: {_reason(self._matcher.get_error())}")


def _is_closed(matcher: llguidance.LLMatcher) -> bool:
    """Whether no more text can follow, while the end is still to come."""
    return bool(matcher.is_stopped()) and str(matcher.stop_reason()).startswith("NoExtension")


class _Vocabulary:
    """A tokenizer in the form that llguidance reads: the bytes of every token, and which are
    special. Called with a text, it gives tokens that are exactly its bytes.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.tokens += [b""] * (vocab_size - tokenizer.vocab_size)
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.bos_token_id = tokenizer.bos_id
        if not tokenizer.eos_ids:  # llguidance must have one: past the vocabulary, never chosen
            self.special_token_ids.append(len(self.tokens))
            self.tokens.append(b"<end>")
        self.eos_token_id = min(tokenizer.eos_ids, default=len(self.tokens) - 1)
        single = {piece: i for i, piece in enumerate(self.tokens) if len(piece) == 1}
        self._single = single

    def __call__(self, data: str | bytes) -> list[int]:
        data = data.encode() if isinstance(data, str) else data
        text = data.decode("utf-8", "replace")
        ids = self._encode(text)
        if self._bytes(ids) == data:
            return ids
        # SentencePiece puts a space in front of every text; after a line feed there is none.
        ids = self._encode("\n" + text)
        for start in range(1, 4):
            if self._bytes(ids[start:]) == data:
                return ids[start:]
        return [self._single[byte] for byte in map(bytes, zip(data)) if byte in self._single]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special=False, parse_special=False)

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[i] for i in ids)


def _schema_source(schema: Schema) -> str:
    options: Any = {"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
    try:
        source: str = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides=options
        )
    except ValueError as error:
        raise InvalidRequest(f"the JSON Schema cannot be used: {error}") from None
    return source


def _lark(gbnf: str) -> str:
    """GBNF as Lark. Raises ``InvalidRequest``."""
    try:
        lark: str = gbnf_to_lark.gbnf_to_lark(_ESCAPE.sub(_character, gbnf))
    except Exception as error:  # the converter's own errors are of this very type
        if type(error) not in (Exception, gbnf_to_lark.GbnfToLarkError, RecursionError):
            raise
        reason = " ".join(str(error).split())
        raise InvalidRequest(f"the GBNF grammar cannot be used: {reason[:300]}") from None
    return lark


def _character(escape: re.Match[str]) -> str:
    """An escaped code point as itself, or where it could be read as syntax as two hex digits."""
    code = next(filter(None, escape.groups()), None)
    if code is None:
        return escape.group()
    point = int(code, 16)
    if point < 0x80:
        return f"\\x{point:02x}"
    if point > 0x10FFFF or 0xD800 <= point < 0xE000:
        raise InvalidRequest(f"the GBNF grammar has {escape.group()}, which is no character")
    return chr(point)


def _reason(error: str) -> str:
    """What llguidance says, in one line."""
    lines = error.splitlines() or ["unknown"]
    if lines[0].startswith("panic"):
        return "it is too large"
    if lines[0].startswith("NoExtension"):
        return "no answer can satisfy it"
    detail = next((line for line in lines if line.startswith("error: ")), "")
    return f"{lines[0][:200]} {detail.removeprefix('error: ')}".strip()
