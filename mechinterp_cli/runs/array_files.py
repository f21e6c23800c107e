"""Safetensors files of float32 arrays that are filled in place, with a checksum of their own.

What the file will hold is known before its numbers are, so its header is written last, over zeros.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BYTES = 4
"""Of one number."""
_ALIGNED = 8
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ArrayFile:
    """A file of float32 arrays, little-endian, one behind the other.

    Args:
        name: What the numbers are, unambiguously: it is part of the checksum.
        shapes: Of every array, in their order.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def numbers(self) -> int:
        """How many numbers all arrays have."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def start(self) -> int:
        """Where the numbers begin; a multiple of eight bytes."""
        return len(self.header("0" * 64))

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.start + self.numbers * BYTES

    def header(self, checksum: str) -> bytes:
        """What stands before the numbers: as long for every checksum."""
        entries: dict[str, object] = {"__metadata__": {"sha256": checksum}}
        at = 0
        for name, shape in self.shapes.items():
            end = at + math.prod(shape) * BYTES
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        return len(text).to_bytes(8, "little") + text

    def seal(self, path: Path) -> None:
        """Write the header of a file whose numbers are all there."""
        with path.open("r+b") as file:
            header = self.header(self._checksum(file))
            file.seek(0)
            file.write(header)

    def is_intact(self, path: Path) -> bool:
        """Whether a file holds what was once sealed under this name; False where it cannot be read."""
        try:
            with path.open("rb") as file:
                if file.seek(0, 2) != self.size:
                    return False
                header = self.header(self._checksum(file))
                file.seek(0)
                return file.read(self.start) == header
        except OSError:
            return False

    def _checksum(self, file: BinaryIO) -> str:
        """Of the name and the numbers."""
        digest = hashlib.sha256(self.name.encode())
        file.seek(self.start)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()
