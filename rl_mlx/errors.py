"""The exception tree. Each error is one clear line, knows its HTTP status and its exit code.

RlMlxError
├── InvalidRequest        400  something that cannot be done was asked for (a ValueError)
│   └── ContextOverflow   400  prompt plus answer would not fit the model's context
├── ModelNotFound         404  no such file, folder or model in any store (a FileNotFoundError)
├── FormatError           422  a file is damaged, hostile, or not what it claims to be
├── UnsupportedModel      501  well-formed, but of an architecture or tensor type nobody here runs
├── DestinationExists     409  a file or folder is in the way (a FileExistsError)
├── BackendUnavailable    503  a backend is not installed or cannot work on this machine
├── MissingPackage        501  an optional Python package is not installed (an ImportError)
├── OutOfMemory           507  the memory budget (or the disk) would be passed (a MemoryError)
├── QueueFull             429  too many requests are waiting already
└── EngineError           500  generation failed; the message says where
"""

from __future__ import annotations


class RlMlxError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is one line: the cause and the fix."""

    status = 500
    exit_code = 1


class InvalidRequest(RlMlxError, ValueError):
    """A parameter or a prompt that cannot be honoured."""

    status = 400
    exit_code = 2


class ContextOverflow(InvalidRequest):
    """The prompt, or prompt plus ``max_tokens``, is longer than the context."""


class ModelNotFound(RlMlxError, FileNotFoundError):
    """The model reference names nothing that can be found."""

    status = 404


class FormatError(RlMlxError):
    """A model file is malformed: truncated, hostile, or of another format."""

    status = 422


class UnsupportedModel(RlMlxError):
    """The file is sound but its architecture or a tensor type is not supported."""

    status = 501


class DestinationExists(RlMlxError, FileExistsError):
    """The output path exists and ``force`` was not given."""

    status = 409


class BackendUnavailable(RlMlxError):
    """The backend cannot be used here; the message names the command that installs it."""

    status = 503


class MissingPackage(RlMlxError, ImportError):
    """An optional package is wanted; the message names the command that installs it."""

    status = 501


class OutOfMemory(RlMlxError, MemoryError):
    """Memory or disk needed exceeds the budget; nothing was allocated."""

    status = 507


class QueueFull(RlMlxError):
    """The queue limit is reached; try again later."""

    status = 429


class EngineError(RlMlxError):
    """Generation failed inside a backend."""
