"""Settings, rates, passes and buffers of each method; CANON and DUET step by step."""

import dataclasses
import itertools

import pytest
import torch

from cmh_milvus.methods import (
    canon,
    dsph,
    duet,
    get_method,
    list_methods,
    make_config,
    mith,
)
from cmh_milvus.methods.base import TrainData, one_cycle
from cmh_milvus.methods.canon import CanonConfig
from tests.reference import methods_supervised as reference

ITERATIVE = [name for name in list_methods() if not get_method(name).closed_form]


def draw(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pairs(n=40, labels=True):
    return TrainData(draw(n, 7, 0), draw(n, 6, 1), (draw(n, 4, 2) > 0.3).float() if labels else None)


def made(name, data, n_bits=16, **settings):
    method = get_method(name)
    small = {"hidden": 12, "width": 12, "clusters": 20} | settings
    fields = {field.name for field in dataclasses.fields(method.Config)}
    torch.manual_seed(0)
    return method(data, n_bits, make_config(method, {k: v for k, v in small.items() if k in fields}))


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing():
    rates = [one_cycle(i / 100, 0.5) for i in range(101)]
    assert rates[0] == pytest.approx(0.5 / 25)
    assert rates[30] == max(rates) == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.5 / 250_000)
    assert all(a < b for a, b in itertools.pairwise(rates[:31]))
    assert all(a > b for a, b in itertools.pairwise(rates[30:]))
    assert one_cycle(0.1, 1.0, warm_up=0.1) == 1.0


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("duet", {100: 240, 1250: 240, 5000: 60, 10_000: 30, 100_000: 20, 10**6: 20}),
        ("canon", {100: 40, 4500: 40, 6000: 30, 15_000: 12, 10**6: 12}),
        ("mith", {100: 100, 2700: 50, 4500: 30, 10**6: 30}),
        ("dsph", {100: 72, 2700: 40, 4500: 24, 10**6: 24}),
        ("dchmt", {100: 120, 2700: 66, 4500: 40, 10**6: 40}),
    ],
)
def test_few_pairs_are_passed_over_more_often(name, passes):
    method = get_method(name)
    assert {n: method.epochs(method.Config(), n) for n in passes} == passes
    assert method.epochs(method.Config(epochs=7), 100) == 7


@pytest.mark.parametrize("name", ["dcmh", "ssah", "mesdch"])
def test_rates_fall_linearly_to_a_thirtieth(name):
    method = made(name, pairs(), learning_rate=0.3)
    for progress, expected in ((0.0, 0.3), (0.5, 0.155), (1.0, 0.01)):
        rates = method.learning_rates(progress)
        assert rates.keys() == method.optimizers().keys()
        assert list(rates.values()) == pytest.approx([expected] * len(rates))


@pytest.mark.parametrize("name", ITERATIVE)
def test_settings_reach_heads_and_optimizers(name):
    fields = {field.name for field in dataclasses.fields(get_method(name).Config)}
    method = made(
        name,
        pairs(),
        dropout=0.4,
        input_dropout=0.1,
        weight_decay=0.07,
        learning_rate=0.02,
        teacher_rate=0.03,
        generator_rate=0.004,
        proxy_rate=0.05,
    )
    if "dropout" in fields:
        for head in (method.image_head, method.text_head):
            assert (head.config.dropout, head.config.input_dropout) == (0.4, 0.1)
            assert [layer.p for layer in head.layers if isinstance(layer, torch.nn.Dropout)] == [0.1, 0.4]
    own = {"teacher": 0.03, "generator": 0.004, "proxies": 0.05}
    for part, optimizer in method.optimizers().items():
        (group,) = optimizer.param_groups
        assert group["lr"] == own.get(part, 0.02), part
        if "weight_decay" in fields:
            assert group["weight_decay"] == (5e-4 if part == "proxies" else 0.07), part


def test_dsph_proxies_have_momentum_and_their_threshold():
    method = made("dsph", pairs(), n_bits=16)
    assert method.optimizers()["proxies"].param_groups[0]["momentum"] == 0.9
    assert method.threshold == dsph.threshold(16, 4) == 1 - 2 * 10 / 16


# DUET


def test_a_blend_mixes_both_sides_alike():
    torch.manual_seed(0)
    image, text = duet.blended(torch.eye(60), 2 * torch.eye(60), 0.3)
    assert torch.equal(text, 2 * image)
    torch.testing.assert_close(image.sum(dim=1), torch.ones(60))
    own = image.diagonal()
    assert own.min() >= 0.7 - 1e-6
    assert own.min() < 0.75 < 0.95 < own.max() <= 1
    assert ((image > 0).sum(dim=1) <= 2).all()
    tokens, _ = duet.blended(torch.eye(60)[:, None].expand(60, 3, 60), text, 0.3)
    assert torch.equal(tokens[:, 0], tokens[:, 2])


def test_duet_learns_from_blends_and_aims_at_the_items_own(monkeypatch):
    data = pairs()
    method = made("duet", data, blend=0.3, overlap_power=2.0, tau_label=1.1, tau_pair=0.7, pair_weight=0.5)
    seen = {}
    mixed = draw(5, 7, 8), draw(5, 6, 9)
    monkeypatch.setattr(duet, "blended", lambda image, text, blend: seen.update(blend=blend) or mixed)
    for name in ("label_contrast", "pair_contrast", "soft_targets"):
        real = getattr(duet, name)

        def spy(*given, real=real, name=name):
            seen.setdefault(name, given)
            return real(*given)

        monkeypatch.setattr(duet, name, spy)
    heads = []
    method.image_head.layers.register_forward_pre_hook(lambda _, given: heads.append(given[0]))
    batch = data.rows(torch.tensor([3, 9, 11, 20, 1]))
    list(method.steps(batch, "joint"))
    assert seen["blend"] == 0.3
    torch.testing.assert_close(heads[0], method.image_head.scaling(mixed[0]))
    torch.testing.assert_close(seen["soft_targets"][0], method.image_head.scaling(batch.image))
    torch.testing.assert_close(seen["soft_targets"][1], method.text_head.scaling(batch.text))
    expected = [[reference.label_similarity(a, b, "jaccard") ** 2 for b in batch.labels] for a in batch.labels]
    torch.testing.assert_close(seen["label_contrast"][2], torch.tensor(expected))
    assert seen["label_contrast"][3] == 1.1
    assert seen["pair_contrast"][3] == 0.7


# CANON


def test_canon_rows_are_eq_1_and_2():
    """Against numpy-like steps: canonical directions times rho^power, unit rows, their weighted mean, centred."""
    image, text = (draw(60, d, s).double() for d, s in ((7, 0), (6, 1)))
    text[:, :3] += image[:, :3]
    config = CanonConfig(directions=3, ridge=0.7, power=2.0, text_share=0.8)
    centred = [x - x.mean(dim=0) for x in (image, text)]
    roots = []
    for x in centred:
        c = x.T @ x / 60
        values, axes = torch.linalg.eigh(c + 0.7 * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype))
        roots.append(axes @ torch.diag(values.rsqrt()) @ axes.T)
    u, rho, vt = torch.linalg.svd(roots[0] @ (centred[0].T @ centred[1] / 60) @ roots[1], full_matrices=False)
    z = [
        torch.nn.functional.normalize(x @ r @ w[:, :3] * rho[:3] ** 2, dim=1)
        for x, r, w in zip(centred, roots, (u, vt.T), strict=True)
    ]
    expected = torch.nn.functional.normalize(0.2 * z[0] + 0.8 * z[1], dim=1)
    expected = expected - expected.mean(dim=0)
    found = canon.shared_rows(image, text, config)
    torch.testing.assert_close(found @ found.T, expected @ expected.T)


def test_canon_teaches_each_row_its_own_code_after_quantisation():
    data = pairs(labels=False)
    method = made("canon", data, iterations=25, directions=6).eval()
    rows = torch.tensor([7, 30, 2])
    (step,) = method.steps(data.rows(rows), "joint")
    for side, head, x in (("image", method.image_head, data.image), ("text", method.text_head, data.text)):
        torch.testing.assert_close(step.terms[side], canon.code_loss(head(x[rows]), method.target_codes[rows]))
    shared = canon.shared_rows(
        method.image_head.scaling(data.image), method.text_head.scaling(data.text), method.config
    )

    def lost(codes):  # of an orthogonal fit of the codes by the rows
        _u, s, _vt = torch.linalg.svd(shared.T @ codes.double(), full_matrices=False)
        return -s.sum().item()

    torch.manual_seed(0)
    chance = [lost(canon.teacher_codes(shared, 16, 0)) for _ in range(20)]
    assert lost(method.target_codes) < min(chance)


@pytest.mark.parametrize(("asked", "beside_text"), [(3, 3), (0, 0), (128, 6)])
def test_canon_sees_components_beside_bags_of_words_alone(asked, beside_text):
    """Pictures are dense here; there are no more components than columns."""
    data = pairs(labels=False)
    bags = torch.eye(6)[torch.arange(len(data.text)) % 6]
    method = made("canon", dataclasses.replace(data, text=bags), components=asked)
    assert (method.image_head.config.components, method.text_head.config.components) == (0, beside_text)


# Buffers: what a step leaves behind


def test_mith_keeps_all_four_codes_and_weighs_them():
    data = pairs()
    method = made("mith", data, n_bits=8, concept=3).eval()
    rows = torch.tensor([7, 0, 3])
    list(method.steps(data.rows(rows), "joint"))
    for side, head, x in (("image", method.image_head, data.image), ("text", method.text_head, data.text)):
        parts = mith.split_head(head, x[rows], 12)
        for kind in ("whole", "local"):
            assert torch.equal(getattr(method, f"{side}_{kind}")[rows], getattr(parts, kind)), (side, kind)
    for name, value in (("image_whole", 0.5), ("text_whole", -0.5), ("image_local", -0.4), ("text_local", 0.5)):
        getattr(method, name)[:] = value
    method.end_epoch(0)
    assert (method.code_buffer == 1).all()
    method.text_whole[:] = -0.505  # -0.00495 of the global codes against 0.001 of the local ones
    method.end_epoch(1)
    assert (method.code_buffer == -1).all()
    method.text_whole[:] = -0.5005  # -0.000495 against 0.001
    method.end_epoch(2)
    assert (method.code_buffer == 1).all()


def test_mesdch_keeps_fresh_codes_and_its_signs_follow_all_three_nets():
    data = pairs()
    method = made("mesdch", data, n_bits=8).eval()
    rows = torch.tensor([7, 0, 3])
    assert tuple(method.phases(0)) == ("label", "image", "text")
    for phase in method.phases(0):
        list(method.steps(data.rows(rows), phase))
    for buffer, codes in (
        (method.label_buffer, method.label_net(data.labels[rows])),
        (method.image_buffer, method.image_head(data.image[rows])),
        (method.text_buffer, method.text_head(data.text[rows])),
    ):
        assert torch.equal(buffer[rows], torch.tanh(codes))
    for turn in itertools.permutations((0.5, 0.2, -0.8)):
        for buffer, value in zip((method.label_buffer, method.image_buffer, method.text_buffer), turn, strict=True):
            buffer[:] = value
        method.end_epoch(0)
        assert (method.code_buffer == -1).all()
        method.label_buffer += 0.2
        method.end_epoch(1)
        assert (method.code_buffer == 1).all()


def test_dcmh_signs_follow_both_nets():
    method = made("dcmh", pairs(), n_bits=8)
    assert tuple(method.phases(0)) == ("image", "text")
    for image, text, sign in ((0.5, -0.6, -1), (-0.6, 0.5, -1), (0.6, -0.5, 1), (-0.5, 0.6, 1)):
        method.image_buffer[:], method.text_buffer[:] = image, text
        method.end_epoch(0)
        assert (method.code_buffer == sign).all()
    fresh = made("dcmh", pairs(), n_bits=8)
    for buffer in (fresh.image_buffer, fresh.text_buffer):
        assert 0.8 < buffer.std() < 1.2, "F and G start as N(0, 1)"


def test_ssah_keeps_fresh_features_and_losses_of_one_pass():
    data = pairs()
    method = made("ssah", data, n_bits=8).eval()
    rows = torch.tensor([7, 0, 3])
    with torch.no_grad():
        for weight in method.label_net.parameters():
            weight.add_(0.05)
    (step,) = method.steps(data.rows(rows), "label")
    assert torch.equal(method.label_features[rows], method.label_net(data.labels[rows]))
    assert torch.equal(method.label_codes[rows], torch.tanh(method.label_net.output(method.label_features[rows])))
    method.end_phase("label")
    assert method.pass_loss == pytest.approx(sum(term.item() for term in step.terms.values()), rel=1e-5)
    (step,) = method.steps(data.rows(rows), "image")
    method.end_phase("image")
    assert method.pass_loss == pytest.approx(sum(term.item() for term in step.terms.values()), rel=1e-5)


# Which passes, and how many


def test_passes_of_the_rounds():
    method = made("ugach", pairs(labels=False), pretraining=3, generator_passes=2)
    passes = [tuple(method.phases(epoch)) for epoch in range(5)]
    assert passes == [("pretrain",)] * 3 + [("discriminator", "generator", "generator")] * 2
    method = made("ucch", pairs(labels=False), warm_up=2)
    assert [tuple(method.phases(epoch)) for epoch in range(4)] == [("warm_up",)] * 2 + [("memory",)] * 2
    assert tuple(made("cirh", pairs(labels=False)).phases(0)) == ("teacher", "students")


def test_cirh_rates_are_two_cycles():
    rates = made("cirh", pairs(labels=False), teacher_rate=0.4, learning_rate=0.1).learning_rates(0.3)
    assert rates == pytest.approx({"teacher": 0.4, "students": 0.1})


def test_ucch_widths():
    method = made("ucch", pairs(labels=False))
    assert method.image_head.config.hidden == (12, 12)
    assert method.text_head.config.hidden == (12,)


@pytest.mark.parametrize(("share", "most", "k"), [(0.4, 1000, 16), (0.4, 5, 5), (0.0, 9, 1), (1.0, 1000, 39)])
def test_dgcpn_neighbours(share, most, k):
    method = made("dgcpn", pairs(labels=False), neighbours=share, max_neighbours=most)
    assert method.neighbours.shape == (40, k + 1)


# Closed forms


def codes_of(method, data):
    method.fit(data, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat([method.image_head(data.image), method.text_head(data.text)])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cca_itq", {"ridge": 10.0}),
        ("cca_itq", {"iterations": 1}),
        ("cmfh", {"image_weight": 0.9}),
        ("cmfh", {"gamma": 1.0}),
        ("cmfh", {"ridge": 30.0}),
        ("cmfh", {"iterations": 1}),
        ("cmfh", {"mu": 1.0}),
        ("lcmh", {"ridge": 10.0}),
        ("lcmh", {"iterations": 1}),
        ("scm", {"ridge": 30.0}),
    ],
)
def test_each_setting_of_a_closed_form_changes_its_codes(name, change):
    data = pairs(200)
    assert ((codes_of(made(name, data), data) >= 0) != (codes_of(made(name, data, **change), data) >= 0)).any()
