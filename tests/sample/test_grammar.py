"""Grammars: what they accept, token by token, over real vocabularies; and what is refused."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_mlx.errors import EngineError, InvalidRequest
from rl_mlx.sample.adjust import allowed_tokens
from rl_mlx.sample.grammar import Compiler, Matcher
from rl_mlx.sample.schema import locate
from rl_mlx.text.tokenizer import Tokenizer
from rl_mlx.types import Grammar

pytestmark = pytest.mark.shared
VOCABS = ("gpt-2", "llama-spm", "phi-3")  # bytes, SentencePiece, SentencePiece and added tokens


@pytest.fixture(scope="module", params=VOCABS)
def vocab(shared: Path, request: pytest.FixtureRequest) -> tuple[Tokenizer, Compiler]:
    tokenizer = Tokenizer.from_gguf(shared / f"vocab/ggml-vocab-{request.param}.gguf")
    return tokenizer, Compiler(tokenizer)


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> tuple[Tokenizer, Compiler]:
    tokenizer = Tokenizer.from_gguf(shared / "vocab/ggml-vocab-gpt-2.gguf")
    return tokenizer, Compiler(tokenizer)


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens that are exactly the text, with none for the space that SentencePiece adds."""
    ids = tokenizer.encode("\n" + text, add_special=False, parse_special=False)
    while b"".join(map(tokenizer.token_bytes, ids)) != text.encode():
        ids = ids[1:]
    return ids


def accepts(vocab: tuple[Tokenizer, Compiler], grammar: Grammar, text: str) -> bool:
    """Whether masks let the text through token by token, and the answer end after it."""
    tokenizer, compiler = vocab
    matcher = compiler.compile(grammar).start()
    for token in tokens_of(tokenizer, text):
        if not allowed_tokens(matcher.mask(), compiler.vocab_size)[token]:
            return False
        matcher.advance(token)
    ends = allowed_tokens(matcher.mask(), compiler.vocab_size)[[*tokenizer.eos_ids]]
    assert ends.all() == ends.any() == matcher.complete
    return matcher.complete


def sample(vocab: tuple[Tokenizer, Compiler], grammar: Grammar, seed: int) -> str:
    """An answer by random logits."""
    tokenizer, compiler = vocab
    rng = np.random.default_rng(seed)
    matcher = compiler.compile(grammar).start()
    ids: list[int] = []
    while not matcher.done:
        logits = rng.normal(size=compiler.vocab_size)
        logits[~allowed_tokens(matcher.mask(), compiler.vocab_size)] = -np.inf
        token = int(logits.argmax())
        matcher.advance(token)
        if token in tokenizer.eos_ids:
            break
        ids.append(token)
        assert len(ids) < 3000
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/point"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"point": {"type": "array", "items": {"const": 0}, "minItems": 2, "maxItems": 2}},
}


@pytest.mark.parametrize("seed", range(8))
def test_random_answers_follow_the_schema(vocab: tuple[Tokenizer, Compiler], seed: int) -> None:
    answer = json.loads(sample(vocab, schema(PERSON), seed))
    assert list(answer) == ["name", "age", "tags", "next"]
    assert isinstance(answer["name"], str)
    assert 1 <= len(answer["name"]) <= 8
    assert isinstance(answer["age"], int)
    assert 0 <= answer["age"] <= 150
    assert len(answer["tags"]) <= 3
    assert set(answer["tags"]) <= {"a", "b", None}
    assert answer["next"] in (True, False, [0, 0])


@pytest.mark.parametrize("seed", range(4))
def test_random_answers_validate(gpt2: tuple[Tokenizer, Compiler], seed: int) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the package jsonschema")
    answer = json.loads(sample(gpt2, schema(PERSON), 100 + seed))
    jsonschema.Draft202012Validator(PERSON).validate(answer)


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (
            Grammar("json_object"),
            ["{}", '{"a": [1, null, {"b": "é \\u0007 \\n"}]}', '{\n  "a": 1.5e-3\n}'],
            ["[]", "1", '{"a"}', '{"a": 01}', "{} x", "{'a': 1}", '{"a": 1,}', '{"a": "\n"}'],
        ),
        (Grammar("regex", r"[a-c]{2,3}\d?"), ["ab", "abc7"], ["a", "abcd", "xab", "ab77"]),
        (Grammar("regex", "(Grüße|日本)!"), ["Grüße!", "日本!"], ["Grüsse!", "日!"]),
        (
            Grammar("lark", 'start: "yes" | "no" reason\nreason: " because " /[a-z]+/'),
            ["yes", "no because so"],
            ["no", "yes because so", "maybe"],
        ),
        (
            Grammar("gbnf", 'root ::= ("-"? [0-9]+) (" " op " " [0-9]+)*\nop ::= [-+*]'),
            ["-1", "1 + 2 * 30"],
            ["1+2", "--1", "1 + "],
        ),
        (
            Grammar("gbnf", r'root ::= [\u00e9-\u00ff]{2} "\u005d\x41\xe9"  # comment'),
            ["éÿ]Aé"],
            ["ee]Aé", "éÿ]A"],
        ),
        (schema({"type": "string", "format": "date"}), ['"2024-02-29"'], ['"today"', "20240229"]),
        (schema({"const": "x", "$id": "http://a/b"}), ['"x"'], ['"y"', "x"]),
        (schema({}), ["1", '"a"', "[]"], ["a", ""]),
    ],
    ids=lambda value: value.kind if isinstance(value, Grammar) else "",
)
def test_accepts(
    vocab: tuple[Tokenizer, Compiler], grammar: Grammar, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not accepts(vocab, grammar, text)] == []
    assert [text for text in bad if accepts(vocab, grammar, text)] == []


# Valid by the standard, and yet not written so: properties come in the order of the schema, and
# numbers of a const, an enum or an integer as they are spelled there; formats are checked, where
# the standard only notes them.
NARROWER = re.compile(
    r"different property order|: allOf: allOf$|allOf with base schema|float|\.0|maxItems ignored"
    r"|only an annotation|non-ASCII pattern|multiple types"
)


REFUSAL = re.compile(r"the JSON Schema(?:'s /\S+ is not supported.*| cannot be used at /\S*: .+)")


@pytest.mark.parametrize("draft", ["draft7", "draft2020-12"])
def test_the_standards_own_tests(
    shared: Path, gpt2: tuple[Tokenizer, Compiler], draft: str
) -> None:
    """What is compiled accepts nothing invalid, and of the valid all but what is said above."""
    compiled = 0
    refusals: list[str] = []
    wrong: list[str] = []
    missed: list[str] = []
    for path in sorted((shared / "api/json_schema_test_suite/tests" / draft).glob("*.json")):
        for group in json.loads(path.read_text("utf-8")):
            if not isinstance(group["schema"], dict):
                continue
            grammar = schema(group["schema"])
            try:
                gpt2[1].compile(grammar)
            except InvalidRequest as error:
                refusals.append(str(error))
                continue
            compiled += 1
            for case in group["tests"]:
                text = json.dumps(case["data"], ensure_ascii=not is_text(case["data"]))
                name = f"{path.stem}: {group['description']}: {case['description']}"
                if accepts(gpt2, grammar, text) != case["valid"]:
                    (missed if case["valid"] else wrong).append(name)
    assert wrong == []
    assert [name for name in missed if not NARROWER.search(name)] == []
    assert compiled > 150
    assert len(refusals) > 50
    assert [line for line in refusals if not REFUSAL.fullmatch(line)] == []


def is_text(value: Any) -> bool:
    return "\\ud" not in json.dumps(value) or len(json.dumps(value)) > 20


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"properties": {"a/b": {"not": {}}}}, "/properties/a~1b/not"),
        ({"items": {"uniqueItems": True, "maxItems": 2}}, "/items/uniqueItems"),
        ({"$defs": {"q": {"if": {}}}, "items": {"$ref": "#/$defs/q"}}, "/$defs/q/if"),
        ({"properties": {"next": {"$ref": "#"}, "v": {"not": {}}}}, "/properties/v/not"),
        ({"properties": {"x": {"$ref": "#"}}, "unevaluatedItems": False}, "/unevaluatedItems"),
        ({"anyOf": [{"type": "null"}, {"type": "foo"}]}, "/anyOf/1/type"),
        ({"type": "string", "format": "zork"}, "/format"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "/minimum"),
        ({"$ref": "http://example.com/x"}, "/$ref"),
        ({"$ref": "#/nowhere"}, "/$ref"),
        ({"$ref": "#"}, "/$ref"),
        ({"$defs": {"a": {"$id": "x"}}}, "/$defs/a/$id"),
        ({"type": "string", "pattern": "(?=a)"}, "/pattern"),
    ],
)
def test_a_schema_is_refused_by_path(
    gpt2: tuple[Tokenizer, Compiler], value: Any, path: str
) -> None:
    with pytest.raises(InvalidRequest) as error:
        gpt2[1].compile(schema(value))
    assert re.search(rf"(at|'s) {re.escape(path)}(:| )", str(error.value))
    assert "\n" not in str(error.value)


def test_a_property_may_be_named_like_a_keyword(gpt2: tuple[Tokenizer, Compiler]) -> None:
    value = {"type": "object", "properties": {"$id": {"type": "string"}, "not": {"type": "null"}}}
    assert accepts(gpt2, schema(value), '{"$id": "a", "not": null}')


def test_locate_gives_up_on_what_is_too_large() -> None:
    many = {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}, "not": {}}
    assert locate(many, lambda part: "bad" if "not" in part else None) == ("/", "bad")
    many["properties"] = {}
    assert locate(many, lambda part: "bad" if "not" in part else None) == ("/not", "bad")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "("),
        Grammar("regex", "(?=a)"),
        Grammar("lark", "start: foo"),
        Grammar("lark", 'begin: "a"'),
        Grammar("lark", "start: " + "(" * 10_000),
        Grammar("lark", "start: " + '"a" ' * 100_000),
        Grammar("gbnf", "root ::= x"),
        Grammar("gbnf", 'root ::= "a'),
        Grammar("gbnf", "start: 'a'"),
        Grammar("gbnf", "root ::= " + "(" * 5000),
        Grammar("gbnf", r'root ::= "\ud800"'),
        Grammar("regex", "\ud800"),
        Grammar("json_schema", '{"const": "\\ud800"}'),
        Grammar("json_schema", '{"items":' * 120 + '{"not":{}}' + "}" * 120),
        Grammar("json_schema", '{"items":' * 900 + "{}" + "}" * 900),
    ],
    ids=lambda grammar: f"{grammar.kind}-{grammar.text[:12].encode('ascii', 'replace')!r}",
)
def test_a_wrong_grammar_is_one_line(gpt2: tuple[Tokenizer, Compiler], grammar: Grammar) -> None:
    with pytest.raises(
        InvalidRequest, match=r"cannot be used|not supported|lone surrogates|no character"
    ) as error:
        gpt2[1].compile(grammar)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("kind", "text", "match"),
    [
        ("xml", "x", "unknown kind"),
        ("regex", "", "needs its text"),
        ("json_object", "{}", "no text"),
        ("json_schema", "{", "no JSON"),
        ("json_schema", "[" * 100_000, "no JSON"),
        ("json_schema", "[]", "object"),
        ("regex", None, "needs its text"),
        ("regex", "a" * (2**20 + 1), "at most"),
    ],
)
def test_the_form_of_a_grammar_is_checked_at_once(kind: Any, text: Any, match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        Grammar(kind, text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("arithmetic", "1+2=3\n"),
        ("c", "int main(){return 1;}"),
        ("chess", "1. e4 e5\n2. Nf3 Nc6\n"),
        ("english", "Hello there."),
        ("japanese", "こんにちは"),
        ("json", '{"a": [1, true]}'),
        ("json_arr", '[\n1,\n"b"\n]'),
        ("list", "- one\n- two\n"),
    ],
)
def test_llama_cpps_own_grammars(
    shared: Path, vocab: tuple[Tokenizer, Compiler], name: str, text: str
) -> None:
    grammar = Grammar("gbnf", (shared / f"api/grammars/{name}.gbnf").read_text("utf-8"))
    assert not accepts(vocab, grammar, "\x07")
    tokenizer, compiler = vocab
    matcher = compiler.compile(grammar).start()
    ids = tokens_of(tokenizer, text)
    assert matcher.allowed(ids) == len(ids)


def state(matcher: Matcher) -> tuple[bytes, bool, bool, list[int]]:
    return matcher.mask().tobytes(), matcher.complete, matcher.done, matcher.forced()


def test_rollback_and_copies(vocab: tuple[Tokenizer, Compiler]) -> None:
    tokenizer, compiler = vocab
    ids = tokens_of(tokenizer, '{"name": "Ada", "age": 36, "tags": ["a"], "next": [0, 0]}')
    ids.append(min(tokenizer.eos_ids))
    matcher = compiler.compile(schema(PERSON)).start()
    states = []
    for i, token in enumerate(ids):
        states.append(state(matcher))
        assert matcher.allowed(ids[i:]) == len(ids) - i
        twin = matcher.copy()
        matcher.advance(token)
        assert state(twin) == states[-1]
    states.append(state(matcher))
    assert matcher.done
    assert matcher.allowed(ids[-1:]) == 0
    for length in range(len(ids), -1, -1):
        twin = matcher.copy()
        twin.rollback(len(ids) - length)
        assert state(twin) == states[length]
        for token in ids[length : length + 3]:  # and on again
            twin.advance(token)
        assert state(twin) == states[min(length + 3, len(ids))]


def test_forced_tokens_are_the_tokenizers_own(vocab: tuple[Tokenizer, Compiler]) -> None:
    tokenizer, compiler = vocab
    matcher = compiler.compile(
        Grammar("regex", r"(A|B): the weather today is (good|bad)\.")
    ).start()
    matcher.advance(tokens_of(tokenizer, "A")[0])
    forced = matcher.forced()
    assert forced
    assert forced == tokens_of(tokenizer, ": the weather today is good.")[: len(forced)]
    for token in forced:
        assert np.flatnonzero(allowed_tokens(matcher.mask(), compiler.vocab_size)).size >= 1
        matcher.advance(token)
    assert not matcher.done


def test_a_token_that_does_not_follow_is_an_error(gpt2: tuple[Tokenizer, Compiler]) -> None:
    tokenizer, compiler = gpt2
    constraint = compiler.compile(Grammar("regex", "ab"))
    matcher = constraint.start()
    wrong = tokens_of(tokenizer, "x")
    assert matcher.allowed(wrong) == 0
    with pytest.raises(EngineError, match="grammar"):
        matcher.advance(wrong[0])
    assert constraint.start().allowed(tokens_of(tokenizer, "ab")) == 1  # others are not touched


def test_masks_are_as_wide_as_the_logits(shared: Path, gpt2: tuple[Tokenizer, Compiler]) -> None:
    tokenizer = gpt2[0]
    wide = Compiler(tokenizer, tokenizer.vocab_size + 100)
    mask = wide.compile(Grammar("regex", "(.|\n)*")).start().mask()
    assert mask.dtype == np.uint32
    assert mask.shape == ((tokenizer.vocab_size + 100 + 31) // 32,)
    allowed = allowed_tokens(mask, wide.vocab_size)
    assert not allowed[tokenizer.vocab_size :].any()
    special = [token for token in tokenizer.special_ids if token not in tokenizer.eos_ids]
    assert not allowed[special].any()
    assert allowed[: tokenizer.vocab_size].sum() > 0.9 * tokenizer.vocab_size


def test_control_tokens_are_no_text(shared: Path) -> None:
    tokenizer = Tokenizer.from_gguf(shared / "vocab/ggml-vocab-phi-3.gguf")
    compiler = Compiler(tokenizer)
    matcher = compiler.compile(Grammar("regex", r"<\|user\|>")).start()
    allowed = allowed_tokens(matcher.mask(), compiler.vocab_size)
    assert np.flatnonzero(allowed).size > 0
    assert not allowed[[*tokenizer.special_ids]].any()


def test_a_vocabulary_without_an_end(gpt2: tuple[Tokenizer, Compiler]) -> None:
    class Endless(Tokenizer):
        def __init__(self) -> None:
            super().__init__(gpt2[0]._parts)
            self.eos_ids = frozenset()

    compiler = Compiler(Endless())
    matcher = compiler.compile(Grammar("regex", "a")).start()
    matcher.advance(tokens_of(gpt2[0], "a")[0])
    assert matcher.done
    assert not allowed_tokens(matcher.mask(), compiler.vocab_size).any()


def test_blank_space_has_a_bound(gpt2: tuple[Tokenizer, Compiler]) -> None:
    pretty = json.dumps({"a": [1, {"b": {}}], "c": "d"}, indent=4)
    for text in (pretty, pretty.replace("\n", "\r\n"), "{ }", "{\n" + " " * 20 + "}"):
        assert accepts(gpt2, Grammar("json_object"), text)
    for text in ("{  }", "{\n\n}", "{\n" + " " * 21 + "}", " {}", "{} "):
        assert not accepts(gpt2, Grammar("json_object"), text)


def test_many_threads_share_a_compiler(shared: Path, gpt2: tuple[Tokenizer, Compiler]) -> None:
    tokenizer = gpt2[0]
    compiler = Compiler(tokenizer)
    failures: list[Exception] = []

    def work(seed: int) -> None:
        try:
            for i in range(5):
                grammar = Grammar("regex", f"[a-z]{{{1 + (seed + i) % 3}}}!")
                assert re.fullmatch(grammar.text, sample((tokenizer, compiler), grammar, seed))
        except Exception as error:  # noqa: BLE001 - told by the thread that asserts
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_compiled_grammars_are_kept_for_a_while(gpt2: tuple[Tokenizer, Compiler]) -> None:
    compiler = gpt2[1]
    first = compiler.compile(Grammar("regex", "first"))
    assert compiler.compile(Grammar("regex", "first")) is first
    for i in range(40):
        compiler.compile(Grammar("regex", f"number {i}"))
    assert compiler.compile(Grammar("regex", "first")) is not first
