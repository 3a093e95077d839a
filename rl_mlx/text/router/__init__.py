"""A pure streaming router: a model's output text into reasoning, answer and calls of tools."""

from rl_mlx.text.router.formats import Format
from rl_mlx.text.router.pieces import (
    Content,
    Piece,
    Reasoning,
    Routed,
    ToolCall,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    ToolCallWithdrawn,
    collect,
)
from rl_mlx.text.router.stream import Router

__all__ = [
    "Content",
    "Format",
    "Piece",
    "Reasoning",
    "Routed",
    "Router",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "ToolCallWithdrawn",
    "collect",
]
