"""What lm-evaluation-harness asks of a model, against closed forms; its tasks, where it is here."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rl_mlx.errors import InvalidRequest, MissingPackage
from rl_mlx.lab.tasks import Bridge, TaskScores, _scores, tasks
from rl_mlx.lab.text import log_probs
from tests.lab.conftest import VOCAB, by_last


def asks(*args) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def chain(llm, table, text: str, start: int = 1) -> float:
    ids = [start, *llm.tokenize(text, add_special=False)]
    rows = log_probs(np.array([table([i]) for i in ids[:-1]], np.float32))
    return float(rows[np.arange(len(rows)), ids[1:]].sum())


def test_likelihoods_are_those_of_the_chain(make_table):
    table = by_last(0)
    llm = make_table(table)
    bridge = Bridge(llm)
    found = bridge.loglikelihood([asks("abc", "def"), asks("", "def"), asks("a" * 100, "bc")])
    assert found[0][0] == pytest.approx(chain(llm, table, "abcdef") - chain(llm, table, "abc"))
    assert found[1][0] == pytest.approx(chain(llm, table, "def"))
    assert found[2][0] == pytest.approx(chain(llm, table, "abc") - chain(llm, table, "a"))
    assert [same for _, same in found] == [False] * 3
    text = "thequickbrownfox" * 10  # longer than the context
    whole = bridge.loglikelihood_rolling([asks(text), asks("a")])
    assert whole[1] == pytest.approx(chain(llm, table, "a"))
    # The first token of the second and third windows has the BOS before it.
    pieces = [text[i : i + 64] for i in range(0, len(text), 64)]
    assert whole[0] == pytest.approx(sum(chain(llm, table, piece) for piece in pieces))


def test_greedy_is_said_where_it_is(make_table):
    follows = np.roll(np.eye(VOCAB), 1, axis=1) * 20
    llm = make_table(lambda ids: follows[ids[-1]])
    found = Bridge(llm).loglikelihood([asks("ab", "cd"), asks("ab", "ce")])
    assert [same for _, same in found] == [True, False]
    assert found[0][0] == pytest.approx(-2 * math.log(1 + (VOCAB - 1) * math.exp(-20)))


def test_answers_come_in_order_with_the_settings_of_each(make_table, monkeypatch):
    llm = make_table(by_last(0))
    asked = []

    def generate(prompts, **sampling):
        asked.append((len(prompts), sampling))
        return [SimpleNamespace(text=llm.detokenize(p).upper()) for p in prompts]

    monkeypatch.setattr(llm, "generate", generate)
    short, long = {"until": ["\n"], "max_gen_toks": 4}, {"until": "x", "max_gen_toks": 8}
    requests = [asks("a", short), asks("b", long), asks("c", short)]
    assert Bridge(llm).generate_until(requests) == ["A", "B", "C"]
    assert sorted(asked, key=lambda a: a[0]) == [
        (1, {"stop": ("x",), "max_tokens": 8, "temperature": 0.0}),
        (2, {"stop": ("\n",), "max_tokens": 4, "temperature": 0.0}),
    ]


def test_figures_are_taken_from_the_harness(tmp_path: Path):
    results = {
        "results": {
            "t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 1,
                  "f1_stderr,none": "N/A"},
        },
        "n-samples": {"t": {"original": 10, "effective": 4}},
    }  # fmt: skip
    scores = TaskScores("m", "mlx", "0", _scores(results))
    assert [(s.metric, s.value, s.error, s.samples) for s in scores.scores] == [
        ("acc", 0.5, 0.1, 4), ("f1", 1.0, None, 4),
    ]  # fmt: skip
    scores.save(tmp_path / "s.parquet")
    assert TaskScores.load(tmp_path / "s.parquet") == scores


def test_without_the_harness_one_line_says_so(make_table, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingPackage, match="pip install lm-eval"):
        tasks(make_table(by_last(0)), ["arc_easy"])


TASK = """task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: ["c", "x"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""


def test_a_task_of_our_own(make_table, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness, which is not installed")
    follows = np.roll(np.eye(VOCAB), 1, axis=1) * 20
    (tmp_path / "d.json").write_text('{"q": "ab"}\n{"q": "b"}\n{"q": "w"}\n')
    (tmp_path / "letters.yaml").write_text(TASK % (tmp_path / "d.json"))
    llm = make_table(lambda ids: follows[ids[-1]])
    found = tasks(llm, ["letters"], include=tmp_path)
    (score,) = (s for s in found.scores if s.metric == "acc")
    assert (score.value, score.samples) == (pytest.approx(2 / 3), 3)
    with pytest.raises(InvalidRequest, match="no task 'none'"):
        tasks(llm, ["none"], include=tmp_path)
