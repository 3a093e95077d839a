"""Converting, against copying, decoding and quantizing anew, and mlx-lm: seconds and peak memory.

    python benchmarks/convert.py [--mb 500] [--runs 3] [--sizes 10 50 250 1000 2000] [--json]

The models are synthetic llamas, written beside each other in a folder of their own (--folder) and
removed. Every arm runs in a process of its own, in turn with the others; medians are shown. Times
are of the work, not of starting Python; ``cached`` is until the call is back, ``on disk`` until the
bytes that were written are on the disk (fsync), as ours are when the call is back. Ratios are of
that, the median of those of each round. ``cores`` are the seconds that all cores worked, which
other programs change less. Peak memory is of the process, in MB.

- ``cp``: the system's cp of the GGUF file; ``convert``: GGUF Q4_K_M to an MLX folder.
- ``naive``: gguf-py decodes, mx.quantize packs (of the file's first --naive-mb, scaled to all).
- ``q4`` and ``mlx-lm``: a bfloat16 folder to 4 bits, here and by mlx_lm.convert.
- the last table: convert over sizes, in MB/s and of the speed of ``cp``, which stay the same where
  cost is linear. Large files can cost both more: a virtual machine's memory is first made then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from _paired import machine

HIDDEN, INNER, VOCAB, HEADS, KV = 2048, 5632, 4096, 16, 512
_KINDS = gguf.GGMLQuantizationType
_Q4, _Q6 = (_KINDS.Q4_K, 256, 144, (0, 2)), (_KINDS.Q6_K, 256, 210, (208,))
_SHAPES = {
    "attn_q": (HIDDEN, HIDDEN), "attn_k": (KV, HIDDEN), "attn_v": (KV, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}  # fmt: skip
_LAYER = sum(rows * columns for rows, columns in _SHAPES.values())

ARMS = {
    "convert": """
from rl_mlx.convert import convert
run = lambda: convert(source, out)
""",
    "q4": """
from rl_mlx.convert import convert
run = lambda: convert(source, out, quant="q4", scales="bfloat16")
""",
    "mlx-lm": """
import importlib
from pathlib import Path
from mlx_lm.utils import load_config, load_model
module = importlib.import_module("mlx_lm.convert")
class Quiet:  # these models have no tokenizer, and no card
    def save_pretrained(self, path): pass
def load(path, **_):
    return load_model(Path(path), lazy=True)[0], Quiet(), load_config(Path(path))
module.load = load
module.save.__globals__["create_model_card"] = lambda *_: None
run = lambda: module.convert(source, out, quantize=True)
""",
    "naive": """
import gguf, mlx.core as mx
def run():
    arrays, done = {}, 0
    for tensor in gguf.GGUFReader(source).tensors:
        values = mx.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        if values.ndim == 2:
            bits = 8 if tensor.tensor_type.name == "Q6_K" else 4
            for i, part in enumerate(mx.quantize(values, group_size=32, bits=bits)):
                arrays[f"{tensor.name}.{i}"] = part
        else:
            arrays[tensor.name] = values
        mx.eval(*arrays.values())
        done += tensor.n_bytes
        if done > limit:
            break
    mx.save_safetensors(out + ".safetensors", arrays)
    return done
""",
}
_FRAME = """
import json, resource, sys, time
source, out, limit = sys.argv[1], sys.argv[2], float(sys.argv[3])
{arm}
start, cores = time.perf_counter(), time.process_time()
done = run()
seconds, cores = time.perf_counter() - start, time.process_time() - cores
try:  # ru_maxrss counts the parent's memory on Linux
    status = open("/proc/self/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
except OSError:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, cores, peak, done if isinstance(done, int) else 0]))
"""


def write_gguf(path: Path, megabytes: float) -> None:
    """A llama with the mixture of Q4_K_M: Q6_K for the head and half of v and down."""
    layers = max(1, round((megabytes - 12) * 1e6 / (_LAYER * 0.6)))
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV * HEADS // HIDDEN)
    writer.add_layer_norm_rms_eps(1e-5)

    def add(name: str, rows: int, columns: int, *, wide: bool) -> None:
        kind, size, width, halves = _Q6 if wide else _Q4
        blocks = rng.integers(0, 256, (rows * columns // size, width), dtype=np.uint8)
        for at in halves:
            scales = rng.uniform(1e-4, 1e-3, len(blocks)).astype(np.float16)
            blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
        writer.add_tensor(f"{name}.weight", blocks.reshape(rows, -1), raw_dtype=kind)

    add("token_embd", VOCAB, HIDDEN, wide=False)
    add("output", VOCAB, HIDDEN, wide=True)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(HIDDEN, np.float32))
        for name, shape in _SHAPES.items():
            add(f"blk.{i}.{name}", *shape, wide=i % 2 == 0 and name in ("attn_v", "ffn_down"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_folder(path: Path, megabytes: float) -> None:
    """The same llama in bfloat16, in one file."""
    path.mkdir()
    layers = max(1, round(megabytes * 1e6 / 2 / _LAYER))
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}{names[name]}.weight": shape for name, shape in _SHAPES.items()}
        shapes |= {
            f"{at}{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "vocab_size": VOCAB,
        "num_key_value_heads": KV * HEADS // HIDDEN, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = rng.standard_normal(int(np.prod(shape)), np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> np.uint32(16)).astype(np.uint16))


class Measured(NamedTuple):
    """Seconds until the call was back, until all was on the disk, and of work; peak memory."""

    cached: float
    seconds: float
    cores: float
    peak_mb: float


def run(arm: str, source: Path, out: Path, limit: float = 0) -> Measured:
    """Measure an arm once; what it wrote is removed."""
    size = source.stat().st_size if source.is_file() else 0
    if arm == "cp":
        start, before = time.perf_counter(), os.times()
        subprocess.run(["cp", source, out], check=True)
        seconds, peak, after = time.perf_counter() - start, 0.0, os.times()
        cores = sum(after[2:4]) - sum(before[2:4])  # of children
    else:
        program = _FRAME.format(arm=ARMS[arm])
        command = [sys.executable, "-c", program, str(source), str(out), str(limit)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds, cores, peak, read = json.loads(done.stdout.splitlines()[-1])
        whole = size / read if read else 1
        seconds, cores = seconds * whole, cores * whole
    start = time.perf_counter()
    for written in [out, *out.parent.glob(f"{out.name}/*"), *out.parent.glob(f"{out.name}.*")]:
        if written.is_file():
            with written.open("rb+") as file:
                os.fsync(file.fileno())
    flushed = seconds + time.perf_counter() - start
    for left in out.parent.glob(f"{out.name}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return Measured(seconds, flushed, cores, peak / 1e6)


def compare(arms: dict[str, tuple[Path, float]], out: Path, runs: int) -> dict[str, list[Measured]]:
    """The arms in turn."""
    found: dict[str, list[Measured]] = {arm: [] for arm in arms}
    for _ in range(runs):
        for arm, (source, limit) in arms.items():
            found[arm].append(run(arm, source, out, limit))
    return found


def medians(times: list[Measured]) -> dict[str, float]:
    """Of all that was measured."""
    return {name: statistics.median(getattr(t, name) for t in times) for name in Measured._fields}


def ratio(times: list[Measured], others: list[Measured], what: str) -> float:
    """How many times as fast as the others: the median over the rounds."""
    pairs = zip(times, others, strict=True)
    return statistics.median(getattr(other, what) / getattr(own, what) for own, other in pairs)


PAIRS = (("convert", "cp"), ("convert", "naive"), ("q4", "mlx-lm"))


def measure_arms(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every arm on models of ``--mb``, and the ratios of pairs."""
    source, folder = work / "model.gguf", work / "hf"
    write_gguf(source, options.mb)
    write_folder(folder, options.mb)
    os.sync()  # nothing of it is left to be written meanwhile
    arms = {
        "cp": (source, 0.0),
        "convert": (source, 0.0),
        "naive": (source, options.naive_mb * 1e6),
    }
    found = compare(arms, work / "out", options.runs)
    found |= compare(dict.fromkeys(("q4", "mlx-lm"), (folder, 0.0)), work / "out", options.runs)
    source.unlink()
    shutil.rmtree(folder)
    return {
        "mb": options.mb,
        "arms": {arm: medians(times) for arm, times in found.items()},
        "ratios": {f"{a} / {b}": ratio(found[a], found[b], "seconds") for a, b in PAIRS},
        "ratios of core seconds": {
            f"{a} / {b}": ratio(found[a], found[b], "cores") for a, b in PAIRS
        },
    }


def measure_sizes(work: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """``convert`` of files of each of ``--sizes``, beside ``cp``."""
    found = {}
    for size in options.sizes:
        source = work / "size.gguf"
        write_gguf(source, size)
        os.sync()
        mb = source.stat().st_size / 1e6
        arms = compare({"cp": (source, 0), "convert": (source, 0)}, work / "out", options.runs)
        times = medians(arms["convert"])
        speeds = {"mb_a_second": mb / times["seconds"], "mb_a_core_second": mb / times["cores"]}
        of_cp = {"of_cp": ratio(arms["convert"], arms["cp"], "seconds")}
        found[f"{mb:.0f}"] = times | speeds | of_cp
    return found


def main() -> None:
    """Measure, and print tables or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--mb", type=float, default=500, help="0 leaves the arms out")
    parser.add_argument("--naive-mb", type=float, default=30)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--sizes", type=float, nargs="*", default=[10, 50, 250, 1000, 2000])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "load": [os.getloadavg()[0]]}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.mb:
            results |= measure_arms(Path(folder), options)
        results["sizes"] = measure_sizes(Path(folder), options)
    results["load"].append(os.getloadavg()[0])
    print(json.dumps(results, indent=2) if options.json else table(results))


def table(results: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'':12}{'cached s':>12}{'on disk s':>12}{'core s':>12}{'peak MB':>12}"]
    for arm, found in results.get("arms", {}).items():
        lines.append(f"{arm:12}" + "".join(f"{found[name]:12.2f}" for name in Measured._fields))
    for kind in ("ratios", "ratios of core seconds"):
        lines += [f"{what:24}{n:12.2f}  {kind}" for what, n in results.get(kind, {}).items()]
    lines += [
        f"convert {size:>6} MB {at['mb_a_second']:8.0f} MB/s {at['mb_a_core_second']:8.0f} MB a "
        f"core second {at['of_cp']:6.2f} of cp {at['peak_mb']:6.0f} MB peak"
        for size, at in results["sizes"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
