# SPDX-License-Identifier: Apache-2.0
"""Kills, full disks, read-only folders, and readers beside a writer: real processes, real signals."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from camoe_search.cli import main
from camoe_search.database import connect
from camoe_search.index import VideoIndex
from camoe_search.writer import IndexWriter
from tests.camoe_search.random_index import make_index, moment, random_index, random_texts, random_videos
from tests.video_files import write_video


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
OPTIONS = {"num_workers": 0, "batch_size": 2, "text_encoder": False}


def rows_of(folder) -> dict:
    """Every row by (name, start); vectors to the bit."""
    rows = VideoIndex(folder).table().to_pylist()
    return {(Path(row.pop("path")).name, row["start"]): row for row in rows}


def assert_equal_up_to_batches(rows: dict, expected: dict):
    """All but numbers to the bit. A clip whose batch has another size gets its sums in another order."""
    assert rows.keys() == expected.keys()
    for row in (*rows.values(), *expected.values()):
        row["numbers"] = np.hstack([row.pop("vector"), row.pop("gate_weights"), row.pop("bias")])
    for row, other in zip(map(rows.get, sorted(rows)), map(expected.get, sorted(rows)), strict=True):
        np.testing.assert_allclose(row.pop("numbers"), other.pop("numbers"), rtol=0, atol=1e-5)
    assert rows == expected


# --- SIGKILL ---------------------------------------------------------------------------------------------------------

# Starts a build in a process of its own, again and again, and kills it at a random moment until one gets through. The
# processes are forked, so that torch is imported once. Prints the number of kills and the moments after each.
KILL = """
import json, os, random, signal, sys, threading, time
import torch, tqdm
from camoe_search.encoder import CAMoEEncoder
from camoe_search.index import VideoIndex
torch.set_num_threads(1)
videos, folder, model = sys.argv[1:]
encoder = CAMoEEncoder.from_pretrained(model, device="cpu")
encoder.weights
options = dict(num_workers=0, batch_size=2, text_encoder=False, window=1, stride=0.05)
random_numbers, kills, moments, longest = random.Random(0), 0, [], 0.1
while True:
    child = os.fork()
    if not child:
        tqdm.tqdm.set_lock(threading.RLock())  # its own is shared by forks: a killed one would never release it
        VideoIndex.create_or_update([videos], folder, encoder, **options)
        os._exit(0)
    if kills < 20:
        time.sleep(random_numbers.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.path.exists(folder + "/index.sqlite"):
        moments.append(len(VideoIndex(folder)))  # it opens, whatever happened
    if status == 0:
        break
    kills += 1
    if moments[-3:] == moments[-1:] * 3:
        longest *= 1.3  # a busy machine: give it time to get somewhere
print(json.dumps([kills, moments]))
"""


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_in_the_index_of_an_unbroken_run(videos, encoder, tmp_path):
    for i in range(6, 12):
        write_video(videos / f"clip_{i}.mp4", 20 + i)
    command = [sys.executable, "-c", KILL, str(videos), str(tmp_path / "killed"), encoder.name]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, moments = json.loads(done.stdout.splitlines()[-1])
    assert kills >= 3 and moments == sorted(moments) and len(set(moments)) > 2
    torch.set_num_threads(1)  # as in the killed processes
    VideoIndex.create_or_update([videos], tmp_path / "unbroken", encoder, window=1, stride=0.05, **OPTIONS)
    assert_equal_up_to_batches(rows_of(tmp_path / "killed"), rows_of(tmp_path / "unbroken"))


def test_finished_work_is_kept_when_files_come_and_go_after_a_kill(videos, encoder, tmp_path, monkeypatch):
    encode_clips, made = type(encoder).encode_clips, []

    def stop_after_two(self, clips, *options):
        for batch in encode_clips(self, clips, *options):
            if len(made) == 2:
                raise KeyboardInterrupt
            made.append([Path(clips[i].source).name for i in batch.indices])
            yield batch

    monkeypatch.setattr(type(encoder), "encode_clips", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        VideoIndex.create_or_update([videos], tmp_path / "index", encoder, **OPTIONS)
    before = rows_of(tmp_path / "index")
    assert {name for name, _ in before} == {f"clip_{i}.mp4" for i in range(4)}
    write_video(videos / "a_first.mp4", 13)
    (videos / "clip_1.mp4").unlink()
    (videos / "clip_4.mp4").unlink()
    made[:] = [None] * 5
    index = VideoIndex.create_or_update([videos], tmp_path / "index", encoder, prune=True, **OPTIONS)
    assert sorted(made[5]) == ["a_first.mp4", "clip_5.mp4"] and len(made) == 6
    after = rows_of(index.folder)
    for key in ("clip_0.mp4", 0), ("clip_2.mp4", 0), ("clip_3.mp4", 0):
        assert after[key]["vector"] == before[key]["vector"]
    assert {name for name, _ in after} == {"a_first.mp4", *(f"clip_{i}.mp4" for i in (0, 2, 3, 5))}


# --- readers beside a writer -----------------------------------------------------------------------------------------

# Searches all the time; an answer is all moments of one state, which begin at second 1000 or later.
READ = """
import sys, time
import numpy as np
from camoe_search.index import VideoIndex
folder, stop = sys.argv[1], time.time() + float(sys.argv[2])
query = np.ones((1, 24), np.float32)
answers, opened = 0, None
while time.time() < stop:
    if answers % 5 == 0:
        opened = VideoIndex(folder)
    hits = opened.search_vectors(query, k=1000, correction="query_bank")[0]
    numbers = sorted(int(hit.path[-7:-4]) for hit in hits)
    # Every commit adds or removes a whole block of ten.
    assert len(numbers) % 10 == 0 and all(n // 10 * 10 in numbers for n in numbers), numbers
    assert numbers == sorted(n for block in {n // 10 for n in numbers} for n in range(10 * block, 10 * block + 10))
    answers += 1
print(answers)
"""


def test_a_segments_file_goes_only_when_no_commit_on_the_disk_names_it(tmp_path, monkeypatch):
    """Commits wait in the log, unsynced: a power cut after the file has gone must not bring them back."""
    random_index(tmp_path, 40)
    log, pending = tmp_path / "index.sqlite-wal", []
    monkeypatch.setattr(
        "camoe_search.writer.delete_segments", lambda folder, keep: pending.append((log.stat().st_size, keep))
    )
    with IndexWriter(tmp_path) as writer:
        writer.remove_files(list(range(1, 21)))
        writer.tidy()
    assert pending == [(0, {2})]


def test_readers_see_the_state_of_some_commit_while_a_writer_adds_removes_and_compacts(tmp_path):
    seconds = 6
    vectors = random_videos(100)[0].numpy()
    with make_index(tmp_path / "index") as writer:
        writer.add_moments("/videos", [moment(i) for i in range(10)], vectors[:10])
        command = [sys.executable, "-c", READ, str(tmp_path / "index"), str(seconds)]
        readers = [
            subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        random_numbers, there, changes = random.Random(1), {0}, 0
        while any(reader.poll() is None for reader in readers):
            block = random_numbers.randrange(10)
            rows = range(10 * block, 10 * block + 10)
            if block in there:
                files = writer.connection.execute(
                    "SELECT id FROM files WHERE path IN ({})".format(",".join(f"'{moment(i).path}'" for i in rows))
                )
                assert writer.remove_files([file for (file,) in files]) == 10
                there.remove(block)
            else:
                writer.add_moments("/videos", [moment(i) for i in rows], vectors[rows.start : rows.stop])
                there.add(block)
            if changes % 3 == 0:
                writer.tidy()
            changes += 1
        for reader in readers:
            out, errors = reader.communicate()
            assert reader.returncode == 0, errors
            assert int(out) > 10
    assert changes > 20
    stored = rows_of(tmp_path / "index")
    assert {int(name[:3]) // 10 for name, _ in stored} == there
    for (name, _), row in stored.items():
        np.testing.assert_array_equal(np.float32(row["vector"]), vectors[int(name[:3])])


# --- disks -----------------------------------------------------------------------------------------------------------

FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from camoe_search.cli import main
from camoe_search.database import connect
main(sys.argv[2:])
"""


def file_sizes(folder) -> list[int]:
    return [path.stat().st_size for path in folder.iterdir() if path.is_file()]


@pytest.mark.parametrize("share", ["vectors", "database"])
def test_a_full_disk_is_one_line_and_the_index_is_as_before(videos, checkpoint, encoder, tmp_path, share):
    """A limit of file sizes stands for the disk: writing beyond it fails as it does on a full one."""
    index = VideoIndex.create_or_update([videos / "clip_0.mp4"], tmp_path / "index", encoder, **OPTIONS)
    before, hits = rows_of(tmp_path / "index"), index.search("a red star")
    index.close()
    row = 4 * index.description.width
    limit = row + 100 if share == "vectors" else 20_000
    command = [sys.executable, "-c", FULL, str(limit), "index", str(videos), "--index", str(tmp_path / "index")]
    command += ["--num-workers", "0", "--no-text-tower"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert rows_of(tmp_path / "index") == before
    assert VideoIndex.load(tmp_path / "index", encoder).search("a red star") == hits
    assert len(VideoIndex.create_or_update([videos], tmp_path / "index", encoder, **OPTIONS)) == 6


def run_as_stranger(*arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `camoe` in a process that may not write to what this user owns (root may)."""
    from camoe_search import describe, index, remove  # noqa: F401  a stranger may not be able to import them

    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            code = 0
            try:
                sys.stdout, sys.stderr = out, errors
                if not os.geteuid():
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                main([str(argument) for argument in arguments])
            except SystemExit as stop:
                code = stop.code
            except BaseException as error:
                print(repr(error), file=errors)
                code = 99
            out.flush()
            errors.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        for file in (out, errors):
            file.seek(0)
        return os.waitstatus_to_exitcode(status), out.read(), errors.read()


def test_a_read_only_folder_can_be_searched_and_a_change_is_one_line():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to strangers
    try:
        index = random_index(folder / "index", 20)
        index.close()
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        code, _, errors = run_as_stranger("remove", "*/003.mp4", "--index", folder / "index")
        assert code == 2 and len(errors.splitlines()) == 1 and errors.startswith("error: "), errors
        code, out, errors = run_as_stranger("info", "--json", "--index", folder / "index")
        assert json.loads(out)["moments"] == 20, errors
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_what_an_interrupted_run_wrote_behind_the_rows_is_written_over(tmp_path):
    with make_index(tmp_path / "index") as writer:
        vectors = random_videos(20)[0].numpy()
        writer.add_moments("/videos", [moment(i) for i in range(10)], vectors[:10])
    segment = tmp_path / "index" / "segment-000001.vectors"
    with open(segment, "ab") as file:
        file.write(b"\xff" * 1000)  # vectors whose transaction was not committed
    index = VideoIndex(tmp_path / "index")
    assert len(index.search_vectors(random_texts(1).numpy(), 50)[0]) == 10
    with IndexWriter(tmp_path / "index") as writer:
        writer.add_moments("/videos", [moment(i) for i in range(10, 20)], vectors[10:])
    stored = rows_of(tmp_path / "index")
    for (name, _), row in stored.items():
        np.testing.assert_array_equal(np.float32(row["vector"]), vectors[int(name[:3])])
    assert len(stored) == 20


def test_a_damaged_database_is_one_line(tmp_path, capsys):
    random_index(tmp_path / "index").close()
    (tmp_path / "index" / "index.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(SystemExit) as stop:
        main(["info", "--index", str(tmp_path / "index")])
    assert stop.value.code == 2 and "cannot be opened" in capsys.readouterr().err


def test_segments_stay_while_a_reader_keeps_the_log_from_being_copied(tmp_path):
    """A commit that no longer names a segment must be on the disk before the segment's file goes."""
    vectors = random_videos(20)[0].numpy()
    index = random_index(tmp_path / "index", 20)
    with connect(tmp_path / "index") as reader, IndexWriter(tmp_path / "index") as writer:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM windows").fetchone()
        writer.connection.execute("PRAGMA busy_timeout = 0")
        writer.add_moments("/videos", [moment(i) for i in range(20, 40)], vectors)
        (tmp_path / "index" / "segment-000099.vectors").write_bytes(b"of a segment that is no longer named")
        writer.tidy()
        assert (tmp_path / "index" / "segment-000099.vectors").exists()
        reader.execute("COMMIT")
        writer.tidy()
    assert not (tmp_path / "index" / "segment-000099.vectors").exists() and len(index) == 40
