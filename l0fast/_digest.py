"""Digests: whether the bytes of a file that is read again are those that were written.

SHA-256 of the content. It finds every accidental change; it is no signature: who can write a file
can write its digest, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

KEY = "sha256"
"""The entry of a JSON object that holds the digest of all others."""
_MARK = b"\nl0fast sha256 "
_TRAILER = len(_MARK) + 2 * hashlib.sha256().digest_size
_BLOCK = 1 << 20


class Changed(ValueError):
    """The content is not what was written."""

    def __init__(self) -> None:
        super().__init__("its bytes have changed since it was written")


class _Hashing:
    """A file that notes the digest of what is written, and the first error in writing it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()


def write_sealed(file: BinaryIO, write: Callable[[Any], None]) -> None:
    """Has `write` fill a file from its beginning to its end, and puts the digest behind that.

    Formats that are found from their end, such as zip, can be read with the digest behind them.

    Raises:
        OSError: it cannot be written; whatever `write` makes of it.
    """
    hashing = _Hashing(file)
    try:
        write(hashing)
    except Exception:
        if hashing.error is not None:
            raise hashing.error from None
        raise
    file.write(_MARK + hashing.digest.hexdigest().encode())


def check_sealed(file: BinaryIO) -> bool:
    """Whether a file has a digest behind its content; it is read once, and is at its beginning
    afterwards.

    Raises:
        Changed: the content is not what the digest is of.
    """
    size = file.seek(0, 2)
    file.seek(max(size - _TRAILER, 0))
    trailer = file.read()
    file.seek(0)
    if not trailer.startswith(_MARK):
        return False
    digest, left = hashlib.sha256(), size - _TRAILER
    while left > 0:
        block = file.read(min(left, _BLOCK))
        if not block:
            raise Changed
        digest.update(block)
        left -= len(block)
    if trailer[len(_MARK) :] != digest.hexdigest().encode():
        raise Changed
    file.seek(0)
    return True


def of_json(entry: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """The digest of an object as JSON knows it (but for its own entry KEY), and of tensors.

    Args:
        entry: strings, numbers, lists and dicts.
        tensors: on the CPU, contiguous; their names, dtypes, shapes and bytes count.
    """
    digest = hashlib.sha256()
    rest = {name: value for name, value in entry.items() if name != KEY}
    digest.update(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted((tensors or {}).items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def sealed_json(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An object with its digest, which is of what JSON will give back of it."""
    plain: dict[str, Any] = json.loads(json.dumps({**entry}))
    return {**entry, KEY: of_json(plain)}


def check_json(entry: Mapping[str, Any]) -> None:
    """Refuses an object that was read and is not the one that its digest is of; one without a
    digest is an earlier version's.

    Raises:
        Changed: it is another one.
    """
    if KEY in entry and entry[KEY] != of_json(entry):
        raise Changed
