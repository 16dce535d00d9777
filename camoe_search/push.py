# SPDX-License-Identifier: Apache-2.0
"""`camoe push`: a folder of parts becomes a data set on the Hub, with a card that says how it was made."""

import os

from .errors import SearchError
from .load import Parts


CARD = """---
tags:
- camoe
- video-text-retrieval
configs:
- config_name: default
  data_files: part-*.parquet
---

# Vectors of {moments} moments

Made by `camoe encode` with `{model}` (weights {weights}): {experts} experts of {dim} entries, {num_frames} frames a
moment. The inner product of a row's `vector` and a text's vector is the score; minus `bias`, it is corrected for hubs.
The videos themselves are not here.

Search it without encoding anything:

```
camoe load {repo} --index my-index
camoe search "a dog catches a frisbee" --index my-index
```

or read it: `datasets.load_dataset("{repo}")`. The column `error` says why a row has no vector.
"""


def push_parts(folder: str, repo: str, private: bool = True) -> str:
    """Upload the parts of a folder. What the repository has already is not sent again.

    Returns:
        the address of the data set.

    Raises:
        SearchError: there are no parts, or the Hub refuses them.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not os.path.isdir(folder):
        raise SearchError(f"{folder} is no folder of this machine: give one that has parts")
    parts = Parts(folder)
    description = parts.description
    moments = 0
    for name in parts.names:
        with parts.folder.open(name) as file:
            moments += file.metadata.num_rows
    card = CARD.format(
        moments=moments,
        model=os.path.basename(description.model) if os.path.isabs(description.model) else description.model,
        weights=description.weights,
        experts=len(description.experts),
        dim=description.dim,
        num_frames=description.num_frames,
        repo=repo,
    )
    api = HfApi()
    try:
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns="part-*.parquet",
            delete_patterns="part-*.parquet",
            commit_message=f"{moments} moments",
        )
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo, repo_type="dataset")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SearchError(f"{repo} cannot be pushed: {' '.join(str(error).split())[:300]}") from error
    return str(url)
