"""The prefix tree against a plain list of everything that was put in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rl_mlx.cache.prefix import PrefixTree

BLOCK = 4


@dataclass(frozen=True)
class Piece:
    """Remembers which tokens it stands for."""

    prefix: tuple[int, ...]
    start: int
    nbytes: int = 10
    whole: bool = True


def insert(tree, tokens):
    """Put a whole sequence in, as the runner does; gives the node it ends on."""
    node = tree.root
    for start in range(0, len(tokens), tree.block):
        block = tuple(tokens[start : start + tree.block])
        if len(block) < tree.block and tree.covers(node, block):
            break
        found = tree.find(node, block)
        node = found or tree.add(node, block, Piece(tuple(tokens[: start + len(block)]), start))
    return node


def matched(path):
    return sum(count for _, count in path)


tokens_strategy = st.lists(st.integers(0, 2), min_size=1, max_size=14)


class Machine(RuleBasedStateMachine):
    """Every match is right; without eviction it is the longest there is."""

    def __init__(self):
        super().__init__()
        self.tree = PrefixTree(BLOCK)
        self.seen = []
        self.pinned = []
        self.evicted = False

    @rule(tokens=tokens_strategy)
    def put(self, tokens):
        insert(self.tree, tokens)
        self.seen.append(tokens)

    @rule(tokens=tokens_strategy)
    def look(self, tokens):
        path = self.tree.match(tokens)
        at = 0
        for node, count in path:
            assert node.piece.prefix[: at + count] == tuple(tokens[: at + count])
            assert node.piece.start == at
            at += count
        if not self.evicted:
            assert at == max((common(tokens, s) for s in self.seen), default=0)

    @rule(limit=st.integers(0, 80))
    def evict(self, limit):
        self.tree.evict(limit)
        self.evicted = True
        assert self.tree.nbytes <= limit or self.pinned

    @rule(tokens=tokens_strategy)
    def pin(self, tokens):
        path = self.tree.match(tokens)
        if path:
            self.tree.pin(path[-1][0])
            self.pinned.append(path[-1][0])

    @rule()
    def unpin(self):
        if self.pinned:
            self.tree.unpin(self.pinned.pop())

    @invariant()
    def the_sums_are_right(self):
        nodes, total, count = [self.tree.root], 0, 0
        while nodes:
            node = nodes.pop()
            for child in node.children.values():
                assert child.parent is node
                assert child.end == node.end + len(child.tokens)
                assert node is self.tree.root or len(node.tokens) == BLOCK
                total += child.piece.nbytes
                count += 1
                nodes.append(child)
        assert (self.tree.nbytes, self.tree.nodes) == (total, count)
        assert all(node.parent is not None for node in self.pinned), "a pinned node was evicted"


def common(a, b):
    count = 0
    for x, y in zip(a, b):
        if x != y:
            break
        count += 1
    return count


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_leaf_goes_first():
    tree = PrefixTree(BLOCK)
    for first in (1, 2, 3):
        insert(tree, [first] * 8)
    tree.match([1] * 8)
    tree.evict(40)
    assert [matched(tree.match([n] * 8)) for n in (1, 2, 3)] == [8, 0, 8]


def test_a_longer_block_takes_the_place_of_a_shorter_one():
    tree = PrefixTree(BLOCK)
    insert(tree, [1, 2])
    insert(tree, [1, 2, 3])
    insert(tree, [1, 2, 3, 4])
    assert tree.nodes == 1
    assert matched(tree.match([1, 2, 9])) == 2


def test_only_whole_pieces_with_a_state_will_do_where_asked():
    tree = PrefixTree(BLOCK)
    node = tree.add(tree.root, (1, 2, 3, 4), Piece((1, 2, 3, 4), 0))
    tree.add(node, (5, 6, 7, 8), Piece((1, 2, 3, 4, 5, 6, 7, 8), 4, whole=False))
    wanted = [1, 2, 3, 4, 5, 6, 7, 8]
    assert matched(tree.match(wanted)) == 8
    assert matched(tree.match(wanted, lambda piece: piece.whole)) == 4
    assert matched(tree.match([1, 2, 3, 9], lambda piece: piece.whole)) == 0


def test_a_long_path_is_no_deep_recursion():
    tree = PrefixTree(BLOCK)
    insert(tree, list(range(6_000)))
    assert matched(tree.match(list(range(6_000)))) == 6_000
    tree.evict(0)
    assert (tree.nodes, tree.nbytes) == (0, 0)


def test_unpinning_too_often_is_a_bug():
    tree = PrefixTree(BLOCK)
    with pytest.raises(AssertionError):
        tree.unpin(insert(tree, [1]))
