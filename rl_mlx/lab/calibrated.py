"""Learned and calibrated quantization by mlx-lm's own AWQ, GPTQ and DWQ: called, not copied.

They read a text and choose scales (AWQ: Lin et al. 2023), roundings (GPTQ: Frantar et al. 2022) or
train the scales against the model as it was (DWQ, mlx-lm's own). What they write is a folder like
any other. mlx-lm would download a text for that; here it is the one that is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from rl_mlx.convert.files import read_json
from rl_mlx.convert.hfconfig import bilingual
from rl_mlx.convert.staging import new_folder
from rl_mlx.errors import BackendUnavailable, InvalidRequest, UnsupportedModel
from rl_mlx.lab.text import Text, read_text

Method = Literal["awq", "gptq", "dwq"]
_LEFTOVERS = 6  # bits of what GPTQ does not do: embeddings


@dataclass(frozen=True)
class _Options:
    bits: int
    group_size: int
    length: int
    samples: int
    learning_rate: float


def calibrate(
    source: str | Path,
    destination: str | Path,
    method: Method,
    text: Text | None = None,
    *,
    bits: int = 4,
    group_size: int = 64,
    length: int = 512,
    samples: int = 128,
    learning_rate: float = 1e-6,
    force: bool = False,
) -> None:
    """Quantize the folder ``source``, of plain floats, by a method of mlx-lm.

    ``text`` is cut into at most ``samples`` pieces of ``length`` tokens; ``learning_rate`` is
    DWQ's. All three are made for a GPU, and take long without one.

    Raises ``InvalidRequest`` for an unknown method, a source that is no such folder or a text of
    fewer than two pieces, ``UnsupportedModel`` for a family that AWQ does not know,
    ``DestinationExists`` without ``force``, and ``BackendUnavailable`` where MLX cannot do it here.
    """
    if method not in get_args(Method):
        raise InvalidRequest(f"no method {method!r}; known are {', '.join(get_args(Method))}")
    source = Path(source)
    config = read_json(source / "config.json")
    if not config or "quantization" in config or "quantization_config" in config:
        raise InvalidRequest(f"{source} is no folder of plain floats, which {method} starts from")
    options = _Options(bits, group_size, length, samples, learning_rate)
    with new_folder(Path(destination), force=force) as folder:
        _run(method, source, folder, bilingual(config), text or read_text(), options)


def _run(
    method: Method,
    source: Path,
    folder: Path,
    config: dict[str, Any],
    text: Text,
    options: _Options,
) -> None:
    import mlx.core as mx  # noqa: PLC0415  (mlx-lm takes a second and a half)
    from mlx_lm.utils import load, save  # noqa: PLC0415

    # mlx-lm reads no rope_parameters, as transformers 5 writes them: it gets its own words too.
    loaded: Any = load(str(source), model_config=config)
    model, tokenizer = loaded[:2]
    ids = tokenizer.encode(text.text, add_special_tokens=False)
    count = min(options.samples, len(ids) // options.length)
    if count < 2:
        raise InvalidRequest(
            f"{text.name} has {len(ids)} tokens here, fewer than two pieces of {options.length}; "
            "take a longer text or a smaller length"
        )
    rows = mx.array(np.array(ids[: count * options.length]).reshape(count, options.length))
    try:
        model, config = _METHODS[method](model, config, rows, options)
        mx.eval(model.parameters())
    except (RuntimeError, ValueError) as error:
        what = str(error).strip().partition("\n")[0]
        raise BackendUnavailable(
            f"mlx-lm's {method} does not run on {mx.default_device()} with this model: {what}"
        ) from error
    save(folder, str(source), model, tokenizer, config)


_Made = tuple[Any, dict[str, Any]]


def _awq(model: Any, config: dict[str, Any], rows: Any, options: _Options) -> _Made:
    from mlx_lm.quant import awq  # noqa: PLC0415

    family = config["model_type"]
    if family not in awq.AWQ_MODEL_CONFIGS:
        known = ", ".join(sorted(awq.AWQ_MODEL_CONFIGS))
        raise UnsupportedModel(f"mlx-lm's AWQ does not know {family!r}; it knows {known}")
    awq.awq_quantize(
        model, rows, awq.AWQ_MODEL_CONFIGS[family], group_size=options.group_size,
        bits=options.bits, embed_group_size=options.group_size, embed_bits=max(options.bits, 4),
    )  # fmt: skip
    return model, awq.update_config(model, config)


def _gptq(model: Any, config: dict[str, Any], rows: Any, options: _Options) -> _Made:
    from mlx_lm.quant.gptq import gptq_quantize  # noqa: PLC0415

    group = options.group_size
    made = gptq_quantize(model, rows, options.bits, group, _LEFTOVERS, group)  # type: ignore[no-untyped-call]
    return made[0], {**config, "quantization": made[1]}


def _dwq(model: Any, config: dict[str, Any], rows: Any, options: _Options) -> _Made:
    from mlx import optimizers  # noqa: PLC0415
    from mlx_lm.quant.dwq import dwq_quantize  # noqa: PLC0415
    from mlx_lm.utils import quantize_model  # noqa: PLC0415

    student, config = quantize_model(
        copy.deepcopy(model), config, group_size=options.group_size, bits=options.bits
    )
    # Pairs of ids and where the loss begins, as mlx-lm's data sets give them.
    pieces = [(row, 0) for row in rows.tolist()]
    held_out = max(1, len(pieces) // 8)
    dwq_quantize(
        student,
        lambda batch, _index, split: model(batch),  # noqa: ARG005  (mlx-lm names it)
        optimizers.Adam(learning_rate=options.learning_rate, bias_correction=True),
        pieces[held_out:],
        pieces[:held_out],
        batch_size=1,
        max_seq_length=options.length,
        seed=0,
    )
    return student, config


_METHODS: Mapping[str, Callable[[Any, dict[str, Any], Any, _Options], _Made]] = MappingProxyType(
    {"awq": _awq, "gptq": _gptq, "dwq": _dwq}
)
