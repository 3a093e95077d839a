"""What every result can do: tables, files, plots, and errors without the optional packages."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest

from rl_mlx.errors import FormatError, MissingPackage
from rl_mlx.lab import Divergence, Measurement, Perplexity, divergence, perplexity
from tests.lab.conftest import by_last

TEXT = "thequickbrownfoxjumpsoverthelazydog" * 3


@pytest.fixture(params=["perplexity", "divergence"])
def result(request, make_table) -> Measurement:
    llm = make_table(by_last(0), name="a<b>")
    if request.param == "perplexity":
        return perplexity(llm, TEXT, window=16)
    return divergence(make_table(by_last(1)), llm, TEXT, window=16)


@pytest.mark.parametrize("name", ["r.json", "r.parquet"])
def test_saved_and_loaded_is_the_same(result, tmp_path: Path, name: str):
    result.save(tmp_path / name)
    loaded = type(result).load(tmp_path / name)
    assert loaded == result
    assert type(loaded) is type(result)


def test_others_read_the_files(result, tmp_path: Path):
    import pandas as pd

    result.save(tmp_path / "r.parquet")
    result.save(tmp_path / "r.json")
    frame = pd.read_parquet(tmp_path / "r.parquet")
    assert frame.equals(result.to_pandas())
    assert json.loads((tmp_path / "r.json").read_text())["kind"] == type(result).__name__


def test_a_table_for_jupyter(result):
    shown = result._repr_html_()
    assert shown.count("<tr>") == 2
    assert "a&lt;b&gt;" in shown
    assert "<b>" not in shown


def test_a_plot_has_a_title_and_units(result):
    ax = result.plot()
    assert ax.get_title(loc="left")
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert result.plot(ax) is ax


def test_what_is_no_result_is_refused(result, tmp_path: Path):
    path = tmp_path / "r.json"
    result.save(path)
    other = Divergence if isinstance(result, Perplexity) else Perplexity
    with pytest.raises(FormatError, match=f"holds a {type(result).__name__}; load it with"):
        other.load(path)
    nothing = json.dumps({"kind": type(result).__name__, "rl_mlx": "1"})
    for text in ("", "[]", "{}", nothing):
        path.write_text(text)
        with pytest.raises(FormatError, match="no result of the lab") as caught:
            type(result).load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        type(result).load(tmp_path / "nothing.json")


def test_without_the_optional_packages_there_is_one_clear_error(result, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in {"pandas", "matplotlib", "pyarrow"}:
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    def import_module(name):
        return without(name, fromlist=["x"])

    monkeypatch.setattr("rl_mlx.lab.measurement.importlib.import_module", import_module)
    for call in (result.to_pandas, result.plot, lambda: result.save(tmp_path / "r.parquet")):
        with pytest.raises(MissingPackage, match=r"pip install 'rl-mlx\[lab\]'") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert result._repr_html_()
    result.save(tmp_path / "r.json")
