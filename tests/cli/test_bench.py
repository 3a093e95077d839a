"""``rl-mlx bench``: what is measured, and how it is shown."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

import pytest

from rl_mlx.cli.main import main
from rl_mlx.errors import InvalidRequest
from rl_mlx.lab.bench import Benchmark, Case, Speed, _Run, cases, measure, measure_in_turns
from rl_mlx.lab.energy import Meter
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
    assert found["cores"] >= 1
    (result,) = found["rows"]
    assert (result["model"], result["ratio"]) == ("bytes", None)
    assert (result["test"], result["tokens"], result["streams"]) == ("tg8", 8, 1)
    assert len(result["repeats"]) == 2
    assert (result["tokens_per_second"], result["deviation"]) == (32, 0)
    assert asked[0][1].context == 400


def test_sides_take_turns_and_the_ratio_is_of_pairs(make_llm, monkeypatch) -> None:
    a, b = make_llm(lambda _: LONG), make_llm(lambda _: LONG)
    order: list[str] = []
    speeds = {"a": iter((1, 2, 4, 8, 16)), "b": iter((1, 1, 1, 4, 32))}

    def run(llm, case, random):
        side = "a" if llm is a else "b"
        order.append(side)
        return _Run(next(speeds[side]), 0.5, 3.0)

    monkeypatch.setattr("rl_mlx.lab.bench._run", run)
    first, second = measure_in_turns([a, b], Case("pp", 4), repeats=4)
    assert "".join(order) == "abbaabbaab"
    assert (first.rates, second.rates) == ((2, 4, 8, 16), (1, 1, 4, 32))
    assert second.ratio(first) == 0.5
    assert (first.first_token, first.joules, first.joules_per_token) == (0.5, 12, 0.75)


def test_against_another_backend_or_model(loaded, capsys: Capture) -> None:
    asked = loaded(lambda _: LONG)
    assert main(["bench", "m", "--vs", "mlx", "-p", "16", "-n", "4", "-r", "2"]) == 0
    *_, head, _, first, second, _, _ = capsys.readouterr().out.splitlines()
    assert head.split("|")[-2].strip() == "ratio"
    assert first.split("|")[-2].strip() == ""
    assert second.split("|")[-2].strip() == "1.000"
    assert main(["bench", "m", "--vs", "other", "-p", "0", "-n", "4", "-r", "1"]) == 0
    assert [(model, s.backend) for model, s in asked] == [
        ("m", "auto"), ("m", "mlx"), ("m", "auto"), ("other", "auto"),
    ]  # fmt: skip


def test_csv_a_file_and_a_plot(loaded, capsys: Capture, home: Path) -> None:
    loaded(lambda _: LONG)
    command = ["bench", "m", "--csv", "-p", "16", "-n", "4", "-r", "2", "--vs", "mlx"]
    assert main([*command, "--save", "b.parquet", "--plot", "b.svg"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(r["test"], r["ratio"]) for r in rows] == [
        ("pp16", ""), ("pp16", "1.0"), ("tg4", ""), ("tg4", "1.0"),
    ]  # fmt: skip
    assert rows[0]["first_token"] == "0.5"
    saved = Benchmark.load("b.parquet")
    assert [r.repeats for r in saved.rows] == [(32, 32), (32, 32), (16, 16), (16, 16)]
    assert "<svg" in Path("b.svg").read_text()


def test_energy_is_that_of_whole_packages(tmp_path: Path) -> None:
    assert Meter(tmp_path).joules() is None
    for name, joules in (("intel-rapl:0", 5), ("intel-rapl:1", 999), ("intel-rapl:0:0", 7)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000\n")
        (tmp_path / name / "energy_uj").write_text(f"{joules}000000\n")
    meter = Meter(tmp_path)
    assert meter.packages == 2
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("8000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")  # it began again
    assert meter.joules() == pytest.approx(3 + 2, abs=1e-5)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-p", "x"], "--prompt takes whole numbers"),
        (["-p", "-1"], "--prompt"),
        (["-c", "0"], "--concurrency takes whole numbers from 1 on"),
        (["-p", "0", "-n", "0"], "nothing is to be measured"),
        (["-r", "0"], "-r"),
        (["-p", "5000"], "set a longer --context"),
        (["--csv", "--json"], "--csv and --json exclude each other"),
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
    assert [r["test"] for r in found["rows"]] == ["pp32", "tg8", "pp32 @ d64", "tg8 @ d64"]
    assert all(r["tokens_per_second"] > 0 for r in found["rows"])
