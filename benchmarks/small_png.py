"""Charts as small files: the PNG that vl-convert draws, with a palette and packed as tightly as zlib can.

A chart has few colours. Of 32 bits a pixel eight are left, which takes a sixth of the room.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RGBA, _PALETTE, _SUB = 6, 3, 1
_COLOURS = 256


def shrunk(png: bytes) -> bytes:
    """The same picture on white with at most 256 colours, each as near to what it was as that allows.

    Args:
        png: As vl-convert writes it.

    Raises:
        ValueError: It is another kind of PNG.
    """
    pixels = decoded(png)
    height, width = pixels.shape[:2]
    colours, where, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
    kept, instead = palette(colours, counts)
    rows = instead[where.reshape(height, width)].astype(np.uint8)
    head = struct.pack(">IIBBBBB", width, height, 8, _PALETTE, 0, 0, 0)
    packed = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes(), 9)  # filter 0 in front of every row
    chunks = ((b"IHDR", head), (b"PLTE", kept.tobytes()), (b"IDAT", packed), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def palette(colours: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most 256 colours that stand for all: of every cube of neighbours the most frequent one.

    Cubes are as small as can be. So rare colours, such as a scale's, keep their hue; the most frequent 256 colours
    would be the greys of letters.

    Args:
        colours: (n, 3), all different.
        counts: (n,), how often each is there.

    Returns:
        Those that are kept (at most 256, 3), and which of them stands for each colour (n,).
    """
    for side in range(1, _COLOURS + 1):
        cubes, cube = np.unique(colours // side, axis=0, return_inverse=True)
        if len(cubes) <= _COLOURS:
            break
    order = np.lexsort((-counts, cube))
    first = np.unique(cube[order], return_index=True)[1]
    return colours[order[first]], cube


def decoded(png: bytes) -> np.ndarray:
    """The pixels (height, width, 3) on white, of a PNG as vl-convert writes it.

    Raises:
        ValueError: It is no PNG of 8-bit RGBA whose rows all hold differences to the pixel on the left.
    """
    chunks = list(_chunks(png))
    width, height, *kind = struct.unpack(">IIBBBBB", dict(chunks)[b"IHDR"])
    if kind != [8, _RGBA, 0, 0, 0]:
        raise ValueError(f"a PNG of kind {kind}: 8-bit RGBA is expected")
    packed = b"".join(data for name, data in chunks if name == b"IDAT")
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 4 * width)
    if (rows[:, 0] != _SUB).any():
        raise ValueError("a PNG with rows of another filter than Sub")
    pixels = np.cumsum(rows[:, 1:].reshape(height, width, 4), axis=1, dtype=np.uint8).astype(float)
    opacity = pixels[..., 3:] / 255
    return np.rint(pixels[..., :3] * opacity + 255 * (1 - opacity)).astype(np.uint8)


def size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, of any PNG."""
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(name, data) of every part of a PNG."""
    if not png.startswith(SIGNATURE):
        raise ValueError("no PNG")
    start = len(SIGNATURE)
    while start < len(png):
        (length,) = struct.unpack(">I", png[start : start + 4])
        yield png[start + 4 : start + 8], png[start + 8 : start + 8 + length]
        start += 12 + length


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
