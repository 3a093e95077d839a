"""What a file is that is no GGUF file, so that an error can say it."""

from __future__ import annotations

_DOWNLOAD = "download the model again"
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model", "run `git lfs pull`"),
    (b"PK\x03\x04", "a zip or PyTorch file", "use a GGUF or safetensors version of the model"),
    (b"\x80\x02", "a PyTorch pickle", "use a GGUF or safetensors version of the model"),
    (b"lmgg", "of the old GGML format", "use a GGUF version of the model"),
    (b"fmgg", "of the old GGMF format", "use a GGUF version of the model"),
    (b"tjgg", "of the old GGJT format", "use a GGUF version of the model"),
    (b"\x89HDF\r\n", "an HDF5 (Keras) file", "use a GGUF or safetensors version of the model"),
    (b"\x93NUMPY", "a NumPy array", "use a GGUF or safetensors version of the model"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it first"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
)


def guess(head: bytes, size: int) -> tuple[str, str]:
    """What a file of ``size`` bytes that begins with ``head`` seems to be, and what to do."""
    for magic, name, fix in _MAGICS:
        if head.startswith(magic):
            return name, fix
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file", "give the folder that holds it and its config.json"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page", f"{_DOWNLOAD} from its raw link"
    if text.startswith((b"{", b"[")):
        return "JSON text", _DOWNLOAD
    if not head.strip(b"\0"):
        return "zeros, an unfinished download", _DOWNLOAD
    if b"GGUF".startswith(head):
        return f"the first {size} bytes of a GGUF file", _DOWNLOAD
    return f"not GGUF: it begins with {head[:16]!r}", _DOWNLOAD
