# SPDX-License-Identifier: Apache-2.0
"""Whatever users hold is a video, and the same frames give the same pixels in every form and type."""

import io
import threading
import traceback
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Video
from transformers import CLIPImageProcessor, SiglipImageProcessor

from modeling_camoe.frames import Clip, VideoDecodingError, sample_frames
from modeling_camoe.video_inputs import read_video
from modeling_camoe.video_processing_camoe import CAMoEVideoProcessor
from tests.video_files import index_picture, indices_of, write_video


SMALL = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
UINT8 = {"do_rescale": False, "do_normalize": False}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """24 frames in 2 s."""
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", num_frames=24, fps=12, gop=6)


@pytest.fixture
def processor():
    return CAMoEVideoProcessor(num_frames=4, **SMALL)


def frames_of(count, size=32):
    """(T, 3, H, W) uint8; frame i shows i."""
    return torch.stack([torch.from_numpy(index_picture(i, size, size)).permute(2, 0, 1) for i in range(count)])


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def write_pictures(folder, frames) -> list[Path]:
    paths = [folder / f"{i:02}.png" for i in range(len(frames))]
    for path, frame in zip(paths, frames, strict=True):
        PIL.Image.fromarray(frame.permute(1, 2, 0).numpy()).save(path)
    return paths


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a folder, served on this machine, and the folder."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would refuse this machine, too

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", tmp_path
    server.shutdown()
    server.server_close()


# --- forms -----------------------------------------------------------------------------------------------------------


def test_every_form_of_a_file_gives_the_same_pixels(processor, video, server):
    address, folder = server
    content = video.read_bytes()
    (folder / "clip.mp4").write_bytes(content)
    rows = Dataset.from_dict({"video": [str(video)]})
    decoded = rows.cast_column("video", Video())  # torchcodec decoders
    forms = {
        "text": str(video),
        "path": video,
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "open file": io.BytesIO(content),
        "file on disk": open(video, "rb"),
        "address": f"{address}/clip.mp4?token=hf_hidden",
        "clip": Clip(video),
        "clip of an address": Clip(f"{address}/clip.mp4"),
        "row": rows.cast_column("video", Video(decode=False))[0]["video"],
        "row of bytes": {"path": None, "bytes": content},
        "decoder": decoded[0]["video"],
        "sampled": sample_frames(video, 4, size=32),
        "decoded": processor.decode(video),
    }
    expected = processor(videos=str(video))["pixel_values_videos"]
    for name, form in forms.items():
        if hasattr(form, "seek"):
            form.seek(0)
        assert torch.equal(processor(videos=form)["pixel_values_videos"], expected), name
    batches = {
        "column": decoded["video"],
        "list": [str(video)],
        "tuple": (video,),
        "array of names": np.array([str(video)]),
        "generator": (path for path in [video]),
        "nested": [[str(video)]],
    }
    for name, batch in batches.items():
        assert torch.equal(processor(videos=batch)["pixel_values_videos"], expected), name


def test_every_form_of_decoded_frames_gives_the_same_pixels(processor, tmp_path):
    frames = noise(4, 3, 48, 40)
    last = frames.permute(0, 2, 3, 1).contiguous()
    images = [PIL.Image.fromarray(image) for image in last.numpy()]
    paths = write_pictures(tmp_path, frames)
    forms = {
        "tensor": frames,
        "array": frames.numpy(),
        "channels last": last,
        "array, channels last": last.numpy(),
        "list of tensors": list(frames),
        "list of arrays": list(last.numpy()),
        "images": images,
        "paths": paths,
        "paths as text": [str(path) for path in paths],
        "batch": frames[None],
        "with metadata": {"array": frames, "video_metadata": {"fps": 2.0, "total_num_frames": 4}},
        "images with metadata": {"array": images, "video_metadata": None},
        "decoded": processor.decode(frames),
    }
    expected = processor(videos=frames)["pixel_values_videos"]
    for name, form in forms.items():
        assert torch.equal(processor(videos=form)["pixel_values_videos"], expected), name
    together = processor(videos=[frames, last.numpy(), images])["pixel_values_videos"]
    assert torch.equal(together, expected.expand(3, -1, -1, -1, -1))


def test_a_picture_in_any_form_is_a_clip_of_one_frame(processor, tmp_path, server):
    address, folder = server
    frame = noise(3, 32, 32)
    (path,) = write_pictures(folder, frame[None])
    image = PIL.Image.open(path)
    forms = [frame, frame.numpy(), frame.permute(1, 2, 0).numpy(), image, path, str(path), path.read_bytes()]
    forms += [f"{address}/{path.name}", open(path, "rb"), {"path": str(path), "bytes": None}]
    for form in forms:
        batch = processor(videos=form, **UINT8)
        assert batch["frame_mask"].tolist() == [[1, 0, 0, 0]]
        assert torch.equal(batch["pixel_values_videos"][0, 0], frame)


def test_a_decoder_of_no_known_source_is_sampled_by_itself(processor, video):
    decoders = pytest.importorskip("torchcodec.decoders")
    for order in ("NCHW", "NHWC"):
        decoder = decoders.VideoDecoder(str(video), dimension_order=order)
        batch = processor(videos=decoder, return_metadata=True, **UINT8)
        assert indices_of(batch["pixel_values_videos"][0]) == [3, 9, 15, 21]
        assert batch["video_metadata"][0].timestamps == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert processor(videos=decoder, fps=1)["frame_mask"].sum() == 2


def test_what_cannot_be_fetched_or_read_is_named_and_secrets_are_not(processor, server):
    address, folder = server
    (folder / "broken.png").write_bytes(b"\x89PNG no picture")
    (folder / "broken.mp4").write_bytes(b"no video" * 9)
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    for form, message in (
        (f"{address}/none.mp4?token=hf_hidden", r"/none\.mp4: cannot be downloaded \(.*404"),
        (f"{address}/broken.mp4?token=hf_hidden", r"/broken\.mp4: "),
        (
            f"{address.replace('//', '//me:hf_hidden@')}/none.mp4#hf_hidden",
            r"//127[^@]*/none\.mp4: cannot be downloaded",
        ),
        ("data:video/mp4;base64,!", r"^data:video/mp4;base64,!: not a data: address of base64"),
        ("data:,no video", r"^data:,no video: not a data: address of base64"),
        (f"{address}/broken.png", r"broken\.png: a picture that cannot be read"),
        (folder / "broken.png", r"broken\.png: a picture that cannot be read"),
        (folder / "none.jpg", r"none\.jpg: no such file"),
        (folder / "moving.webp", r"moving\.webp: an animated picture; convert it"),
        (io.BytesIO(b""), "<0 bytes>|open file"),
    ):
        with pytest.raises(VideoDecodingError, match=message) as raised:
            processor(videos=form)
        assert "hf_hidden" not in "".join(traceback.format_exception(raised.value))
    with pytest.raises(ValueError, match="opened as text"):
        processor(videos=io.StringIO("a"))


def test_a_download_ends_at_the_limit(processor, server, video, monkeypatch):
    address, folder = server
    (folder / "long.mp4").write_bytes(video.read_bytes() + bytes(3 << 20))
    assert processor(videos=f"{address}/long.mp4")["frame_mask"].sum() == 4
    monkeypatch.setattr("modeling_camoe.video_inputs.MAX_DOWNLOAD_BYTES", 1 << 20)
    with pytest.raises(VideoDecodingError, match=r"/long\.mp4: more than 1 MiB, the limit for an address"):
        processor(videos=f"{address}/long.mp4")


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 50])  # with and without resizing
@pytest.mark.parametrize(
    "dtype,white",
    [(dtype, 255) for dtype in (torch.int16, torch.int64, torch.float16, torch.float32, torch.float64)]
    + [(dtype, 1) for dtype in (torch.float16, torch.float32, torch.float64)],
)
def test_every_type_of_the_same_frames_gives_the_same_pixels(processor, dtype, white, size):
    frames = noise(4, 3, size, size)
    expected = processor(videos=frames)["pixel_values_videos"]
    form = frames.to(dtype) if white == 255 else (frames.double() / 255).to(dtype)
    for video in (form, form.numpy(), list(form)):
        pixels = processor(videos=video)["pixel_values_videos"]
        assert pixels.dtype == torch.float32 and torch.equal(pixels, expected)
    assert torch.equal(processor.decode(form).frames, processor.decode(frames).frames)


def test_transparent_frames_of_every_type_show_white(processor):
    frames = torch.full((4, 4, 32, 32), 100, dtype=torch.uint8)
    frames[:, 3] = 51  # a fifth
    expected = processor(videos=frames, **UINT8)["pixel_values_videos"]
    assert (expected == 224).all()  # 0.8 * 255 + 0.2 * 100
    normalised = processor(videos=frames)["pixel_values_videos"]
    for form in (frames.float(), frames / 255):
        assert torch.equal(processor(videos=form)["pixel_values_videos"], normalised)


@pytest.mark.parametrize(
    "frames,message",
    [
        (noise(4, 3, 8, 8) > 100, "video 1 has frames of type torch.bool"),
        (noise(4, 3, 8, 8).int() + 1, "video 1 has values from 1 to 256: give them from 0 to 255"),
        (-noise(4, 3, 8, 8).long(), "video 1 has values from -255 to 0"),
        (noise(4, 3, 8, 8) / 64 - 1.9, "normalised already need do_rescale=False"),
        (noise(4, 3, 8, 8) / 250, "video 1 has values from 0 to 1.02: give them from 0 to 1 or from 0 to 255"),
        (torch.full((4, 3, 8, 8), float("nan")), "video 1 has values from nan"),
    ],
)
def test_frames_whose_scale_is_not_clear_are_an_error(processor, frames, message):
    with pytest.raises(ValueError, match=message):
        processor(videos=[noise(4, 3, 8, 8), frames])


def test_prepared_floats_are_left_alone_on_request(processor):
    frames = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(processor(videos=frames, **UINT8)["pixel_values_videos"][0], frames)
    scaled = noise(4, 3, 32, 32)
    pixels = processor(videos=scaled / 255, do_rescale=False)["pixel_values_videos"]
    torch.testing.assert_close(pixels, processor(videos=scaled)["pixel_values_videos"])


def test_another_default_type_of_torch_changes_nothing(processor, video):
    expected = processor(videos=[video, video])["pixel_values_videos"]
    torch.set_default_dtype(torch.float64)
    try:
        pixels = processor(videos=[video, processor.decode(video).frames.double()])["pixel_values_videos"]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(pixels, expected)


# --- metadata --------------------------------------------------------------------------------------------------------


def test_metadata_of_a_file_says_what_was_taken_from_what(processor, video):
    for form in (video, video.read_bytes(), Clip(video)):
        metadata = processor(videos=form, return_metadata=True)["video_metadata"][0]
        assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (24, 12, 2)
        assert (metadata.width, metadata.height) == (64, 48)
        assert metadata.frames_indices.tolist() == [3, 9, 15, 21]
        assert metadata.timestamps == pytest.approx([0.25, 0.75, 1.25, 1.75])
    window = processor(videos=Clip(video, 1.0, 2.0), num_frames=2, return_metadata=True)["video_metadata"][0]
    assert window.timestamps == pytest.approx([1.25, 1.75]) and window.frames_indices.tolist() == [15, 21]
    sampled = processor(videos=processor.decode(video), return_metadata=True)["video_metadata"][0]
    assert sampled.timestamps == pytest.approx([0.25, 0.75, 1.25, 1.75])


def test_metadata_of_frames_is_completed(processor):
    metadata = processor(videos=frames_of(24), return_metadata=True)["video_metadata"][0]
    assert metadata.frames_indices.tolist() == [3, 9, 15, 21] and metadata.total_num_frames == 24
    given = {"total_num_frames": 24, "fps": 12.0}
    batch = processor(videos=[frames_of(24)], video_metadata=[given], return_metadata=True)
    assert batch["video_metadata"][0].timestamps == pytest.approx([0.25, 0.75, 1.25, 1.75])
    # Every second frame of a video of 48 frames, of which every sixth is taken.
    given = {"total_num_frames": 48, "fps": 24.0, "frames_indices": list(range(0, 48, 2))}
    form = {"array": frames_of(24), "video_metadata": given}
    batch = processor(videos=form, return_metadata=True, **UINT8)
    assert indices_of(batch["pixel_values_videos"][0]) == [3, 9, 15, 21]
    assert batch["video_metadata"][0].frames_indices.tolist() == [6, 18, 30, 42]
    assert batch["video_metadata"][0].timestamps == pytest.approx([0.25, 0.75, 1.25, 1.75])
    assert processor.decode(form).times == pytest.approx((0.25, 0.75, 1.25, 1.75))
    assert processor(videos=form, fps=1)["frame_mask"].sum() == 2


# --- the library's image processors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [PIL.Image.Resampling.BILINEAR, PIL.Image.Resampling.BICUBIC])
@pytest.mark.parametrize("do_resize", [True, False])
@pytest.mark.parametrize("do_center_crop", [True, False])
@pytest.mark.parametrize(
    "image_class,size",
    [(CLIPImageProcessor, {"shortest_edge": 32}), (SiglipImageProcessor, {"height": 32, "width": 32})],
)
def test_pixels_are_those_of_the_librarys_image_processor(
    video, image_class, size, do_resize, do_center_crop, resample
):
    options = {"size": size, "crop_size": {"height": 28, "width": 28}, "do_resize": do_resize, "resample": resample}
    options |= {"do_center_crop": do_center_crop, "image_mean": [0.5] * 3, "image_std": [0.4] * 3}
    processor = CAMoEVideoProcessor(num_frames=4, **options)
    stored = sample_frames(video, 4, size=None).frames
    images = [PIL.Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in stored]
    expected = image_class(**options)(images, return_tensors="pt")["pixel_values"]
    forms = [images, stored]
    if processor._decoded_size(processor._settings()) is None:  # else the decoder scales, a little differently
        forms += [video, processor.decode(video)]
    for form in forms:
        pixels = processor(videos=form)["pixel_values_videos"][0]
        torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_decoded_frames_are_resized_before_they_travel(video):
    processor = CAMoEVideoProcessor(num_frames=4, size={"height": 20, "width": 30}, do_center_crop=False)
    assert processor.decode(video).frames.shape == (4, 3, 20, 30)


# --- frames of unusual types -----------------------------------------------------------------------------------------


def test_grey_pictures_of_16_bits_keep_their_levels(tmp_path):
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    picture = PIL.Image.fromarray(levels)
    picture.save(tmp_path / "levels.png")
    expected = np.repeat((levels // 257).astype(np.uint8)[None, :, :, None], 3, -1)
    for video in (picture, tmp_path / "levels.png", (tmp_path / "levels.png").read_bytes(), [picture]):
        assert np.array_equal(read_video(video)[0], expected)


def test_grey_pictures_of_an_unknown_scale_are_refused():
    for values in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), -3, np.int32)):
        with pytest.raises(ValueError, match="video 4: grey levels from .* give them from 0 to 255"):
            read_video([PIL.Image.fromarray(values)], 4)


@pytest.mark.parametrize("dtype", ["uint16", ">u2", ">i2", ">f4"])
def test_frames_of_other_types_and_byte_orders_are_the_same_frames(dtype):
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    processor = CAMoEVideoProcessor(num_frames=3, **SMALL)
    expected = processor(videos=[frames], return_tensors="pt")["pixel_values_videos"]
    pixels = processor(videos=[frames.astype(dtype)], return_tensors="pt")["pixel_values_videos"]
    assert torch.equal(pixels, expected)


def test_a_list_of_frames_of_different_types_is_refused():
    frame = np.full((32, 32, 3), 128, np.uint8)
    with pytest.raises(ValueError, match="video 2 has frames of different types, uint8 and others; give uint8"):
        read_video([frame, frame / 255], 2)
