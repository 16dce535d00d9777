# SPDX-License-Identifier: Apache-2.0
"""Publish a finished run as a repository on the Hub that works without this project.

    python hub_cards/release.py runs/demo --repo_id org/camoe-motion --dry_run release
    python hub_cards/release.py runs/demo --repo_id org/camoe-motion [--create_pr] [--private]
    python hub_cards/release.py runs/demo --repo_id org/camoe-motion --example_clips data/motion_demo/test/*_0000*.mp4

Builds the release folder (weights, code, processor, card, results), loads it in a fresh process that cannot import
this project, checks that the vectors are the same to the bit, lists the files, and uploads them in one commit, so that
an interrupted upload leaves the repository as it was. A release always has a card, and a card shows only results that
the run's eval_results.json holds.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from card import CardError, Run, read_source, render_card
from check_release import fingerprint
from examples import CLIP_SUFFIXES, ExampleError, add_examples
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from machine_paths import find_machine_paths
from transformers.utils import logging

from modeling_camoe import CAMoEModel, CAMoEPipeline, CAMoEProcessor
from modeling_camoe.saving import SMALL_FILES


HERE = Path(__file__).parent

# From the run, if it has them.
RUN_FILES = ("query_bank.txt", "eval_results.json", "eval_ranks.safetensors", "all_results.json", "recipe.yaml")
# From this folder, in every release.
STATIC_FILES = ("handler.py", "untrusted.py", "requirements.txt")
# What a release may contain beside the small files that saving writes: text, pictures, safetensors and example clips,
# but no pickles, which can run code.
SUFFIXES = frozenset({".jpg", ".json", ".md", ".png", ".safetensors", ".txt", ".yaml", *CLIP_SUFFIXES})
# Files of an earlier release to delete: old code or shards would still be loaded.
STALE = re.compile(r"[^/]+\.(py|safetensors|safetensors\.index\.json)|examples\.json|example_\d+\.\w+")


class ReleaseError(Exception):
    """A mistake of the user: one line and exit code 2."""


def find_card(card: str | None, repo_id: str) -> Path:
    """The source of the card: the given file, or the one named like the repository."""
    source = Path(card) if card else HERE / f"{repo_id.split('/')[-1]}.md"
    if not source.is_file():
        names = ", ".join(sorted(path.stem for path in HERE.glob("camoe-*.md")))
        raise ReleaseError(
            f"no card: {source} does not exist; give --card FILE, or name the repository as one of {names}"
        )
    return source


def assemble(run_dir: Path, folder: Path, source: Path, repo_id: str, example_clips=()) -> dict[str, str]:
    """Build the release of a run in `folder`; returns the fingerprint of its model.

    Args:
        run_dir: output_dir of a finished run.
        folder: an empty folder.
        source: of the card.
        repo_id: name of the repository in the card.
        example_clips: paths of clips to include.
    """
    if not (run_dir / "config.json").is_file() or not list(run_dir.glob("*.safetensors")):
        raise ReleaseError(
            f"{run_dir} holds no config.json with model.safetensors; give the output_dir of a finished run"
        )
    model = CAMoEModel.from_pretrained(run_dir).eval()
    processor = CAMoEProcessor.from_pretrained(run_dir)
    retrieval = CAMoEPipeline(model, processor=processor, device="cpu")
    retrieval.save_pretrained(folder)  # a whole release (modeling_camoe/saving.py)
    for name in RUN_FILES:
        if (run_dir / name).is_file():
            shutil.copy(run_dir / name, folder / name)
    for picture in run_dir.glob("*.png"):
        shutil.copy(picture, folder / picture.name)
    for name in STATIC_FILES:
        shutil.copy(HERE / name, folder / name)
    if example_clips:
        header, _ = read_source(source)
        add_examples(folder, retrieval, example_clips, [header["example"], header["other_example"]])
    (folder / "README.md").write_text(render_card(source, Run.read(folder), repo_id), encoding="utf-8")
    names = sorted(path.name for path in folder.iterdir() if path.suffix not in SUFFIXES)
    unknown = [name for name in names if not SMALL_FILES.fullmatch(name)]
    if unknown:
        raise ReleaseError(f"the release would contain files of an unknown kind: {', '.join(unknown)}")
    return fingerprint(model, processor)


def check_paths(folder: Path):
    """Refuse to publish paths of this machine."""
    found = find_machine_paths(folder)
    if found:
        raise ReleaseError(
            f"the release would publish paths of this machine: {'; '.join(found)}. Replace them in these files of the "
            "run by what a reader needs to know (the name of the data, of the model on the Hub), and release again"
        )


def verify(folder: Path, expected: dict[str, str]):
    """Load the folder where this project is not installed; the vectors must equal the run's to the bit."""
    with tempfile.TemporaryDirectory() as modules:  # where transformers copies remote code
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        done = subprocess.run(
            [sys.executable, "-I", str(HERE / "check_release.py"), str(folder.resolve())],
            capture_output=True, text=True, env=environment, cwd=modules,
        )  # fmt: skip
    if done.returncode != 0:
        cause = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ReleaseError(f"the release does not load where this project is not installed: {cause[0]}")
    if json.loads(done.stdout.splitlines()[-1]) != expected:
        raise ReleaseError("the release loads, but its vectors differ from those of the run's model")


def describe(folder: Path, repo_id: str) -> str:
    """What will be uploaded, one line per file."""
    files = sorted(path for path in folder.iterdir())
    total = sum(path.stat().st_size for path in files)
    lines = [f"{path.stat().st_size:>12,}  {path.name}" for path in files]
    if (folder / "config.json").is_file() and not (folder / "eval_results.json").is_file():
        lines.append("no eval_results.json: the card says that nothing was measured")
    return "\n".join([f"{repo_id}: {len(files)} files, {total / 1e6:.1f} MB", *lines])


def upload(folder: Path, repo_id: str, private: bool, create_pr: bool, repo_type: str = "model") -> str:
    """Upload everything in one commit; returns the URL of the commit or the pull request.

    Raises:
        ReleaseError: no access, no connection, or the upload failed.

    `upload_folder` is no alternative: with xet it may commit in parts, and in between users would load old weights
    with new code.
    """
    api = HfApi()
    files = sorted(path for path in folder.iterdir())
    operations = [CommitOperationAdd(path.name, path) for path in files]
    names = {path.name for path in files}
    try:
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
        for name in api.list_repo_files(repo_id, repo_type=repo_type):
            if name not in names and STALE.fullmatch(name):
                operations.append(CommitOperationDelete(name))
        message = f"Release {repo_id}"
        commit = api.create_commit(
            repo_id, operations, commit_message=message, create_pr=create_pr, repo_type=repo_type
        )
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: a large file failed
        raise ReleaseError(f"the upload failed, and the repository is as it was: {error}") from error
    return commit.pr_url or commit.commit_url


def dry_run_folder(dry_run: str | None) -> Path | None:
    """The folder that a dry run leaves behind; it must not exist yet."""
    kept = Path(dry_run) if dry_run else None
    if kept is not None and kept.exists():
        raise ReleaseError(f"--dry_run: {kept} exists already; name a new folder")
    if kept is not None and not kept.parent.is_dir():
        raise ReleaseError(f"--dry_run: the folder {kept.parent} does not exist")
    return kept


def release(arguments: argparse.Namespace):
    """Run the whole program."""
    try:
        validate_repo_id(arguments.repo_id)
    except HFValidationError as error:
        raise ReleaseError(f"--repo_id: {error}") from error
    run_dir = Path(arguments.run_dir)
    if not run_dir.is_dir():
        raise ReleaseError(f"the run {run_dir} does not exist")
    source = find_card(arguments.card, arguments.repo_id)
    kept = dry_run_folder(arguments.dry_run)
    with tempfile.TemporaryDirectory(dir=kept.parent if kept else None, prefix=".release_") as temporary:
        folder = Path(temporary) / "release"
        folder.mkdir()
        expected = assemble(run_dir, folder, source, arguments.repo_id, arguments.example_clips)
        check_paths(folder)
        verify(folder, expected)
        print(describe(folder, arguments.repo_id))
        if kept is not None:
            os.replace(folder, kept)
            print(f"dry run: nothing was uploaded; the release is in {kept}")
        else:
            print(f"uploaded: {upload(folder, arguments.repo_id, arguments.private, arguments.create_pr)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", help="output_dir of a finished run")
    parser.add_argument("--repo_id", required=True, help="repository on the Hub, for example org/camoe-msrvtt")
    parser.add_argument("--card", help="source of the card (default: the one in hub_cards/ named like the repository)")
    parser.add_argument(
        "--dry_run", metavar="DIR", help="build and check the release in this new folder; upload nothing"
    )
    parser.add_argument(
        "--example_clips", nargs="+", metavar="CLIP", default=[],
        help="clips for the card and the Space; make sure that you may publish them",
    )  # fmt: skip
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing to main")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        release(arguments)
    except (ReleaseError, CardError, ExampleError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was released", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
