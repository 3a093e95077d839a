"""The prefix tree: what was computed for the tokens of earlier sequences, in blocks, to start later
ones with.

A node holds one block of tokens and a piece of cache for them; its path from the root is the whole
prefix. Only full blocks have children; a shorter one ends a path. Nodes that running sequences
stand on are pinned; the others are evicted, the least recently used leaf first. Pure Python: a
piece is anything with a size in bytes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

BLOCK = 64


class Sized(Protocol):
    """What a node holds."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""


P = TypeVar("P", bound=Sized)


class Node(Generic[P]):
    """A block of tokens after those of its parents."""

    def __init__(self, parent: Node[P] | None, tokens: tuple[int, ...], piece: P | None) -> None:
        self.parent = parent
        self.tokens = tokens
        self.piece = piece
        self.children: dict[tuple[int, ...], Node[P]] = {}
        self.pins = 0
        self.used = 0
        self.end: int = len(tokens) + (parent.end if parent is not None else 0)


class PrefixTree(Generic[P]):
    """``block`` tokens a node; ``nbytes`` is the sum over the pieces of all ``nodes``."""

    def __init__(self, block: int = BLOCK) -> None:
        self.block = block
        self.nbytes = 0
        self.nodes = 0
        self.root: Node[P] = Node(None, (), None)
        self._clock = itertools.count(1)
        self._numbers = itertools.count()
        self._leaves: list[tuple[int, int, Node[P]]] = []

    def match(
        self, tokens: Sequence[int], is_whole_enough: Callable[[P], bool] | None = None
    ) -> list[tuple[Node[P], int]]:
        """The longest known prefix of ``tokens``: nodes and how many of each one's tokens belong to
        it.

        With ``is_whole_enough`` only whole nodes count, and the last must be one that it accepts.
        """
        path: list[tuple[Node[P], int]] = []
        node, at = self.root, 0
        while at < len(tokens):
            child, count = self._best(node, tokens, at)
            if child is None or (is_whole_enough and count < len(child.tokens)):
                break
            path.append((child, count))
            at += count
            if count < self.block:
                break
            node = child
        while is_whole_enough and path:
            piece = path[-1][0].piece
            if piece is not None and is_whole_enough(piece):
                break
            path.pop()
        for found, _ in path:
            self._touch(found)
        return path

    def _best(self, node: Node[P], tokens: Sequence[int], at: int) -> tuple[Node[P] | None, int]:
        """The child that shares most of ``tokens`` from ``at`` on, and how many."""
        exact = node.children.get(tuple(tokens[at : at + self.block]))
        if exact is not None:
            return exact, len(exact.tokens)
        best, most = None, 0
        for child in node.children.values():
            shared = 0
            for ours, theirs in zip(child.tokens, tokens[at : at + self.block]):
                if ours != theirs:
                    break
                shared += 1
            if shared > most:
                best, most = child, shared
        return best, most

    def find(self, parent: Node[P], tokens: tuple[int, ...]) -> Node[P] | None:
        """The child with exactly these tokens."""
        node = parent.children.get(tokens)
        if node is not None:
            self._touch(node)
        return node

    def covers(self, parent: Node[P], tokens: tuple[int, ...]) -> bool:
        """Whether some child begins with these tokens."""
        return any(child[: len(tokens)] == tokens for child in parent.children)

    def add(self, parent: Node[P], tokens: tuple[int, ...], piece: P) -> Node[P]:
        """A new child; shorter ones that it begins with are no longer needed, and go."""
        assert 0 < len(tokens) <= self.block, "a node holds between one token and a block"
        assert parent is self.root or len(parent.tokens) == self.block, "a path ended here"
        assert tokens not in parent.children, "the tree has this block already"
        for shorter in [c for c in parent.children.values() if tokens[: len(c.tokens)] == c.tokens]:
            if not shorter.pins:
                self._remove(shorter)
        node = Node(parent, tokens, piece)
        parent.children[tokens] = node
        self.nbytes += piece.nbytes
        self.nodes += 1
        self._touch(node)
        return node

    def pin(self, node: Node[P]) -> None:
        """Keep a node, and so its path, from being evicted; as often as it is unpinned."""
        node.pins += 1

    def unpin(self, node: Node[P]) -> None:
        """Take one pin back."""
        assert node.pins > 0, "unpinned more often than pinned"
        node.pins -= 1
        self._touch(node)

    def evict(self, limit: int) -> None:
        """Drop the least recently used leaves until at most ``limit`` bytes are left, or all are
        pinned.
        """
        while self.nbytes > limit and self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            is_stale = node.used != used or node.parent is None
            if not (is_stale or node.children or node.pins):
                parent = node.parent
                self._remove(node)
                if parent is not None and parent is not self.root:
                    self._offer(parent)

    def _remove(self, node: Node[P]) -> None:
        assert node.parent is not None, "the root stays"
        del node.parent.children[node.tokens]
        assert node.piece is not None, "only the root is empty"
        self.nbytes -= node.piece.nbytes
        self.nodes -= 1
        node.parent = node.piece = None

    def _touch(self, node: Node[P]) -> None:
        if node is not self.root:
            node.used = next(self._clock)
            self._offer(node)

    def _offer(self, node: Node[P]) -> None:
        """Put a node on the heap of what may be evicted; what is stale there is skipped later."""
        heapq.heappush(self._leaves, (node.used, next(self._numbers), node))
        if len(self._leaves) > 4 * (self.nodes + 16):
            live = {n for _, _, n in self._leaves if n.parent is not None}
            self._leaves = [(n.used, i, n) for i, n in enumerate(live)]
            self._numbers = itertools.count(len(live))
            heapq.heapify(self._leaves)
