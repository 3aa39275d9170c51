"""Small ICC colour profiles, made from their definitions."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import product

# Columns of the matrix from linear RGB to XYZ under D50, as the profiles of these spaces hold them.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
WHITE = (0.9642, 1.0, 0.8249)  # D50


def _fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _text(text: str) -> bytes:
    content = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(content), 28) + content


def _profile(space: bytes, connection: bytes, kind: bytes, name: str, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text(name), b"cprt": _text("none"), b"wtpt": _xyz(WHITE), **tags}
    table, data = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        table += struct.pack(">4sII", signature, start + len(data), len(content))
        data += content + b"\0" * (-len(content) % 4)
    size = start + len(data)
    header = struct.pack(">I4sI4s4s4s", size, b"none", 0x04300000, kind, space, connection)
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + _fixed(*WHITE)
    return header.ljust(128, b"\0") + table + data


def rgb(name: str, columns: Sequence[Sequence[float]]) -> bytes:
    """A space of these primaries with sRGB's curve."""
    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {f"{channel}XYZ".encode(): _xyz(column) for channel, column in zip("rgb", columns, strict=True)}
    tags |= {f"{channel}TRC".encode(): curve for channel in "rgb"}
    return _profile(b"RGB ", b"XYZ ", b"mntr", name, tags)


def grey(name: str, gamma: float) -> bytes:
    return _profile(
        b"GRAY", b"XYZ ", b"mntr", name, {b"kTRC": b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + _fixed(gamma)}
    )


def cmyk(name: str) -> bytes:
    """Inks of which all print alike: each takes the colour from white towards a green, by equal parts."""
    ramp = bytes(range(256))
    corners = [sum(inks) / 4 for inks in product((0, 1), repeat=4)]
    lut = b"".join(bytes([round(255 - 155 * ink), round(128 - 100 * ink), round(128 + 60 * ink)]) for ink in corners)
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return _profile(b"CMYK", b"Lab ", b"prtr", name, {b"A2B0": head + ramp * 4 + lut + ramp * 3})
