# SPDX-License-Identifier: Apache-2.0
"""`camoe index --watch` follows what happens in a folder."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from camoe_search import watch
from camoe_search.index import VideoIndex


def wait_for(condition, seconds: float = 120):
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "nothing happened"
        time.sleep(0.2)


def test_files_that_appear_and_go_are_followed_until_interrupted(some_videos, checkpoint, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    shutil.copy(some_videos / "clip_0.mp4", videos)
    command = [sys.executable, "-m", "camoe_search", "index", str(videos), "--model", str(checkpoint), "--watch"]
    command += ["--index", str(tmp_path / "index"), "--num-workers", "0", "--no-text-tower", "--prune"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in a background
    ) as process:  # fmt: skip
        try:
            while "watching" not in (line := process.stderr.readline()):
                assert line, "it ended"
            index = VideoIndex(tmp_path / "index")
            assert len(index) == 1

            shutil.copy(some_videos / "clip_1.mp4", videos)  # perhaps before the watcher has started
            wait_for(lambda: len(index) == 2)
            (videos / "clip_0.mp4").unlink()
            wait_for(lambda: len(index) == 1)
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert process.returncode == 130


def test_what_changed_before_the_watcher_started_is_looked_at_once(tmp_path):
    (tmp_path / "early.mp4").touch()
    waiting = watch.changes([str(tmp_path)])
    assert next(waiting) is None  # without any later change


def test_without_the_package_folders_are_looked_at_again_and_again(monkeypatch):
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    slept = []
    monkeypatch.setattr(watch.time, "sleep", slept.append)
    waiting = watch.changes(["/somewhere"])
    assert [next(waiting) for _ in range(3)] == [None] * 3 and slept == [watch.POLL_SECONDS] * 3


@pytest.mark.parametrize("name", ["camoe_search.remove", "camoe_search.index", "camoe_search.cli"])
def test_commands_that_load_no_model_import_no_torch(name):
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {name}; print('torch' in sys.modules or 'transformers' in sys.modules)"],
        env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "False\n", done.stderr


def test_what_an_update_writes_into_an_index_among_the_videos_is_no_change(tmp_path, monkeypatch):
    index, video = tmp_path / "index", tmp_path / "new.mp4"
    seen = [set(), {(1, f"{index}/index.sqlite-wal")}, {(1, f"{index}/index.sqlite"), (1, str(video))}]
    monkeypatch.setattr("watchfiles.watch", lambda *folders, **options: iter(seen))
    assert list(watch.changes([str(tmp_path)], index)) == [None, None]  # the first look, and the video
