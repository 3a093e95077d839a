"""LLM and AsyncLLM over a fake backend: text in, text out, cancelled when nobody listens."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
import tokenizers

from rl_mlx.backends.fake import INFO, FakeBackend
from rl_mlx.errors import EngineError, InvalidRequest
from rl_mlx.llm import LLM, AsyncLLM
from rl_mlx.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token a byte, and two control tokens."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    built.add_special_tokens(["<s>", "</s>"])
    built.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)


@pytest.fixture
def fake(tokenizer):
    """``fake(reply)``: an LLM whose answers are ``reply(request)``, text or token ids."""
    opened = []

    def make(reply):
        def ids(request):
            answer = reply(request)
            return (
                tokenizer.encode(answer, add_special=False) if isinstance(answer, str) else answer
            )

        info = INFO.__class__(**{**INFO.__dict__, "vocab": tokenizer.vocab_size})
        llm = LLM.of(FakeBackend(ids, info), tokenizer)
        opened.append(llm)
        return llm

    yield make
    for llm in opened:
        llm.close()


def echo(tokenizer):
    return lambda request: tokenizer.decode(request.prompt).upper()


def test_generate_gives_text_ids_usage_and_reason(fake, tokenizer):
    llm = fake(echo(tokenizer))
    result = llm.generate("héllo", max_tokens=50)
    assert result.text == "HÉLLO"
    assert result.finish_reason == "stop"
    assert result.token_ids == tokenizer.encode("HÉLLO", add_special=False)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (6, 6)
    assert result.usage.total_tokens == 12
    assert result.logprobs is None


def test_a_list_of_prompts_is_a_batch_in_order(fake, tokenizer):
    llm = fake(echo(tokenizer))
    prompts = ["one", tokenizer.encode("two"), "three"]
    assert [r.text for r in llm.generate(prompts)] == ["ONE", "TWO", "THREE"]
    assert llm.generate([]) == []


def test_chunks_joined_are_the_text_and_whole_characters(fake):
    llm = fake(lambda request: "naïve 🙂 text")
    chunks = list(llm.generate("x", stream=True))
    assert "".join(c.text for c in chunks) == "naïve 🙂 text"
    assert "\ufffd" not in "".join(c.text for c in chunks)
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == len("naïve 🙂 text".encode())


def test_a_stop_string_across_tokens_cuts_the_text(fake):
    llm = fake(lambda request: "one two END three")
    result = llm.generate("x", stop="END")
    assert result.text == "one two "
    assert result.finish_reason == "stop"
    streamed = "".join(c.text for c in llm.generate("x", stop=["never", "END"], stream=True))
    assert streamed == "one two "


def test_a_stop_string_that_does_not_come_whole_is_text(fake):
    assert fake(lambda request: "the EN").generate("x", stop="END").text == "the EN"


def test_an_unfinished_character_is_marked_at_the_end(fake):
    llm = fake(lambda request: "🙂")
    assert llm.generate("x", max_tokens=2).text == "\ufffd"
    assert llm.generate("x", max_tokens=2).finish_reason == "length"


def test_chat_renders_the_template(fake, tokenizer):
    llm = fake(lambda request: "hello")
    llm.chat([{"role": "user", "content": "hi"}])
    request = llm._llm._backend.requests[0]
    want = "<s>user: hi</s><s>assistant: "
    assert tokenizer.decode(request.prompt, skip_special=False) == want
    assert request.eos_ids == tokenizer.eos_ids
    assert llm.apply_template([{"role": "user", "content": "hi"}]) == want


def test_closing_the_stream_cancels_the_request(fake):
    llm = fake(lambda request: itertools.repeat(5))
    stream = llm.generate("x", stream=True)
    next(stream)
    stream.close()
    backend = llm._llm._backend
    assert backend.cancelled == {backend.requests[0].id}


def test_an_interrupt_cancels_the_batch(fake):
    llm = fake(lambda request: itertools.repeat(5))
    backend = llm._llm._backend
    channel = llm._llm._waiting.channel()
    interrupted = iter([KeyboardInterrupt])

    async def get():
        raise next(interrupted)

    channel.get = get
    llm._llm._waiting.channel = lambda: channel
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"])
    assert len(backend.cancelled) == 2


def test_a_failed_request_raises_its_error_and_the_next_one_works(fake):
    def reply(request):
        if len(request.prompt) == 3:
            raise EngineError("it broke")
        return "fine"

    llm = fake(reply)
    with pytest.raises(EngineError, match="it broke"):
        llm.generate("bad")
    assert llm.generate("good").text == "fine"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(""), "the prompt is empty"),
        (lambda llm: llm.generate([[]]), "the prompt is empty"),
        (lambda llm: llm.generate([1, 999]), "token id 999 is outside the vocabulary of 258"),
        (lambda llm: llm.generate("x", temprature=1), "unknown sampling option 'temprature'"),
        (lambda llm: llm.generate(["x"], stream=True), "takes one prompt"),
        (lambda llm: llm.generate("x", temperature=float("nan")), "finite"),
        (lambda llm: llm.chat("hi"), "messages"),
    ],
)
def test_bad_calls_are_one_clear_line(fake, call, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        call(fake(lambda request: "x"))
    assert "\n" not in str(caught.value)


def test_async_is_the_same(tokenizer):
    async def main():
        info = INFO.__class__(**{**INFO.__dict__, "vocab": tokenizer.vocab_size})
        backend = FakeBackend(lambda r: tokenizer.encode("yes", add_special=False), info)
        async with AsyncLLM.of(backend, tokenizer) as llm:
            result = await llm.generate("x")
            many = await llm.generate(["x", "y"])
            chunks = [
                c.text async for c in llm.chat([{"role": "user", "content": "x"}], stream=True)
            ]
            together = await asyncio.gather(*(llm.generate("x") for _ in range(20)))
            logits = await llm.logits([1, 2])
        return result.text, [r.text for r in many], "".join(chunks), together, logits.shape

    text, many, chunks, together, shape = asyncio.run(main())
    assert (text, many, chunks) == ("yes", ["yes", "yes"], "yes")
    assert {r.text for r in together} == {"yes"}
    assert shape == (2, 258)


def test_leaving_an_async_stream_cancels(tokenizer):
    async def main():
        backend = FakeBackend(lambda r: itertools.repeat(5), INFO)
        async with AsyncLLM.of(backend, tokenizer) as llm:
            stream = llm.generate([1], stream=True)
            async for _ in stream:
                break
            await stream.aclose()
            return backend.cancelled

    assert asyncio.run(main()) == {"req-0"}
