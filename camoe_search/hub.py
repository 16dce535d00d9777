# SPDX-License-Identifier: Apache-2.0
"""Push an index to a data set repository on the Hub, and download it. The client is imported on use."""

from pathlib import Path

from .database import FILE, write_lock
from .errors import SearchError
from .local_store import LocalStore
from .segments import segment_path
from .text_encoder import FOLDER as TEXT_FOLDER
from .writer import IndexWriter


def upload(folder: Path, repo_id: str, private: bool) -> str:
    """Upload an index as it is now, replacing an earlier one. Returns the URL of the repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    with write_lock(folder):  # nothing may change while it is read
        with IndexWriter(folder) as writer:
            writer.tidy()  # all of the database is in one file then
        store = LocalStore(folder)
        segments = [segment_path(folder, number).name for (number,) in store.select("SELECT id FROM segments")]
        count = len(store)
        store.close()
        api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=[FILE, *segments, f"{TEXT_FOLDER}/*"],
            delete_patterns="segment-*",
            commit_message=f"Index of {count} moments",
        )
    return str(url)


def download(repo_id: str) -> str:
    """Download an index from the Hub; returns its local folder.

    Raises:
        SearchError: there is no such data set, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(repo_id, repo_type="dataset")
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SearchError(f"{repo_id} is neither a folder nor a data set on the Hub that can be reached") from error
