"""Photos as the training sees them, for people to look at."""

from __future__ import annotations

import numpy as np
from PIL import Image

from gsoft_diffusion.photos.crops import Variant, crop, nearest_size
from gsoft_diffusion.photos.folder import Photo, Size, open_mask
from gsoft_diffusion.photos.image_files import open_image

OUTSIDE = (0.25, np.array([200, 30, 30]))  # how much is seen of what is outside of the mask, and the colour over it


def preview(photo: Photo, sizes: list[Size], place: float = 0.5) -> Image.Image:
    """The photo upright, in sRGB and cropped as in training, with what its mask leaves out in red.

    photo: its file is read anew.
    sizes: those that the run trains in, of which the photo gets the nearest.
    place: of the crop along the side that is cut, from 0 (left or top) to 1.

    Raises UserError as `open_image`.
    """
    variant = Variant(nearest_size(photo.size, sizes), place)
    image = crop(open_image(photo.path), variant, variant.size, Image.Resampling.LANCZOS)
    if photo.mask is None:
        return image
    mask = np.asarray(crop(open_mask(photo), variant, variant.size, Image.Resampling.BOX), dtype=np.float64) / 255
    share, colour = OUTSIDE
    seen = share + (1 - share) * mask[..., None]
    return Image.fromarray((np.asarray(image) * seen + colour * (1 - seen)).round().astype(np.uint8))


def enlarged(photo: Photo, sizes: list[Size]) -> str:
    """A note if the photo has fewer pixels than the training's pictures, "" if not.

    photo, sizes: as in `preview`.
    """
    across, down = nearest_size(photo.size, sizes)
    width, height = photo.size
    if width >= across and height >= down:
        return ""
    return f"{width}×{height} pixels, enlarged to {across}×{down}: it will look soft"
