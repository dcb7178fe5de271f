"""Numbers of a grid as colours: bits of each token, or errors, where people would rather look than read."""

import numpy as np
from PIL import Image
from torch import Tensor

# at the low end, the centre, the high end; apart for the colour-blind, and the centre is no colour
COLOURS = np.array([[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]], dtype=np.float64)


def heat_map(values: Tensor, centre: float, reach: float, cell: int = 1) -> Image.Image:
    """A picture (w * cell, h * cell) of numbers (h, w): blue below `centre`, grey at it, red above, in full from `reach` away.

    Args:
        values: (h, w), or (h, w, n), of which the mean over n is shown, such as the bits of each token beside log2(codebook_size).
        centre: of the scale.
        reach: half of the scale's width, above 0.
        cell: pixels along each side of a position.
    """
    grid = (values.double().mean(-1) if values.ndim == 3 else values.double()).cpu().numpy()
    place = np.clip((grid - centre) / reach, -1, 1)
    stops = np.linspace(-1, 1, len(COLOURS))
    colours = np.stack([np.interp(place, stops, channel) for channel in COLOURS.T], axis=-1)
    picture = Image.fromarray(np.rint(colours).astype(np.uint8))
    return picture.resize((picture.width * cell, picture.height * cell), Image.Resampling.NEAREST)
