# SPDX-License-Identifier: Apache-2.0
"""The losses against naive loops, and over two real processes against one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from modeling_camoe import losses
from modeling_camoe.losses import DualSoftmaxLoss, contrastive_loss, expert_contrastive_loss, gather_with_grad
from tests.tiny_model import random_inputs, tiny_model


def authors_dual_softmax_loss(logits, temp):
    """What the authors' one released file computes, from its formula: called on S and on S.T, then averaged."""
    weighted = logits * F.softmax(logits / temp, dim=0) * len(logits)
    return -torch.diag(F.log_softmax(weighted, dim=-1)).mean()


@pytest.mark.parametrize("temp", [1.0, 10.0, 1000.0])
def test_dual_softmax_loss_equals_the_authors_formula_in_both_directions(temp):
    torch.manual_seed(0)
    texts, videos = (F.normalize(torch.randn(6, 16, dtype=torch.float64), dim=-1) for _ in range(2))
    logits = 20.0 * texts @ videos.T
    expected = (authors_dual_softmax_loss(logits, temp) + authors_dual_softmax_loss(logits.T, temp)) / 2
    torch.testing.assert_close(contrastive_loss(texts, videos, 20.0, dual_softmax_temp=temp), expected)


@pytest.mark.parametrize("prior", ["detached", "own_axis"])
def test_other_priors_equal_their_formulas_and_so_do_their_gradients(prior):
    torch.manual_seed(0)
    videos = torch.randn(5, 8, dtype=torch.float64)
    texts = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(texts, videos, 3.0, dual_softmax_temp=10.0, dual_softmax_prior=prior)
    expected = 0.0
    for logits in (3.0 * texts @ videos.T, 3.0 * videos @ texts.T):
        weights = (logits / 10).exp()
        weights = (
            weights.detach() / weights.detach().sum(0) if prior == "detached" else weights / weights.sum(1)[:, None]
        )
        expected = expected - (logits * weights * 5).log_softmax(dim=1).diag().mean() / 2
    torch.testing.assert_close(loss, expected)
    actual_and_naive = [torch.autograd.grad(value, texts)[0] for value in (loss, expected)]
    torch.testing.assert_close(*actual_and_naive)
    module = DualSoftmaxLoss(temp=10.0, prior=prior)
    assert torch.equal(module(texts, videos, 3.0), loss)


def test_with_a_detached_prior_a_falling_score_does_not_raise_its_own_logit():
    """At temp 1 the trained prior is better served by the lowest score of all: the model ends upside down."""
    signs = {}
    for prior in ("trained", "detached"):
        score = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
        texts = torch.stack([torch.stack([score, torch.zeros(())]), torch.tensor([0.0, 0.5])])
        loss = contrastive_loss(texts, torch.eye(2, dtype=torch.float64), 20.0, None, 1.0, dual_softmax_prior=prior)
        signs[prior] = torch.autograd.grad(loss, score)[0].sign().item()
    assert signs == {"trained": 1, "detached": -1}  # minus: descent raises the score of a matching pair


def test_an_unknown_prior_is_named():
    with pytest.raises(ValueError, match="`dual_softmax_prior` is 'none'; choose from"):
        contrastive_loss(torch.zeros(2, 4), torch.zeros(2, 4), 1.0, dual_softmax_prior="none")
    with pytest.raises(ValueError, match="`prior` is 'none'; choose from"):
        DualSoftmaxLoss(prior="none")


def test_without_dual_softmax_the_loss_is_symmetric_cross_entropy():
    torch.manual_seed(0)
    texts, videos = (torch.randn(6, 16, dtype=torch.float64) for _ in range(2))
    logits = 3.0 * texts @ videos.T
    expected = -(logits.log_softmax(1).diag().mean() + logits.log_softmax(0).diag().mean()) / 2
    torch.testing.assert_close(contrastive_loss(texts, videos, 3.0), expected)


@pytest.mark.parametrize("temp", [None, 10.0])
def test_pairs_of_the_same_video_are_not_negatives(temp):
    torch.manual_seed(0)
    texts, videos = (torch.randn(4, 16, dtype=torch.float64) for _ in range(2))
    videos[1] = videos[0]
    ids = torch.tensor([7, 7, 8, 9])
    loss = contrastive_loss(texts, videos, 1.0, ids, temp)
    # The naive way: for each row, softmax over the columns that are not another pair of its video.
    total = 0.0
    for logits in (texts @ videos.T, (texts @ videos.T).T):
        if temp is not None:
            allowed = (ids[:, None] != ids[None, :]) | torch.eye(4, dtype=torch.bool)
            exponents = torch.where(allowed, (logits / temp).exp(), 0.0)
            logits = logits * exponents / exponents.sum(dim=0) * 4
        for n in range(4):
            columns = [m for m in range(4) if m == n or ids[m] != ids[n]]
            total -= (logits[n, n] - torch.logsumexp(logits[n, columns], dim=0)) / 8
    torch.testing.assert_close(loss, total)


def test_expert_loss_is_the_mean_of_each_experts_own_loss():
    torch.manual_seed(0)
    text_embeds = F.normalize(torch.randn(4, 3, 8, dtype=torch.float64), dim=-1)
    video_embeds = text_embeds.flip(0)
    expected = sum(contrastive_loss(text_embeds[:, e], video_embeds[:, e], 5.0) for e in range(3)) / 3
    torch.testing.assert_close(expert_contrastive_loss(text_embeds, video_embeds, 5.0), expected)


@pytest.mark.parametrize("temp", [None, 10.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_vectors_have_a_loss_in_float32(dtype, temp):
    texts, videos = (F.normalize(torch.randn(8, 16), dim=-1).to(dtype) for _ in range(2))
    expected = contrastive_loss(texts.float(), videos.float(), 100.0, dual_softmax_temp=temp)
    scale = torch.tensor(100.0, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(texts, videos, scale, dual_softmax_temp=temp)
    assert loss.dtype == torch.float32 and loss.item() == expected.item()


@pytest.mark.parametrize("ids", [torch.arange(3), torch.zeros(5, 2, dtype=torch.long), torch.tensor(1)])
def test_video_ids_of_another_length_are_an_error_that_says_so(ids):
    with pytest.raises(ValueError, match="`video_ids` of shape .* are not one row for each of 4 pairs"):
        contrastive_loss(torch.randn(4, 8), torch.randn(4, 8), 10.0, ids)


def test_unpaired_rows_are_an_error():
    with pytest.raises(ValueError, match="takes pairs, got 3 texts and 2 videos"):
        contrastive_loss(torch.zeros(3, 4), torch.zeros(2, 4), 1.0)


@pytest.mark.parametrize("temp", [None, 10.0])
def test_as_a_module_it_is_the_same_loss(temp):
    torch.manual_seed(0)
    texts, videos = torch.randn(4, 8), torch.randn(4, 8)
    ids = torch.tensor([0, 1, 1, 2])
    assert torch.equal(DualSoftmaxLoss(temp)(texts, videos, 3.0, ids), contrastive_loss(texts, videos, 3.0, ids, temp))
    assert not list(DualSoftmaxLoss().parameters())
    with pytest.raises(ValueError, match="`temp` must be positive or None, got 0"):
        DualSoftmaxLoss(temp=0)


def test_in_one_process_gathering_changes_nothing():
    torch.manual_seed(0)
    texts, videos = torch.randn(4, 8), torch.randn(4, 8)
    expected = contrastive_loss(texts, videos, 3.0)
    assert torch.equal(contrastive_loss(texts, videos, 3.0, gather_across_devices=True), expected)
    assert gather_with_grad(texts) is texts


# All of it in one pair of processes: starting them takes longer than what they do.
TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from modeling_camoe import losses
from tests.tiny_model import random_inputs, tiny_model
rank, path = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
data = torch.load(f"{path}/data.pt")
mine = slice(4 * rank, 4 * rank + 4)
gradients, shapes, product = [], [], losses.similarity
losses.similarity = lambda texts, videos: shapes.append((len(texts), len(videos))) or product(texts, videos)
for temp in (None, 10.0):
    weight, scale = data["weight"].clone().requires_grad_(), data["scale"].clone().requires_grad_()
    texts, videos, ids = data["texts"][mine] @ weight, data["videos"][mine] @ weight, data["ids"][mine]
    losses.contrastive_loss(texts, videos, scale.exp(), ids, temp, gather_across_devices=True).backward()
    for gradient in (weight.grad, scale.grad):  # what DDP does
        dist.all_reduce(gradient)
        gradient /= 2
    gradients.append((weight.grad, scale.grad))
losses.similarity, alone = product, None
groups = [dist.new_group([rank]) for rank in range(2)]
if rank == 0:  # the other one calls nothing: were anything gathered, this would wait for it for ever
    texts, videos = data["texts"], data["videos"]
    in_group = losses.DualSoftmaxLoss(None, gather_across_devices=True, process_group=groups[0])(texts, videos, 2.0)
    model = tiny_model()
    alone = losses.contrastive_loss(texts, videos, 2.0), in_group, model(**random_inputs(), return_loss=True).loss
torch.save((gradients, shapes, alone), f"{path}/results_{rank}.pt")
dist.barrier()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The global batch, and of each of two processes its gradients, the shapes of its products, and losses alone."""
    folder = tmp_path_factory.mktemp("two_processes")
    torch.manual_seed(0)
    data = {"texts": torch.randn(8, 6), "videos": torch.randn(8, 6), "weight": torch.randn(6, 5)}
    data |= {"scale": torch.tensor(0.3), "ids": torch.tensor([0, 1, 2, 3, 4, 1, 5, 6])}  # video 1 is on both ranks
    torch.save(data, folder / "data.pt")
    env = {**os.environ, "PYTHONPATH": str(Path(losses.__file__).parents[1])}
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), str(folder)], env=env) for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return data, [torch.load(folder / f"results_{rank}.pt") for rank in range(2)]


def test_two_processes_have_the_gradient_of_the_one_global_batch(two_processes):
    data, results = two_processes
    for i, temp in enumerate((None, 10.0)):
        weight, scale = data["weight"].clone().requires_grad_(), data["scale"].clone().requires_grad_()
        contrastive_loss(data["texts"] @ weight, data["videos"] @ weight, scale.exp(), data["ids"], temp).backward()
        for gradients, _, _ in results:
            torch.testing.assert_close(gradients[i], (weight.grad, scale.grad), rtol=1e-5, atol=1e-6)


def test_without_a_prior_a_process_scores_its_own_rows_only(two_processes):
    _, results = two_processes
    for _, shapes, _ in results:
        assert shapes == [(4, 8), (4, 8), (8, 8)]  # texts, videos; the prior of dual softmax needs all rows


def test_a_loss_that_does_not_gather_needs_no_other_process(two_processes):
    data, results = two_processes
    plain, in_group, of_model = results[0][2]
    expected = contrastive_loss(data["texts"], data["videos"], 2.0)
    torch.testing.assert_close((plain, in_group), (expected, expected))
    torch.testing.assert_close(of_model, tiny_model()(**random_inputs(), return_loss=True).loss)


def test_it_trains_encoders_that_are_not_ours():
    torch.manual_seed(0)
    texts, videos = torch.randn(16, 8), torch.randn(16, 12)
    text_encoder, video_encoder = torch.nn.Linear(8, 4), torch.nn.Linear(12, 4)
    optimizer = torch.optim.Adam([*text_encoder.parameters(), *video_encoder.parameters()], lr=0.05)
    loss_function, steps = DualSoftmaxLoss(temp=10.0), []
    for _ in range(30):
        vectors = (F.normalize(v, dim=-1) for v in (text_encoder(texts), video_encoder(videos)))
        steps.append(loss_function(*vectors, scale=10.0))
        optimizer.zero_grad()
        steps[-1].backward()
        optimizer.step()
    assert steps[-1] < 0.5 * steps[0]


@pytest.mark.parametrize("temp", [None, 10.0])
def test_pairs_that_share_any_of_several_ids_are_not_each_others_negatives(temp):
    """The ids are the video and the caption: two videos with one caption are masked as one video's captions are."""
    torch.manual_seed(0)
    texts, videos = (F.normalize(torch.randn(4, 8), dim=-1) for _ in range(2))
    videos_and_captions = torch.tensor([[0, 9], [1, 8], [2, 9], [3, 7]])
    loss = contrastive_loss(texts, videos, 5.0, videos_and_captions, temp)
    assert torch.equal(loss, contrastive_loss(texts, videos, 5.0, torch.tensor([0, 1, 0, 3]), temp))
    assert loss < contrastive_loss(texts, videos, 5.0, videos_and_captions[:, 0], temp)
    # 9 as a video is not 9 as a caption.
    crossed = torch.tensor([[9, 0], [1, 8], [2, 9], [3, 7]])
    assert torch.equal(
        contrastive_loss(texts, videos, 5.0, crossed, temp),
        contrastive_loss(texts, videos, 5.0, crossed[:, 0], temp),
    )
