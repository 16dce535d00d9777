# SPDX-License-Identifier: Apache-2.0
"""Texts that are alike are encoded once and short ones apart from long ones; nothing else changes."""

import pytest
import torch

from modeling_camoe import text_groups
from modeling_camoe.text_groups import encode_in_groups, group_texts
from tests.tiny_model import BOS, EOS, tiny_model


def ragged_inputs(num_texts=6, num_experts=4, length=12):
    """Texts of 3 to 12 tokens, padded on the right; the last stream of every other caption repeats its first."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, EOS, (num_texts, num_experts, length), generator=generator)
    sizes = torch.randint(3, length + 1, (num_texts, num_experts), generator=generator)
    sizes[0, 0] = length
    position = torch.arange(length)
    input_ids = input_ids.where(position < sizes[..., None] - 1, EOS)
    input_ids[..., 0] = BOS
    attention_mask = (position < sizes[..., None]).long()
    input_ids[::2, -1], attention_mask[::2, -1] = input_ids[::2, 0], attention_mask[::2, 0]
    return input_ids, attention_mask


@pytest.fixture
def calls(monkeypatch):
    """The shapes of ids that the text tower gets; few texts are enough for groups."""
    monkeypatch.setattr(text_groups, "MIN_TEXTS", 12)
    shapes = []

    def counting(model):
        encode = model.clip.get_text_features
        monkeypatch.setattr(
            model.clip,
            "get_text_features",
            lambda ids, **kwargs: shapes.append(tuple(ids.shape)) or encode(ids, **kwargs),
        )
        return shapes

    return counting


def test_groups_give_the_vectors_and_gradients_of_one_call(monkeypatch):
    """The tolerance is rounding: sums over other shapes, in float32."""
    model = tiny_model()
    input_ids, attention_mask = ragged_inputs()
    weights = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(text_groups, "MIN_TEXTS", 12 if grouped else 10**9)  # 24 texts here
        model.zero_grad()
        output = model.get_text_features(input_ids, attention_mask)
        (output.pooler_output * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.clip.text_model.parameters() if p.grad is not None])
        real = attention_mask.flatten(1).bool()  # hidden states beyond a text's end mean nothing
        results.append((output.pooler_output.detach(), gradient, output.last_hidden_state.detach()[real]))
    for grouped, whole in zip(*results, strict=True):
        assert grouped.shape == whole.shape
        torch.testing.assert_close(grouped, whole, atol=1e-5, rtol=1e-5)


def test_the_tower_reads_each_text_once_in_groups_of_like_length(calls):
    model = tiny_model()
    shapes = calls(model)
    input_ids, attention_mask = ragged_inputs()
    model.get_text_features(input_ids, attention_mask)
    different = {tuple(row) for row in input_ids.flatten(0, 1).tolist()}
    assert len(shapes) == text_groups.NUM_GROUPS
    assert sum(rows for rows, _ in shapes) == len(different) < 24
    assert [length for _, length in shapes] == sorted(length for _, length in shapes)
    assert sum(rows * length for rows, length in shapes) < 0.75 * input_ids.numel()


@pytest.mark.parametrize("texts", [[(1, 2)] * 5, [(1,), (2,)], [(i, i) for i in range(9)], [(1, 2, 3), (1,), (1, 2)]])
def test_the_number_of_groups_does_not_depend_on_the_texts(texts):
    """Processes that share a sharded model wait for each other in every call of the tower."""
    groups, places = group_texts(texts, 3)
    assert len(groups) == 3 and all(groups)
    positions = [position for group in groups for position in group]
    assert [texts[positions[place]] for place in places] == texts


def test_groups_are_the_cheapest():
    lengths = [2, 3, 3, 4, 9, 10, 20, 21, 22, 30]
    texts = [(i,) * size for i, size in enumerate(lengths, start=1)]
    groups, _ = group_texts(texts, 3)
    cost = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    naive = min(
        i * lengths[i - 1] + (j - i) * lengths[j - 1] + (10 - j) * lengths[-1]
        for i in range(1, 9)
        for j in range(i + 1, 10)
    )
    assert cost == naive


def test_texts_padded_on_the_left_are_left_alone():
    input_ids = torch.full((12, 4), EOS)
    attention_mask = torch.tensor([[0, 0, 1, 1]] * 12)
    assert encode_in_groups(None, input_ids, attention_mask) is None


@pytest.mark.parametrize("case", ["few texts", "no mask", "hidden states", "attentions"])
def test_one_call_where_grouping_would_not_do(calls, case):
    model = tiny_model(attn_implementation="eager") if case == "attentions" else tiny_model()
    shapes = calls(model)
    input_ids, attention_mask = ragged_inputs(2 if case == "few texts" else 6)
    asked = {"hidden states": {"output_hidden_states": True}, "attentions": {"output_attentions": True}}.get(case, {})
    output = model.get_text_features(input_ids, None if case == "no mask" else attention_mask, **asked)
    assert shapes == [(input_ids.shape[0] * 4, 12)]
    if case == "hidden states":
        assert output.hidden_states[0].shape == (24, 12, 32)
    if case == "attentions":
        assert output.attentions[0].shape == (24, 4, 12, 12)
