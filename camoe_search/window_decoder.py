# SPDX-License-Identifier: Apache-2.0
"""Overlapping windows of a file are decoded together: its packets are read once, and each frame is decoded once.

A worker of `iter_encoded_videos` asks for the clips of a batch one after the other. The first window of a file brings
the frames of all its windows in that batch, which wait here for their turn: at most a batch of frames is kept.
"""

from collections.abc import Sequence

from modeling_camoe.frames import SampledFrames, VideoDecodingError


class WindowDecoder:
    """The `decoder` of `iter_encoded_videos` for a list of clips.

    Args:
        clips: paths or `Clip`s, as they are encoded.
        batch_size: of the encoding.
        video_processor: decodes windows of a file (`decode_windows`) and single clips (`decode`).
        preview_size: of the `preview` that comes with the frames; None: none comes.
    """

    def __init__(self, clips: Sequence, batch_size: int, video_processor, preview_size: int | None = None):
        self.clips, self.batch_size, self.video_processor = clips, batch_size, video_processor
        self.preview_size = preview_size
        self._positions = {clip: position for position, clip in enumerate(clips)}
        self._ready: dict = {}  # clip -> its frames, or the error

    def decode(self, clip) -> SampledFrames:
        """The frames of a clip.

        Raises:
            VideoDecodingError: naming the file and the cause.
        """
        if clip not in self._ready:
            together = self._windows_from(self._positions[clip])
            if len(together) == 1:
                return self.video_processor.decode(clip, preview_size=self.preview_size)
            decoded = self.video_processor.decode_windows(together, self.preview_size)
            self._ready = dict(zip(together, decoded, strict=True))
        found = self._ready.pop(clip)
        if isinstance(found, VideoDecodingError):
            raise found
        return found

    def _windows_from(self, position: int) -> list:
        """The clip at a position, and the windows of the same file that follow it in its batch."""
        source = getattr(self.clips[position], "source", None)
        end = min((position // self.batch_size + 1) * self.batch_size, len(self.clips))
        last = position + 1
        while source is not None and last < end and getattr(self.clips[last], "source", None) == source:
            last += 1
        return self.clips[position:last]
