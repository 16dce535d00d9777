# SPDX-License-Identifier: Apache-2.0
"""
Video processor class for CAMoE: videos in any form -> `pixel_values_videos` (B, T, 3, H, W) and `frame_mask` (B, T).

It differs from the library's processors in three ways:
- files are decoded by this package's `frames` module: exact times, only the wanted frames, at their final size;
- frames are taken at segment centres (the library takes the left edges), and a clip with fewer than T frames is padded
  and masked (the library raises);
- T is the same for every batch, so `torch.compile` compiles once.
"""

import os
from collections.abc import Mapping

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    is_pil_image,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType, logging
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .frames import Clip, SampledFrames, describe_source
from .frames import sample_frames as decode_frames


logger = logging.get_logger(__name__)


class CAMoEVideoProcessorKwargs(VideosKwargs, total=False):
    """
    sampling (`str`, *optional*, defaults to `self.sampling`):
        How frames are chosen from a file: `"uniform"`, `"jitter"` or `"keyframe"`.
    """

    sampling: str | None


class CAMoEVideoProcessor(BaseVideoProcessor):
    r"""
    Turns videos into the inputs of [`CAMoEModel`].

    Every argument may be given here, as a default, and overridden in a call. The defaults are CLIP's: short side 224
    (bicubic), centre crop 224 x 224, CLIP's mean and standard deviation.

    Args:
        num_frames (`int`, *optional*, defaults to 12):
            T, frames per video. A video with more frames is sampled evenly, one with fewer is padded and masked.
        sampling (`str`, *optional*, defaults to `"uniform"`):
            How frames are chosen from a file: `"uniform"` (segment centres), `"jitter"` (a random time per segment) or
            `"keyframe"` (the nearest key frames: much cheaper, approximate).
        do_sample_frames (`bool`, *optional*, defaults to `True`):
            False keeps every frame of decoded videos. Files are always sampled.
        do_rescale, do_normalize (`bool`, *optional*, defaults to `True`):
            With both False, uint8 frames stay uint8: a batch is a quarter of the size, and the model rescales and
            normalises it on its own device.
    """

    num_frames = 12
    sampling = "uniform"
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    do_sample_frames = True
    valid_kwargs = CAMoEVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "frame_mask"]

    def __init__(self, **kwargs: Unpack[CAMoEVideoProcessorKwargs]):
        super().__init__(**kwargs)

    def preprocess(self, videos, **kwargs: Unpack[CAMoEVideoProcessorKwargs]) -> BatchFeature:
        """
        Args:
            videos: one video or a list of videos. A video is a path, the bytes of a file, a [`Clip`], a
                [`SampledFrames`], a row of a `datasets.Video(decode=False)` column (`{"path": ..., "bytes": ...}`), a
                tensor or array (T, 3, H, W) or (T, H, W, 3), or a list of frames (PIL images or arrays). Float values
                are expected from 0 to 255, like uint8 ones, unless `do_rescale=False`.

        Returns:
            [`BatchFeature`] with `pixel_values_videos` (B, T, 3, H, W), zero where padded, and `frame_mask` (B, T),
            1 for a real frame and 0 for padding. T is `num_frames` (or, with `do_sample_frames=False`, the length of
            the longest video if that is more).

        Raises:
            VideoDecodingError: a file cannot be decoded; names it.
            ValueError: an input is not a video; says which.
        """
        settings = self._settings(**kwargs)
        videos = _flatten(videos)
        if not videos:
            raise ValueError("there are no videos: the list is empty")
        frames = [self._load(video, index, settings) for index, video in enumerate(videos)]

        video_metadata = make_batched_metadata(frames, video_metadata=kwargs.pop("video_metadata", None))
        if settings["do_sample_frames"]:
            for i, metadata in enumerate(video_metadata):
                if len(frames[i]) > settings["num_frames"] or (settings["fps"] and not _is_file(videos[i])):
                    count = VideoMetadata(total_num_frames=len(frames[i]), fps=metadata.fps)
                    metadata.frames_indices = self.sample_frames(count, settings["num_frames"], settings["fps"])
                    frames[i] = frames[i][metadata.frames_indices]

        kwargs.update(
            do_sample_frames=False, input_data_format=ChannelDimension.FIRST, num_frames=settings["num_frames"]
        )
        return super().preprocess(frames, video_metadata=video_metadata, **kwargs)

    def decode(
        self,
        video: str | os.PathLike | bytes | Clip | Mapping,
        *,
        num_frames: int | None = None,
        sampling: str | None = None,
        fps: float | None = None,
        seed: int | None = None,
    ) -> SampledFrames:
        """
        One file -> its frames at their final size, as uint8: the part of a call that a worker process can do. Calling
        the processor on the result does the rest. `seed` makes `sampling="jitter"` repeatable.

        Raises:
            VideoDecodingError: the file cannot be decoded; names it.
        """
        settings = self._settings(num_frames=num_frames, sampling=sampling, fps=fps)
        return self._decode(video, settings, seed=seed)

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs
    ) -> np.ndarray:
        """Indices of the frames at the centres of equal segments: at most `num_frames` and at most `fps` a second."""
        total = metadata.total_num_frames
        count = min(total, num_frames or self.num_frames)
        if fps is not None:
            if metadata.fps is None:
                raise ValueError(
                    "`fps` needs to know the rate of the decoded frames: pass video_metadata={'fps': ...}"
                )
            count = min(count, max(1, round(total / metadata.fps * fps)))
        return ((np.arange(count) + 0.5) * total / count).astype(int)

    def _settings(self, **kwargs) -> dict:
        """A call's arguments, with defaults for the rest."""
        settings = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        return settings | {name: value for name, value in kwargs.items() if value is not None}

    def _decode(self, video, settings, seed=None) -> SampledFrames:
        return decode_frames(
            _as_source(video),
            settings["num_frames"],
            settings["sampling"],
            size=self._decoded_size(settings),
            fps=settings["fps"],
            seed=seed,
        )

    def _load(self, video, index, settings) -> torch.Tensor:
        """One video in any form -> (T, C, H, W)."""
        if _is_file(video):
            if not settings["do_sample_frames"]:
                raise ValueError(
                    f"{describe_source(_as_source(video))}: do_sample_frames=False is for decoded videos; "
                    "for a file, choose num_frames"
                )
            return self._decode(video, settings).frames
        if hasattr(video, "times"):  # SampledFrames
            return video.frames
        if isinstance(video, (list, tuple)):
            video = _stack(video, index)
        video = torch.as_tensor(video)
        if len(video) == 0:
            raise ValueError(f"video {index} has no frames")
        try:
            layout = settings["input_data_format"] or infer_channel_dimension_format(video, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(
                f"video {index} of shape {tuple(video.shape)} is neither (T, 3, H, W) nor (T, H, W, 3)"
            ) from error
        if settings["do_rescale"] and video.is_floating_point() and video.max() <= 1:
            logger.warning_once("Float frames seem to be scaled to 0..1 already: then pass do_rescale=False.")
        return video.permute(0, 3, 1, 2).contiguous() if ChannelDimension(layout) == ChannelDimension.LAST else video

    def _decoded_size(self, settings) -> int | None:
        """The short side to which the decoder scales, which is faster than the library; None where it cannot."""
        standard = self._standardize_kwargs(
            **{key: settings[key] for key in ("size", "crop_size", "default_to_square")}
        )
        size, crop_size = standard["size"], standard["crop_size"]
        short = size.shortest_edge if size.longest_edge is None else None
        is_scaled = settings["do_resize"] and short and settings["resample"] == PILImageResampling.BICUBIC
        is_cropped = settings["do_center_crop"] and short and max(crop_size.height, crop_size.width) <= short
        return short if is_scaled and is_cropped else None

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        num_frames: int,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        videos = super()._preprocess(videos, **kwargs)["pixel_values_videos"]  # list of (T', 3, H, W)
        sizes = {tuple(video.shape[1:]) for video in videos}
        if len(sizes) > 1:
            raise ValueError(
                f"videos of different sizes {sorted(sizes)} make no batch: "
                "leave do_resize and do_center_crop on, or give a fixed size"
            )
        length = max(num_frames, *(len(video) for video in videos))
        frame_mask = torch.zeros(len(videos), length, dtype=torch.long, device=videos[0].device)  # (B, T)
        for i, video in enumerate(videos):
            frame_mask[i, : len(video)] = 1
        if all(len(video) == length for video in videos):
            batch = torch.stack(videos)  # (B, T, 3, H, W)
        else:  # slower: writes everything twice
            batch = videos[0].new_zeros(len(videos), length, *videos[0].shape[1:])
            for i, video in enumerate(videos):
                batch[i, : len(video)] = video
        return BatchFeature(data={"pixel_values_videos": batch, "frame_mask": frame_mask}, tensor_type=return_tensors)


def _flatten(videos) -> list:
    """One video, or videos in any nesting -> list of videos."""
    if _is_file(videos) or hasattr(videos, "times"):
        return [videos]
    if isinstance(videos, (list, tuple)):
        if videos and all(is_pil_image(item) or getattr(item, "ndim", None) in (2, 3) for item in videos):
            return [videos]  # the frames of one video
        return [video for item in videos for video in _flatten(item)]
    if is_pil_image(videos):
        return [[videos]]
    if not isinstance(videos, (np.ndarray, torch.Tensor)) or videos.ndim not in (3, 4, 5):
        if hasattr(videos, "get_frames_at"):  # torchcodec's; `datasets` opens one for every row
            raise ValueError("an open decoder is not a video: read the column as datasets.Video(decode=False)")
        kind = type(videos).__name__ + (f" of shape {tuple(videos.shape)}" if hasattr(videos, "shape") else "")
        raise ValueError(
            f"{kind} is not a video: give a path, bytes, a Clip, frames of shape (T, 3, H, W) or (T, H, W, 3), "
            "or a list of images"
        )
    if videos.ndim == 5:
        return list(videos)
    return [videos if videos.ndim == 4 else videos[None]]


# A `Clip` and `SampledFrames` are recognised by their attributes: where code came with a checkpoint, its classes exist
# twice, and an object of one copy is not an instance of the other's class.


def _is_file(video) -> bool:
    return isinstance(video, (str, os.PathLike, bytes, Mapping)) or hasattr(video, "source")


def _as_source(video) -> str | os.PathLike | bytes | Clip:
    if not isinstance(video, Mapping):
        return video
    source = video.get("path") if video.get("bytes") is None else video["bytes"]
    if source is None:
        raise ValueError(f"a video given as a dict needs 'path' or 'bytes', got {sorted(video)}")
    return source


def _stack(frames, index) -> np.ndarray | torch.Tensor:
    """List of frames -> one array with the same layout per frame."""
    frames = [np.asarray(frame.convert("RGB")) if is_pil_image(frame) else frame for frame in frames]
    frames = [frame[..., None] if frame.ndim == 2 else frame for frame in frames]
    if len({tuple(frame.shape) for frame in frames}) > 1:
        raise ValueError(f"video {index} has frames of different sizes")
    return torch.stack(frames) if isinstance(frames[0], torch.Tensor) else np.stack(frames)


__all__ = ["CAMoEVideoProcessor"]
