"""What every result of the lab can do: be a table, a plot, a file."""

from __future__ import annotations

import html
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_mlx import __version__
from rl_mlx.errors import FormatError, MissingPackage

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from typing_extensions import Self

Record = Mapping[str, Any]
_KEY = b"rl_mlx"


def optional(module: str, *, install: str = "'rl-mlx[lab]'") -> Any:
    """An optional module; raises ``MissingPackage``, which says what pip is to ``install``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingPackage(
            f"{package} is not installed here ({error}); install it: pip install {install}"
        ) from None


class Measurement(ABC):
    """Base of the results, which are frozen dataclasses of plain values.

    ``save`` and ``load`` keep all of it as JSON (any other suffix than ``.parquet``), or as the
    table of ``to_pandas`` in Parquet with all of it in the file's metadata.
    """

    @abstractmethod
    def records(self) -> Sequence[Record]:
        """The rows of its table."""

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw it, on new axes without ``ax``. Raises ``MissingPackage`` without matplotlib."""

    def to_pandas(self) -> pd.DataFrame:
        """Its table as a data frame. Raises ``MissingPackage`` without pandas."""
        frame: pd.DataFrame = optional("pandas").DataFrame(list(self.records()))
        return frame

    def as_dict(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return {"kind": type(self).__name__, "rl_mlx": __version__, **asdict(self)}  # type: ignore[call-overload]

    def save(self, path: str | Path) -> None:
        """Write it; a file of that name is replaced. Raises ``MissingPackage`` and ``OSError``."""
        path, document = Path(path), json.dumps(self.as_dict(), indent=1)
        if path.suffix != ".parquet":
            path.write_text(document + "\n", "utf-8")
            return
        pa, parquet = optional("pyarrow"), optional("pyarrow.parquet")
        table = pa.Table.from_pylist([dict(r) for r in self.records()])
        parquet.write_table(table.replace_schema_metadata({_KEY: document.encode()}), path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What ``save`` wrote; an equal object.

        Raises ``FormatError`` where it is none or another kind of result, ``MissingPackage``,
        ``OSError``.
        """
        pydantic = importlib.import_module("pydantic")
        path = Path(path)
        try:
            document = json.loads(
                _parquet(path) if path.suffix == ".parquet" else path.read_bytes()
            )
            kind = document.pop("kind")
            if kind != cls.__name__:
                raise FormatError(f"{path} holds a {kind}; load it with {kind}.load")
            document.pop("rl_mlx")
            loaded: Self = pydantic.TypeAdapter(cls).validate_python(document)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            what = str(error).splitlines()[0]
            raise FormatError(f"{path} is no result of the lab: {what}") from error
        return loaded

    def _repr_html_(self) -> str:
        """Its table, as Jupyter shows it."""
        return html_table(type(self).__name__, self.records())


def _parquet(path: Path) -> bytes:
    schema = optional("pyarrow.parquet").read_schema(path)
    document: bytes = (schema.metadata or {})[_KEY]
    return document


def html_table(title: str, records: Sequence[Record]) -> str:
    """A table with a caption; numbers to four digits, no more than 60 rows."""
    if not records:
        return f"<p>{html.escape(title)}: nothing</p>"
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in records[0])
    rows = ["".join(f"<td>{html.escape(shown(v))}</td>" for v in r.values()) for r in records[:60]]
    more = f" (60 of {len(records)} rows)" if len(records) > 60 else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<table><caption>{html.escape(title)}{more}</caption>"
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    )


def shown(value: Any) -> str:
    """A value for people: four digits of a number that is not whole, nothing for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) and not value.is_integer() else str(value)
