# SPDX-License-Identifier: Apache-2.0
"""An index on the Hub: pushed, opened from there, pushed again."""

import huggingface_hub
import pytest

from camoe_search.errors import SearchError
from camoe_search.index import VideoIndex
from tests.camoe_search.random_index import random_index, random_texts
from tests.hub_cards.fake_hub import FakeHub


REPO = "me/films"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as hub:
        for module in (huggingface_hub.constants, huggingface_hub.hf_api):
            monkeypatch.setattr(module, "ENDPOINT", hub.url, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", _template(hub.url))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield hub


def _template(url: str) -> str:
    return url + "/{repo_id}/resolve/{revision}/{filename}"


def test_a_pushed_index_opens_from_the_hub(hub, tmp_path):
    index = random_index(tmp_path / "index")
    (tmp_path / "index" / ".lock").touch()
    index.push_to_hub(REPO)
    repository = hub.repositories[f"datasets/{REPO}"]
    assert repository.private
    names = set(hub.files(f"datasets/{REPO}"))
    assert {"index.sqlite", "segment-000001.vectors"} <= names and ".lock" not in names

    text = random_texts(3).numpy()
    assert VideoIndex.load(REPO).search_vectors(text) == index.search_vectors(text)

    index.remove(["/videos/1", "/videos/2"])  # half of the rows: the segment is written again
    index.push_to_hub(REPO, private=False)
    names = set(hub.files(f"datasets/{REPO}"))
    assert {name for name in names if name.startswith("segment")} == {"segment-000002.vectors"}
    assert repository.messages[repository.commits[-1]] == "Index of 20 moments"
    pulled = VideoIndex.load(REPO)
    assert len(pulled) == 20 and pulled.search_vectors(text) == index.search_vectors(text)


def test_the_error_names_what_is_neither_a_folder_nor_on_the_hub(hub):
    for name in ("me/nothing", "no such/place/at all"):
        with pytest.raises(SearchError, match=f"{name} is neither a folder nor a data set on the Hub"):
            VideoIndex.load(name)
