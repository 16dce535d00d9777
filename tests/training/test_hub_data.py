# SPDX-License-Identifier: Apache-2.0
"""`--dataset_name org/name`: a data set that contains its videos, read from a Hub on the loopback interface."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest

from tests.programs import run_program
from tests.tiny_processor import tiny_model_and_processor
from tests.video_files import write_video


REPOSITORY, COMMIT = "org/clips", "a" * 40


class _Handler(BaseHTTPRequestHandler):
    """The part of the API that `datasets` uses to find and fetch the files of one data set; all else is not found."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/"
        if path.startswith(api):
            return self._answer_api(path.removeprefix(api).strip("/"), body)
        name = path.removeprefix(resolve).partition("/")[2] if path.startswith(resolve) else None
        if name in self.files:
            return self._send_file(name)
        self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_POST = do_GET

    def _answer_api(self, what: str, body: bytes):
        def entry(name: str) -> dict:
            return {"type": "file", "path": name, "size": len(self.files[name]), "oid": "b" * 40}

        if what.startswith("paths-info/"):
            try:
                paths = json.loads(body)["paths"]
            except ValueError:
                paths = parse_qs(body.decode())["paths"]
            answer = [entry(name) for name in paths if name in self.files]
        elif what.startswith("tree/"):
            answer = [entry(name) for name in self.files]
        else:
            files = [{"rfilename": name} for name in self.files]
            answer = {"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": files}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str):
        content, headers = self.files[name], {"ETag": f'"{len(name):040}"', "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, content, headers)
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        start, end = int(start), min(int(end or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)

    def _send(self, status: int, body: bytes, headers: dict):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path):
    """The address of a Hub with one data set: a table that contains three videos."""
    clips = [write_video(tmp_path / f"{n}.mp4", num_frames=4 + n, fps=4, size=(32, 32)) for n in range(3)]
    rows = {
        "video": [{"bytes": clip.read_bytes(), "path": clip.name} for clip in clips],
        "caption": ["a red star spins", "two kids are playing", "a small blue disc"],
    }
    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    table = tmp_path / "table.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(table)
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test.parquet\n---\n"
    handler = type("Handler", (_Handler,), {"files": {"README.md": card, "data/test.parquet": table.read_bytes()}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def on(hub: str, cache) -> str:
    """Code that points a program, whose libraries are imported already, to this Hub and to its own caches."""
    return f"""
import datasets, huggingface_hub
constants, config = huggingface_hub.constants, datasets.config
constants.ENDPOINT = config.HF_ENDPOINT = {hub!r}
constants.HUGGINGFACE_CO_URL_TEMPLATE = {hub!r} + "/{{repo_id}}/resolve/{{revision}}/{{filename}}"
constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = False
constants.HF_HUB_CACHE = config.HF_HUB_CACHE = {str(cache / "hub")!r}
config.HF_DATASETS_CACHE = {str(cache / "datasets")!r}
config.DOWNLOADED_DATASETS_PATH = {str(cache / "datasets" / "downloads")!r}
"""


def test_a_data_set_is_scored_straight_from_the_hub(hub, tmp_path):
    model, processor = tiny_model_and_processor()
    processor.tagger = None
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    given = ("--checkpoint", tmp_path / "checkpoint", "--dataset_name", REPOSITORY, "--corrections", "[none]")
    done = run_program("evaluate_retrieval.py", *given, "--num_workers", 0, code=on(hub, tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "checkpoint" / "eval_results.json").read_text())
    assert (results["num_texts"], results["num_videos"], results["dataset"]) == (3, 3, "clips")

    done = run_program("evaluate_retrieval.py", *given, "--split", "train", "--validation_split", "null",
                       "--train_split", "null", code=on(hub, tmp_path / "cache"))  # fmt: skip
    assert done.returncode == 2 and "cannot load split 'train' of org/clips" in done.stderr.splitlines()[-1]
