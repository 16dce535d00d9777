# SPDX-License-Identifier: Apache-2.0
"""The options of `camoe search`: what to look for, and which results."""

import argparse


SEARCH_HELP = """Search with texts, or with a video or picture. The score is the similarity, from -1 to 1, minus a
correction for hubs: a video that resembles every query ranks first too often, and the query bank measures how much.
Overlapping windows of a film are one result, and so are identical files.

what to look for
  camoe search "a red star spins" --index my-index -k 5 --grid found.png
  camoe search "a dog" --text "on a beach*0.5" --not people --index my-index      weights; what you do not want
  camoe search --like clip.mp4 --index my-index --json                            or a picture, or a part of a film:
  camoe search --like film.mp4@12.5-15 --text "at night" --index my-index
  camoe search "a man opens a door" --then "he sits down" --index my-index        one after the other in a file
  camoe search "budget meeting" --words --index my-index        also file names, captions (metadata.jsonl), subtitles

which results
  camoe search "a goal" --group-by file --min-score 0.2 --index my-index
  camoe search "a goal" --glob "2024/*.mp4" --after 2024-05-01 --max-duration 600 --min-resolution 720 --index my-index
  camoe search "a goal" --where "year>=2020" --where place=Rome --index my-index       columns of metadata.jsonl
  camoe search "someone jumps" --index my-index --expert action=2 --path holiday"""


def add_query_options(parser):
    """What to look for."""
    parser.add_argument("text", nargs="?", help="what to look for")
    parser.add_argument(
        "--text", dest="texts", action="append", default=[], type=_wanted, metavar="TEXT[*WEIGHT]",
        help="another text, with a weight beside 1 of the first, such as \"on a beach*0.5\"; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--not", dest="negative", action="append", default=[], type=_unwanted, metavar="TEXT[*WEIGHT]",
        help="what results should not show (weight 0.5 unless given); may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--like", metavar="FILE[@START-END]",
        help="find moments like this video, picture, or part of a video (seconds); alone or with texts",
    )  # fmt: skip
    parser.add_argument(
        "--then", metavar="TEXT", help="what comes later in the same file; finds files that have both in this order"
    )
    parser.add_argument(
        "--words", action="store_true",
        help="also look for the words in file names, captions and subtitles, and fuse both rankings",
    )  # fmt: skip


def add_result_options(parser):
    """How results are grouped, and the fields of `results.Filters`."""
    parser.add_argument(
        "--group-by", choices=("file",), help="one result per file: its best moment, below it all that stand out"
    )
    parser.add_argument("--no-merge", action="store_true", help="a result for every window and every identical file")
    parser.add_argument("--min-score", type=float, metavar="SCORE", help="only results with at least this score")
    group = parser.add_argument_group("filters")
    group.add_argument("--path", metavar="TEXT", help="only files whose path contains this")
    group.add_argument(
        "--glob",
        metavar="PATTERN",
        help='only files whose path ends like this: "2024/*.mp4"; * also crosses /',
    )
    group.add_argument("--min-seconds", type=float, metavar="S", help="only windows at least this long")
    group.add_argument("--max-seconds", type=float, metavar="S", help="only windows at most this long")
    group.add_argument("--min-duration", type=float, metavar="S", help="only files at least this long, in seconds")
    group.add_argument("--max-duration", type=float, metavar="S", help="only files at most this long, in seconds")
    group.add_argument("--after", metavar="DATE", help="only files of that day or later, such as 2024-05-01")
    group.add_argument("--before", metavar="DATE", help="only files older than that day or time")
    group.add_argument(
        "--min-resolution", type=_whole, metavar="P", help="only pictures whose short side has this many pixels: 720"
    )
    group.add_argument("--max-resolution", type=_whole, metavar="P", help="or at most this many")
    group.add_argument(
        "--where", action="append", default=[], metavar="NAME=VALUE",
        help="only files with such metadata; also != < <= > >=, which compare numbers with numbers; may be repeated",
    )  # fmt: skip


def _wanted(text: str):
    from .queries import parse_weighted  # imports numpy, for which --help should not wait

    return parse_weighted(text)


def _unwanted(text: str):
    from .queries import NOT_WEIGHT, parse_weighted

    return parse_weighted(text, NOT_WEIGHT)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
