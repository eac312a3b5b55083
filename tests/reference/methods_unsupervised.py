"""Slow references for the losses of methods that learn from pairs: loops over items, from the papers' formulas."""

import math

import torch


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def sign(value):
    return 1.0 if value >= 0 else -1.0


# UGACH


def ugach_distance(a, b):
    return sum((a[k] - b[k]) ** 2 for k in range(len(a)))


def ugach_log_probability(query, items, is_positive):
    """log p(item | query) over the items that are no positives; None for a positive."""
    weights = [None if p else torch.exp(-ugach_distance(query, o)) for o, p in zip(items, is_positive, strict=True)]
    total = sum(w for w in weights if w is not None)
    return [None if w is None else torch.log(w / total) for w in weights]


def ugach_margin(query, positive, negative, beta):
    return torch.clamp(beta + ugach_distance(query, positive) - ugach_distance(query, negative), min=0)


def ugach_policy_gradient(log_probability, reward):
    b, s = reward.shape
    reward = reward.detach()
    mean = sum(reward.flatten()) / (b * s)
    return -sum((reward[i, j] - mean) * log_probability[i, j] for i in range(b) for j in range(s)) / (b * s)


# UCCH


def ucch_unit(activations):
    relaxed = torch.tanh(activations)
    return relaxed / relaxed.norm()


def ucch_contrast(codes, keys, own_again, tau):
    """Mean over the batch of -log P(i | h_i); `own_again[i]` are the keys drawn that are pair i's own."""
    total = 0.0
    for i, h in enumerate(codes):
        score = [torch.exp((h @ torch.tensor([sign(v) for v in key])) / (tau * math.sqrt(len(h)))) for key in keys]
        total = total - torch.log(score[i] / sum(s for j, s in enumerate(score) if j not in own_again[i]))
    return total / len(codes)


def ucch_ranking(image_codes, text_codes, margin, penalty):
    total = 0.0
    for queries, others in ((image_codes, text_codes), (text_codes, image_codes)):
        for i in range(len(queries)):
            own = queries[i] @ others[i]
            summed = 0.0
            for j in range(len(others)):
                score = queries[i] @ others[j]
                beyond = own.item() - score.item() > margin
                summed = summed + torch.exp(score - penalty if beyond else score)
            total = total + (margin + torch.log(summed) - own) / len(queries)
    return total


def ucch_remember(v, image_code, text_code, rho):
    fresh = (image_code + text_code) / 2
    mixed = (1 - rho) * v + rho * fresh / fresh.norm()
    return mixed / mixed.norm()


# DGCPN


def dgcpn_target(image, text, rows, k, a1, a2, scale):
    """S between the items `rows`, from whole n x n matrices."""
    n = len(image)
    c = [[a1 * cosine(text[i], text[j]) + (1 - a1) * cosine(image[i], image[j]) for j in range(n)] for i in range(n)]
    p = torch.zeros(n, n)
    for i in range(n):
        nearest = sorted((j for j in range(n) if j != i), key=lambda j: -c[i][j])[:k]
        total = sum(max(c[i][j], 0.0) for j in nearest)
        for j in nearest:
            p[i, j] = max(c[i][j], 0.0) / total
    target = torch.zeros(len(rows), len(rows))
    for x, i in enumerate(rows):
        for y, j in enumerate(rows):
            coherence = sum(p[i, m] * p[j, m] for m in range(n))
            target[x, y] = 2 * ((1 - a2) * c[i][j] + a2 * scale * coherence) - 1
    return target


def dgcpn_loss(image_code, text_code, target, pull, dw, cw):
    b = len(target)
    pairs, structure, consistency = 0.0, 0.0, 0.0
    for i in range(b):
        pairs = pairs + (cosine(image_code[i], text_code[i]) - pull) ** 2 / b
        for j in range(b):
            across, back = cosine(image_code[i], text_code[j]), cosine(image_code[j], text_code[i])
            images, texts = cosine(image_code[i], image_code[j]), cosine(text_code[i], text_code[j])
            if i != j:
                structure = structure + sum((u - target[i, j]) ** 2 for u in (images, texts, across)) / b**2
            differences = (across - images, across - texts, images - texts, across - back)
            consistency = consistency + sum(d**2 for d in differences) / b**2
    return pairs + dw * structure + cw * consistency


# CIRH


def cirh_similarity(image, text, rows, kept, a1, a2):
    """S between the items `rows`, from whole n x n matrices."""
    n = len(image)
    s1 = torch.zeros(n, n)
    for i in range(n):
        for j in range(n):
            s1[i, j] = a1 * cosine(image[i], image[j]) + (1 - a1) * cosine(text[i], text[j])
    for i in range(n):
        for j in sorted(range(n), key=lambda j: float(s1[i, j]))[: n - round(kept * n)]:
            s1[i, j] = 0
    s = torch.zeros(len(rows), len(rows))
    for x, i in enumerate(rows):
        for y, j in enumerate(rows):
            both = [2 / (1 + math.exp(-float(s1[a, b]))) - 1 + (a == b) for a, b in ((i, j), (j, i))]
            s[x, y] = a2 * s1[i, j] + (1 - a2) * sum(both) / 2
    return s


def cirh_smoothed(features, similarity):
    """0.7 of each row, 0.2 of that of the largest other S, 0.1 of the next."""
    rows = []
    for i in range(len(features)):
        first, second = sorted((j for j in range(len(features)) if j != i), key=lambda j: -float(similarity[i, j]))[:2]
        rows.append(0.7 * features[i] + 0.2 * features[first] + 0.1 * features[second])
    return torch.stack(rows)


def normalized_columns(rows):
    """Batch normalisation, before it learns a scale."""
    columns = []
    for column in rows.T:
        mean = sum(column) / len(column)
        variance = sum((value - mean) ** 2 for value in column) / len(column)
        columns.append((column - mean) / torch.sqrt(variance + 1e-5))
    return torch.stack(columns, dim=1)


def cirh_teacher(weights, image, text, similarity, recon):
    """L1 and H of smoothed features. `weights` gives a layer's x -> x W + b by its name."""
    b = len(similarity)

    def unit(rows):
        return torch.stack([row / torch.sqrt((row**2).sum()) for row in rows])

    def rectified(rows):
        return rows * (rows > 0)

    def neighbours(v):
        return torch.stack([sum(similarity[i, j] * v[j] for j in range(b)) for i in range(b)])

    v = {
        m: unit(rectified(normalized_columns(weights[f"{m}_encoder"](x))))
        for m, x in (("image", image), ("text", text))
    }
    moved = {m: weights[f"{m}_graph"](v[m]) for m in v}
    g = {m: rectified(normalized_columns(neighbours(moved[m]))) for m in v}
    joint = {m: weights["joint_graph"](v[m]) for m in v}
    halves = normalized_columns(
        torch.cat([neighbours(joint["image"]) + joint["text"], joint["image"] + neighbours(joint["text"])])
    )
    g_joint = rectified(halves[:b] + halves[b:])
    h = {m: normalized_columns(weights[f"{m}_code"](torch.cat([g[m], g_joint], dim=1))) for m in v}
    h_joint = normalized_columns(weights["joint_code"](g_joint))
    whole = torch.tanh(normalized_columns(weights["code"](torch.cat([h["image"], h_joint, h["text"]], dim=1))))
    total = 0.0
    for m, x in (("image", image), ("text", text)):
        hidden = rectified(normalized_columns(weights[f"{m}_decoder 0"](whole + torch.tanh(h[m]))))
        again = normalized_columns(weights[f"{m}_decoder 1"](hidden))
        total = total + recon * ((again - x) ** 2).sum() / x.numel()
    for codes in (h["image"], h["text"], whole):
        for i in range(b):
            for j in range(b):
                total = total + (cosine(codes[i], codes[j]) - similarity[i, j]) ** 2 / b**2
    nearest_sign = torch.tensor([[1.0 if value >= 0 else -1.0 for value in row] for row in whole])
    return total + ((whole - nearest_sign) ** 2).sum() / whole.numel(), whole


def cirh_student_loss(image_code, text_code, code, similarity, dw):
    b, n_bits = code.shape
    total = 0.0
    for i in range(b):
        for k in range(n_bits):
            square = (image_code[i, k] - code[i, k]) ** 2 + (text_code[i, k] - code[i, k]) ** 2
            total = total + (square + (image_code[i, k] - text_code[i, k]) ** 2) / (b * n_bits)
        for j in range(b):
            for x, y in ((image_code, image_code), (text_code, text_code), (image_code, text_code)):
                total = total + dw * (cosine(x[i], y[j]) - similarity[i, j]) ** 2 / b**2
    return total


# LCMH


def lcmh_memberships(features, centroids):
    rows = []
    for x in features:
        closeness = [1 / sum((x[d] - m[d]) ** 2 for d in range(len(x))) for m in centroids]
        rows.append(torch.stack([c / sum(closeness) for c in closeness]))
    return torch.stack(rows)


# CMFH


def cmfh_objective(views, latent, bases, projections, weights, mu, gamma):
    total = 0.0
    for x, u, w, a in zip(views, bases, projections, weights, strict=True):
        squares = [(x - latent @ u), (latent - x @ w)]
        fit = sum((e**2) * f for m, f in zip(squares, (1.0, mu), strict=True) for e in m.flatten())
        total = total + a * (fit + gamma * sum((m**2).sum() for m in (u, w, latent)))
    return total


# DUET


def duet_label_contrast(codes, others, labels, tau, same_side, reach):
    b, n_bits = codes.shape
    values = []
    for i in range(b):
        own = {c for c in range(labels.shape[1]) if labels[i, c]}
        candidates = [j for j in range(b) if not (same_side and j == i)]
        weights = {}
        for j in candidates:
            theirs = {c for c in range(labels.shape[1]) if labels[j, c]}
            weights[j] = len(own & theirs) / len(own | theirs) if own | theirs else 0.0
        total = sum(weights.values())
        if total == 0:
            continue
        score = {j: torch.exp((codes[i] @ others[j]) / (n_bits**0.5 * tau)) for j in candidates}
        normaliser = sum(score.values())
        value = 0.0
        for j in candidates:
            farthest = n_bits**0.5 * (reach + (1 - reach) * weights[j])
            similarity = (codes[i] @ others[j]) / n_bits**0.5
            tie = abs(similarity - farthest) < 1e-9
            share = 0.5 if tie else float(similarity < farthest)  # of the gradient; torch.minimum halves it at a tie
            attraction = share * similarity + (1 - share) * farthest
            value = value + weights[j] * (torch.log(normaliser) - attraction / tau) / total
        values.append(value)
    return sum(values) / len(values) if values else torch.zeros(())


def duet_pair_contrast(image_code, text_code, target, tau):
    b, n_bits = image_code.shape
    total = 0.0
    for one, other in ((image_code, text_code), (text_code, image_code)):
        for i in range(b):
            score = [torch.exp((one[i] @ other[j]) / (n_bits**0.5 * tau)) for j in range(b)]
            total = total - sum(target[i, j] * torch.log(score[j] / sum(score)) for j in range(b)) / (2 * b)
    return total


def duet_soft_targets(image, text, tau):
    b = len(image)
    target = torch.zeros(b, b)
    for side in (image, text):
        for i in range(b):
            score = [torch.exp(cosine(side[i], side[j]) / tau) for j in range(b)]
            for j in range(b):
                target[i, j] += score[j] / sum(score) / 2
    return target


def duet_partner_distance(predicted, partner):
    return sum(1 - cosine(u, v) for u, v in zip(predicted, partner, strict=True)) / len(predicted)


def duet_loss(method, image, text, labels, rows):
    """Eq. 6 of the batch `rows`, for a method without dropout and blend; its layers make the codes."""
    config, image_scaled, text_scaled = method.config, method.image_head.scaling(image), method.text_head.scaling(text)
    hidden = method.image_head.hidden(image[rows]), method.text_head.hidden(text[rows])
    codes = []
    for head, one in zip((method.image_head, method.text_head), hidden, strict=True):
        relaxed = torch.tanh(head.output(one))
        codes.append(relaxed + torch.where(relaxed >= 0, 1.0, -1.0).detach() - relaxed.detach())
    lengths = [n for n in (16, 32, 64) if n < method.n_bits and config.nested] + [method.n_bits]
    total = 0.0
    if labels is not None:
        for u in range(2):
            for v in range(2):
                for n in lengths:
                    a, b = codes[u][:, :n], codes[v][:, :n]
                    settings = config.tau_label, u == v, config.reach
                    total = total + duet_label_contrast(a, b, labels[rows], *settings) / (4 * len(lengths))
        for layer, one in zip((method.image_labels, method.text_labels), hidden, strict=True):
            chance = torch.sigmoid(layer(one))
            cross = -(labels[rows] * chance.log() + (1 - labels[rows]) * (1 - chance).log())
            total = total + config.predict_weight * cross.sum() / (2 * cross.numel())
    for layer, one, other, gist in (
        (method.partner_text, hidden[0], text_scaled, method.text_gist),
        (method.partner_image, hidden[1], image_scaled, method.image_gist),
    ):
        centred = other - other.mean(dim=0)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[: gist.shape[1]]
        partner = centred @ axes.T
        signs = torch.where((partner * gist).sum(dim=0) >= 0, 1.0, -1.0)  # a component's sign is free
        total = total + config.partner_weight * duet_partner_distance(layer(one), partner[rows] * signs)
    weight = 1.0 if labels is None else config.pair_weight
    for n in lengths:
        own = torch.eye(len(rows))
        alike = duet_soft_targets(image_scaled[rows], text_scaled[rows], config.tau_soft)
        a, b = codes[0][:, :n], codes[1][:, :n]
        pairs = duet_pair_contrast(a, b, own, config.tau_pair)
        soft = duet_pair_contrast(a, b, alike, config.tau_pair)
        total = total + weight * (pairs + config.soft_weight * soft) / len(lengths)
    return total


# CANON


def canon_code_loss(activations, codes):
    b, n_bits = codes.shape
    terms = [torch.log(1 + torch.exp(-codes[i, k] * activations[i, k])) for i in range(b) for k in range(n_bits)]
    return sum(terms) / (b * n_bits)
