# SPDX-License-Identifier: Apache-2.0
"""Files as they are in the wild: headers, key flags and tags that are wrong, damage, and things that are no videos."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import PIL.Image
import pytest
from av.stream import Disposition

from modeling_camoe.frames import VideoDecodingError, probe_video, sample_frames
from tests.video_files import index_picture, indices_of, natural_picture, sample, write_video


def remux(source, path, change):
    """Copies the coded pictures to another file; `change(number, packet)` alters them first."""
    with av.open(str(source)) as original, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(original.streams.video[0])
        for number, packet in enumerate(packet for packet in original.demux(video=0) if packet.size):
            change(number, packet)
            packet.stream = stream
            copy.mux(packet)
    return path


def flag(number, packet):
    packet.is_keyframe = True


def avi_without_index(path, stated):
    """An AVI of 48 frames that states another number and whose index is cut off."""
    content = write_video(path, 48).read_bytes()
    content = bytearray(content[: content.rindex(b"idx1")])
    header = content.index(b"strh")
    content[header + 40 : header + 44] = stated.to_bytes(4, "little")
    path.write_bytes(content)
    return path


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [48, 96, 20])
@pytest.mark.parametrize("sampling", ["uniform", "keyframe"])
def test_an_avi_without_index_gives_ordered_frames_of_its_true_duration(folder, stated, sampling):
    path = avi_without_index(folder / f"no_index{stated}.avi", stated)
    sampled = sample(path, 8, sampling)
    assert indices_of(sampled.frames) == [3, 9, 15, 21, 27, 33, 39, 45]
    assert sampled.duration == pytest.approx(4.0)
    assert indices_of(sample(path, 2, sampling, start=3.75).frames) in ([44, 46], [45, 47])
    assert probe_video(path).duration == pytest.approx(4.0)


def test_keyframe_sampling_does_not_believe_a_header_that_promises_too_much(folder):
    path = write_video(folder / "twice.avi", 48, codec="mpeg4")
    content = bytearray(path.read_bytes())
    header = content.index(b"strh")
    content[header + 40 : header + 44] = (96).to_bytes(4, "little")
    path.write_bytes(content)
    sampled = sample(path, 8, "keyframe")
    assert sampled.duration == pytest.approx(4.0)
    assert max(sampled.times) < 4.0


@pytest.mark.parametrize("factor", [0.5, 100])
def test_a_complete_matroska_file_with_a_wrong_duration_is_decoded_to_its_end(folder, factor):
    path = write_video(folder / f"wrong{factor}.mkv", 48)
    content = path.read_bytes()
    stated = struct.pack(">d", 4000.0)
    assert content.count(b"\x44\x89\x88" + stated) == 1  # ID of the duration, its length, milliseconds
    path.write_bytes(content.replace(b"\x44\x89\x88" + stated, b"\x44\x89\x88" + struct.pack(">d", 4000.0 * factor)))
    sampled = sample(path, 4)
    assert indices_of(sampled.frames) == [6, 18, 30, 42]
    assert sampled.duration == pytest.approx(4.0, abs=0.01)


# --- key flags -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec,name,size", [("mpeg4", "mp4", (64, 48)), ("h263", "3gp", (128, 96)), ("libx264", "mkv", (64, 48))]
)
def test_key_flags_on_every_packet_do_no_harm(folder, codec, name, size):
    options = {"options": {"g": "24", "b": "2000000"}} if codec != "libx264" else {"gop": 24}
    fps = 25 if codec == "h263" else 12
    honest = write_video(folder / f"honest_{codec}.mov", 60, fps, size, codec=codec, **options)
    path = remux(honest, folder / f"flagged_{codec}.{name}", flag)
    for sampling in ("uniform", "keyframe"):
        assert indices_of(sample(path, 6, sampling).frames) == [5, 15, 25, 35, 45, 55]


def test_frames_before_the_first_key_flag_are_not_dropped(folder):
    def forget_first_flag(number, packet):
        packet.is_keyframe = packet.is_keyframe and number > 0

    path = remux(write_video(folder / "honest.mp4", 48), folder / "late_flag.mkv", forget_first_flag)
    assert indices_of(sample(path, 2, end=0.9).frames)[-1] < 12


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_raw_coded_pictures_come_at_a_steady_rate(folder, codec):
    options = {"g": "12", "bf": "2", "b": "4000000"}
    path = write_video(folder / f"raw.{codec}", 48, 24, codec=codec, format=codec, options=options)
    assert indices_of(sample(path, 8).frames) == [3, 9, 15, 21, 27, 33, 39, 45]
    assert probe_video(path).duration == pytest.approx(2.0)


def test_the_window_of_a_raw_stream_has_the_frames_of_the_whole(folder):
    options = {"g": "12", "bf": "2", "b": "4000000"}
    path = write_video(folder / "raw.m1v", 48, 24, codec="mpeg1video", format="mpeg1video", options=options)
    assert indices_of(sample(path, 2, start=1.0, end=1.5).frames) == [27, 33]


def test_an_avi_with_packed_frames_is_exact(folder):
    """DivX put a B-frame into the packet of the frame that it refers to, and an empty packet into its place."""
    options = {"g": "12", "bf": "1", "b": "9000000", "qmin": "1", "qmax": "1"}
    honest = write_video(folder / "unpacked.avi", 48, codec="mpeg4", options=options)
    picture, mark = b"\x00\x00\x01\xb6", b"\x00\x00\x01\xb2DivX503b1393p"
    path = folder / "packed.avi"
    with av.open(str(honest)) as original, av.open(str(path), "w") as packed:
        stream = packed.add_stream_from_template(original.streams.video[0])
        coded = [bytes(packet) for packet in original.demux(video=0) if packet.size]
        kinds = [each[each.index(picture) + 4] >> 6 for each in coded]  # 0: key, 1: refers back, 2: B-frame
        coded[0] = coded[0].replace(picture, mark + picture, 1)
        for i, kind in enumerate(kinds):
            if kind == 2:
                coded[i - 1] += coded[i]
                coded[i] = picture + b"\x40\x00\x00"
        for i, (content, kind) in enumerate(zip(coded, kinds, strict=True)):
            packet = av.Packet(content)
            packet.pts = packet.dts = i
            packet.time_base, packet.duration, packet.is_keyframe = Fraction(1, 12), 1, kind == 0
            packet.stream = stream
            packed.mux(packet)
    assert 2 in kinds
    assert indices_of(sample(path, 8).frames) == [3, 9, 15, 21, 27, 33, 39, 45]


def test_packets_without_content_show_the_frame_before_on(folder):
    """As in Theora. Here the last 18 of 48."""
    honest = write_video(folder / "honest.avi", 48, codec="mpeg4", options={"g": "12", "bf": "0", "b": "4000000"})
    path = folder / "repeats.nut"
    with av.open(str(honest)) as original, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(original.streams.video[0])
        for number, packet in enumerate(packet for packet in original.demux(video=0) if packet.size):
            if number >= 30:
                empty = av.Packet(b"")
                empty.pts, empty.dts, empty.duration = packet.pts, packet.dts, packet.duration
                empty.time_base, packet = packet.time_base, empty
            packet.stream = stream
            copy.mux(packet)
    sampled = sample(path, 8)
    assert indices_of(sampled.frames) == [3, 9, 15, 21, 27, 29]
    assert sampled.duration == pytest.approx(4.0)


def test_reordered_frames_at_an_uneven_rate_are_shown_to_their_end(folder):
    times = np.cumsum([0, 1, 1, 1, 8, 8, 8, 8, 8, 8, 8, 8]) / 12
    path = write_video(folder / "uneven.mp4", len(times), fps=12, times=times, options={"g": "12", "bf": "3"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert float(stream.duration * stream.time_base) < times[-1]  # what the file states
    for threads in (1, 2):
        sampled = sample(path, 5, threads=threads)
        assert sampled.duration == pytest.approx(times[-1] + 1 / 12, abs=0.01)
        centres = (np.arange(5) + 0.5) * sampled.duration / 5
        assert indices_of(sampled.frames) == (np.searchsorted(times, centres, side="right") - 1).tolist()
    assert indices_of(sample(path, 1, start=times[-1]).frames) == [11]
    assert probe_video(path).duration == pytest.approx(times[-1] + 1 / 12, abs=0.01)


def test_an_early_subtitle_that_lasts_longest_does_not_make_a_file_look_cut_off(folder):
    text, path = folder / "text.srt", folder / "subtitle.mkv"
    text.write_text("1\n00:00:00,500 --> 00:01:00,000\nHello\n")
    honest = write_video(folder / "honest.mkv", 240)
    with av.open(str(honest)) as video, av.open(str(text)) as subtitles, av.open(str(path), "w") as copy:
        streams = [copy.add_stream_from_template(each.streams[0]) for each in (video, subtitles)]
        (subtitle,) = [packet for packet in subtitles.demux() if packet.size]
        for number, packet in enumerate(packet for packet in video.demux() if packet.size):
            packet.stream = streams[0]
            copy.mux(packet)
            if number == 8:
                subtitle.stream = streams[1]
                copy.mux(subtitle)
    with av.open(str(path)) as container:
        assert container.duration == pytest.approx(60e6)
    sampled = sample(path, 8)
    assert indices_of(sampled.frames) == [15, 45, 75, 105, 135, 165, 195, 225]
    assert sampled.duration == pytest.approx(20.0, abs=0.01)


# --- what a player shows ---------------------------------------------------------------------------------------------


MATRICES = {  # of x' = ax + cy, y' = bx + dy as (a, b, c, d), and the same by numpy
    "mirrored": ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
    "upside_down": ((1, 0, 0, -1), lambda picture: picture[::-1]),
    "turned": ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
    "transposed": ((0, 1, 1, 0), lambda picture: picture.T),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_the_whole_display_matrix_is_applied(folder, kind):
    (a, b, c, d), expected = MATRICES[kind]
    picture = np.full((48, 64, 3), 40, np.uint8)
    picture[:24, :32] = 200
    path = write_video(folder / f"{kind}.mp4", 2, pictures=[picture] * 2)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    frame = sample(path, 1, size=None).frames[0].float().mean(0).numpy()
    wanted = expected(picture[..., 0]).astype(np.float32)
    assert frame.shape == wanted.shape
    assert np.abs(frame - wanted).mean() < 4


def test_pixels_that_are_not_square_are_made_so(folder):
    path = write_video(folder / "wide.mp4", 4, pixel_aspect=2)
    assert sample(path, 1, size=None).frames.shape == (1, 3, 48, 128)
    assert sample(path, 1, size=32).frames.shape == (1, 3, 32, 32)
    path.write_bytes(path.read_bytes().replace(b"pasp", b"free"))  # now the coded pictures alone say so
    assert sample(path, 1, size=None).frames.shape == (1, 3, 48, 128)


def test_frames_that_change_their_size_get_that_of_the_first(folder):
    small = write_video(folder / "small_part.ts", 24, pictures=[natural_picture(48, 64)] * 24)
    large = write_video(
        folder / "large_part.ts", 24, size=(128, 96), start=2.0, pictures=[natural_picture(96, 128)] * 24
    )
    path = folder / "both_parts.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    assert sample(path, 6, size=None).frames.shape == (6, 3, 48, 64)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_of_several_video_streams_the_default_one_is_taken(folder, suffix):
    path = folder / f"two_streams.{suffix}"
    with av.open(str(path), "w") as container:
        streams = []
        for size, disposition in (((64, 48), Disposition.dub), ((128, 96), Disposition.default)):
            stream = container.add_stream("libx264", rate=12, options={"g": "12", "bf": "2", "crf": "10"})
            (stream.width, stream.height), stream.pix_fmt, stream.disposition = size, "yuv420p", disposition
            streams.append(stream)
        for i in range(24):
            for stream, first in zip(streams, (0, 100), strict=True):
                picture = index_picture(first + i, stream.width, stream.height)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    assert indices_of(sample(path, 4).frames) == [103, 109, 115, 121]
    assert probe_video(path).width == 128


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def damaged(folder):
    """96 frames at 12 a second; the group of pictures from 4 to 6 s is noise."""
    path = write_video(folder / "damaged_middle.mp4", 96, gop=24, size=(128, 96))
    with av.open(str(path)) as container:
        packets = [(p.pts * p.time_base * 12, p.pos, p.size) for p in container.demux(video=0) if p.size]
    content = bytearray(path.read_bytes())
    generator = np.random.default_rng(0)
    for frame, position, size in packets:
        if 48 <= frame < 72:
            content[position + 4 : position + size] = generator.bytes(size - 4)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_damage_is_an_error_that_names_the_time_or_frames_are_taken_around_it(damaged, threads):
    with pytest.raises(VideoDecodingError, match=r"damaged at (3\.9|4\.0)\d+ s, up to 6\.000 s"):
        sample(damaged, 8, threads=threads)
    sampled = sample(damaged, 6, on_damage="around", threads=threads)
    assert indices_of(sampled.frames) == [6, 18, 30, 42, 78, 90]  # the middles of six segments of a second
    ((start, end),) = sampled.skipped_damage
    assert (start, end) == (pytest.approx(4.0, abs=0.1), pytest.approx(6.0))
    assert sample(damaged, 2, end=3.0, on_damage="around", threads=threads).skipped_damage == ()


def test_a_policy_for_damage_that_is_none_is_a_value_error(damaged):
    with pytest.raises(ValueError, match="'skip' is not one of error, around"):
        sample(damaged, on_damage="skip")


def test_a_damaged_last_packet_does_no_harm_to_the_frames_before(folder):
    path = write_video(folder / "last.mp4", 48, options={"g": "12", "bf": "0"})
    with av.open(str(path)) as container:
        last = [(p.pos, p.size) for p in container.demux(video=0) if p.size][-1]
    content = bytearray(path.read_bytes())
    content[last[0] + 4 : last[0] + last[1]] = b"\xff" * (last[1] - 4)
    path.write_bytes(content)
    assert indices_of(sample(path, 8).frames) == [3, 9, 15, 21, 27, 33, 39, 45]
    with pytest.raises(VideoDecodingError, match=r"damaged.* 3\.917 s"):
        sample(path, 1, start=3.92)


@pytest.mark.parametrize("sampling", ["uniform", "keyframe"])
def test_an_encrypted_file_is_called_so(folder, sampling):
    options = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "00" * 16, "encryption_kid": "01" * 16}
    path = write_video(folder / "encrypted.mp4", 24, container_options=options)
    for source in (path, path.read_bytes()):
        with pytest.raises(VideoDecodingError, match="encrypted; it can only be decoded with its key"):
            sample(source, 4, sampling)


# --- no videos -------------------------------------------------------------------------------------------------------


NO_VIDEOS = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "saved web page"),
    "hls": (b"\xef\xbb\xbf#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:5,\nhonest.ts\n", "names other files"),
    "concat": (b"ffconcat version 1.0\nfile 'video.mp4'\n", "list of other files"),
    "dash": (b'<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', "DASH manifest"),
    "zip": (b"PK\x03\x04" + bytes(40), "ZIP archive"),
}


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_named_like_a_video_and_is_none_is_called_what_it_is(folder, video, kind):
    content, cause = NO_VIDEOS[kind]
    path = folder / f"{kind}.mp4"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(VideoDecodingError, match=cause):
            sample_frames(source)
        with pytest.raises(VideoDecodingError, match=cause):
            probe_video(source)


def test_a_segment_without_its_header_is_called_one_and_appended_to_it_a_video(folder):
    options = {"movflags": "dash+frag_keyframe+empty_moov+default_base_moof"}
    content = write_video(folder / "streamed.mp4", 24, container_options=options).read_bytes()
    start = min(content.index(box) for box in (b"sidx", b"moof") if box in content) - 4
    for segment in (content[start:], (b"\0\0\0\x10stypmsdh\0\0\0\0") + content[start:]):
        (folder / "segment.m4s").write_bytes(segment)
        for source in (folder / "segment.m4s", segment):
            with pytest.raises(VideoDecodingError, match="a segment of a streamed video without its header; append"):
                sample(source)
        (folder / "joined.mp4").write_bytes(content[:start] + segment)
        assert indices_of(sample(folder / "joined.mp4", 4).frames) == [3, 9, 15, 21]


def test_an_animated_webp_is_called_what_it_is(folder):
    pictures = [PIL.Image.fromarray(natural_picture(48, 64, seed)) for seed in range(3)]
    pictures[0].save(folder / "animated.webp", save_all=True, append_images=pictures[1:], duration=100)
    with pytest.raises(VideoDecodingError, match="animated WebP"):
        sample(folder / "animated.webp")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_refused_instead_of_waited_for(folder):
    os.mkfifo(folder / "pipe.mp4")
    with pytest.raises(VideoDecodingError, match="a pipe or a device"):
        sample(folder / "pipe.mp4")


def test_a_title_in_another_encoding_does_no_harm(folder):
    path = folder / "title.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "Caf__ du nord"
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in [natural_picture(48, 64)] * 6:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"Caf__", b"Caf\xe9\xff"))
    assert len(sample(path, 3).times) == 3


def test_an_flv_whose_video_begins_after_minutes_of_sound_is_decoded(folder):
    sound_seconds, path = 120, folder / "late.flv"
    with av.open(str(path), "w", format="flv") as container:
        stream = container.add_stream("libx264", rate=12, options={"g": "12", "bf": "0", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=11025, layout="mono")
        for second in range(sound_seconds):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 11025), np.int16), format="s16", layout="mono")
            silence.sample_rate, silence.pts = 11025, second * 11025
            container.mux(sound.encode(silence))
        for i in range(24):
            frame = av.VideoFrame.from_ndarray(index_picture(i, 64, 48), format="rgb24")
            frame.pts, frame.time_base = sound_seconds * 12 + i, Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    content = path.read_bytes()
    tags, position = [], 13  # after the header
    while position < len(content):
        end = position + 15 + int.from_bytes(content[position + 1 : position + 4], "big")
        tags.append(content[position:end])
        position = end
    header = next(tag for tag in tags if tag[0] == 9)  # of the video: it was written first
    tags = [tag for tag in tags if tag is not header and tag[0] != 18]  # 18: tells which streams there are
    tags.insert(next(i for i, tag in enumerate(tags) if tag[0] == 9), header)
    path.write_bytes(content[:13] + b"".join(tags))
    sampled = sample(path, 4)
    assert indices_of(sampled.frames) == [3, 9, 15, 21]
    assert sampled.times[0] == pytest.approx(120.25, abs=0.01)


def test_whatever_a_file_makes_the_libraries_raise_names_the_file(video, monkeypatch):
    def break_down(self):
        raise IndexError("tuple index out of range")

    monkeypatch.setattr("modeling_camoe.video_file.VideoFile.span", break_down)
    with pytest.raises(VideoDecodingError, match="video.mp4: cannot be decoded .IndexError: tuple index"):
        sample(video)
