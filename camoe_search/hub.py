# SPDX-License-Identifier: Apache-2.0
"""Push an index to a data set repository on the Hub, and download it. The client is imported on use."""

from pathlib import Path

from .errors import SearchError
from .store import Description


def upload(folder: Path, description: Description, num_moments: int, repo_id: str, private: bool) -> str:
    """Upload the current generation of an index, replacing an earlier one. Returns the URL of the repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=folder,
        allow_patterns=[f"{description.generation}/**", "index.json", "skipped.jsonl"],
        delete_patterns="generation-*/**",
        commit_message=f"Index of {num_moments} moments",
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
