"""Damaged, hostile and mistaken files: each an error of ours, on one line that names the file."""

from __future__ import annotations

import os
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_mlx.convert.gguf.reader import GGMLType, GGUFFile, StringArray, ValueType
from rl_mlx.errors import FormatError, ModelNotFound, RlMlxError, UnsupportedModel

F32, Q4_K = GGMLType.F32, GGMLType.Q4_K
HUGE = 2**64 - 1


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def number(key: str, value: int, kind: ValueType = ValueType.UINT32) -> bytes:
    letters = {ValueType.UINT16: "H", ValueType.UINT32: "I", ValueType.INT32: "i"}
    return pair(key, kind, struct.pack("<" + letters[kind], value))


def listed(key: str, element: int, count: int, payload: bytes) -> bytes:
    return pair(key, ValueType.ARRAY, struct.pack("<IQ", element, count) + payload)


def tensor(name: str | bytes, dims: Sequence[int], kind: int = F32, offset: int = 0) -> bytes:
    """A tensor info; ``dims`` as in the file, innermost first."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    header = struct.pack("<4sIQQ", b"GGUF", version, tensor_count, pair_count)
    header += b"".join(pairs) + b"".join(tensors)
    padding = bytes(-len(header) % alignment) if tensors else b""
    return header + padding + data


VALID = build(
    [
        pair("general.architecture", ValueType.STRING, text("llama")),
        number("general.alignment", 32),
        listed("tokens", ValueType.STRING, 3, text("a") + text("bc") + text("")),
        listed("scores", ValueType.FLOAT32, 3, struct.pack("<3f", 1, 2, 3)),
        listed("flags", ValueType.BOOL, 2, b"\0\1"),
        listed(
            "nested",
            ValueType.ARRAY,
            2,
            struct.pack("<IQ2H", ValueType.UINT16, 2, 1, 2) + struct.pack("<IQ", ValueType.INT8, 0),
        ),
    ],
    [tensor("a", [4, 2], F32, 0), tensor("b", [256], Q4_K, 32)],
    bytes(range(32)) + bytes(144),
)


def read_all(path: Path) -> None:
    """Open and touch every value and every byte."""
    with GGUFFile.open(path) as file:
        for value in file.metadata.values():
            if isinstance(value, StringArray):
                assert len(list(value)) == len(value)
        for name, info in file.tensors.items():
            assert file.raw(name).nbytes == info.nbytes
            file.raw(name).sum()


def outcome(path: Path) -> str | None:
    """The message of the error that reading ``path`` ends in, if it does."""
    try:
        read_all(path)
    except RlMlxError as error:
        return str(error)
    return None


def failure(path: Path, kind: type[RlMlxError] = RlMlxError) -> str:
    """The message of opening ``path``, which must fail."""
    with pytest.raises(kind) as caught:
        GGUFFile.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert len(message) < len(str(path)) + 350
    return message


def test_the_valid_file_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(VALID)
    read_all(path)


@pytest.mark.shared
def test_all_of_shared(shared: Path) -> None:
    files = [path for path in (shared / "malformed").rglob("*") if path.is_file()]
    assert len(files) > 100
    opened = []
    for path in files:
        message = outcome(path)
        if message is None:
            opened.append(path.name)
        else:
            assert message.startswith(f"{path}: ")
            assert "\n" not in message
    assert "docker_dummy.gguf" in opened
    assert "dummy-00001-of-00002.gguf" in opened
    assert "dummy-00002-of-00002.gguf" in opened
    assert len(opened) < len(files) - 90


HOSTILE = {
    "no version": (b"GGUF\3", "version passes the end of the file by 3 bytes"),
    "no counts": (b"GGUF\3\0\0\0", "tensor count passes the end of the file by 8 bytes"),
    "version 0": (build(version=0), "0 is no GGUF version"),
    "noise for a version": (build(version=0x12345678), "is no GGUF version"),
    "2^64 tensors": (build(counts=(HUGE, 0)), "cannot be in 24 bytes"),
    "2^64 keys": (build(counts=(0, HUGE)), "cannot be in 24 bytes"),
    "more keys than bytes": (build([number("a", 1)], counts=(0, 9)), "9 keys cannot be in"),
    "more tensors than bytes": (
        build([], [tensor("a", [1])], bytes(4), counts=(9, 0)),
        "9 tensors and 0 keys cannot be in",
    ),
    "one key too many": (
        build([number("a", 1), text("abc") + bytes(2)]),
        "the type of 'abc' passes the end of the file by 2 bytes",
    ),
    "a key past the end": (
        build([struct.pack("<Q", 2**60) + bytes(32)]),
        "key 1 of 1 passes the end of the file by 1152921504606846944 bytes",
    ),
    "a key of 2^64 bytes": (
        build([struct.pack("<Q", HUGE) + bytes(32)]),
        "key 1 of 1 passes the end",
    ),
    "a key not UTF-8": (build([pair(b"\xff\xfe", 0, b"\0")]), "key 1 of 1 is not UTF-8"),
    "a string past the end": (
        build([pair("s", ValueType.STRING, struct.pack("<Q", 10) + b"abc")]),
        "the value of 's' passes the end of the file by 7 bytes",
    ),
    "an unknown value type": (build([pair("k", 13, bytes(8))]), "'k' has unknown value type 13"),
    "an unknown element type": (
        build([listed("k", 99, 1, bytes(8))]),
        "the value of 'k' has unknown value type 99",
    ),
    "an array past the end": (
        build([listed("k", ValueType.UINT32, 9, bytes(32))]),
        "the value of 'k' passes the end of the file by 4 bytes",
    ),
    "an array of 2^64 numbers": (
        build([listed("k", ValueType.FLOAT64, HUGE, bytes(32))]),
        "the value of 'k' passes the end of the file",
    ),
    "an array of 2^64 strings": (
        build([listed("k", ValueType.STRING, HUGE, bytes(32))]),
        "cannot have 18446744073709551615 strings in 32 bytes",
    ),
    "an array of 2^64 arrays": (
        build([listed("k", ValueType.ARRAY, HUGE, bytes(32))]),
        "cannot have 18446744073709551615 arrays in 32 bytes",
    ),
    "strings whose lengths pass the end": (
        build([listed("k", ValueType.STRING, 3, text("abc") + text("d" * 20)[:-1] + bytes(4))]),
        "string 3 of 3 passes the end of the file",
    ),
    "a string of 2^63 in an array": (
        build([listed("k", ValueType.STRING, 2, text("a") + struct.pack("<Q", 2**63) + bytes(9))]),
        "string 2 of 2 passes the end of the file",
    ),
    "arrays nested too deep": (
        build([listed("k", 9, 1, struct.pack("<IQ", 9, 1) * 5000)]),
        "the value of 'k' has arrays nested deeper than 4",
    ),
    "a key twice": (build([number("k", 1), number("k", 2)]), "key 'k' is there twice"),
    "alignment 0": (
        build([number("general.alignment", 0)]),
        "general.alignment must be a power of two up to 1048576, not 0",
    ),
    "alignment 24": (build([number("general.alignment", 24)]), "must be a power of two"),
    "alignment 2^31": (build([number("general.alignment", 2**31)]), "not 2147483648"),
    "alignment -32": (build([number("general.alignment", -32, ValueType.INT32)]), "not -32"),
    "alignment is text": (
        build([pair("general.alignment", ValueType.STRING, text("32"))]),
        "general.alignment must be a power of two up to 1048576, not a str",
    ),
    "alignment is true": (
        build([pair("general.alignment", ValueType.BOOL, b"\1")]),
        "general.alignment must be a power of two up to 1048576, not a bool",
    ),
    "a tensor's name not UTF-8": (
        build([], [tensor(b"\xff", [1])], bytes(4)),
        "the name of tensor 1 of 1 is not UTF-8",
    ),
    "5 dimensions": (
        build([], [tensor("t", [1] * 5)], bytes(4)),
        "tensor 't' has 5 dimensions, more than 4",
    ),
    "2^32 dimensions": (
        build([], [text("t") + struct.pack("<I", 2**32 - 1)], bytes(32)),
        "tensor 't' has 4294967295 dimensions",
    ),
    "dimension 0": (
        build([], [tensor("t", [4, 0])], bytes(4)),
        "tensor 't' has a dimension of 0: [0, 4]",
    ),
    "dimension 2^42": (
        build([], [tensor("t", [2**42])], bytes(32)),
        "ends at byte 17592186044480 and the file at 96, 17592186044384 bytes are missing",
    ),
    "a size that overflows 64 bits to 0": (
        build([], [tensor("t", [2**32, 2**32])], bytes(32)),
        "truncated: tensor 't' ends at byte 73786976294838206560",
    ),
    "a size that overflows everything": (
        build([], [tensor("t", [HUGE] * 4)], bytes(32)),
        "truncated: tensor 't' ends at byte",
    ),
    "an offset of 2^64": (
        build([], [tensor("t", [1], F32, 2**64 - 32)], bytes(32)),
        "truncated: tensor 't' ends at byte 18446744073709551652",
    ),
    "half a block": (
        build([], [tensor("t", [300, 256], Q4_K)], bytes(99999)),
        "tensor 't' has rows of 300, not of whole Q4_K blocks",
    ),
    "a scalar block": (build([], [tensor("t", [], Q4_K)], bytes(200)), "rows of 1, not of whole"),
    "misaligned": (
        build([], [tensor("t", [1], F32, 4)], bytes(64)),
        "tensor 't' is not aligned to 32 bytes",
    ),
    "overlapping": (
        build([], [tensor("a", [16]), tensor("b", [16], F32, 32)], bytes(128)),
        "tensors 'a' and 'b' overlap",
    ),
    "one tensor twice": (
        build([], [tensor("a", [8]), tensor("a", [8], F32, 32)], bytes(128)),
        "tensor 'a' is there twice",
    ),
    "the last byte gone": (VALID[:-1], "tensor 'b' ends at byte 560 and the file at 559, 1 bytes"),
    "no data": (VALID[:-176], "tensor 'b' ends at byte 560 and the file at 384, 176 bytes"),
    "names with line ends, too long": (
        build([pair("k\n" * 999, 13, bytes(8))]),
        r"'k\nk\nk\nk\nk\nk\n",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(tmp_path: Path, case: str) -> None:
    data, fragment = HOSTILE[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    message = failure(path, FormatError)
    assert fragment in message
    assert message.endswith("the file is damaged or its download incomplete: download it again")


UNSUPPORTED = {
    "version 1": (build(version=1), "GGUF version 1 was given up in 2023; convert the model again"),
    "version 4": (build(version=4), "GGUF version 4 is newer than 3; update rl-mlx"),
    "version 4, big-endian": (b"GGUF\0\0\0\4", "GGUF version 4 is newer"),
    "a retired type": (
        build([], [tensor("t", [32], 4)], bytes(99)),
        "tensor 't' has type 4 (Q4_2), which ggml has removed; use another quantization",
    ),
    "a repacked type": (build([], [tensor("t", [32], 31)], bytes(99)), "type 31 (Q4_0_4_4)"),
    "a fork's type": (
        build([], [tensor("t", [256], 137)], bytes(99)),
        "tensor 't' has type 137, which is unknown here",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(tmp_path: Path, case: str) -> None:
    data, fragment = UNSUPPORTED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    assert fragment in failure(path, UnsupportedModel)


OTHERS = {
    "LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "this is a Git LFS pointer, not the model; run `git lfs pull`",
    ),
    "safetensors": (struct.pack("<Q", 2) + b"{}" + bytes(9), "this is a safetensors file; give"),
    "zip": (b"PK\x03\x04" + bytes(99), "this is a zip or PyTorch file; use a GGUF"),
    "pickle": (b"\x80\x02}q\x00.", "this is a PyTorch pickle"),
    "HTML": (b"\n <!DOCTYPE html><html>", "this is a web page; download the model again"),
    "HTML with a BOM": (b"\xef\xbb\xbf<HTML>", "this is a web page"),
    "XML": (b"<?xml version='1.0'?><Error>", "this is a web page"),
    "JSON": (b'{"error": "not found"}', "this is JSON text"),
    "ggjt": (b"tjgg" + bytes(99), "this is of the old GGJT format"),
    "gzip": (b"\x1f\x8b\x08" + bytes(9), "this is compressed with gzip; unpack it first"),
    "zeros": (bytes(4096), "this is zeros, an unfinished download"),
    "text": (b"Entry not found", "this is not GGUF: it begins with b'Entry not found'"),
    "half a magic": (b"GGU", "this is the first 3 bytes of a GGUF file"),
    "empty": (b"", "the file is empty; download it again"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_formats_are_named(tmp_path: Path, case: str) -> None:
    data, fragment = OTHERS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    assert fragment in failure(path, FormatError)


def test_no_file(tmp_path: Path) -> None:
    assert "there is no such file" in failure(tmp_path / "none.gguf", ModelNotFound)
    assert "this is a folder; give a GGUF file in it" in failure(tmp_path, FormatError)
    (tmp_path / "file").touch()
    assert "there is no such file" in failure(tmp_path / "file" / "m.gguf", ModelNotFound)
    assert "cannot be read" in failure(tmp_path / ("n" * 999), FormatError)
    assert "cannot be read" in failure(tmp_path / "nul\0.gguf", FormatError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "this is a device or a pipe" in failure(tmp_path / "pipe", FormatError)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all files")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(VALID)
    path.chmod(0)
    assert "check its permissions" in failure(path, FormatError)


def part(no: int, count: int, *names: str, total: int = 2) -> bytes:
    pairs = [
        number("split.no", no, ValueType.UINT16),
        number("split.count", count, ValueType.UINT16),
        number("split.tensors.count", total, ValueType.INT32),
    ]
    infos = [tensor(name, [8], F32, 32 * i) for i, name in enumerate(names)]
    return build(pairs, infos, bytes(32 * len(names)))


def write_parts(folder: Path, *parts: bytes) -> list[Path]:
    paths = [folder / f"m-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    return paths


def test_split_missing_parts(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, *(part(i, 7, f"t{i}", total=7) for i in range(7)))
    read_all(paths[3])
    paths[1].unlink()
    message = failure(paths[0], ModelNotFound)
    assert "of its 7 parts m-00002-of-00007.gguf are missing; download them" in message
    for path in (paths[0], *paths[4:]):
        path.unlink()
    assert "m-00005-of-00007.gguf and 2 more are missing" in failure(paths[2], ModelNotFound)


def test_split_damaged(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, part(0, 2, "a"), part(1, 2, "b"))
    read_all(paths[0])
    renamed = tmp_path / "model.gguf"
    renamed.write_bytes(part(0, 2, "a"))
    assert "its name must end in -0000N-of-00002.gguf" in failure(renamed, FormatError)

    damages = [
        (part(0, 2, "b"), "split.no is 0 where its name says 1"),
        (part(1, 3, "b"), "split.count is 3 where its name says 2"),
        (build([], [tensor("b", [8])], bytes(32)), "split.count is -1 where its name says 2"),
        (part(1, 2, "a"), "tensor 'a' is in another part too"),
        (part(1, 2, "b")[:-1], "truncated"),
        (b"<html>", "this is a web page"),
    ]
    for data, fragment in damages:
        paths[1].write_bytes(data)
        with pytest.raises(FormatError, match=fragment) as caught:
            GGUFFile.open(paths[0])
        assert str(caught.value).startswith(str(paths[1]))

    paths[1].write_bytes(part(1, 2, "b", "c"))
    assert "its parts have 3 tensors, not 2" in failure(paths[0], FormatError)
    paths[0].write_bytes(build([pair("split.count", ValueType.STRING, text("2"))]))
    assert "split.count must be a whole number, not str" in failure(paths[0], FormatError)


def check(path: Path, data: bytes) -> None:
    """Success or an error of ours on one line; memory within what the file's length pays for."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        message = outcome(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message is None or "\n" not in message
    assert peak < 100_000 + 100 * len(data)


FUZZ = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WORDS = st.sampled_from([0, 1, 2, 3, 4, 8, 9, 13, 255, 2**31, 2**32, 2**42, 2**60, 2**63, HUGE])


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=8))
def test_fuzz_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for position, value in changes:
        data[position] = value
    check(tmp_path / "m.gguf", bytes(data))


@FUZZ
@given(st.integers(0, len(VALID) - 8), WORDS, st.integers(0, len(VALID)))
def test_fuzz_words_and_ends(tmp_path: Path, position: int, word: int, end: int) -> None:
    data = VALID[:position] + struct.pack("<Q", word) + VALID[position + 8 :]
    check(tmp_path / "m.gguf", data)
    check(tmp_path / "m.gguf", data[:end])


PAYLOADS = st.one_of(
    st.binary(max_size=32),
    st.builds(
        lambda kind, n, rest: struct.pack("<IQ", kind, n) + rest,
        st.integers(0, 14),
        WORDS,
        st.binary(max_size=64),
    ),
)
PAIRS = st.lists(
    st.builds(
        pair,
        st.sampled_from(["a", "general.alignment", "split.count"]),
        st.integers(0, 14),
        PAYLOADS,
    ),
    max_size=3,
)
TENSORS = st.lists(
    st.builds(
        tensor,
        st.sampled_from(["a", "b"]),
        st.lists(WORDS, max_size=5),
        st.integers(0, 45),
        WORDS | st.just(32),
    ),
    max_size=3,
)


@FUZZ
@given(PAIRS, TENSORS, st.binary(max_size=256), st.sampled_from([2, 3]))
def test_fuzz_fields(
    tmp_path: Path, pairs: list[bytes], tensors: list[bytes], data: bytes, version: int
) -> None:
    check(tmp_path / "m.gguf", build(pairs, tensors, data, version=version))


def test_memory_is_bounded_by_the_file(tmp_path: Path) -> None:
    empty = struct.pack("<IQ", ValueType.UINT8, 0)
    for element, item in ((ValueType.ARRAY, empty), (ValueType.STRING, bytes(8))):
        data = build([listed("k", element, 20_000, item * 20_000)])
        check(tmp_path / "m.gguf", data)
    check(
        tmp_path / "m.gguf",
        build([], [tensor(f"{i}", [1], F32, 32 * i) for i in range(5000)], bytes(32 * 5000)),
    )
