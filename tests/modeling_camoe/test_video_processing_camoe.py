# SPDX-License-Identifier: Apache-2.0
"""The video processor: every form of video becomes the same batch, short clips are masked, defaults survive saving."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_camoe.frames import Clip, VideoDecodingError, sample_frames
from modeling_camoe.video_file import VideoFile
from modeling_camoe.video_processing_camoe import CAMoEVideoProcessor
from tests.video_files import index_picture, indices_of, spoil, write_video


SMALL = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
UINT8 = {"do_rescale": False, "do_normalize": False}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """24 frames in 2 s."""
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", num_frames=24, fps=12, gop=6)


@pytest.fixture(scope="module")
def short_video(tmp_path_factory):
    """3 frames."""
    return write_video(tmp_path_factory.mktemp("videos") / "short.mp4", num_frames=3, fps=12)


@pytest.fixture
def processor():
    return CAMoEVideoProcessor(num_frames=4, **SMALL)


def frames_of(count, size=32):
    """(T, 3, H, W) uint8; frame i shows i."""
    return torch.stack([torch.from_numpy(index_picture(i, size, size)).permute(2, 0, 1) for i in range(count)])


def test_a_file_gives_its_sampled_frames_normalised(processor, video):
    batch = processor(videos=video, return_tensors="pt")
    assert batch["pixel_values_videos"].shape == (1, 4, 3, 32, 32)
    assert batch["frame_mask"].tolist() == [[1, 1, 1, 1]]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    expected = (sample_frames(video, 4, size=32).frames / 255 - mean) / std
    torch.testing.assert_close(batch["pixel_values_videos"][0], expected, atol=1e-5, rtol=1e-5)


def test_damage_is_an_error_or_frames_are_taken_around_it(processor, tmp_path, caplog):
    path = spoil(write_video(tmp_path / "damaged.mp4", 72, gop=24, size=(128, 96)), 24, 48)  # from 2 to 4 s
    with pytest.raises(VideoDecodingError, match="damaged"):
        processor(videos=path)
    sampled = processor.decode(path, on_damage="around")
    assert indices_of(sampled.frames) == [6, 18, 54, 66]
    assert len(sampled.skipped_damage) == 1
    assert "damaged.mp4: damaged from" in caplog.text
    batch = CAMoEVideoProcessor(num_frames=4, on_damage="around", **SMALL)(videos=path, **UINT8)
    assert torch.equal(batch["pixel_values_videos"][0], sampled.frames)


def test_uint8_frames_stay_uint8_where_neither_rescaled_nor_normalised(processor, video):
    batch = processor(videos=video, **UINT8)
    assert batch["pixel_values_videos"].dtype == torch.uint8
    assert indices_of(batch["pixel_values_videos"][0]) == [3, 9, 15, 21]


def test_every_form_of_a_file_gives_the_same(processor, video):
    expected = processor(videos=str(video))["pixel_values_videos"]
    forms = [
        Path(video),
        video.read_bytes(),
        Clip(video),
        {"path": str(video), "bytes": None},
        {"path": None, "bytes": video.read_bytes()},
        sample_frames(video, 4, size=32),
        processor.decode(video),
    ]
    for form in [*forms, [str(video)], [[str(video)]]]:
        assert torch.equal(processor(videos=form)["pixel_values_videos"], expected)
    together = processor(videos=forms)["pixel_values_videos"]
    assert torch.equal(together, expected.expand(len(forms), -1, -1, -1, -1))


def test_every_form_of_decoded_frames_gives_the_same(processor):
    frames = frames_of(4)
    last = frames.permute(0, 2, 3, 1).contiguous()
    expected = processor(videos=frames)["pixel_values_videos"]
    forms = [
        frames.numpy(),
        last,
        last.numpy(),
        frames.float(),
        list(frames),
        list(last.numpy()),
        [PIL.Image.fromarray(image) for image in last.numpy()],
        frames[None],
    ]
    for form in forms:
        torch.testing.assert_close(processor(videos=form)["pixel_values_videos"], expected)
    assert len(processor(videos=forms[:3])["pixel_values_videos"]) == 3
    assert len(processor(videos=torch.stack([frames, frames]))["pixel_values_videos"]) == 2


def test_one_image_is_a_video_of_one_frame(processor):
    for image in (PIL.Image.new("L", (40, 30), 100), np.full((30, 40, 3), 100, np.uint8)):
        batch = processor(videos=image, **UINT8)
        assert batch["frame_mask"].tolist() == [[1, 0, 0, 0]]
        assert (batch["pixel_values_videos"][0, 0] == 100).all()


def test_short_clips_are_padded_with_zeros_and_masked(processor, video, short_video):
    batch = processor(videos=[short_video, video])
    assert batch["frame_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert (batch["pixel_values_videos"][0, 3] == 0).all()
    assert (batch["pixel_values_videos"][0, :3] != 0).any(dim=(1, 2, 3)).all()


def test_a_batch_of_short_clips_has_the_same_shape(processor, short_video):
    assert processor(videos=[short_video])["pixel_values_videos"].shape == (1, 4, 3, 32, 32)


@pytest.mark.parametrize("total,expected", [(24, [3, 9, 15, 21]), (5, [0, 1, 3, 4]), (4, [0, 1, 2, 3])])
def test_frames_are_thinned_at_segment_centres(processor, total, expected):
    assert indices_of(processor(videos=frames_of(total), **UINT8)["pixel_values_videos"][0]) == expected


def test_thinning_decoded_frames_is_like_sampling_the_file(processor, video):
    everything = sample_frames(video, 24, size=32).frames
    decoded, sampled = (processor(videos=v, **UINT8)["pixel_values_videos"] for v in (everything, video))
    assert torch.equal(decoded, sampled)


def test_without_sampling_all_frames_are_kept(processor):
    batch = processor(videos=[frames_of(7), frames_of(2)], do_sample_frames=False, **UINT8)
    assert batch["pixel_values_videos"].shape[:2] == (2, 7)
    assert batch["frame_mask"].sum(1).tolist() == [7, 2]


def test_arguments_of_a_call_override_the_defaults(processor, video):
    assert processor(videos=video, num_frames=6, **UINT8)["pixel_values_videos"].shape[1] == 6
    frames = processor(videos=video, sampling="keyframe", num_frames=12, **UINT8)
    assert indices_of(frames["pixel_values_videos"][0][frames["frame_mask"][0] == 1]) == [0, 6, 12, 18]
    assert processor(videos=video, fps=1)["frame_mask"].sum() == 2
    larger = processor(videos=video, size={"shortest_edge": 48}, crop_size={"height": 40, "width": 40})
    assert larger["pixel_values_videos"].shape[-2:] == (40, 40)
    assert processor.num_frames == 4 and processor.sampling == "uniform"


def test_fps_of_decoded_frames_needs_their_rate(processor):
    batch = processor(videos=frames_of(12), fps=1, video_metadata={"total_num_frames": 12, "fps": 6.0}, **UINT8)
    assert indices_of(batch["pixel_values_videos"][0][batch["frame_mask"][0] == 1]) == [3, 9]
    with pytest.raises(ValueError, match="`fps` needs to know the rate"):
        processor(videos=frames_of(12), fps=1)


def test_frames_of_the_right_size_are_not_touched(processor):
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(processor(videos=frames, **UINT8)["pixel_values_videos"][0], frames)


def test_a_crop_smaller_than_the_short_side_is_the_centre(processor, video):
    whole = sample_frames(video, 4, size=32).frames
    batch = processor(videos=video, crop_size={"height": 20, "width": 24}, **UINT8)
    assert torch.equal(batch["pixel_values_videos"][0], whole[:, :, 6:26, 4:28])


@pytest.mark.parametrize(
    "options,shape",
    [
        ({"do_resize": False, "do_center_crop": False}, (48, 64)),
        ({"do_resize": False}, (32, 32)),
        ({"do_center_crop": False}, (32, 42)),
        ({"size": {"height": 20, "width": 30}, "do_center_crop": False}, (20, 30)),
        ({"resample": PIL.Image.Resampling.BILINEAR}, (32, 32)),
    ],
)
def test_what_decoding_cannot_do_the_library_does(processor, video, options, shape):
    batch = processor(videos=video, **options, **UINT8)
    assert batch["pixel_values_videos"].shape == (1, 4, 3, *shape)
    stored = processor(videos=sample_frames(video, 4, size=None), **options, **UINT8)
    assert torch.equal(batch["pixel_values_videos"], stored["pixel_values_videos"])


def test_grey_and_transparent_frames_become_rgb(processor):
    grey = np.full((4, 32, 32, 1), 90, np.uint8)
    opaque = np.concatenate([np.full((4, 32, 32, 3), 90, np.uint8), np.full((4, 32, 32, 1), 255, np.uint8)], -1)
    for frames in (grey, opaque):
        pixels = processor(videos=frames, **UINT8)["pixel_values_videos"]
        assert pixels.shape == (1, 4, 3, 32, 32)
        assert (pixels == 90).all()


def test_decode_is_what_a_worker_does_of_a_call(processor, video):
    sampled = processor.decode(video, sampling="jitter", num_frames=3, seed=1)
    expected = sample_frames(video, 3, "jitter", size=32, seed=1)
    assert torch.equal(sampled.frames, expected.frames)
    assert sampled.times == expected.times


def test_numpy_output(processor, video):
    batch = processor(videos=video, return_tensors="np")
    assert isinstance(batch["pixel_values_videos"], np.ndarray)
    assert isinstance(batch["frame_mask"], np.ndarray)


@pytest.mark.parametrize(
    "videos,message",
    [
        ([], "the list is empty"),
        (3, "int is not a video"),
        (None, "NoneType is not a video"),
        (torch.zeros(4), r"Tensor of shape \(4,\) is not a video"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(0, 3, 8, 8)], "video 1 has no frames"),
        (torch.zeros(2, 5, 8, 8), r"video 0 of shape \(2, 5, 8, 8\) is neither"),
        ([[PIL.Image.new("RGB", (8, 8)), PIL.Image.new("RGB", (9, 8))]], "frames of different sizes"),
        ({"file": "a.mp4"}, r"needs 'path' or 'bytes', got \['file'\]"),
    ],
)
def test_what_is_no_video_is_a_clear_error(processor, videos, message):
    with pytest.raises(ValueError, match=message):
        processor(videos=videos)


def test_a_file_that_cannot_be_decoded_is_named(processor, video, tmp_path):
    with pytest.raises(VideoDecodingError, match="missing.mp4: no such file"):
        processor(videos=[video, tmp_path / "missing.mp4"])


def test_a_file_cannot_be_kept_whole(processor, video):
    with pytest.raises(ValueError, match="do_sample_frames=False is for decoded videos"):
        processor(videos=video, do_sample_frames=False)


def test_videos_of_different_sizes_make_no_batch(processor):
    with pytest.raises(ValueError, match="different sizes"):
        processor(videos=[frames_of(4), frames_of(4, size=40)], do_resize=False, do_center_crop=False)


def test_defaults_survive_saving_and_loading(tmp_path, video):
    saved = CAMoEVideoProcessor(num_frames=5, sampling="keyframe", image_mean=[0.5] * 3, **SMALL)
    saved.save_pretrained(tmp_path)
    loaded = CAMoEVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert (loaded.num_frames, loaded.sampling) == (5, "keyframe")
    assert torch.equal(loaded(videos=video)["pixel_values_videos"], saved(videos=video)["pixel_values_videos"])
    assert CAMoEVideoProcessor.from_pretrained(tmp_path, num_frames=7, sampling="jitter").sampling == "jitter"


def test_the_saved_config_says_what_a_reader_needs(tmp_path):
    CAMoEVideoProcessor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert config["num_frames"] == 12
    assert config["sampling"] == "uniform"
    assert config["size"] == {"shortest_edge": 224}
    assert config["crop_size"] == {"height": 224, "width": 224}
    assert config["image_mean"] == list(OPENAI_CLIP_MEAN)


def test_it_loads_as_remote_code(tmp_path, video, monkeypatch):
    """From a folder that holds the code, as on the Hub. Its Clip class is not ours, and ours is understood."""
    monkeypatch.setattr(CAMoEVideoProcessor, "_auto_class", None)
    CAMoEVideoProcessor.register_for_auto_class("AutoVideoProcessor")
    saved = CAMoEVideoProcessor(num_frames=3, **SMALL)
    saved.save_pretrained(tmp_path / "remote")
    names = {path.name for path in (tmp_path / "remote").glob("*.py")}
    decoding = {"frames.py", "decoding.py", "pictures.py", "torchcodec_decoder.py", "video_file.py"}
    decoding |= {"timeline.py", "video_source.py"}
    assert decoding | {"video_inputs.py", "video_processing_camoe.py"} <= names
    # AutoVideoProcessor would prefer our own class, which is registered in this process.
    reference = saved.to_dict()["auto_map"]["AutoVideoProcessor"]
    loaded = get_class_from_dynamic_module(reference, tmp_path / "remote").from_pretrained(tmp_path / "remote")
    assert type(loaded).__module__.startswith("transformers_modules")
    clip = Clip(video, 0.5, 1.0)
    for form in (clip, saved.decode(clip)):
        assert torch.equal(loaded(videos=form)["pixel_values_videos"], saved(videos=form)["pixel_values_videos"])
    with pytest.raises(ValueError, match="no such file"):
        loaded(videos="missing.mp4")


def test_files_are_decoded_by_the_frames_module_alone(processor, video, monkeypatch, tmp_path):
    copy = shutil.copy(video, tmp_path / "copy.mp4")
    opened = []
    original = VideoFile._open
    monkeypatch.setattr(VideoFile, "_open", lambda self: opened.append(self.name) or original(self))
    processor(videos=copy)
    assert opened == [str(copy)]
