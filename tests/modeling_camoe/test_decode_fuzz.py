# SPDX-License-Identifier: Apache-2.0
"""Damaged files of all kinds give the frames of a plain decode, or an error that names the file."""

import pytest

from tests import decode_fuzz


# Of the thousand that the program makes: every fifteenth, so that all kinds and all mutations come up.
NUMBERS = range(0, 960, 16)


@pytest.mark.slow
def test_damaged_files_are_decoded_right_or_refused(tmp_path):
    kinds = decode_fuzz.write_kinds(tmp_path)
    contents = [path.read_bytes() for path in kinds]
    paths = []
    for number in NUMBERS:
        kind, mutation, content = decode_fuzz.mutate(contents, number)
        paths.append(tmp_path / f"{number}_{mutation}_{kinds[kind].name}")
        paths[-1].write_bytes(content)
    outcomes = dict(decode_fuzz.run(paths))
    assert len(outcomes) == len(paths)
    assert {paths[i].name: o for i, o in outcomes.items() if o["outcome"] in decode_fuzz.BAD} == {}
    assert sum(outcome["outcome"] == "right" for outcome in outcomes.values()) > 15


def test_a_frame_of_another_video_is_told_from_the_right_one():
    import numpy as np

    plain = [np.full((3, 4, 4), level, np.uint8) for level in (0, 50, 100)]
    assert decode_fuzz.largest_difference(np.stack([plain[0], plain[2]]), plain) == 0
    assert decode_fuzz.largest_difference(np.stack([plain[2], plain[0]]), plain) == 255  # in another order
    assert decode_fuzz.largest_difference(np.stack([plain[1] + 9]), plain) == 9
