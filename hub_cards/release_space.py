# SPDX-License-Identifier: Apache-2.0
"""Publish a Space that demonstrates a release on the Hub.

    python hub_cards/release_space.py --model org/camoe-motion --repo_id org/camoe-motion-demo --dry_run space
    python hub_cards/release_space.py --model org/camoe-motion --repo_id org/camoe-motion-demo [--private]

Copies space/, writes the name of the release into its metadata, and uploads it in one commit. If the model's
repository is private, the Space needs a token to read it: a secret called HF_TOKEN.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from release import ReleaseError, check_paths, describe, dry_run_folder, upload


SOURCE = Path(__file__).parent / "space"
NEEDED = ("config.json", "processor_config.json", "frames.py")  # files of the model's repository that the page loads


def assemble_space(folder: Path, model: str):
    """Build a Space that loads `model` in `folder`."""
    for path in SOURCE.iterdir():
        if path.is_file():
            shutil.copy(path, folder / path.name)  # follows links: some files are shared with the release
    card = SpaceCard.load(folder / "README.md")
    card.data.models = [model]
    card.text = card.text.replace("org/camoe-motion", model)
    card.save(folder / "README.md")


def check_model(model: str):
    """Check that the page will find its model.

    Raises:
        ReleaseError: there is no such repository, or it is not a release.
    """
    try:
        files = HfApi().list_repo_files(model)
    except (HTTPError, OSError) as error:
        raise ReleaseError(f"--model: {model} cannot be read: {error}") from error
    missing = [name for name in NEEDED if name not in files]
    if missing:
        raise ReleaseError(f"--model: {model} has no {', '.join(missing)}; release it with hub_cards/release.py first")


def release_space(arguments: argparse.Namespace):
    """Run the whole program."""
    for name in ("model", "repo_id"):
        try:
            validate_repo_id(getattr(arguments, name))
        except HFValidationError as error:
            raise ReleaseError(f"--{name}: {error}") from error
    kept = dry_run_folder(arguments.dry_run)
    with tempfile.TemporaryDirectory(dir=kept.parent if kept else None, prefix=".release_") as temporary:
        folder = Path(temporary) / "space"
        folder.mkdir()
        assemble_space(folder, arguments.model)
        check_paths(folder)
        if kept is None:
            check_model(arguments.model)
        print(describe(folder, arguments.repo_id))
        if kept is not None:
            os.replace(folder, kept)
            print(f"dry run: nothing was uploaded; the Space is in {kept}")
        else:
            print(f"uploaded: {upload(folder, arguments.repo_id, arguments.private, False, repo_type='space')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="repository of the release to demonstrate")
    parser.add_argument("--repo_id", required=True, help="name of the Space, for example org/camoe-motion-demo")
    parser.add_argument("--dry_run", metavar="DIR", help="build the Space in this new folder; upload nothing")
    parser.add_argument("--private", action="store_true", help="create a private Space")
    arguments = parser.parse_args()
    try:
        release_space(arguments)
    except (ReleaseError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing was released", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
