# SPDX-License-Identifier: Apache-2.0
"""
A decoded frame -> (3, H, W) uint8 RGB as a player shows it: square pixels, upright, at its final size.

Files may ask for pixels that are not square (DVDs, old broadcasts) and, by a matrix, for turns by 90 degrees and
mirroring (telephones). Both are applied.
"""

import math

import numpy as np

from .video_source import pyav


# How swscale is to work on frames that keep their size: its shortcut for these leaves the last columns of some widths
# as it found them in memory, and is 1.2 levels too dark. SWS_BICUBIC | SWS_ACCURATE_RND.
WITHOUT_SHORTCUT = 0x4 | 0x40000

# Beyond, a pixel aspect ratio is a mistake in the file.
WIDEST_PIXEL = 8


class PictureMaker:
    """
    Args:
        size: the short side is scaled to it, then the central size x size is cut out. None: as stored, but for the
            shape of the pixels; all frames get the size of the first one.
        get_pixel_aspect: gives width of a pixel / its height, once a frame has been decoded: some files state it in
            their coded pictures only.
        preview_size: also make `previews`, pictures of whole frames whose long side is at most this.
    """

    def __init__(self, size, get_pixel_aspect, preview_size=None):
        self.size = size
        self.preview_size = preview_size
        self.previews = {}  # pts -> (3, h, w)
        self.get_pixel_aspect = get_pixel_aspect
        self.pixel_aspect = None  # until the first frame
        self.full_size = None  # (width, height) of the first frame, where no size is given
        # They keep swscale's tables from frame to frame.
        self.reformatter, self.preview_reformatter = (pyav().video.reformatter.VideoReformatter() for _ in range(2))

    def __call__(self, frame, pts=None):
        """`pts`: when the frame is shown, if not at its own time stamp."""
        width, height = self.scaled_size(frame.width, frame.height)
        matrix = display_matrix(frame)
        if self.preview_size is not None:
            preview = self.scale(self.preview_reformatter, frame, *self.size_of_preview(frame.width, frame.height))
            self.previews[frame.pts if pts is None else pts] = upright(preview, matrix)
        return upright(self.scale(self.reformatter, frame, width, height, *self.crop(width, height)), matrix)

    def scale(self, reformatter, frame, width, height, rows=slice(None), columns=slice(None)):
        """A frame, as it is stored -> (3, H, W): scaled, then cut."""
        # Planar RGB takes swscale half the time of packed "rgb24", has none of its bias of -1 to -2 levels, and the
        # channels come first already. When it scales down, swscale widens the cubic kernel: it is antialiased.
        method = WITHOUT_SHORTCUT if (width, height) == (frame.width, frame.height) else "BICUBIC"
        image = reformatter.reformat(frame, width, height, "gbrp", interpolation=method, threads=1)
        green, blue, red = (
            np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, :width][rows, columns]
            for plane in image.planes
        )
        return np.stack([red, green, blue])

    def scaled_size(self, width, height):
        """(width, height) to scale a stored frame to."""
        if self.pixel_aspect is None:
            stated = self.get_pixel_aspect()
            self.pixel_aspect = stated if 1 / WIDEST_PIXEL <= stated <= WIDEST_PIXEL else 1.0
        width = max(1, round(width * self.pixel_aspect))
        if self.size is None:
            self.full_size = self.full_size or (width, height)
            return self.full_size
        short = min(width, height)
        return int(self.size * width / short), int(self.size * height / short)

    def size_of_preview(self, width, height):
        """(width, height) of the preview of a stored frame."""
        width *= self.pixel_aspect
        share = min(1, self.preview_size / max(width, height))
        return max(1, round(width * share)), max(1, round(height * share))

    def crop(self, width, height):
        """Rows and columns of the centre."""
        if self.size is None:
            return slice(None), slice(None)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return slice(top, top + self.size), slice(left, left + self.size)


def display_matrix(frame):
    """The linear part of the display matrix: ((a, b), (c, d)), by which x' = ax + cy and y' = bx + dy; or None."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV knows fewer kinds of side data than FFmpeg, which stereoscopic HEVC for instance has
        turn = math.radians(frame.rotation)  # counterclockwise
        return (math.cos(turn), -math.sin(turn)), (math.sin(turn), math.cos(turn))
    if data is None or data.buffer_size < 36:
        return None
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32, 9).tolist()
    return (a, b), (c, d)


def upright(image, matrix):
    """Turns and mirrors an image (..., H, W) as a display matrix asks, by the nearest multiple of 90 degrees."""
    if matrix is None or not any(map(any, matrix)):
        return image
    (a, b), (c, d) = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, row_sign, column_sign = image.swapaxes(-1, -2), b, c
    else:
        row_sign, column_sign = d, a
    turned = image[..., :: -1 if row_sign < 0 else 1, :: -1 if column_sign < 0 else 1]
    return np.ascontiguousarray(turned)
