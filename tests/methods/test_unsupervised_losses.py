"""Losses of the methods that learn from pairs, and of DUET, against slow references: values and gradients."""

import itertools
import math

import numpy as np
import pytest
import torch

from cmh_milvus.errors import DataError
from cmh_milvus.methods import canon, cirh, cmfh, dgcpn, duet, lcmh, ucch, ugach
from cmh_milvus.methods.base import TrainData, binarized, label_similarity, nearest_rows
from tests.reference import methods_unsupervised as slow

B, K = 6, 8


@pytest.fixture
def codes():
    """Two relaxed code matrices (6, 8), float64, with gradient."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(B, K, generator=generator, dtype=torch.float64).mul(2).sub(1).requires_grad_() for _ in "xy"]


def assert_same(fast, reference, inputs):
    """Equal values, and equal gradients in all inputs."""
    assert torch.isclose(fast, reference, rtol=1e-9, atol=1e-12), (fast, reference)
    found = torch.autograd.grad(fast, inputs, allow_unused=True, retain_graph=True)
    expected = torch.autograd.grad(reference, inputs, allow_unused=True, retain_graph=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, rtol=1e-7, atol=1e-10)


def features(n, d, seed):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _float64_references():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# base


@pytest.mark.parametrize("block", [1, 4, 100])
def test_nearest_rows_are_the_sorted_ones(block):
    unit = torch.nn.functional.normalize(features(17, 5, 0) - 0.5, dim=1)
    values, rows = nearest_rows(unit, 4, block)
    for i in range(17):
        order = sorted(range(17), key=lambda j: -float(unit[i] @ unit[j]))[:4]
        assert rows[i].tolist() == order
        assert rows[i, 0] == i
        assert torch.allclose(values[i], torch.stack([unit[i] @ unit[j] for j in order]))
    assert nearest_rows(unit, 40)[1].shape == (17, 17)


def test_codes_are_signs_and_that_of_zero_is_plus_one():
    activations = torch.tensor([0.0, -0.0, -1e-30, 1e-30], requires_grad=True)
    codes = binarized(activations)
    assert codes.tolist() == [1, 1, -1, 1]
    assert not codes.requires_grad
    assert binarized(activations.half()).dtype == torch.float16


# UGACH


def test_ugach_distances_and_probabilities(codes):
    x, y = (torch.sigmoid(c) for c in codes)
    is_positive = torch.rand(B, B, generator=torch.Generator().manual_seed(1)) < 0.3
    is_positive[:, 0] = False
    fast = ugach.candidate_log_probability(ugach.squared_distances(x, y), is_positive)
    for i in range(B):
        expected = slow.ugach_log_probability(x[i], y, is_positive[i].tolist())
        for j in range(B):
            if expected[j] is None:
                assert fast[i, j].exp() == 0
            else:
                assert_same(fast[i, j], expected[j], codes)


def test_ugach_margin(codes):
    x, y = (torch.sigmoid(c) for c in codes)
    far = ugach.squared_distances(x, y)
    near = far[:, 2:3]
    fast = ugach.margin_loss(near, far, beta=0.1)
    values = [slow.ugach_margin(x[i], y[2], y[j], 0.1) for i in range(B) for j in range(B)]
    assert {v.item() > 0 for v in values} == {True, False}
    assert_same(fast.sum(), torch.stack(values).sum(), codes)


def test_ugach_policy_gradient_is_reinforce_with_a_baseline(codes):
    log_probability = torch.log_softmax(codes[0], dim=1)[:, :2]
    reward = torch.sigmoid(codes[1])[:, :2]
    fast = ugach.policy_gradient(log_probability, reward)
    assert_same(fast, slow.ugach_policy_gradient(log_probability, reward), codes)
    assert torch.autograd.grad(fast, codes, allow_unused=True)[1] is None, "no gradient through the reward"
    again = ugach.policy_gradient(log_probability, reward + 5)
    assert torch.isclose(fast, again), "a constant in the reward changes nothing"


def test_ugach_policy_gradient_estimates_the_gradient_of_the_expected_reward():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, generator=generator, requires_grad=True)
    reward = torch.rand(1, 5, generator=generator)
    log_probability = torch.log_softmax(logits, dim=1)
    exact = torch.autograd.grad(-(log_probability.exp() * reward).sum(), logits, retain_graph=True)[0]
    picks = log_probability.detach().exp().multinomial(200_000, replacement=True, generator=generator)
    loss = ugach.policy_gradient(log_probability.gather(1, picks), reward.gather(1, picks))
    estimate = torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(estimate, exact, atol=3e-3)


def test_ugach_texts_without_words_have_only_themselves():
    words = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [0, 0, 2]])
    neighbours = ugach.correlated(words, 3)
    assert [sorted(set(row)) for row in neighbours.tolist()] == [[0, 3], [1], [2, 3], [0, 2, 3], [4], [5]]


@pytest.mark.parametrize("phase", ["pretrain", "discriminator", "generator"])
def test_ugach_steps(phase, monkeypatch):
    """One player learns; the other one is at rest, without its dropout and the batch's statistics."""
    n, b = 30, 7
    data = TrainData(features(n, 5, 0), features(n, 4, 1), None)
    method = ugach.UGACH(data, K, ugach.UgachConfig(margin=0.05, neighbours=3, hidden=6, dropout=0.5)).train()
    learner, other = (method.generator, method) if phase == "generator" else (method, method.generator)
    for head in (learner.image_head, learner.text_head):
        for layer in head.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
    rows = torch.tensor([3, 29, 0, 12, 5, 21, 8])
    picks = torch.tensor([[1, 4], [6, 6], [0, 3], [5, 2], [2, 2], [0, 1], [4, 3]])
    seen = []
    monkeypatch.setattr(ugach, "picked", lambda log_probability, s: seen.append(log_probability) or picks)
    torch.manual_seed(7)
    (step,) = method.steps(data.rows(rows), phase)
    assert all(module.training for module in method.modules())

    own = method.neighbours[rows].tolist()
    for side, feature in ((0, data.image_vectors), (1, data.text_vectors)):
        head = (method.image_head, method.text_head)[side]
        unit = torch.nn.functional.normalize(head.scaling(feature), dim=1)
        for i, near in zip(rows.tolist(), own, strict=True):
            order = sorted(range(n), key=lambda j: -float(unit[i] @ unit[j]))[:3]
            assert near[3 * side : 3 * side + 3] == order
    torch.manual_seed(7)
    chosen = torch.randint(6, (b, 1)).flatten().tolist()
    positives = data.rows(torch.tensor([near[c] for near, c in zip(own, chosen, strict=True)]))

    def codes_of(nets, learns):
        nets.train(learns)
        both = ((nets.image_head, data.image[rows], positives.image), (nets.text_head, data.text[rows], positives.text))
        image, text = (torch.sigmoid(head(torch.cat([x, other]))) for head, x, other in both)
        nets.train()
        return {"image_query": (image[:b], text[b:], text[:b]), "text_query": (text[:b], image[b:], image[:b])}

    is_positive = [[int(row) in near for row in rows] for near in own]
    own_codes, others_codes = codes_of(learner, True), codes_of(other, False)
    picker = {"generator": own_codes, "discriminator": others_codes, "pretrain": None}[phase]
    judge = others_codes if phase == "generator" else own_codes
    beta = 0.05 * K
    for side, log_probability in zip(("image_query", "text_query"), seen, strict=True):
        hinges = []
        for i in range(b):
            if picker is None:
                equal = torch.tensor(1 / is_positive[i].count(False)).log()
                expected = [None if p else equal for p in is_positive[i]]
            else:
                query, _, items = picker[side]
                expected = slow.ugach_log_probability(query[i], items, is_positive[i])
            for j, value in enumerate(expected):
                assert log_probability[i, j] < -1e8 if value is None else torch.isclose(log_probability[i, j], value)
            query, positive, items = judge[side]
            hinges.append([slow.ugach_margin(query[i], positive[i], items[j], beta) for j in picks[i].tolist()])
        hinge = torch.stack([torch.stack(row) for row in hinges])
        if phase == "generator":
            term = slow.ugach_policy_gradient(log_probability.gather(1, picks), torch.sigmoid(hinge))
            assert_same(step.terms[f"policy_{side}"], term, [learner.image_head.output.weight])
            assert all(p.grad is None for p in other.image_head.parameters())
        else:
            term = hinge.mean()
            assert_same(step.terms[f"margin_{side}"], term, [learner.image_head.output.weight])
    assert step.optimizer == ("generator" if phase == "generator" else "discriminator")


def test_ugach_picks_with_replacement_and_never_a_positive():
    is_positive = torch.tensor([[True, False, False, True, False]])
    log_probability = ugach.candidate_log_probability(torch.tensor([[0.0, 1.0, 3.0, 0.5, 2.0]]), is_positive)
    picks = ugach.picked(log_probability.expand(60_000, -1).requires_grad_(), 2)
    shares = torch.stack([(picks == j).double().mean() for j in range(5)])
    assert torch.allclose(shares, log_probability.exp()[0], atol=0.01)
    assert shares[0] == shares[3] == 0
    twice = (picks[:, 0] == picks[:, 1]).double().mean()
    assert torch.isclose(twice, log_probability.exp().square().sum(), atol=0.01)


# UCCH


def test_ucch_contrast(codes):
    x = torch.stack([slow.ucch_unit(row) for row in codes[0]])
    assert torch.allclose(ucch.unit_code(codes[0]), x)
    memory = torch.randn(B + 5, K, generator=torch.Generator().manual_seed(3))
    own_again = [[], [B + 1, B + 3], [], [], [B], []]
    is_other = torch.ones(B, B + 5, dtype=torch.bool)
    for i, keys in enumerate(own_again):
        is_other[i, keys] = False
    fast = ucch.contrast(ucch.unit_code(codes[0]), binarized(memory), is_other, tau=0.9)
    assert_same(fast, slow.ucch_contrast(x, memory, own_again, 0.9), codes[:1])


@pytest.mark.parametrize("penalty", [0.1, 1.0])
def test_ucch_ranking(codes, penalty):
    x, y = (ucch.unit_code(c) for c in codes)
    fast = ucch.ranking(x @ y.T, margin=0.2, penalty=penalty)
    assert_same(fast, slow.ucch_ranking(x, y, 0.2, penalty), codes)


def test_ucch_memory_moves_towards_the_mean_code(codes):
    x, y = (ucch.unit_code(c).detach() for c in codes)
    memory = torch.nn.functional.normalize(torch.randn(B, K), dim=1)
    fast = ucch.remember(memory, x, y, rho=0.6)
    for i in range(B):
        assert torch.allclose(fast[i], slow.ucch_remember(memory[i], x[i], y[i], 0.6))


@pytest.mark.parametrize(("n", "shrinkage"), [(150, 1.7), (600, 1.7), (50, 0.4 * 1.7)])
def test_ucch_weights_shrink_alike_whatever_the_number_of_pairs(n, shrinkage):
    """Where there are at least 100 updates; of 40, as of 50 pairs, each shrinks them as one of 100 does."""
    batch_size = 50
    config = ucch.UcchConfig(hidden=8, batch_size=batch_size, epochs=40, shrinkage=1.7)
    torch.manual_seed(0)
    method = ucch.UCCH(TrainData(torch.randn(n, 4), torch.randn(n, 4), None), 16, config)
    (optimizer,) = method.optimizers().values()
    for parameter in method.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = method.image_head.output.weight.detach().clone()
    steps = config.epochs * n // batch_size
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = method.learning_rates(step / steps)["nets"]
        optimizer.step()
    fallen = method.image_head.output.weight / before
    assert torch.allclose(fallen, torch.full_like(fallen, math.exp(-shrinkage)), rtol=0.05)


@pytest.mark.parametrize("phase", ["warm_up", "memory"])
def test_ucch_steps(phase, monkeypatch):
    """The warm-up's keys are the signs of the mean code, and it fills the memory; later keys are drawn from it."""
    data, rows = TrainData(features(9, 4, 0) - 0.5, features(9, 6, 1) - 0.5, None), torch.tensor([7, 0, 4])
    method = ucch.UCCH(data, K, ucch.UcchConfig(beta=0.4, hidden=5, negatives=4, rho=0.7)).double().eval()
    drawn = torch.tensor([1, 0, 8, 4])
    monkeypatch.setattr(torch, "randint", lambda high, size, device: drawn if (high, size) == (9, (4,)) else None)
    before = method.memory.clone()
    batch = data.rows(rows)
    steps = list(method.steps(batch, phase))
    x = torch.stack([slow.ucch_unit(row) for row in method.image_head(batch.image)])
    y = torch.stack([slow.ucch_unit(row) for row in method.text_head(batch.text)])
    if phase == "warm_up":
        keys, own_again, rho = (x + y).detach() / 2, [[], [], []], 1.0
    else:
        keys, own_again, rho = before[[7, 0, 4, 1, 0, 8, 4]], [[], [4], [6]], 0.7
    contrast = sum(slow.ucch_contrast(side, keys, own_again, 0.9) for side in (x, y))
    expected = 0.4 * contrast + 0.6 * slow.ucch_ranking(x, y, 0.2, 0.1)
    (step,) = steps
    assert_same(sum(step.terms.values()), expected, [method.image_head.output.weight, method.text_head.output.weight])
    for place, row in enumerate(rows):
        remembered = slow.ucch_remember(before[row], x[place].detach(), y[place].detach(), rho)
        assert torch.allclose(method.memory[row], remembered)
    others = [i for i in range(9) if i not in rows.tolist()]
    assert torch.equal(method.memory[others], before[others])


# DGCPN


@pytest.mark.parametrize("shift", [0.0, 0.6], ids=["no cosine below 0", "some below 0"])
def test_dgcpn_target_of_a_batch_is_the_block_of_the_whole_matrix(shift):
    data, rows = TrainData(features(15, 4, 0) - shift, features(15, 6, 1) - shift, None), torch.tensor([3, 14, 0, 7])
    config = dgcpn.DgcpnConfig(hidden=4, neighbours=0.4, a1=0.3, a2=0.4, scale=2.5)
    method = dgcpn.DGCPN(data, K, config).double()
    chances = dgcpn.transition(method.neighbours[rows], method.weights[rows], 15)
    assert torch.allclose(chances.sum(dim=1), torch.ones(4))
    assert ((method.weights[rows] == 0).sum(dim=1) > 1).any() == (shift > 0), "more than the item itself"
    expected = slow.dgcpn_target(data.image, data.text, rows.tolist(), 6, 0.3, 0.4, 2.5 * 7)
    assert torch.allclose(method.target(data.rows(rows)), expected)


def test_dgcpn_steps_are_half_real_and_half_binary():
    data, rows = TrainData(features(15, 4, 0) - 0.6, features(15, 6, 1) - 0.6, None), torch.tensor([3, 14, 0, 7])
    method = dgcpn.DGCPN(data, K, dgcpn.DgcpnConfig(hidden=4, pull=1.4, dw=0.7, cw=1.3)).double().eval()
    batch = data.rows(rows)
    target = method.target(batch)
    weights = [method.image_head.output.weight, method.text_head.output.weight]
    image, text = torch.tanh(method.image_head(batch.image)), torch.tanh(method.text_head(batch.text))
    sides = [(image, text), (image, binarized(text.detach())), (binarized(image.detach()), text)]
    steps = list(method.steps(batch, "joint"))
    for step, codes in zip(steps, sides, strict=True):
        assert_same(sum(step.terms.values()), slow.dgcpn_loss(*codes, target, 1.4, 0.7, 1.3), weights)


def test_dgcpn_loss(codes):
    target = torch.rand(B, B, generator=torch.Generator().manual_seed(2)) * 2 - 1
    fast = dgcpn.coherence_loss(*codes, target, pull=1.5, dw=0.7, cw=1.3)
    assert fast.keys() == {"pairs", "structure", "consistency"}
    assert_same(sum(fast.values()), slow.dgcpn_loss(*codes, target, 1.5, 0.7, 1.3), codes)


def test_dgcpn_loss_does_not_see_the_order_of_items_or_bits(codes):
    target = torch.rand(B, B)
    rows, bits = torch.randperm(B), torch.randperm(K)
    fast = dgcpn.coherence_loss(*codes, target, 1.5, 1, 1)
    moved = dgcpn.coherence_loss(*(c[rows][:, bits] for c in codes), target[rows][:, rows], 1.5, 1, 1)
    assert all(torch.isclose(fast[term], moved[term]) for term in fast)


# CIRH


def test_cirh_similarity_of_a_batch_is_the_block_of_the_whole_matrix():
    image, text, rows = features(14, 4, 0), features(14, 6, 1), torch.tensor([5, 0, 13, 2, 9])
    unit = cirh.joint_features(image, text, a1=0.3)
    fast = cirh.similarity_block(unit[rows], cirh.row_thresholds(unit, 0.4, block=5)[rows], a2=0.35)
    expected = slow.cirh_similarity(image, text, rows.tolist(), 0.4, 0.3, 0.35)
    assert torch.allclose(fast, expected)


def test_cirh_students(codes):
    code = binarized(torch.randn(B, K))
    similarity = torch.rand(B, B)
    fast = cirh.student_loss(*codes, code, similarity, dw=0.3)
    assert_same(sum(fast.values()), slow.cirh_student_loss(*codes, code, similarity, 0.3), codes)


def cirh_of_twenty():
    data = TrainData(features(20, 6, 0) - 0.3, features(20, 5, 1) - 0.3, None)
    torch.manual_seed(1)
    return data, cirh.CIRH(data, 8, cirh.CirhConfig(kept=0.8, width=7, hidden=16)).double()


def test_cirh_smoothing():
    x, similarity = features(7, 4, 0), features(7, 7, 1) + 3 * torch.eye(7)
    assert torch.allclose(cirh.smoothed(x, similarity), slow.cirh_smoothed(x, similarity))
    assert torch.allclose(cirh.smoothed(x[:2], similarity[:2, :2]), 0.7 * x[:2] + 0.2 * x[[1, 0]])


def test_cirh_teacher_on_a_batch():
    """Eq. 1 to 4 as a step of training composes them, and the codes that the students are given."""
    data, method = cirh_of_twenty()
    rows = torch.tensor([17, 3, 8, 11, 0, 14])
    method.code_buffer.zero_()
    (step,) = method.steps(data.rows(rows), "teacher")
    layers = dict(method.teacher.named_modules())
    names = {f"{m}_{part}": f"{m}_{part}.0" for m in ("image", "text") for part in ("encoder", "code")}
    names |= {f"{m}_graph": f"{m}_graph.linear" for m in ("image", "text", "joint")}
    names |= {f"{m}_decoder {i}": f"{m}_decoder.{3 * i}" for m in ("image", "text") for i in (0, 1)}
    names |= {"joint_code": "joint_code.0", "code": "code.0"}
    similarity = slow.cirh_similarity(data.image, data.text, rows.tolist(), 0.8, 0.3, 0.3)
    image, text = (
        slow.cirh_smoothed(head.scaling(x[rows]), similarity)
        for head, x in ((method.image_head, data.image), (method.text_head, data.text))
    )
    weights = {name: layers[layer] for name, layer in names.items()}
    expected, codes = slow.cirh_teacher(weights, image, text, similarity, 10.0)
    assert_same(sum(step.terms.values()), expected, [layer.weight for layer in weights.values()])
    assert torch.equal(method.code_buffer[rows], binarized(codes))
    assert not method.code_buffer[[i for i in range(20) if i not in rows.tolist()]].any()


def test_cirh_students_on_a_batch():
    """The authors' code takes S by position and codes by shuffled row; here both follow the row number."""
    data, method = cirh_of_twenty()
    method.eval()
    method.code_buffer.copy_(binarized(torch.randn(20, 8)))
    rows = torch.tensor([17, 3, 8, 11])
    (step,) = method.steps(data.rows(rows), "students")
    similarity = slow.cirh_similarity(data.image, data.text, rows.tolist(), 0.8, 0.3, 0.3)
    h_image, h_text = torch.tanh(method.image_head(data.image[rows])), torch.tanh(method.text_head(data.text[rows]))
    expected = slow.cirh_student_loss(h_image, h_text, method.code_buffer[rows], similarity, 0.01)
    assert_same(sum(step.terms.values()), expected, [method.image_head.output.weight, method.text_head.output.weight])


# LCMH


def test_lcmh_memberships():
    x, centroids = features(5, 3, 0), features(4, 3, 1)
    layer = lcmh.CentroidMemberships(4, 3)
    layer.centroids.copy_(centroids)
    fast = layer(x)
    assert torch.allclose(fast, slow.lcmh_memberships(x, centroids))
    assert torch.allclose(fast.sum(dim=1), torch.ones(5))
    layer.centroids[0] = x[2]
    assert torch.allclose(layer(x)[2], torch.tensor([1.0, 0, 0, 0]), atol=1e-4)


def test_lcmh_k_means_finds_separate_clusters_and_never_gets_worse():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    x = centres.repeat_interleave(30, dim=0) + torch.randn(90, 2, generator=torch.Generator().manual_seed(0))

    def cost(found):
        return float(torch.cdist(x, found).min(dim=1).values.square().sum())

    costs = [cost(lcmh.k_means(x, 3, i, torch.Generator().manual_seed(4))) for i in range(8)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(costs))
    found = lcmh.k_means(x, 3, 10, torch.Generator().manual_seed(4))
    assert torch.cdist(centres, found).min(dim=1).values.max() < 1


def test_lcmh_threshold_is_between_the_middle_rows():
    values = torch.tensor([[5.0, 1], [1, 1], [2, 2], [8, 4], [9, 8]])
    assert lcmh.threshold(values).tolist() == [6.5, 3.0]
    assert lcmh.threshold(values[:4]).tolist() == [3.5, 1.5]
    assert lcmh.threshold(values[:2]).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("n", [200, 201])
def test_lcmh_bits_are_balanced_and_decided_on_the_train_rows(n):
    """No train row lies on the threshold, where rounding would choose its bit anew in each batch."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    shared = torch.randn(n, 6)
    data = lcmh.TrainData(shared @ torch.randn(6, 12), shared @ torch.randn(6, 10), None)
    method = lcmh.LCMH(data, 8, lcmh.LcmhConfig(clusters=20))
    method.fit(data, torch.Generator().manual_seed(0))
    for head, x in ((method.image_head, data.image), (method.text_head, data.text)):
        with torch.no_grad():
            activations = head.eval()(x)
        assert torch.all(((activations >= 0).float().mean(dim=0) - 0.5).abs() <= 0.5 / n + 1e-6)
        assert activations.abs().min() > 1e-5


def test_lcmh_codes_of_rows_that_are_alike_do_not_depend_on_the_batch():
    """Texts without words, pairs that occur twice, rows that are a centroid: a row alone has the code of the batch."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    shared = torch.randn(300, 6)
    image, text = shared @ torch.randn(6, 12), (shared @ torch.randn(6, 10)).clamp(min=0)
    text[:140] = 0
    image[200:250], text[200:250] = image[250:], text[250:]
    data = lcmh.TrainData(image, text, None)
    method = lcmh.LCMH(data, 16, lcmh.LcmhConfig(clusters=250))
    method.fit(data, torch.Generator().manual_seed(0))
    for head, x in ((method.image_head, image), (method.text_head, text)):
        with torch.no_grad():
            together = head.eval()(x)
            alone = torch.cat([head(row[None]) for row in x])
        assert torch.equal(together >= 0, alone >= 0)
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_lcmh_needs_more_clusters_than_bits():
    """The centred memberships of k clusters span k - 1 directions."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    image, text = torch.randn(17, 5), torch.randn(17, 5)
    method = lcmh.LCMH(lcmh.TrainData(image, text, None), 16, lcmh.LcmhConfig(clusters=8))
    assert method.image_head.config.centroids == 17
    with pytest.raises(DataError, match="16 bits of 17 clusters or more, and there are 16 train pairs"):
        lcmh.LCMH(lcmh.TrainData(image[1:], text[1:], None), 16, lcmh.LcmhConfig())


# CMFH


def test_cmfh_updates_are_the_minima_of_the_objective():
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(12, d, generator=generator) for d in (5, 7)]
    weights, mu, gamma = [0.3, 0.7], 4.0, 0.2
    latent = torch.randn(12, 3, generator=generator)
    bases = [cmfh.update_basis(latent, x, gamma) for x in views]
    projections = [cmfh.update_projection(x, latent, cmfh.factorize(x, gamma / mu)) for x in views]
    new = cmfh.update_latent(views, bases, projections, weights, mu, gamma)

    def gradient(y, us, ws, of):
        unknowns = [t.clone().requires_grad_() for t in (y, *us, *ws)]
        value = slow.cmfh_objective(views, unknowns[0], unknowns[1:3], unknowns[3:], weights, mu, gamma)
        return torch.autograd.grad(value, [unknowns[i] for i in of])

    for found in gradient(latent, bases, projections, (1, 2, 3, 4)):
        assert found.abs().max() < 1e-9
    assert gradient(new, bases, projections, (0,))[0].abs().max() < 1e-9


# CANON


def test_canon_code_loss(codes):
    target = binarized(torch.randn(B, K, generator=torch.Generator().manual_seed(5)))
    assert_same(canon.code_loss(codes[0], target), slow.canon_code_loss(codes[0], target), codes[:1])


def test_canon_teacher_keeps_what_both_sides_share():
    """Items of one hidden class share most bits, though each side is mostly noise of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.arange(300) % 3
    signal = torch.nn.functional.one_hot(hidden, 3).to(torch.float64)
    sides = [3 * torch.randn(300, 20, generator=generator) for _ in "xy"]
    for side in sides:
        side[:, :3] += 5 * signal
    config = canon.CanonConfig(directions=3)
    target = canon.teacher_codes(canon.shared_rows(*sides, config), 8, 20)
    assert set(target.unique().tolist()) == {-1.0, 1.0}
    agreement = (target @ target.T / 8)[~torch.eye(300, dtype=torch.bool)]
    same = (hidden[:, None] == hidden)[~torch.eye(300, dtype=torch.bool)]
    assert agreement[same].mean() > agreement[~same].mean() + 0.4


# DUET


@pytest.mark.parametrize("same_side", [False, True])
@pytest.mark.parametrize("reach", [0.0, 0.1, 1.0])
def test_duet_label_contrast(codes, same_side, reach):
    labels = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=torch.float64)
    overlap = label_similarity(labels, labels, "jaccard")
    other = codes[0] if same_side else codes[1]
    fast = duet.label_contrast(codes[0], other, overlap, 0.2, reach + (1 - reach) * overlap)
    slow_value = slow.duet_label_contrast(codes[0], other, labels, 0.2, same_side, reach)
    assert_same(fast, slow_value, codes)


def test_duet_label_contrast_without_any_positive_is_nothing(codes):
    assert duet.label_contrast(*codes, torch.zeros(B, B), 0.2, torch.ones(B, B)) == 0


def test_duet_pair_contrast_and_soft_targets(codes):
    image, text = features(B, 7, 2) - 0.5, features(B, 5, 1)
    target = duet.soft_targets(image, text, 0.1)
    expected = slow.duet_soft_targets(image, text, 0.1)
    assert torch.allclose(target, expected)
    for wanted in (target, torch.eye(B)):
        assert_same(duet.pair_contrast(*codes, wanted, 0.1), slow.duet_pair_contrast(*codes, wanted, 0.1), codes)


def test_duet_gist_are_the_scores_of_the_leading_components():
    """Against numpy's full decomposition; a component's sign is free."""
    rows = features(30, 8, 0) - 0.5
    rows *= torch.tensor([20.0, 10.0, 5.0] + 5 * [1e-3])
    found = duet.gist(rows, 3).numpy()
    centred = (rows - rows.mean(dim=0)).numpy()
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :3] * values[:3]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-5, atol=1e-5)
    assert duet.gist(rows, 100).shape == (30, 8)
    assert duet.gist(rows[:5], 100).shape == (5, 5)


@pytest.mark.parametrize(("n_bits", "nested"), [(8, False), (24, True)])
@pytest.mark.parametrize("pair_weight", [None, 0.0, 0.3])
@pytest.mark.parametrize("bags", [False, True])
def test_a_duet_step_is_eq_6(n_bits, nested, pair_weight, bags):
    """`pair_weight` None: without labels. Texts are dense, or bags of words with components beside them."""
    weight, off = pair_weight or 0.0, {"dropout": 0, "input_dropout": 0, "blend": 0}
    config = duet.DuetConfig(pair_weight=weight, reach=0.2, hidden=12, nested=nested, partner_dim=100, **off)
    image, text = features(20, 7, 0) - 0.5, features(20, 5, 1)
    if bags:
        text *= text > 0.7
        text[range(20), [row % 5 for row in range(20)]] = 1.0  # no bag is empty
    labels = None if pair_weight is None else (features(20, 3, 2) > 0.5).to(torch.float64)
    torch.manual_seed(0)
    method = duet.Duet(TrainData(image, text, labels), n_bits, config)
    rows = torch.tensor([3, 0, 7, 12, 19, 5])
    assert (method.text_head.config.components, method.image_head.config.components) == (5 * bags, 0)
    (step,) = method.steps(TrainData(image, text, labels).rows(rows), "joint")
    expected = slow.duet_loss(method, image, text, labels, rows)
    assert_same(torch.stack(list(step.terms.values())).sum(), expected, list(method.parameters()))
