# SPDX-License-Identifier: Apache-2.0
"""What `camoe serve` takes and gives. These models parse every request and make the OpenAPI document."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .queries import MAX_WEIGHT


MAX_PAGES = 200  # every page repeats the search for all results up to it
MAX_TEXTS = 16  # of one query

Text = Annotated[str, Field(max_length=100_000)]
Texts = Annotated[list[Text], Field(max_length=MAX_TEXTS)]
Seconds = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
Pixels = Annotated[int, Field(ge=1, le=1 << 16)]


class SearchOptions(BaseModel):
    """What both forms of a search take; unknown names, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    index: Text | None = Field(None, description="name of the index; the first one if not given")
    like: Text | None = Field(None, description="key of a moment, or of an upload, that results resemble")
    negative: Texts = Field([], alias="not", description="texts that results should not fit")
    then: Text | None = Field(None, description="what comes later in the same file")
    words: bool = Field(False, description="look for the words also in file names, captions and subtitles")
    page: int = Field(0, ge=0, lt=MAX_PAGES, description="of the results, from 0; further on, narrow the search")
    correction: Literal["none", "query_bank", "dynamic"] | None = Field(None, description="of hubs")
    group_by: Literal["file"] | None = Field(None, description="one result per file")
    min_score: float | None = None
    path: Text | None = Field(None, description="part of the path")
    glob: Text | None = Field(None, description="pattern of the path")
    min_seconds: Seconds | None = Field(None, description="of a moment")
    max_seconds: Seconds | None = None
    min_duration: Seconds | None = Field(None, description="of a file, in seconds")
    max_duration: Seconds | None = None
    after: Text | None = Field(None, description="date of the file, such as 2024-05-01, or later")
    before: Text | None = Field(None, description="earlier than that")
    min_resolution: Pixels | None = Field(None, description="of the short side, in pixels")
    max_resolution: Pixels | None = None
    where: Texts = Field([], description="conditions on metadata, such as year>=2020")


class SearchQuery(SearchOptions):
    """`GET /api/search?q=…`"""

    q: Text | None = Field(None, description="what to look for")

    @property
    def texts(self) -> list[tuple[str, float]]:
        return [] if self.q is None else [(self.q, 1.0)]

    @property
    def experts(self) -> dict[str, float]:
        return {}


class WeightedText(BaseModel):
    """A text and how much of it is wanted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    text: Text
    weight: float = Field(1.0, gt=0, le=MAX_WEIGHT)


class SearchBody(SearchOptions):
    """`POST /api/search`; types are exact: "1" is not a number."""

    model_config = ConfigDict(strict=True)

    text: Text | Annotated[list[WeightedText], Field(min_length=1, max_length=MAX_TEXTS)] | None = Field(
        None, description="what to look for: a text, or several with weights"
    )
    experts: dict[str, Weight] = Field({}, max_length=64, description="weights of experts; 1 for those not given")

    @property
    def texts(self) -> list[tuple[str, float]]:
        if isinstance(self.text, list):
            return [(each.text, each.weight) for each in self.text]
        return [] if self.text is None else [(self.text, 1.0)]


class Span(BaseModel):
    """A moment of a file."""

    key: str
    start: float = Field(description="seconds")
    end: float
    peak: tuple[float, float] = Field(description="start and end of the best window: play from there")
    score: float


class Result(Span):
    """A moment that was found."""

    name: str = Field(description="of the file")
    folder: str
    title: str = Field(description="the name, with as much of the folder as tells it from others on the page")
    paths: list[str] = Field(description="all files with this content")
    relevance: float = Field(description="0: as an average moment, 1: as the best one of this search")
    match: str = Field(description="relevance in words")
    experts: dict[str, float] | None = Field(description="what each adds to the score; null for a fused score")
    correction: float | None = Field(description="what the correction adds to the score")
    moments: list[Span] = Field(description="of the file, by time, where results are grouped or in order")


class Place(BaseModel):
    """A moment of a file, without a query."""

    key: str
    name: str
    folder: str
    title: str
    start: float
    end: float
    paths: list[str]


class Folder(BaseModel):
    """A folder with videos in it, or in folders of it."""

    path: str
    depth: int
    files: int


class Browse(BaseModel):
    """What there is to see before a search."""

    recent: list[Place] = Field(description="the newest files, of the folder if one was asked for")
    folders: list[Folder] = Field(description="in the order of a tree")
    examples: list[str] = Field(description="queries to begin with: from the query bank")


class Upload(BaseModel):
    """A video or picture that was sent as a query."""

    key: str = Field(description="for `like`")


class Results(BaseModel):
    """A page of results."""

    index: str
    hits: list[Result]
    page: int
    more: bool
    milliseconds: int


class About(BaseModel):
    """An index, its model and its settings."""

    index: str
    indexes: list[str] = Field(description="names of all that are served")
    moments: int
    model: str
    experts: list[str]
    corrections: list[str]
    correction: str
    page_size: int


class Health(BaseModel):
    """The server is alive."""

    status: Literal["ok"]


class Problem(BaseModel):
    """Why a request was refused."""

    error: str
