"""What photos look like to a person: blurred, or taken twice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

# Sharpness is judged at this size, so that it says something of what is seen and not of the camera's pixels.
SIDE = 256
# Variance of the Laplacian, in levels² of 255. Of DreamBooth's 158 photos the softest has 178; what is blurred over
# a hundredth of its side has less than 14.
BLURRED = 60.0
FLAT = 8.0  # standard deviation of a picture that shows too little to be called blurred
HASH = (17, 16)  # columns and rows whose neighbours are compared: 256 bits
# Bits in which the same view, taken twice or saved anew, differs at most. Different photos of DreamBooth's subjects
# differ in 71 or more, of the bundled ones in 62; half of them differ in 28 from themselves turned by 1.5 degrees.
ALIKE = 40


def is_blurred(image: Image.Image) -> bool:
    """Whether a picture of at least 256 pixels a side has no sharp edge: out of focus, or shaken.

    Smaller pictures, and those that show next to nothing, are not judged.
    """
    if min(image.size) < SIDE:
        return False
    grey = image.convert("L")
    grey.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    levels = np.asarray(grey, dtype=np.float64)
    if levels.std() < FLAT:
        return False
    inner = levels[1:-1, 1:-1]
    neighbours = levels[:-2, 1:-1] + levels[2:, 1:-1] + levels[1:-1, :-2] + levels[1:-1, 2:]
    return float((neighbours - 4 * inner).var()) < BLURRED


def look(image: Image.Image) -> int:
    """What the picture looks like, in 256 bits: whether each of a grid of places is darker than its right neighbour.

    Scaling, compression and small changes of brightness leave most bits as they are.
    """
    grey = np.asarray(image.convert("L").resize(HASH, Image.Resampling.BOX), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] < grey[:, 1:]).tobytes(), "big")


def alike(looks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The positions of pictures that look nearly the same as one before them: that one's, and their own.

    looks: as `look` gave them.
    """
    seen: list[int] = []
    for position, bits in enumerate(looks):
        first = next((at for at, other in enumerate(seen) if (other ^ bits).bit_count() <= ALIKE), None)
        if first is not None:
            yield first, position
        seen.append(bits)
