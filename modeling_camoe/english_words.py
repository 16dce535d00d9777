# SPDX-License-Identifier: Apache-2.0
"""Word lists of english_tags.py and english_streams.py.

Function words, and the few nouns and verbs that decide what a prepositional phrase means, all in lower case.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _forms(verbs: str) -> frozenset[str]:
    """All forms of regular verbs (and some that do not exist, which does no harm)."""
    forms = set()
    for verb in verbs.split():
        stem = verb.removesuffix("e")
        forms.update(
            (verb, f"{verb}s", f"{verb}es", f"{stem}ing", f"{stem}ed", f"{verb}{verb[-1]}ing", f"{verb}{verb[-1]}ed")
        )
    return frozenset(forms)


# Prepositions whose phrase says where something is or goes.
PLACE_PREPOSITIONS = _words(
    "in on at over under above below beneath underneath beside behind near between among amongst amid amidst "
    "across through throughout along alongside past against inside outside within around round by beyond atop "
    "upon opposite off into onto toward towards up down out"
)
PARTICLES = _words("up down on in off out over away")  # of a verb, with or without an object: "picks up a ball"
# What these lead to is a thing, and a place only where the caption names no other ("runs into the crowd") ...
GOAL_PREPOSITIONS = _words("into onto off toward towards away out")
# ... and these lead somewhere after such verbs only ("walks to the store", but "talks to a child").
MOTION_PREPOSITIONS = _words("to from")
MOTION_VERBS = _forms(
    "go walk run drive ride travel move fly swim jump head come return climb crawl roll slide drift race float "
    "hop glide rise fall drop rush sail march bounce hang emerge swing leap step pass lead spread stretch pull "
    "push drag carry throw pour"
) | _words("went gone ran drove rode flew swam came rose fell fallen hung swung leapt led threw travelled travelling")
LEAPING_VERBS = _forms("jump leap hop step climb") | {"leapt"}  # over things
# What these lead to is a thing; right after a verb they go with it ("talks about", "runs after").
THING_PREPOSITIONS = _words("of with for about after like without")
# These join clauses, or tell when and why.
CONJUNCTIONS = _words(
    "as than per during before since until till despite via except including versus that while if because whether "
    "though although unless"
)
PREPOSITIONS = PLACE_PREPOSITIONS | MOTION_PREPOSITIONS | THING_PREPOSITIONS | CONJUNCTIONS
# Two words that act as one preposition: do they say where?
PREPOSITION_PAIRS = {
    **dict.fromkeys([("next", "to"), ("close", "to"), ("adjacent", "to"), ("near", "to"), ("in", "between")], True),
    **dict.fromkeys([("out", "of"), ("outside", "of"), ("inside", "of"), ("off", "of"), ("away", "from")], True),
    **dict.fromkeys([("because", "of"), ("instead", "of"), ("along", "with"), ("due", "to"), ("such", "as")], False),
}
# Words of direction: motion, unless they belong to a noun ("slides right", but "his right hand").
DIRECTIONS = _words(
    "left right up down upward upwards downward downwards forward forwards backward backwards sideward sidewards "
    "sideways leftward leftwards rightward rightwards inward inwards outward outwards clockwise counterclockwise "
    "counter-clockwise anticlockwise anti-clockwise diagonally vertically horizontally around round away back "
    "forth"
)
# Both word of direction and preposition: before a noun they open a phrase of place.
DIRECTION_PREPOSITIONS = _words("up down around round")
# What makes a direction of a phrase: the end in "to the left", "from side to side" ...
GOAL_NOUNS = DIRECTIONS | _words("top bottom side centre center middle edge corner end north south east west")
# ... the picture rather than a place in it ("across the screen", "away from the camera") ...
FRAME_NOUNS = _words("screen frame camera viewer view lens")
# ... and the manner of moving ("in a circle", "at high speed", "around its axis").
MANNER_NOUNS = _words(
    "circle circles loop loops spiral spirals zigzag zigzags zig-zag arc line direction directions motion reverse "
    "place spot speed pace axis rhythm unison sync steps itself himself herself themselves"
)
MANNER_PREPOSITIONS = _words("in at on around")
# "in a red shirt" says who, not where.
WORN_NOUNS = _words(
    "shirt shirts t-shirt tshirt dress dresses suit suits hat cap jacket coat uniform uniforms costume costumes "
    "outfit outfits clothes clothing jeans shorts pants skirt sweater hoodie glasses sunglasses helmet mask wig "
    "bikini swimsuit robe gown tie vest makeup attire"
)
COLOURS = _words(
    "red blue green yellow purple orange white black pink cyan brown grey gray magenta turquoise teal violet "
    "golden silver beige"
)
# The "at" of these verbs is an aim, not a place.
AIMING_VERBS = _forms("look star stare gaze glance peer point shoot laugh smile wave yell shout aim bark grab") | {
    "shot"
}
PLACE_ADVERBS = _words(
    "outside outdoors inside indoors underwater upstairs downstairs overhead nearby underground onstage backstage "
    "aboard"
)
# Adverbs that tell neither action nor place.
EMPTY_ADVERBS = _words("also too then just even only so very as else ever however there here well rather quite really")
# Auxiliary verbs, which alone tell nothing that happens; those that can also be main verbs ("does gymnastics"); and
# those of captions that only point ("we see a ball rolling", "a ball can be seen rolling").
LIGHT_VERBS = _words(
    "be is s are was were been being am 's 're 'm can could will would shall should may might must ca wo 'll 'd"
)
HELPING_VERBS = _words("have has had having 've do does did")
SEEING_VERBS = _words("see sees seen")
# "in the video" is where every clip happens, and "at the same time" is no place.
RECORDINGS = _words("video videos clip clips footage")  # "a video of a man": not an entity where others are
EMPTY_PLACES = RECORDINGS | _words("time times moment while second seconds minute minutes once least")

SINGULAR_DETERMINERS = _words("a an one this that each every another")
PLURAL_DETERMINERS = _words("two three four five six seven eight nine ten some many several these those both all")
CLOSED_CLASS = (
    PREPOSITIONS
    | DIRECTIONS
    | PLACE_ADVERBS
    | LIGHT_VERBS
    | HELPING_VERBS
    | PLURAL_DETERMINERS
    | _words(
        "a an one this that each every another the no any its his her their my your our and or but & which who not"
    )
)
QUANTITIES = _words("few couple dozen hundred thousand lot bunch pair")  # "a couple kids" is plural
INDEFINITE_PRONOUNS = _words(
    "something someone somebody anything anyone anybody everything everyone everybody nothing nobody"
)
# Things in -ing, which need not be verbs even where the caption has no other.
THINGS_IN_ING = _words(
    "building ceiling painting wedding clothing ring king string spring wing thing evening morning railing "
    "lightning awning parking crossing landing opening beginning ending meeting drawing icing earring dressing "
    "frosting pudding topping something anything nothing everything sibling duckling lighting flooring bedding "
    "carving"
)
