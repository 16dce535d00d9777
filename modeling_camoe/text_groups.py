# SPDX-License-Identifier: Apache-2.0
"""Four texts per caption at about the cost of one: encode each distinct text once, grouped by length.

A caption's streams are short, and a stream without words repeats the caption. Padded to one length, the streams of 128
captions hold four times the tokens of the captions alone. Without duplicates, and in three groups that are each padded
to their own longest text, they hold about as many. Padding after a text changes nothing where the text tower is causal
or masks it. SigLIP's is neither: there only the duplicates go.

M texts (N captions x E experts) of L tokens, H hidden size, D dims.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling


# Calls of the text tower per batch. The number is fixed because processes that share a sharded model must call it
# equally often. A fourth group would save another tenth of the tokens.
NUM_GROUPS = 3

# With fewer texts, padding is cheaper than more calls: each call leaves a gradient of the whole token table.
MIN_TEXTS = 64


def may_group(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether `encode_in_groups` pays off and is possible: not in a compiled or exported graph, whose shapes cannot
    depend on values."""
    # Checked first: a compiler would treat the number of texts as a constant.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or input_ids.device.type == "meta":
        return False
    return attention_mask is not None and len(input_ids) >= MIN_TEXTS


def encode_in_groups(
    encode: Callable, input_ids: torch.Tensor, attention_mask: torch.Tensor, may_trim: bool = True
) -> BaseModelOutputWithPooling | None:
    """The text tower's output for each text, computed once per distinct text. It equals one call for all texts up to
    rounding (1e-5 in float32).

    Args:
        encode: CLIP's `get_text_features`.
        input_ids, attention_mask: (M, L).
        may_trim: whether texts may be cut to the longest of their group.

    Returns:
        `pooler_output` (M, D) and `last_hidden_state` (M, L, H), zero beyond the longest text of a group; None if
        texts are padded on the left.
    """
    length = input_ids.shape[1]
    rows = torch.cat([input_ids, attention_mask.to(input_ids.dtype)], dim=1).tolist()  # one device synchronisation
    if not may_trim:
        return _encode_distinct(encode, input_ids, attention_mask, rows)
    lengths = [sum(row[length:]) for row in rows]
    if any(0 in row[length : length + size] for row, size in zip(rows, lengths, strict=True)):
        return None
    groups, positions = group_texts([tuple(row[:size]) for row, size in zip(rows, lengths, strict=True)])
    pooled, hidden = [], []
    for group in groups:
        longest = max(lengths[m] for m in group)
        index = torch.tensor(group, device=input_ids.device)
        output = encode(input_ids[index, :longest], attention_mask=attention_mask[index, :longest])
        pooled.append(output.pooler_output)
        hidden.append(F.pad(output.last_hidden_state, (0, 0, 0, length - longest)))
    positions = torch.tensor(positions, device=input_ids.device)
    return BaseModelOutputWithPooling(torch.cat(hidden)[positions], torch.cat(pooled)[positions])


def _encode_distinct(encode, input_ids, attention_mask, rows: list[list[int]]) -> BaseModelOutputWithPooling:
    """One call for the distinct rows of ids and mask (M, 2L)."""
    (group,), positions = group_texts([tuple(row) for row in rows], num_groups=1)
    index = torch.tensor(group, device=input_ids.device)
    output = encode(input_ids[index], attention_mask=attention_mask[index])
    positions = torch.tensor(positions, device=input_ids.device)
    return BaseModelOutputWithPooling(output.last_hidden_state[positions], output.pooler_output[positions])


def group_texts(texts: list[tuple[int, ...]], num_groups: int = NUM_GROUPS) -> tuple[list[list[int]], list[int]]:
    """Split the distinct texts into groups by length, so that little is padding.

    Args:
        texts: M token sequences.

    Returns:
        `num_groups` non-empty lists of indices into `texts`, together one for each distinct text (the last repeats
        where there are fewer texts than groups); and for each text (M,) its position in the concatenated groups.
    """
    first = {}  # text -> its first index
    for index, text in enumerate(texts):
        first.setdefault(text, index)
    ordered = sorted(first, key=len)
    cuts = _cheapest_cuts([len(text) for text in ordered], num_groups)
    groups = [[first[text] for text in ordered[start:end]] for start, end in zip(cuts, cuts[1:], strict=False)]
    groups += [groups[-1][-1:]] * (num_groups - len(groups))
    position = {text: index for index, text in enumerate(ordered)}
    return groups, [position[text] for text in texts]


def _cheapest_cuts(lengths: list[int], num_groups: int) -> list[int]:
    """Where to split ascending lengths so that padding each group to its longest costs least: [0, ..., M]."""
    ends = [i for i in range(1, len(lengths)) if lengths[i] > lengths[i - 1]] + [len(lengths)]
    best = {0: (0, [0])}  # number of texts so far -> (tokens, cuts)
    for _ in range(num_groups):
        reached = dict(best)
        for end in ends:
            options = [
                (cost + (end - start) * lengths[end - 1], cuts + [end])
                for start, (cost, cuts) in best.items()
                if start < end
            ]
            reached[end] = min([*options, reached.get(end, (float("inf"), []))])
        best = reached
    return best[len(lengths)][1]


__all__ = ["NUM_GROUPS", "encode_in_groups", "group_texts", "may_group"]
