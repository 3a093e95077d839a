"""``rl-mlx generate``: continue a text as it stands, without a chat template."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rl_mlx.cli.load import open_llm
from rl_mlx.cli.options import Json, Model, ModelFlags, SamplingFlags, takes_flags
from rl_mlx.cli.terminal import note, piped_input, print_json
from rl_mlx.errors import InvalidRequest
from rl_mlx.types import Chunk, Timings

if TYPE_CHECKING:
    from rl_mlx.llm import LLM

NAME = "generate"


@takes_flags
def command(
    model: Model,
    *,
    sampling: SamplingFlags,
    loading: ModelFlags,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The text to continue; else stdin.", metavar="TEXT"),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Put no begin-of-text token before the prompt.")
    ] = False,
    ids: Annotated[bool, typer.Option("--ids", help="Print token ids instead of text.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Say on stderr how fast it was.")] = False,
    json: Json = False,
) -> None:
    """Continue a text as it stands, without a chat template."""
    if ids and json:
        raise InvalidRequest("--ids and --json exclude each other; --json has the ids too")
    text = piped_input() if prompt is None else prompt
    if text is None:
        raise InvalidRequest("there is no prompt: give --prompt TEXT, or pipe it in")
    params = sampling.params()
    with open_llm(model, loading) as llm:
        start: Any = llm.tokenize(text, add_special=False) if raw else text
        if raw and not start:
            raise InvalidRequest("the prompt is empty: with --raw it encodes to no tokens")
        if json:
            _print_result(llm, llm.generate(start, params=params))
            return
        show = _ids if ids else _text
        last = _print_stream(llm.generate(start, stream=True, params=params), show)
    if stats:
        note(speed(last))


def _text(chunk: Chunk) -> str:
    return chunk.text


def _ids(chunk: Chunk) -> str:
    return "".join(f"{token} " for token in chunk.token_ids)


def _print_stream(chunks: Iterable[Chunk], show: Callable[[Chunk], str]) -> Timings:
    timings = Timings()
    for chunk in chunks:
        sys.stdout.write(show(chunk))
        sys.stdout.flush()
        timings = chunk.timings or timings
    print()
    return timings


def _print_result(llm: LLM, result: Any) -> None:
    print_json(
        {
            "model": llm.info.name,
            "text": result.text,
            "token_ids": result.token_ids,
            "finish_reason": result.finish_reason,
            "usage": {**asdict(result.usage), "total_tokens": result.usage.total_tokens},
            "timings": timings_json(result.timings),
        }
    )


def timings_json(timings: Timings) -> dict[str, float]:
    """Seconds and counts, and the speeds that follow from them."""
    return {
        **asdict(timings),
        "first_token": timings.first_token,
        "tokens_per_second": timings.tokens_per_second,
        "prompt_tokens_per_second": timings.prompt_tokens_per_second,
    }


def speed(timings: Timings) -> str:
    """What ``--stats`` and ``/stats`` say of one answer."""
    reused = f" ({timings.reused} reused)" if timings.reused else ""
    words = [
        f"{timings.generated} tokens at {timings.tokens_per_second:.1f} tok/s",
        f"first token after {timings.first_token:.2f} s",
        f"prompt {timings.prompt_tokens} tokens{reused} "
        f"at {timings.prompt_tokens_per_second:.1f} tok/s",
    ]
    if timings.drafted:
        share = 100 * timings.accepted / timings.drafted
        words.append(f"{timings.accepted} of {timings.drafted} drafted accepted ({share:.0f}%)")
        gain = timings.speculation_gain
        estimate = f", about {gain:.1f} times as fast" if gain != 1 else ""
        words.append(f"{timings.forwards} forwards{estimate}")
    return " · ".join(words)
