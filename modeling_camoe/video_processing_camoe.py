# SPDX-License-Identifier: Apache-2.0
"""
Video processor class for CAMoE: videos in any form -> `pixel_values_videos` (B, T, 3, H, W) and `frame_mask` (B, T).

It differs from the library's processors in three ways:
- files are decoded by this package's `frames` module: exact times, only the wanted frames, at their final size;
- frames are taken at segment centres (the library takes the left edges), and a clip with fewer than T frames is padded
  and masked (the library raises);
- T is the same for every batch, so `torch.compile` compiles once.

What counts as a video, and how it becomes frames, is in video_inputs.py. Everything else is the library's: this class
overrides its hooks for decoding, sampling and preparing.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.utils import TensorType
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .frames import Clip, SampledFrames, VideoDecodingError, describe_source, probe_video
from .frames import sample_frames as decode_frames
from .frames import sample_windows as decode_windows
from .video_inputs import (
    as_uint8,
    as_videos,
    describe_video,
    is_decoder,
    is_file,
    is_sampled,
    read_video,
    sample_decoder,
)


logger = logging.getLogger(__name__)


class CAMoEVideoProcessorKwargs(VideosKwargs, total=False):
    """
    sampling (`str`, *optional*, defaults to `self.sampling`):
        How frames are chosen from a file: `"uniform"`, `"jitter"` or `"keyframe"`.
    on_damage (`str`, *optional*, defaults to `self.on_damage`):
        What to do about a damaged file: `"error"`, or take frames `"around"` the damaged part.
    """

    sampling: str | None
    on_damage: str | None


class SampledVideoMetadata(VideoMetadata):
    """
    The library's metadata with true `timestamps`: where the times of the frames are known, they are given, instead of
    being worked out from a rate that need not be constant.
    """

    times = None  # (T',) seconds; no annotation, so no field of the dataclass

    @property
    def timestamps(self) -> list[float]:
        return super().timestamps if self.times is None else list(self.times)


class CAMoEVideoProcessor(BaseVideoProcessor):
    r"""
    Turns videos into the inputs of [`CAMoEModel`].

    Every argument may be given here, as a default, and overridden in a call. The defaults are CLIP's: short side 224
    (bicubic), centre crop 224 x 224, CLIP's mean and standard deviation.

    A video is a path, the bytes of a file, an open file, an http(s) address, a [`Clip`] (a window of a file), a row of
    a `datasets.Video` column, decoded or not (a torchcodec `VideoDecoder`, `{"path": ..., "bytes": ...}`), a
    [`SampledFrames`], frames as a tensor or array (T, 3, H, W) or (T, H, W, 3), also as
    `{"array": ..., "video_metadata": ...}`, a list of frames (PIL images, arrays, or paths of pictures), or one
    picture, which is a clip of one frame. Lists, columns and generators of these are batches.

    Frames are 8-bit RGB. Other types are converted first, so that the same picture has the same pixels in any form:

    | type of frames | meaning |
    |---|---|
    | uint8 and other integers | 0 to 255; values outside are an error |
    | floats, none above 1 | 0 to 1 |
    | floats, some above 3 | 0 to 255 |
    | floats, the largest between 1 and 3; values below 0 or above 255; bool | an error |

    `do_rescale=False` takes floats as they are: they are expected to be scaled (and, with `do_normalize=False`,
    normalised) already.

    Args:
        num_frames (`int`, *optional*, defaults to 12):
            T, frames per video. A video with more frames is sampled evenly, one with fewer is padded and masked.
        sampling (`str`, *optional*, defaults to `"uniform"`):
            How frames are chosen from a file: `"uniform"` (segment centres), `"jitter"` (a random time per segment) or
            `"keyframe"` (the nearest key frames: much cheaper, approximate). Decoded frames and open decoders are
            always sampled at segment centres.
        on_damage (`str`, *optional*, defaults to `"error"`):
            What to do about a file of which a wanted frame is damaged: `"error"`, or take frames `"around"` the
            damaged part and log a warning that names it (also `skipped_damage` of what `decode` returns).
        do_sample_frames (`bool`, *optional*, defaults to `True`):
            False keeps every frame of decoded videos. Files are always sampled.
        do_rescale, do_normalize (`bool`, *optional*, defaults to `True`):
            With both False, uint8 frames stay uint8: a batch is a quarter of the size, and the model rescales and
            normalises it on its own device.
    """

    num_frames = 12
    sampling = "uniform"
    on_damage = "error"
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

    def __call__(self, videos, **kwargs: Unpack[CAMoEVideoProcessorKwargs]) -> BatchFeature:
        """
        Args:
            videos: one video or several, in any of the forms above.

        Returns:
            [`BatchFeature`] with `pixel_values_videos` (B, T, 3, H, W), zero where padded, and `frame_mask` (B, T),
            1 for a real frame and 0 for padding. T is `num_frames` (or, with `do_sample_frames=False`, the length of
            the longest video if that is more). With `return_metadata=True` also `video_metadata`: for each video its
            number of frames and rate before sampling, and the indices and `timestamps` of the frames that were taken
            (for a file, indices are worked out from times and the average rate, and its number of frames is what the
            header says).

        Raises:
            VideoDecodingError: a file cannot be read or decoded; names it.
            ValueError: an input is not a video; says which.
        """
        return super().__call__(videos, **kwargs)

    def decode(
        self,
        video,
        *,
        num_frames: int | None = None,
        sampling: str | None = None,
        fps: float | None = None,
        seed: int | None = None,
        on_damage: str | None = None,
        preview_size: int | None = None,
    ) -> SampledFrames:
        """
        One video in any form -> its sampled frames as uint8 RGB, resized: the part of a call that a worker process can
        do. Calling the processor on the result does the rest. `seed` makes `sampling="jitter"` repeatable. `times` are
        empty if frames were given without their rate. `preview_size`: a file's middle frame comes uncropped as well.

        Raises:
            VideoDecodingError: the file cannot be read or decoded; names it.
            ValueError: it is not a video.
        """
        settings = self._settings(num_frames=num_frames, sampling=sampling, fps=fps, on_damage=on_damage)
        sampled, _ = self._load(video, 0, None, settings, seed, preview_size)
        return self._as_pixels(sampled, settings)

    def decode_windows(
        self, clips: Sequence[Clip], preview_size: int | None = None
    ) -> list[SampledFrames | VideoDecodingError]:
        """Windows of one file, each as `decode` gives it (or its error), but decoded once where they overlap."""
        settings = self._settings()
        options = {name: settings[name] for name in ("num_frames", "sampling", "fps", "on_damage")}
        windows = decode_windows(clips, size=self._decoded_size(settings), preview_size=preview_size, **options)
        return [
            window if isinstance(window, VideoDecodingError) else self._as_pixels(window, settings)
            for window in windows
        ]

    def _as_pixels(self, sampled: SampledFrames, settings: dict) -> SampledFrames:
        """As uint8 RGB, resized."""
        frames = as_uint8(*self._prepare_input_videos([sampled.frames], do_convert_rgb=True), 0)
        if settings["do_resize"]:  # does nothing to a file that was scaled while it was decoded
            size = self._standardize_kwargs(size=settings["size"], default_to_square=settings["default_to_square"])
            frames = self.resize(frames, size=size["size"], resample=settings["resample"])
        return replace(sampled, frames=frames)

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

    def _decode_and_sample_videos(
        self,
        videos,
        video_metadata=None,
        do_sample_frames: bool | None = None,
        sample_indices_fn: Callable | None = None,
    ) -> tuple[list, list[VideoMetadata | None]]:
        videos = as_videos(videos)
        if not videos:
            raise ValueError("there are no videos: the list is empty")
        given = [None] * len(videos)
        if video_metadata is not None:
            given = make_batched_metadata(videos, video_metadata)
        # The library makes `sample_indices_fn` of the arguments of the call: they are found there alone.
        settings = self._settings(**sample_indices_fn.keywords) if do_sample_frames else None
        loaded = [self._load(video, i, given[i], settings) for i, video in enumerate(videos)]
        return [sampled.frames for sampled, _ in loaded], [metadata for _, metadata in loaded]

    def _settings(self, **kwargs) -> dict:
        """A call's arguments, with defaults for the rest."""
        settings = {name: getattr(self, name, None) for name in self.valid_kwargs.__annotations__}
        return settings | {name: value for name, value in kwargs.items() if value is not None}

    def _load(
        self, video, index, metadata, settings, seed=None, preview_size=None
    ) -> tuple[SampledFrames, VideoMetadata | None]:
        """
        One video -> its sampled frames, in the layout and type in which they came, and their metadata.

        `settings` None keeps all frames. Reading the header of a file again takes time: only for `return_metadata`.
        """
        content, own_metadata = read_video(video, index)
        if not is_file(content) and not is_decoder(content):
            return self._thin(content, index, own_metadata or metadata, settings)
        if settings is None:
            raise ValueError(
                f"{describe_video(video)}: do_sample_frames=False is for decoded videos; for a file, choose num_frames"
            )
        if is_decoder(content):
            sampled, info = sample_decoder(content, settings["num_frames"], settings["fps"])
        else:
            try:
                sampled = decode_frames(
                    content,
                    settings["num_frames"],
                    settings["sampling"],
                    size=self._decoded_size(settings),
                    fps=settings["fps"],
                    seed=seed,
                    on_damage=settings["on_damage"],
                    preview_size=preview_size,
                )
            except VideoDecodingError as error:  # bytes have no name, but where they came from has one
                cause = str(error).removeprefix(describe_source(content))
                raise VideoDecodingError(describe_video(video) + cause) from error
            for start, end in sampled.skipped_damage:
                logger.warning(
                    "%s: damaged from %.3f to %.3f s: frames are taken around it", describe_video(video), start, end
                )
            info = probe_video(content) if settings["return_metadata"] else None
        return sampled, None if info is None else _metadata_of_times(sampled.times, info)

    def _thin(self, frames, index, metadata, settings) -> tuple[SampledFrames, VideoMetadata]:
        """Decoded frames, or a [`SampledFrames`], sampled at segment centres where they are too many."""
        was_sampled = is_sampled(frames)
        sampled = frames if was_sampled else SampledFrames(torch.as_tensor(frames), (), 0.0)
        times = sampled.times
        total = len(sampled.frames)
        if total == 0:
            raise ValueError(f"video {index} has no frames")
        metadata = SampledVideoMetadata(**{"total_num_frames": total} | dict(metadata or {}))
        indices = metadata.frames_indices  # of these frames in their video: they may have been sampled before
        if indices is None or len(indices) != total:
            indices = range(total)
        rate = None if metadata.fps is None else metadata.fps * total / (metadata.total_num_frames or total)
        if settings is not None and (total > settings["num_frames"] or (settings["fps"] and not was_sampled)):
            kept = self.sample_frames(VideoMetadata(total, rate), settings["num_frames"], settings["fps"])
            sampled = replace(
                sampled, frames=sampled.frames[kept], times=tuple(times[i] for i in kept) if times else ()
            )
        else:
            kept = range(total)
        metadata.frames_indices = np.array([indices[i] for i in kept])
        if times:
            metadata.times = sampled.times
        elif metadata.fps is not None:
            sampled = replace(sampled, times=tuple(metadata.timestamps), duration=total / rate)
        return sampled, metadata

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

    def _prepare_input_videos(
        self, videos, do_convert_rgb: bool | None = None, input_data_format=None, device: str | None = None
    ) -> list[torch.Tensor]:
        """As in the library, but each video may have a layout of its own, and integers become uint8."""
        prepared = []
        for index, video in enumerate(videos):
            try:
                layout = input_data_format or infer_channel_dimension_format(video, num_channels=(1, 3, 4))
            except ValueError as error:
                raise ValueError(
                    f"video {index} of shape {tuple(video.shape)} is neither (T, 3, H, W) nor (T, H, W, 3)"
                ) from error
            if not video.is_floating_point():
                video = as_uint8(video, index)
            prepared += super()._prepare_input_videos([video], do_convert_rgb, ChannelDimension(layout), device)
        return prepared

    def convert_to_rgb(self, video: torch.Tensor) -> torch.Tensor:
        """As in the library, where transparency shows a white background, but also for floats from 0 to 1."""
        if video.shape[-3] != 4:
            return super().convert_to_rgb(video)
        white = 1 if video.is_floating_point() and video.max() <= 1 else 255
        alpha = video[:, 3:] / white
        blended = (1 - alpha) * white + alpha * video[:, :3]  # (T, 3, H, W)
        return blended if video.is_floating_point() else blended.round().to(torch.uint8)

    def _preprocess(
        self,
        videos: list[torch.Tensor],
        num_frames: int,
        do_rescale: bool,
        do_normalize: bool,
        return_tensors: str | TensorType | None = None,
        **kwargs,
    ) -> BatchFeature:
        if do_rescale:
            videos = [as_uint8(video, index) for index, video in enumerate(videos)]
        elif do_normalize and not all(video.is_floating_point() for video in videos):
            raise ValueError(
                "`do_rescale=False` with `do_normalize=True` is for frames as floats that were rescaled already; for "
                "others, turn off both: the model does both to uint8 frames"
            )
        scaling = {"do_rescale": do_rescale, "do_normalize": do_normalize}
        videos = super()._preprocess(videos, **scaling, **kwargs)["pixel_values_videos"]  # (T', 3, H, W) each
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


def _metadata_of_times(times, info) -> SampledVideoMetadata:
    """Frames taken at `times` from a video with the header `info` ([`VideoInfo`])."""
    last = max(0, info.num_frames - 1)
    indices = np.array([min(last, round(time * info.average_fps)) for time in times])
    metadata = SampledVideoMetadata(
        info.num_frames, info.average_fps, info.width, info.height, info.duration, "pyav", indices
    )
    metadata.times = times
    return metadata


__all__ = ["CAMoEVideoProcessor"]
