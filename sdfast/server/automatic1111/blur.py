"""Masks blurred as AUTOMATIC1111 blurs them, by OpenCV's Gaussian.

Where only the masked part of an image is drawn, that part is around the blur, which therefore has to end at
the same pixel.
"""

import numpy as np
import numpy.typing as npt
from PIL import Image

_DEVIATIONS = 2.5  # at which the Gaussian is cut off
_ROWS = 256  # that are transformed at a time
_Shades = npt.NDArray[np.uint8]


def blurred(mask: Image.Image, across: int, down: int) -> Image.Image:
    """A mask of greys, L, blurred along its rows and then along its columns.

    across, down: the Gaussian's standard deviation in pixels, 0 for none. What each makes is rounded.
    """
    shades: _Shades = np.asarray(mask)
    if across > 0:
        shades = _along_rows(shades, across)
    if down > 0:
        shades = _along_rows(shades.T, down).T
    return Image.fromarray(np.ascontiguousarray(shades))


def _along_rows(shades: _Shades, deviation: int) -> _Shades:
    """[n, m] uint8 -> the same: rows are mirrored at their last pixels, beyond which there is nothing.

    By Fourier transforms, whose time hardly depends on how much is blurred.
    """
    reach = int(_DEVIATIONS * deviation + 0.5)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    width = shades.shape[1] + 2 * reach
    spectrum = np.fft.rfft(taps / taps.sum(), width)
    made = np.empty(shades.shape, np.uint8)
    for start in range(0, len(shades), _ROWS):
        rows = np.pad(shades[start : start + _ROWS], ((0, 0), (reach, reach)), mode="reflect")
        folded = np.fft.irfft(np.fft.rfft(rows, width) * spectrum, width)
        made[start : start + _ROWS] = np.rint(folded[:, 2 * reach :])
    return made
