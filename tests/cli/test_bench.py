"""``rl-mlx bench``: what is measured, and how it is shown."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from rl_mlx.cli.main import main
from rl_mlx.errors import InvalidRequest
from rl_mlx.lab.bench import Case, Speed, cases, measure
from rl_mlx.types import Timings

Capture = pytest.CaptureFixture[str]
LONG = "a" * 300


@pytest.fixture(autouse=True)
def _half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake backend reads every prompt in half a second and answers in a quarter."""
    timings = functools.partial(Timings, prefill=0.5, decode=0.25)
    monkeypatch.setattr("rl_mlx.backends.fake.Timings", timings)


def test_names_are_llama_benchs() -> None:
    found = cases([512, 0], [128], [0, 1024], [1, 8])
    assert [c.name for c in found] == [
        "pp512", "tg128", "pp512 @ d1024", "tg128 @ d1024",
        "pp512 x 8", "tg128 x 8", "pp512 @ d1024 x 8", "tg128 @ d1024 x 8",
    ]  # fmt: skip


def test_mean_and_deviation() -> None:
    speed = Speed(Case("tg", 8), (1.0, 2.0, 3.0))
    assert (speed.mean, speed.deviation) == (2.0, 1.0)
    assert Speed(Case("tg", 8), (5.0,)).deviation == 0.0


def test_every_repeat_is_kept_and_every_prompt_is_new(make_llm, monkeypatch) -> None:
    llm = make_llm(lambda _: LONG)
    asked: list[list[list[int]]] = []
    generate = llm.generate

    def spy(prompts, **sampling):
        asked.append([list(p) for p in prompts])
        return generate(prompts, **sampling)

    monkeypatch.setattr(llm, "generate", spy)
    speed = measure(llm, Case("pp", 16, depth=8, streams=2), repeats=3)
    # Nothing was reused here, so the depth counts as well.
    assert speed.rates == (96, 96, 96)
    assert len(asked) == 8  # a warm-up and three repeats, each with its depth first
    for before, timed in zip(asked[::2], asked[1::2]):
        assert [len(p) for p in timed] == [24, 24]
        assert [p[:8] for p in timed] == before
    prompts = [tuple(p) for timed in asked[1::2] for p in timed]
    assert len(set(prompts)) == len(prompts)


def test_generation_makes_all_its_tokens(make_llm) -> None:
    llm = make_llm(lambda _: LONG)
    assert measure(llm, Case("tg", 20), repeats=2).rates == (80, 80)
    assert measure(llm, Case("tg", 20, streams=2), repeats=1).rates == (164,)


def test_a_case_must_fit_and_make_sense(make_llm) -> None:
    llm = make_llm(lambda _: LONG)
    with pytest.raises(InvalidRequest, match="needs a context of 501"):
        measure(llm, Case("pp", 500))
    with pytest.raises(InvalidRequest, match="repeats"):
        measure(llm, Case("pp", 5), repeats=0)
    with pytest.raises(InvalidRequest, match="at least one token"):
        Case("pp", 0)


def test_markdown(loaded, capsys: Capture) -> None:
    loaded(lambda _: LONG)
    assert main(["bench", "m", "-p", "64", "-n", "8", "-c", "1,2", "-r", "2"]) == 0
    machine, empty, head, rule, *rows = capsys.readouterr().out.splitlines()
    assert "core" in machine
    assert "of memory" in machine
    assert empty == ""
    assert [c.strip() for c in head.strip("|").split("|")] == [
        "model", "size", "params", "backend", "test", "tokens/s",
    ]  # fmt: skip
    assert set(rule) == set("|:- ")
    assert [row.split("|")[5].strip() for row in rows] == ["pp64", "tg8", "pp64 x 2", "tg8 x 2"]
    assert all(" ± " in row for row in rows)
    assert {len(row) for row in (head, rule, *rows)} == {len(head)}


def test_json(loaded, capsys: Capture) -> None:
    asked = loaded(lambda _: LONG)
    assert main(["bench", "m", "--json", "-p", "0", "-n", "8", "-r", "2", "--context", "400"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["cores"] >= 1
    assert found["model"]["name"] == "bytes"
    (result,) = found["results"]
    assert (result["test"], result["tokens"], result["streams"]) == ("tg8", 8, 1)
    assert len(result["repeats"]) == 2
    assert (result["tokens_per_second"], result["deviation"]) == (32, 0)
    assert asked[0][1].context == 400


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-p", "x"], "--prompt takes whole numbers"),
        (["-p", "-1"], "--prompt"),
        (["-c", "0"], "--concurrency takes whole numbers from 1 on"),
        (["-p", "0", "-n", "0"], "nothing is to be measured"),
        (["-r", "0"], "-r"),
        (["-p", "5000"], "set a longer --context"),
    ],
)
def test_wrong_commands(loaded, capsys: Capture, options: list[str], says: str) -> None:
    loaded(lambda _: LONG)
    assert main(["bench", "m", *options]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


def test_the_demo_on_its_backend(home: Path, capsys: Capture) -> None:
    assert main(["bench", "demo", "-p", "32", "-n", "8", "-d", "0,64", "-r", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["test"] for r in found["results"]] == ["pp32", "tg8", "pp32 @ d64", "tg8 @ d64"]
    assert all(r["tokens_per_second"] > 0 for r in found["results"])
