# SPDX-License-Identifier: Apache-2.0
"""From an H.264 file to 12 frames of 224 x 224: `sample_frames` against what else a user of transformers would call.

    python benchmarks/decode.py                            clips of 3, 10 and 300 s; about three minutes
    python benchmarks/decode.py --long 0 --repeats 3       quick, without the long one

All ways take the frames at the same twelve times (segment centres) and end with uint8 frames of the same size. Peers:

- transformers.video_utils.load_video with PyAV and with torchcodec, then the resize and crop of its processors;
- torchcodec's own decoder, which resizes while it decodes (bilinear: it has no other).

"floor" is a bare loop that gives the decoder the very packets that ours gives it, and scales the same frames: what is
left of ours is its Python. Ours takes at most 1.10 times as long. The line "same in ..." has the packets of one clip
in other containers. A library that cannot tell the number of frames there takes other frames, and is no peer then.

The limit is a decoder that decodes every picture and converts none, as PyAV does it: ours may pass it, because it
leaves out the pictures that no wanted frame needs. "1 proc." calls from the program itself; "2 proc." are two workers,
as a data loader has. `keyframe` takes the nearest key frames: not the same frames, and compared with `uniform`.
"""

import concurrent.futures
import functools
import multiprocessing
import statistics
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from clips import write_clip
from harness import Line, compare, finish, in_turns, parser
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize
from transformers.video_utils import load_video

from modeling_camoe import decoding
from modeling_camoe.frames import sample_frames
from modeling_camoe.pictures import PictureMaker
from modeling_camoe.video_file import OPEN_QUICKLY


NUM_FRAMES, SIZE = 12, 224

# Seconds, (width, height), pictures from key frame to key frame.
SHORT = [
    (3, (320, 180), 250),
    (3, (320, 240), 250),
    (3, (640, 360), 25),
    (10, (320, 240), 250),
    (10, (640, 360), 250),
    (10, (640, 360), 25),
    (10, (1280, 720), 50),
]


# Containers of H.264 beside plain MP4: file name, FFmpeg's name of the format, its options.
CONTAINERS = [
    ("clip.f4v", "f4v", {}),
    ("dash.mp4", "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof+dash"}),
    ("clip.mkv", "matroska", {}),
    ("clip.mpg", "mpeg", {}),
]


def centres(metadata, **kwargs) -> np.ndarray:
    """For the peers: the numbers of the frames at segment centres, which are those that ours takes."""
    return ((np.arange(NUM_FRAMES) + 0.5) * metadata.total_num_frames / NUM_FRAMES).astype(int)


def resized(frames: torch.Tensor) -> torch.Tensor:
    frames = resize(frames, [SIZE], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return center_crop(frames, [SIZE, SIZE])


def uniform(path: str) -> torch.Tensor:
    return sample_frames(path, NUM_FRAMES, size=SIZE).frames


def keyframe(path: str) -> torch.Tensor:
    return sample_frames(path, NUM_FRAMES, "keyframe", size=SIZE).frames


def load_video_pyav(path: str) -> torch.Tensor:
    frames, _ = load_video(path, backend="pyav", sample_indices_fn=centres)
    return resized(torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous())


def load_video_torchcodec(path: str) -> torch.Tensor:
    frames, _ = load_video(path, backend="torchcodec", sample_indices_fn=centres)
    return resized(frames)


def torchcodec_resizing(path: str, seek_mode: str = "exact") -> torch.Tensor:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import CenterCrop, Resize

    metadata = VideoDecoder(path, seek_mode="approximate").metadata
    short = min(metadata.height, metadata.width)
    sides = [int(SIZE * side / short) for side in (metadata.height, metadata.width)]
    decoder = VideoDecoder(path, seek_mode=seek_mode, transforms=[Resize(sides), CenterCrop((SIZE, SIZE))])
    return decoder.get_frames_at(centres(VideoFrames(metadata.num_frames)).tolist()).data


class VideoFrames:
    """What `centres` needs to know of a video."""

    def __init__(self, total_num_frames: int):
        self.total_num_frames = total_num_frames


def decode_all(path: str) -> int:
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        return sum(1 for _ in container.decode(video=0))


class Floor:
    """Decodes exactly the packets that ours decodes, with as little Python as possible."""

    def __init__(self, path: str):
        self.path = path
        self.steps = []  # (pts or None to drain, skip_frame) of each packet
        decode = decoding.PictureDecoder.decode

        def noting(decoder, packet, is_needed):
            decode(decoder, packet, is_needed)
            codec = decoder.video.decoder
            self.steps.append((None if packet is None else packet.pts, codec.skip_frame))
            self.threads = codec.thread_count, codec.thread_type

        decoding.PictureDecoder.decode = noting
        try:
            times = sample_frames(path, NUM_FRAMES, size=SIZE).times
        finally:
            decoding.PictureDecoder.decode = decode
        with av.open(path) as container:
            stream = container.streams.video[0]
            zero = (container.start_time or 0) / 1e6
            self.wanted = {round((time + zero) / stream.time_base) for time in times}

    def __call__(self) -> int:
        """Returns how many frames it has converted."""
        count = 0
        with av.open(self.path, options=OPEN_QUICKLY) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            codec.thread_count, codec.thread_type = self.threads
            maker = PictureMaker(SIZE, lambda: 1.0)
            packets = {packet.pts: packet for packet in container.demux(stream) if packet.size}
            for pts, skip_frame in self.steps:
                codec.skip_frame = skip_frame
                for frame in codec.decode(packets.get(pts)):
                    if frame.pts in self.wanted:
                        size = maker.scaled_size(frame.width, frame.height)
                        maker.reformatter.reformat(frame, *size, "gbrp", interpolation="BICUBIC", threads=1)
                        count += 1
                if pts is None:
                    codec.flush_buffers()
        return count


def in_container(path: str, target: Path, format: str, options: dict) -> str:
    """Copies the coded pictures to a container of another kind."""
    with av.open(path) as source, av.open(str(target), "w", format=format, container_options=options) as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        convert = None
        if format == "mpeg":  # H.264 with start codes
            convert = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", source.streams.video[0], stream)
        for packet in source.demux(video=0):
            if packet.size:
                for part in convert.filter(packet) if convert else [packet]:
                    part.stream = stream
                    copy.mux(part)
    return str(target)


def measure_containers(path: str, folder: Path, options) -> list[Line]:
    """Ours against the best way of the library that takes the same frames."""
    lines = []
    expected = uniform(path).float()
    for name, format, container_options in CONTAINERS:
        copy = in_container(path, folder / name, format, container_options)
        calls = {"uniform": functools.partial(uniform, copy)}
        for way_name, way in ways().items():
            frames = way(copy)
            if frames.shape == expected.shape and (frames.float() - expected).abs().mean() < 5:
                calls[way_name] = functools.partial(way, copy)
        if len(calls) == 1:
            continue
        times = in_turns(calls, options.repeats, warm_up=True)
        best = min(
            (way_name for way_name in calls if way_name != "uniform"), key=lambda w: statistics.median(times[w])
        )
        lines.append(
            compare(f"same in {name}", times["uniform"], times[best], best, scale=1000, unit="ms", goal=1.0)
        )  # fmt: skip
    return lines


def torchcodec_works() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def ways() -> dict:
    """The library's peers first, then others."""
    found = {"load_video pyav": load_video_pyav}
    if torchcodec_works():
        found |= {"load_video torchcodec": load_video_torchcodec, "torchcodec": torchcodec_resizing}
    return found


def in_workers(way, path: str, pool, calls: int):
    """`calls` calls spread over the workers of a pool."""
    list(pool.map(way, [path] * calls))


def start_worker():
    torch.set_num_threads(1)  # as in the workers of a data loader


def measure(seconds, size, gop, path: str, options, pool=None) -> tuple[list[Line], dict]:
    calls = {"uniform": uniform, "all": decode_all, **ways()}
    if seconds > 60:
        calls.pop("all")  # that is load_video pyav, nearly
    if pool is None and seconds < 60:
        calls["floor"] = Floor(path)
    has_several_keys = seconds * 25 > gop * NUM_FRAMES / 2
    if has_several_keys and pool is None:
        calls["keyframe"] = keyframe
    if pool is None:
        bound = {name: way if name == "floor" else functools.partial(way, path) for name, way in calls.items()}
    else:
        bound = {name: functools.partial(in_workers, way, path, pool, options.calls) for name, way in calls.items()}
    # Half as many turns where each takes seconds, and two for the long clip.
    repeats = 2 if seconds > 60 else options.repeats if pool is None else max(2, options.repeats // 2)
    times = in_turns(bound, repeats, warm_up=seconds < 60)
    per_call = 1000 / (1 if pool is None else options.calls)  # milliseconds
    medians = {name: statistics.median(values) * per_call for name, values in times.items()}

    title = f"decode {seconds} s, {size[1]}p, key every {gop}, {1 if pool is None else 2} proc."
    library = {name: times[name] for name in ways() if name.startswith("load_video")}
    best = min(library, key=lambda name: medians[name])
    goal = 4.5 if seconds > 60 else 1.0  # never below the best way of the library
    if seconds > 60:
        best = "load_video pyav"
    limit = times.get("all")
    lines = [
        compare(
            title,
            times["uniform"],
            times[best],
            best,
            scale=per_call,
            unit="ms",
            goal=goal,
            limit=limit,
            limit_name="full decode" if limit else "",
        )  # fmt: skip
    ]
    if "torchcodec" in times:
        lines.append(
            compare(
                title,
                times["uniform"],
                times["torchcodec"],
                "torchcodec, resizing",
                scale=per_call,
                unit="ms",
                goal=0.95,
            )
        )
    if "floor" in times:
        lines.append(
            compare(
                title,
                times["uniform"],
                times["floor"],
                "floor",
                scale=per_call,
                unit="ms",
                speedup=False,
                goal=1.10,
            )
        )
    if "keyframe" in times:
        lines.append(
            compare(
                f"keyframe {seconds} s, {size[1]}p, key every {gop}",
                times["keyframe"],
                times["uniform"],
                "uniform",
                scale=per_call,
                unit="ms",
                goal=8.0,
                note=f"{len(keyframe(path))} frames",
            )  # fmt: skip
        )
    return lines, {"clip": title, "milliseconds": medians}


def main():
    options = parser(__doc__)
    options.set_defaults(repeats=9)
    options.add_argument("--long", type=float, default=300, help="seconds of the long clip; 0: none")
    options.add_argument("--calls", type=int, default=6, help="clips a turn for two processes")
    options.add_argument("--folder", type=Path, help="keep the clips here (default: a temporary folder)")
    options = options.parse_args()

    lines, details = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cases = SHORT + ([(int(options.long), (640, 360), 250)] if options.long else [])
        paths = {case: str(write_clip(folder / f"{case[0]}s_{case[1][1]}p_{case[2]}.mp4", *case)) for case in cases}
        for case in cases:
            measured, detail = measure(*case, paths[case], options)
            lines += measured
            details.append(detail)
        lines += measure_containers(paths[10, (640, 360), 250], folder, options)
        context = multiprocessing.get_context("spawn")  # decoders must not live through a fork
        with concurrent.futures.ProcessPoolExecutor(2, context, start_worker) as pool:
            for case in SHORT:
                if case[0] == 10:
                    measured, detail = measure(*case, paths[case], options, pool)
                    lines += measured
                    details.append(detail)
    finish("decode", lines, options, {"cases": details})


if __name__ == "__main__":
    main()
