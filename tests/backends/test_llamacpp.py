"""What only the llama.cpp backend has: its cache, speculation, options and errors."""

from __future__ import annotations

import ctypes
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections import deque
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("xllamacpp")

from rl_mlx.backends import open_backend
from rl_mlx.backends.llamacpp import LlamaCppOptions
from rl_mlx.backends.llamacpp import backend as module
from rl_mlx.backends.llamacpp.backend import kv_types
from rl_mlx.backends.llamacpp.library import Library, open_library
from rl_mlx.backends.llamacpp.model import ALL_LAYERS, KV, Context, layer_counts, prepare
from rl_mlx.engine.chunk import ChunkSize
from rl_mlx.errors import (
    BackendUnavailable,
    FormatError,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    RlMlxError,
    UnsupportedModel,
)
from rl_mlx.settings import ModelSettings
from rl_mlx.store import ModelFiles
from rl_mlx.types import Failed, Progress

pytestmark = pytest.mark.shared
TEXT = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426]


@pytest.fixture
def open_cpp(open_model: Any, stories: Path) -> Any:
    def open_one(path: Path = stories, **settings: Any) -> Any:
        return open_model(path, **{"backend": "llama.cpp", "context": 512, **settings})

    return open_one


@pytest.fixture
def golden(shared: Path) -> list[int]:
    path = shared / "models" / "stories260K.greedy.json"
    ids: list[int] = json.loads(path.read_text())["greedy_ids_from_bos"]
    return ids[1:]


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("draft", ["lookup", "model", "lookup+model"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_changes_nothing_but_the_number_of_steps(
    open_cpp: Any, start: Any, stories: Path, draft: str, temperature: float, unified: bool
) -> None:
    options = {"backend_options": {"unified": unified}}
    plain = open_cpp(**options)
    reference = draft.replace("model", str(stories))
    fast = open_cpp(draft=reference, draft_tokens=5, **options)
    prompts = [[1], TEXT, TEXT + TEXT[1:] + TEXT[1:9], [1, 5, 6]]
    for backend in (plain, fast):
        calls = [start(backend, p, max_tokens=50, seed=5, temperature=temperature) for p in prompts]
        replies = [c.reply() for c in calls]
        if backend is plain:
            expected = [r.ids for r in replies]
    assert [r.ids for r in replies] == expected
    timings = [r.finished.timings for r in replies]
    assert sum(t.accepted for t in timings) > 0
    assert all(t.accepted <= t.drafted for t in timings)
    assert all(t.generated <= t.forwards + t.accepted for t in timings)
    assert sum(t.forwards for t in timings) < sum(t.generated for t in timings)


def test_a_draft_model_works_with_the_targets_threads_in_turn(
    open_cpp: Any, ask: Any, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run on the engine's thread, one after the other, so they never share the cores."""
    api = open_library().api
    threads: list[tuple[int, int]] = []
    used: set[int] = set()
    make, decode = api.llama_init_from_model, api.llama_decode

    def make_context(model: Any, params: Any) -> Any:
        threads.append((params.n_threads, params.n_threads_batch))
        return make(model, params)

    def run(*arguments: Any) -> Any:
        used.add(threading.get_ident())
        return decode(*arguments)

    monkeypatch.setattr(api, "llama_init_from_model", make_context)
    monkeypatch.setattr(api, "llama_decode", run)
    options = {"threads": 2, "threads_batch": 1}
    backend = open_cpp(draft=str(stories), draft_tokens=2, backend_options=options)
    timings = ask(backend, [1], max_tokens=30).finished.timings
    assert threads == [(2, 1), (2, 1)]
    assert len(used) == 1
    assert 0 < timings.drafted <= 2 * timings.forwards


@pytest.mark.parametrize("unified", [True, False])
def test_a_finished_answer_is_the_prefix_of_the_next_prompt(
    open_cpp: Any, ask: Any, unified: bool
) -> None:
    backend = open_cpp(backend_options={"unified": unified})
    first = ask(backend, TEXT, max_tokens=10)
    assert first.finished.timings.reused == 0
    longer = [*TEXT, *first.ids, 300, 301]
    again = ask(backend, longer, max_tokens=10)
    assert again.finished.timings.reused == len(TEXT) + 9  # the last id was never fed
    fresh = open_cpp(backend_options={"unified": unified})
    assert ask(fresh, longer, max_tokens=10).ids == again.ids
    assert backend.stats().kv_bytes > 0


@pytest.mark.parametrize("unified", [True, False])
def test_a_prefix_is_shared_by_those_that_run_together(
    open_cpp: Any, start: Any, unified: bool
) -> None:
    backend = open_cpp(backend_options={"unified": unified, "batch": 32})
    prefix = [1, *range(3, 163)]
    calls = [start(backend, [*prefix, 200 + n], max_tokens=8) for n in range(4)]
    replies = [c.reply() for c in calls]
    assert replies[0].finished.timings.reused == 0
    assert all(r.finished.timings.reused >= len(prefix) - 32 for r in replies[1:])
    alone = open_cpp(parallel=1, backend_options={"unified": unified})
    assert [start(alone, [*prefix, 200 + n], max_tokens=8).reply().ids for n in range(4)] == [
        r.ids for r in replies
    ]


def test_sequences_wait_when_the_shared_cells_run_out(open_cpp: Any, start: Any) -> None:
    """256 cells and eight answers of 100 tokens each: some are put back and go on later, with the
    same text.
    """
    prompts = [[1, 300 + n] for n in range(8)]
    results = []
    for context, unified in ((256, True), (256, False)):
        backend = open_cpp(context=context, backend_options={"unified": unified})
        calls = [start(backend, p, max_tokens=100, ignore_eos=True) for p in prompts]
        results.append([c.reply().ids for c in calls])
    assert results[0] == results[1]
    assert [len(ids) for ids in results[0]] == [100] * 8


def test_a_prompt_is_read_in_small_chunks_beside_a_stream(
    open_cpp: Any, start: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [1, *range(3, 90)]
    alone = ask(open_cpp(), prompt, max_tokens=5)
    monkeypatch.setattr(ChunkSize, "tokens", lambda chunks, *, beside: 8 if beside else chunks.most)
    backend = open_cpp()
    stream = start(backend, [1, 400], max_tokens=200, ignore_eos=True)
    stream.first()
    reply = start(backend, prompt, max_tokens=5).reply()
    done = [e.done for e in reply.events if isinstance(e, Progress)]
    assert [b - a for a, b in itertools.pairwise([0, *done])] == [8] * 11
    assert reply.ids == alone.ids
    assert len(stream.reply().ids) == 200


def test_a_recurrent_model_reuses_what_it_can_and_refuses_speculation(
    open_cpp: Any, start: Any, ask: Any, shared: Path
) -> None:
    path = shared / "parity" / "lfm2.gguf"
    prompt = np.load(path.with_suffix(".npz"))["ids"].ravel().tolist()
    backend = open_cpp(path)
    calls = [start(backend, prompt[: 10 + n], max_tokens=12) for n in range(5)]
    together = [c.reply().ids for c in calls]
    alone = [ask(open_cpp(path), prompt[: 10 + n], max_tokens=12).ids for n in range(5)]
    assert together == alone
    turn = [*prompt[:10], *together[0], 7]
    again = ask(backend, turn, max_tokens=12)
    assert again.finished.timings.reused == len(turn) - 2
    assert again.ids == ask(open_cpp(path), turn, max_tokens=12).ids
    with pytest.raises(UnsupportedModel, match="draft="):
        open_cpp(path, draft="lookup")
    with pytest.raises(UnsupportedModel, match="prefix_cache"):
        open_cpp(path, prefix_cache="1GB")


def test_ids_inside_a_character_are_not_lost(open_cpp: Any, ask: Any) -> None:
    """The server class of the binding drops such tokens, because they are no text yet."""
    byte = 3 + 0xE2  # <0xE2>: the first of three bytes of many characters
    reply = ask(open_cpp(), [1], max_tokens=5, logit_bias={byte: 1000.0})
    assert reply.ids == [byte] * 5


def test_quantized_caches_keep_the_logits_close(open_cpp: Any, shared: Path) -> None:
    path = shared / "parity" / "llama3-rope.gguf"
    ids = np.load(path.with_suffix(".npz"))["ids"].ravel().tolist()
    exact = open_cpp(path).logits(ids)
    errors = []
    for bits in (8, 6, 4):
        backend = open_cpp(path, kv_bits=bits, dtype=None)
        assert backend.info.kv_bytes_per_token < open_cpp(path, dtype=None).info.kv_bytes_per_token
        errors.append(float(np.abs(backend.logits(ids) - exact).mean()))
    assert 0 < errors[0] < errors[1] < errors[2] < 0.2 * np.abs(exact).max()


def test_logits_go_on_over_several_batches(open_cpp: Any) -> None:
    ids = [1, *range(3, 70)]
    np.testing.assert_allclose(
        open_cpp(backend_options={"batch": 16}).logits(ids), open_cpp().logits(ids), atol=1e-3
    )


def test_higher_priority_goes_first(open_cpp: Any, start: Any) -> None:
    backend = open_cpp(parallel=1)
    calls = [start(backend, [1, 5 + n], max_tokens=40, ignore_eos=True) for n in range(3)]
    urgent = start(backend, [1, 40], priority=1, max_tokens=1)
    urgent.reply()
    assert calls[2].reply().finished.timings.queued > urgent.reply().finished.timings.queued


def test_a_file_that_is_rejected_says_why(
    open_cpp: Any, shared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With llama.cpp's own words, which are not printed."""
    whole = (shared / "models" / "stories260K.gguf").read_bytes()
    for content, kind, reason in (
        (b"what? " * 100, FormatError, "invalid magic characters: 'what'"),
        (whole[:400_000], FormatError, "data is not within the file bounds"),
        (whole.replace(b"llama", b"lhama"), UnsupportedModel, "unknown model architecture: 'lhama"),
    ):
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(kind) as caught:
            open_cpp(path)
        assert "bad.gguf: " in str(caught.value)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelNotFound, match=r"missing\.gguf"):
        open_cpp(tmp_path / "missing.gguf")
    assert capfd.readouterr() == ("", "")


def test_the_hostile_files_of_others_give_errors_of_ours(open_cpp: Any, shared: Path) -> None:
    files = sorted(p for p in (shared / "malformed").rglob("*") if p.is_file())
    assert len(files) > 100
    for path in files:
        with pytest.raises(RlMlxError) as caught:
            open_cpp(path)
        assert "\n" not in str(caught.value)


def test_nothing_is_printed(open_cpp: Any, ask: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ask(open_cpp(), TEXT, max_tokens=5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_layers": -2}, {"gpu_layers": "some"}, {"threads": 0}, {"parallel": 1},
        {"batch": True}, {"cache_type_k": "q3_k"}, {"rope_scaling": "su"},
        {"numa": "yes"}, {"split_mode": "tensor"}, {"context": 5}, {"mmap": "no"}, {"mlock": None},
        {"rope_freq_base": "x"}, {"tensor_split": "1,x"}, {"tensor_split": [-1]}, {"unified": 1},
    ],
)  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        LlamaCppOptions.of(options)


def test_what_cannot_be_had_is_said(open_cpp: Any, stories: Path, shared: Path) -> None:
    with pytest.raises(OutOfMemory, match="memory"):
        open_cpp(memory="1MB")
    with pytest.raises(InvalidRequest, match="vocabulary"):
        open_cpp(draft=str(shared / "parity" / "llama.gguf"))
    with pytest.raises(InvalidRequest, match="flash attention"):
        open_cpp(kv_bits=8, backend_options={"flash_attention": False})
    with pytest.raises(InvalidRequest, match="unknown backend"):
        open_backend(ModelFiles("x", stories), ModelSettings(backend="torch"))
    settings = ModelSettings(backend="llama.cpp", backend_options={"rpc": "localhost:1"})
    with pytest.raises(BackendUnavailable, match="RPC"):
        open_backend(ModelFiles("x", stories), settings)


@pytest.mark.parametrize(
    ("kinds", "has_gpu"), [((0,), False), ((0, 1), True), ((2, 0), True), ((3, 0), False)]
)
def test_what_counts_as_a_gpu(kinds: tuple[int, ...], has_gpu: bool) -> None:
    """Of ``enum ggml_backend_dev_type``: 0 CPU, 1 GPU, 2 integrated GPU, 3 accelerator (BLAS)."""
    library = object.__new__(Library)
    devices = [("X", "", "", kind, 0, 0) for kind in kinds]
    library.devices = lambda: iter(devices)  # type: ignore[method-assign]
    assert library.has_gpu == has_gpu


def test_ever_fewer_layers_go_to_a_gpu_under_auto_only(stories: Path) -> None:
    cpu, gpu = (SimpleNamespace(has_gpu=has) for has in (False, True))

    def counts(library: Any, layers: Any) -> list[int]:
        return list(layer_counts(library, LlamaCppOptions(gpu_layers=layers), stories))

    assert counts(cpu, "auto") == counts(cpu, "all") == [0]
    assert counts(gpu, "all") == [ALL_LAYERS]
    assert counts(gpu, 7) == counts(cpu, 7) == [7]
    assert counts(gpu, "auto") == [ALL_LAYERS, 4, 3, 2, 1, 0]  # of five


REACHED: dict[str, tuple[Any, str, Any]] = {
    "gpu_layers": (3, "n_gpu_layers", 3),
    "split_mode": ("row", "split_mode", 2),
    "main_gpu": (1, "main_gpu", 1),
    "threads": (2, "n_threads", 2),
    "threads_batch": (3, "n_threads_batch", 3),
    "batch": (64, "n_ubatch", 64),
    "unified": (True, "kv_unified", True),
    "flash_attention": (True, "flash_attn_type", 1),
    "cache_type_k": ("q8_0", "type_k", 8),
    "cache_type_v": ("q4_0", "type_v", 2),
    "rope_scaling": ("yarn", "rope_scaling_type", 2),
    "rope_freq_base": (5000, "rope_freq_base", 5000),
    "rope_freq_scale": ("0.25", "rope_freq_scale", 0.25),
    "yarn_orig_context": (128, "yarn_orig_ctx", 128),
    "mlock": (True, "load_mode", 3),
    "mmap": (False, "load_mode", 0),
}


@pytest.fixture
def passed(open_cpp: Any, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``passed(**backend_options)``: what llama.cpp's own calls were given."""
    api = open_library().api
    given: dict[str, Any] = {}

    def spy(name: str, params_at: int) -> None:
        call = getattr(api, name)

        def record(*arguments: Any) -> Any:
            struct = arguments[params_at]
            given.update((field, getattr(struct, field)) for field, _ in struct._fields_)
            if name == "llama_model_load_from_file" and struct.tensor_split:
                given["shares"] = struct.tensor_split[:3]
            return call(*arguments)

        monkeypatch.setattr(api, name, record)

    spy("llama_model_load_from_file", 1)
    spy("llama_init_from_model", 1)

    def open_with(**options: Any) -> dict[str, Any]:
        given.clear()
        # Its heads are as long as a block of a quantized cache.
        open_cpp(shared / "parity" / "llama3-rope.gguf", dtype=None, backend_options=options)
        return given

    return open_with


def test_every_option_reaches_llamacpp(passed: Any) -> None:
    defaults = dict(passed())
    for option, (value, field, expected) in REACHED.items():
        # A quantized cache of values has to have flash attention, which a CPU would not choose.
        more = {"flash_attention": True} if option.startswith("cache_type") else {}
        assert passed(**{option: value}, **more)[field] == expected, option
        assert option in more or option == "threads" or defaults[field] != expected, option
    assert passed(tensor_split="3,1")["shares"] == [3, 1, 0]
    assert passed(tensor_split=[0.5, 0.25])["shares"] == [0.5, 0.25, 0]
    batch = passed(batch=64)
    assert batch["n_batch"] == batch["n_ubatch"] == 64
    assert passed()["n_threads"] == 1  # what the fixture asks for
    named = {*REACHED, "tensor_split", "numa", "rpc"}
    assert named == {f.name for f in fields(LlamaCppOptions)}


def test_threads_are_the_cores_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_mlx.backends.llamacpp.options.physical_cores", lambda: 6)
    options = LlamaCppOptions().in_force()
    assert (options["threads"], options["threads_batch"]) == (6, 6)
    options = LlamaCppOptions(threads=2, threads_batch=4).in_force()
    assert (options["threads"], options["threads_batch"]) == (2, 4)


def test_numa_is_told_to_llamacpp(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    library: Any = SimpleNamespace(api=SimpleNamespace(llama_numa_init=told.append))
    for name in ("distribute", "isolate", "numactl", "mirror"):
        prepare(library, LlamaCppOptions(numa=name))
    prepare(library, LlamaCppOptions())
    assert told == [1, 2, 3, 4]


def test_workers_are_made_devices_where_the_build_has_rpc() -> None:
    """A library that was built with RPC, as far as that goes; the wheels are not."""
    asked: list[str] = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
    def add_server(endpoint: bytes) -> int:
        asked.append(endpoint.decode())
        return 7 if len(asked) < 2 else 0

    registered: list[int] = []
    api = SimpleNamespace(
        ggml_backend_reg_by_name=lambda name: 1 if name == b"RPC" else None,
        ggml_backend_reg_get_proc_address=lambda registry, name: (
            ctypes.cast(add_server, ctypes.c_void_p).value
        ),
        ggml_backend_register=registered.append,
    )
    library: Any = SimpleNamespace(api=api, errors=lambda: "no devices")
    with socket.create_server(("127.0.0.1", 0)) as worker:
        here = f"127.0.0.1:{worker.getsockname()[1]}"
        prepare(library, LlamaCppOptions(rpc=(here,)))
        assert (asked, registered) == ([here], [7])
        with pytest.raises(BackendUnavailable, match="no devices"):
            prepare(library, LlamaCppOptions(rpc=(here,)))
    with pytest.raises(BackendUnavailable, match=f"no RPC worker answers at {here}"):
        prepare(library, LlamaCppOptions(rpc=(here,)))
    assert len(asked) == 2  # llama.cpp was not asked where nobody listens: it would abort
    with pytest.raises(InvalidRequest, match="host:port"):
        prepare(library, LlamaCppOptions(rpc=("nobody",)))


def test_a_full_gpu_means_fewer_layers_and_a_note(
    open_cpp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "layer_counts", lambda *_: iter((99, 3, 0)))
    load = module.Model

    def loads(library: Any, path: Path, options: Any, layers: int) -> Any:
        if layers:
            raise OutOfMemory(f"no room for {layers}")
        return load(library, path, options, layers)

    monkeypatch.setattr(module, "Model", loads)
    assert open_cpp().info.notes[0] == "only 0 layers are on the GPU: no room for 3"
    monkeypatch.setattr(module, "layer_counts", lambda *_: iter((99,)))
    with pytest.raises(OutOfMemory, match="99"):
        open_cpp()


def test_the_engine_outlives_what_befalls_a_request(
    open_cpp: Any, ask: Any, golden: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no such luck")

    backend = open_cpp(backend_options={"unified": True})
    for method in ("share", "run"):  # while it enters, while it runs
        ask(backend, [1, 5, 6, 7], max_tokens=3)
        with monkeypatch.context() as patch:
            patch.setattr(Context, method, fail)
            last = ask(backend, [1, 5, 6, 8], max_tokens=3).events[-1]
        assert isinstance(last, Failed)
        assert "no such luck" in str(last.error)
        assert ask(backend, [1], max_tokens=20).ids == golden[:20]


def test_what_continues_a_message_has_its_level() -> None:
    library = object.__new__(Library)
    library._log, library._level = deque(), 0
    for level, text in ((2, b"loading "), (5, b"....\n"), (4, b"bad "), (5, b"file\n"), (3, b"hm")):
        library._on_log(level, text, None)
    assert library.errors() == "bad file"
    assert library.errors() == ""


def test_types_of_the_cache() -> None:
    assert kv_types(ModelSettings(), LlamaCppOptions()) == KV("f16", "f16")
    assert kv_types(ModelSettings(dtype="bfloat16"), LlamaCppOptions()) == KV("bf16", "bf16")
    assert kv_types(ModelSettings(kv_bits=4), LlamaCppOptions()) == KV("q4_0", "q4_0")
    mixed = LlamaCppOptions(cache_type_k="q8_0")
    assert kv_types(ModelSettings(), mixed) == KV("q8_0", "f16")


def test_two_models_in_one_process(
    open_cpp: Any, ask: Any, golden: list[int], shared: Path
) -> None:
    other = open_cpp(shared / "parity" / "qwen3.gguf")
    backend = open_cpp()
    assert ask(backend, [1], max_tokens=20).ids == golden[:20]
    assert len(ask(other, [5, 6, 7], max_tokens=20).ids) == 20
    other.close()
    assert ask(backend, [1], max_tokens=20).ids == golden[:20]


@pytest.mark.parametrize("name", ["qwen2", "llama3-rope", "qwen3_moe"])
def test_a_folder_runs_and_is_exported_once(
    name: str,
    open_cpp: Any,
    ask: Any,
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reference = np.load(shared / "hf" / name / "reference.npz")
    ids, expected = reference["ids"].ravel().tolist(), reference["logits"].reshape(-1, 1000)
    backend = open_cpp(shared / "hf" / name)
    assert np.abs(backend.logits(ids) - expected).max() <= 5e-3 * np.abs(expected).max()
    (file,) = (tmp_path / "rl-mlx" / "gguf").iterdir()
    before = file.stat().st_mtime_ns
    again = open_cpp(shared / "hf" / name)
    assert file.stat().st_mtime_ns == before
    assert ask(again, ids[:8], max_tokens=8).ids == ask(backend, ids[:8], max_tokens=8).ids


def test_a_full_disk_is_seen_before_the_export(
    open_cpp: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OutOfMemory, match="XDG_CACHE_HOME"):
        open_cpp(shared / "hf" / "qwen2")
    assert not any(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from rl_mlx.backends.llamacpp import exported

exported._Logged.__call__ = lambda self, done, total: os.kill(os.getpid(), signal.SIGKILL)
exported.gguf_of(Path(sys.argv[1]))
"""


def test_a_process_killed_during_the_export_leaves_nothing_that_is_taken(
    open_cpp: Any, ask: Any, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = shared / "hf" / "qwen2"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert killed.returncode == -9
    cache = tmp_path / "rl-mlx" / "gguf"
    (half,) = cache.iterdir()
    assert half.suffix == ".part"
    assert len(ask(open_cpp(folder), [5, 6, 7], max_tokens=4).ids) == 4
    (file,) = cache.iterdir()
    assert file.suffix == ".gguf"
