"""The disk tier: what comes back after a restart is what was computed, or nothing."""

from __future__ import annotations

import logging
import os
import stat

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open

from rl_mlx import LLM
from rl_mlx.cache.arena import Piece
from rl_mlx.cache.disk import DiskTier
from rl_mlx.cache.layers import KVPiece
from rl_mlx.cache.prefix import BLOCK, PrefixTree

OPTIONS = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
ROOM = 1 << 30


def planes(seed, dtype):
    key = mx.random.key(seed)
    return [mx.random.normal((2, BLOCK, 8), key=key).astype(dtype)]


def piece(seed, dtype=mx.float32, state=True):
    head = (planes(seed + 2, dtype), planes(seed + 3, dtype))
    parts = (
        KVPiece(planes(seed, dtype), planes(seed + 1, dtype)),
        KVPiece([mx.arange(24, dtype=mx.uint32), *planes(seed, dtype)], planes(seed, dtype), head),
        (mx.ones((2, 8)).astype(dtype) * seed, mx.ones((2, 3, 4)) * seed) if state else None,
    )
    made = Piece(parts)
    mx.eval(made.arrays())
    return made


def tokens(block):
    return tuple(range(block, block + BLOCK))


def filled(blocks, **options):
    """A tree with one path of so many blocks, and its nodes."""
    tree, nodes = PrefixTree(), []
    for i in range(blocks):
        nodes.append(tree.add(nodes[-1] if nodes else tree.root, tokens(i), piece(i, **options)))
    return tree, nodes


def restored(root, room=ROOM, **key):
    tree, tier = PrefixTree(), DiskTier(root, ROOM, **key)
    tier.restore(tree, room)
    tier.close()
    return tree


def kept(root, node, limit=ROOM, **key):
    tier = DiskTier(root, limit, **key)
    tier.keep(node)
    tier.close()
    return sorted(root.glob("*/*"), key=lambda p: -p.stat().st_mtime_ns)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("state", [True, False])
def test_what_was_kept_comes_back_bit_for_bit(tmp_path, dtype, state):
    _, nodes = filled(3, dtype=dtype, state=state)
    kept(tmp_path, nodes[-1], model="a")
    tree = restored(tmp_path, model="a")
    path = tree.match([*tokens(0), *tokens(1), *tokens(2)])
    assert [count for _, count in path] == [BLOCK] * 3
    for (node, _), want in zip(path, nodes):
        assert node.piece.has_state == state
        assert node.piece.nbytes == want.piece.nbytes
        for got, array in zip(node.piece.arrays(), want.piece.arrays(), strict=True):
            assert got.dtype == array.dtype
            assert mx.array_equal(got, array)


def test_files_are_safetensors_for_their_owner_alone(tmp_path):
    _, nodes = filled(1)
    (file,) = kept(tmp_path, nodes[0])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    with safe_open(file, "numpy") as opened:  # the reference implementation reads it
        assert opened.get_tensor("tokens").tolist() == list(tokens(0))
        want = np.array(nodes[0].piece.layers[0].keys[0])
        assert np.array_equal(opened.get_tensor("0.keys.0"), want)


def test_another_model_finds_nothing(tmp_path):
    _, nodes = filled(2)
    kept(tmp_path, nodes[-1], model="a")
    assert restored(tmp_path, model="b").nodes == 0
    assert restored(tmp_path, model="a").nodes == 2


def truncate(file):
    os.truncate(file, file.stat().st_size - 100)


def flip(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def empty(file):
    file.write_bytes(b"")


def garbage(file):
    file.write_bytes(os.urandom(500))


def rename(file):
    parent, _, name = file.stem.partition("-")
    file.rename(file.with_name(f"{parent}-{name[::-1]}.safetensors"))


@pytest.mark.parametrize("damage", [truncate, flip, empty, garbage, rename])
def test_what_is_damaged_is_dropped_and_what_leads_to_it_kept(tmp_path, damage, caplog):
    _, nodes = filled(3)
    files = kept(tmp_path, nodes[-1])
    damage(files[1])
    assert restored(tmp_path).nodes == 1
    assert "dropped a block" in caplog.text
    assert len(list(tmp_path.glob("*/*"))) == 2
    kept(tmp_path, nodes[-1])  # written anew
    assert restored(tmp_path).nodes == 3


def test_the_least_recently_used_go_when_the_limit_is_reached(tmp_path):
    first, second = filled(3)[1], filled(1)[1]
    tree, _ = filled(0)
    other = tree.add(tree.root, tokens(500), piece(9))
    size = kept(tmp_path, first[0], model="a")[0].stat().st_size
    kept(tmp_path, first[-1], limit=int(3.5 * size), model="a")
    kept(tmp_path, other, limit=int(3.5 * size), model="b")  # one block has to go: the deepest
    assert (restored(tmp_path, model="a").nodes, restored(tmp_path, model="b").nodes) == (2, 1)
    kept(tmp_path, second[0], limit=int(3.5 * size), model="a")  # used again
    kept(tmp_path, tree.add(other, tokens(501), piece(8)), limit=int(2.5 * size), model="b")
    assert (restored(tmp_path, model="a").nodes, restored(tmp_path, model="b").nodes) == (0, 2)


def test_no_more_is_read_than_there_is_room_for(tmp_path):
    _, nodes = filled(4)
    size = kept(tmp_path, nodes[-1])[0].stat().st_size
    tree = restored(tmp_path, room=int(2.5 * size))
    assert tree.nodes == 2
    assert tree.nbytes <= 2.5 * size


def test_what_was_evicted_before_it_was_written_is_left_out(tmp_path):
    tree, nodes = filled(2)
    tree.evict(0)
    assert kept(tmp_path, nodes[0]) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    _, nodes = filled(1)
    tier = DiskTier(tmp_path / "file", ROOM)
    with caplog.at_level(logging.WARNING):
        tier.restore(PrefixTree(), ROOM)
        tier.keep(nodes[0])
        tier.keep(nodes[0])
        tier.close()
    assert caplog.text.count("cannot be written") == 1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "rl-mlx" / "prefixes"


def ask(prompt, **options):
    with LLM("demo", backend="mlx", prefix_cache="64MB", **options) as llm:
        result = llm.generate(prompt, **OPTIONS)
    return result.token_ids, result.timings.reused


@pytest.mark.parametrize("options", [{}, {"kv_bits": "8/4@20"}], ids=str)
def test_a_restart_keeps_its_prompts_and_the_same_tokens(cache, options):
    prompt = np.random.default_rng(0).integers(5, 500, 150).tolist()
    want, reused = ask(prompt, **options)
    assert reused == 0
    assert ask(prompt, **options) == (want, 128)
    for file in cache.glob("*/*"):
        flip(file)
    assert ask(prompt, **options) == (want, 0)
    assert ask(prompt, context=300, **options) == (want, 0)  # another model, as far as KV goes


def test_without_the_option_nothing_is_written(cache):
    with LLM("demo", backend="mlx") as llm:
        llm.generate(list(range(5, 150)), **OPTIONS)
    assert not cache.exists()
