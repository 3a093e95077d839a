"""What a model's headers say of it, with no weight read; also of models that nobody here runs."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_mlx.convert.files import is_weights, read_json
from rl_mlx.convert.gguf.reader import GGUFFile
from rl_mlx.convert.safetensors import SafetensorsFile
from rl_mlx.errors import FormatError

_SPECIAL = ("bos", "eos", "eot", "unknown", "padding")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERT = re.compile(r"_exps\b|\.experts\b|\bswitch_mlp\b")
KV_ITEM_BYTES = 2
"""Of the KV cache in float16, as on a GPU; MLX on a CPU takes float32, twice that."""


@dataclass(frozen=True)
class Facts:
    """A model in numbers. ``types`` maps a tensor type to the weights it holds; sizes are bytes.

    ``active_bytes`` are those of the weights that a token is computed with: of experts only as many
    as are chosen. ``kv_bytes_per_token`` counts every layer in full, so it is an upper bound for
    models with sliding windows. None where the headers do not say.
    """

    format: str
    architecture: str
    parameters: int
    weight_bytes: int
    active_bytes: int
    types: dict[str, int]
    context: int | None
    layers: int | None
    hidden: int | None
    heads: int | None
    kv_heads: int | None
    kv_bytes_per_token: int | None
    vocab: int | None
    tokenizer: str
    special_ids: dict[str, Any]
    chat_template: bool

    @property
    def bits_per_weight(self) -> float:
        """Over all tensors as they lie on the disk."""
        return 8 * self.weight_bytes / max(self.parameters, 1)

    def memory(self, context: int) -> int | None:
        """Bytes of weights and of the KV cache of ``context`` tokens."""
        if self.kv_bytes_per_token is None:
            return None
        return self.weight_bytes + context * self.kv_bytes_per_token


def inspect(path: str | Path) -> Facts:
    """Read the headers of a GGUF file or a folder; raises what opening them raises."""
    path = Path(path)
    if path.is_dir():
        return _folder_facts(path)
    with GGUFFile.open(path) as file:
        return _gguf_facts(file)


def _gguf_facts(file: GGUFFile) -> Facts:
    architecture = file.str("general.architecture", "unknown")
    types: Counter[str] = Counter()
    for tensor in file.tensors.values():
        types[tensor.type.name] += math.prod(tensor.shape)
    hidden = _number(file.get(f"{architecture}.embedding_length"))
    layers = _number(file.get(f"{architecture}.block_count"))
    heads = file.get(f"{architecture}.attention.head_count")
    kv_heads = file.get(f"{architecture}.attention.head_count_kv", heads)
    width = hidden // most if hidden and (most := _largest(heads)) else None
    ends = [file.get(f"{architecture}.attention.{k}_length", width) for k in ("key", "value")]
    model = file.str("tokenizer.ggml.model", "none")
    pre = file.get("tokenizer.ggml.pre")
    tokens = file.get("tokenizer.ggml.tokens")
    ids = {name: _number(file.get(f"tokenizer.ggml.{name}_token_id")) for name in _SPECIAL}
    sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    experts = [file.get(f"{architecture}.expert_{key}") for key in ("count", "used_count")]
    return Facts(
        format=f"GGUF v{file.version}" + (f", {n} parts" if (n := len(file.paths)) > 1 else ""),
        architecture=architecture,
        parameters=sum(types.values()),
        weight_bytes=sum(sizes.values()),
        active_bytes=_active(sizes, *experts),
        types=dict(types.most_common()),
        context=_number(file.get(f"{architecture}.context_length")),
        layers=layers,
        hidden=hidden,
        heads=_largest(heads),
        kv_heads=_largest(kv_heads),
        kv_bytes_per_token=_kv_bytes(kv_heads, layers, ends),
        vocab=len(tokens) if tokens is not None and hasattr(tokens, "__len__") else None,
        tokenizer=f"{model}, {pre}" if isinstance(pre, str) else model,
        special_ids={k: v for k, v in ids.items() if v is not None and v < 1 << 31},
        chat_template=isinstance(file.get("tokenizer.chat_template"), str),
    )


def _folder_facts(path: Path) -> Facts:
    document = read_json(path / "config.json")
    if not document:
        raise FormatError(f"{path / 'config.json'} is missing or not a JSON object")
    text = document.get("text_config")
    config: dict[str, Any] = {**document, **(text if isinstance(text, dict) else {})}
    types: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for name, kind, weights, size in _tensors(path, document.get("quantization")):
        types[kind] += weights
        sizes[name] = size
    experts = next((config[key] for key in _EXPERTS if key in config), None)
    heads = _number(config.get("num_attention_heads"))
    kv_heads = _number(config.get("num_key_value_heads")) or heads
    hidden, layers = _number(config.get("hidden_size")), _number(config.get("num_hidden_layers"))
    width = _number(config.get("head_dim")) or (hidden // heads if hidden and heads else None)
    tokenizer = read_json(path / "tokenizer_config.json")
    model = read_json(path / "tokenizer.json").get("model")
    words = model.get("type") if isinstance(model, dict) else tokenizer.get("tokenizer_class")
    return Facts(
        format="MLX folder" if "quantization" in document else "safetensors folder",
        architecture=str(document.get("model_type", "unknown")),
        parameters=sum(types.values()),
        weight_bytes=sum(sizes.values()),
        active_bytes=_active(sizes, experts, config.get("num_experts_per_tok")),
        types=dict(types.most_common()),
        context=_number(config.get("max_position_embeddings")),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        kv_bytes_per_token=_kv_bytes(kv_heads, layers, [width, width]),
        vocab=_number(config.get("vocab_size")),
        tokenizer=str(words or "none"),
        special_ids={
            name: config[f"{name}_token_id"]
            for name in ("bos", "eos", "pad")
            if config.get(f"{name}_token_id") is not None
        },
        chat_template=(path / "chat_template.jinja").is_file() or "chat_template" in tokenizer,
    )


def _tensors(path: Path, quantization: object) -> Iterator[tuple[str, str, int, int]]:
    """Of each tensor of a folder: name, type, how many weights it holds, and its bytes.

    Scales and biases of packed tensors hold no weights.
    """
    packing: Mapping[str, Any] = quantization if isinstance(quantization, dict) else {}
    for shard in sorted(p for p in path.iterdir() if is_weights(p.name)):
        file = SafetensorsFile.open(shard)
        packed = {n.removesuffix(".scales") for n in file.tensors if n.endswith(".scales")}
        for name, entry in file.tensors.items():
            module, _, part = name.rpartition(".")
            count = math.prod(entry.shape)
            kind = entry.dtype
            if module in packed and part == "weight":
                own = packing.get(module)
                bits = _number((own if isinstance(own, dict) else packing).get("bits")) or 4
                kind, count = f"{bits}-bit", count * 32 // bits
            elif module in packed and part in ("scales", "biases"):
                count = 0
            yield name, kind, count, entry.nbytes
        file.close()


def _active(sizes: Mapping[str, int], experts: object, used: object) -> int:
    """Bytes of the weights that one token needs, by the names of tensors."""
    total = sum(sizes.values())
    count, chosen = _number(experts), _number(used)
    if not count or chosen is None or chosen >= count:
        return total
    rows = sum(size for name, size in sizes.items() if _EXPERT.search(name))
    return total - rows * (count - chosen) // count


def _kv_bytes(kv_heads: Any, layers: int | None, ends: list[Any]) -> int | None:
    """Keys and values of one token in all layers; ``kv_heads`` is one number or one a layer."""
    widths = [_number(end) for end in ends]
    if layers is None or None in widths:
        return None
    total = _number(kv_heads)
    heads = total * layers if total is not None else _sum(kv_heads)
    return None if heads is None else heads * sum(w or 0 for w in widths) * KV_ITEM_BYTES


def _number(value: object) -> int | None:
    """A whole number above or at 0, else None."""
    return value if type(value) is int and value >= 0 else None


def _sum(value: Any) -> int | None:
    return int(value.sum()) if hasattr(value, "sum") else None


def _largest(value: Any) -> int | None:
    if hasattr(value, "max") and len(value):
        return int(value.max())
    return _number(value)
