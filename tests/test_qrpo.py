"QRPO against its definition: 60 digits for the partition functions, plain fp64 loops for the loss, any cut of the step, any bad input."
import dataclasses
import math
import random
from itertools import product

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from post_training.losses import qrpo
from post_training.losses.sft import reduce_terms

NAN = float("nan")
NAMES = sorted(qrpo.TRANSFORMS)
CHOICES = list(product(NAMES, ("continuous", "finite"), (False, True), (False, True), (None, 0.15)))


def log_z(name, b):
    "beta log Z from the closed forms, 60 digits"
    with mpmath.workdps(60):
        b, t = mpmath.mpf(b), 1 / mpmath.mpf(b)
        z = dict(identity=lambda: b * mpmath.expm1(t), square=lambda: mpmath.sqrt(mpmath.pi * b) / 2 * mpmath.erfi(mpmath.sqrt(t)),
                 sqrt=lambda: 2 * b * b * (mpmath.exp(t) * (t - 1) + 1), log=lambda: b / (1 + b), normal=lambda: mpmath.exp(t * t / 2))
        return float(b * mpmath.log(z[name]()))


def reward_at(name, q):
    f = dict(identity=lambda: q, square=lambda: q * q, sqrt=lambda: math.sqrt(q), log=lambda: math.log(q),
             normal=lambda: float(mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(q) - 1)))
    return f[name]()


# -- partition functions

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-6), (torch.float64, 4e-15)], ids=["fp32", "fp64"])
def test_partition_functions(name, dtype, limit):
    "Every decade of beta, the borders between the branches, and beyond: exact to rounding"
    betas = torch.cat([torch.logspace(-6, 6, 241), torch.tensor([1.999999, 2.0, 2.000001, 1 / 40.001, 1 / 40, 1 / 39.999, 1e-9, 1e9])]).to(dtype)
    for b, got in zip(betas.tolist(), qrpo.TRANSFORMS[name].beta_log_z(betas).tolist()):
        want = log_z(name, b)
        assert abs(got - want) < limit * max(1, abs(want)), (b, got, want)


@pytest.mark.parametrize("name", NAMES)
def test_the_formulas_are_the_integrals(name):
    "The closed forms themselves, by quadrature in 30 digits"
    with mpmath.workdps(30):
        for b in (0.05, 0.4, 2.5, 30.0):
            b = mpmath.mpf(b)
            if name == "normal": z = mpmath.quad(lambda x: mpmath.npdf(x) * mpmath.exp(x / b), [-40, 0, 1 / b, 1 / b + 40])
            else: z = mpmath.quad(lambda u: mpmath.exp(reward_mp(name, u) / b), [0, 0.5, 0.9, 1])
            assert abs(float(b * mpmath.log(z)) - log_z(name, b)) < 1e-9


def reward_mp(name, u):
    return dict(identity=lambda: u, square=lambda: u * u, sqrt=lambda: mpmath.sqrt(u), log=lambda: mpmath.log(u))[name]()


@pytest.mark.parametrize("name", NAMES)
def test_slope_is_minus_the_divergence(name):
    "d/dbeta (beta log Z) by differences in 60 digits, in fp32 too; no NaN from the branch that was not taken"
    betas = [1e-4, 1e-2, 0.1, 1.0, 1.99, 2.01, 50.0, 1e4]
    for dtype, rtol in ((torch.float32, 2e-3), (torch.float64, 1e-6)):
        b = torch.tensor(betas, dtype=dtype, requires_grad=True)
        slope, = torch.autograd.grad(qrpo.TRANSFORMS[name].beta_log_z(b).sum(), b)
        for x, got in zip(b.tolist(), slope.tolist()):
            want = (log_z(name, x * (1 + 1e-5)) - log_z(name, x * (1 - 1e-5))) / (2e-5 * x)
            assert abs(got - want) < rtol * max(abs(want), 1e-4), (x, got, want)


@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 5)), min_size=1, max_size=9).filter(lambda x: any(w for _, w in x)), st.floats(-6, 6))
@settings(max_examples=200, deadline=None)
def test_finite_partition(atoms, log_beta):
    r, w = (torch.tensor([x], dtype=torch.float64) for x in zip(*atoms))
    b = 10**log_beta
    with mpmath.workdps(60):
        z = sum(int(k) * mpmath.exp(mpmath.mpf(x) / b) for x, k in atoms) / sum(k for _, k in atoms)
        want = float(b * mpmath.log(z))
    assert abs(qrpo.finite_beta_log_z(torch.tensor([b], dtype=torch.float64), r, w).item() - want) < 2e-14


# -- quantiles

@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_quantiles_by_counting(seed):
    "Ties, masks, and completions among their references, against counting in plain Python"
    rng = random.Random(seed)
    rows = []
    for _ in range(4):
        refs = [float(rng.randint(0, 4)) for _ in range(rng.randint(2, 6))]
        among = rng.random() < 0.5
        rows.append((rng.choice(refs) if among else float(rng.randint(-1, 5)), refs, among))
    R = max(len(refs) for _, refs, _ in rows)
    reward, among = torch.tensor([r for r, *_ in rows]), torch.tensor([a for *_, a in rows])
    table = torch.tensor([refs + [NAN] * (R - len(refs)) for _, refs, _ in rows])
    mask = torch.tensor([[1] * len(refs) + [0] * (R - len(refs)) for _, refs, _ in rows])
    got = qrpo.quantile(reward, table, mask, among)
    atoms, weights = qrpo.tied_atoms(reward, table, mask, among)
    for i, (r, refs, a) in enumerate(rows):
        others = list(refs)
        if a: others.remove(r)
        assert got[i].item() == pytest.approx(sum(x <= r for x in others) / len(others))
        pool = [*others, r]
        want = sorted(sum(x <= y for k, x in enumerate(pool) if k != j) / len(others) for j, y in enumerate(pool))
        assert sorted(atoms[i][weights[i] > 0].tolist()) == pytest.approx(want)
        assert weights[i][weights[i] > 0].tolist() == pytest.approx([1 / len(pool)] * len(pool))


BAD_REWARDS = [
    (dict(reward_S=torch.tensor([NAN])), "NaN or infinite"),
    (dict(reward_S=torch.tensor([math.inf])), "NaN or infinite"),
    (dict(ref_rewards_SR=torch.tensor([[0.0, -math.inf]])), "NaN or infinite"),
    (dict(ref_rewards_SR=torch.zeros(1, 0)), "no reference"),
    (dict(mask_SR=torch.zeros(1, 2)), "no reference"),
    (dict(reward_S=torch.tensor([0.5]), among_S=True), "none of them has its reward"),
    (dict(mask_SR=torch.tensor([[1, 0]]), among_S=True), "other than itself"),
    (dict(reward_S=torch.tensor([0.0], dtype=torch.float64)), "one precision"),
]


@pytest.mark.parametrize("change,told", BAD_REWARDS, ids=str)
@pytest.mark.parametrize("function", [qrpo.quantile, qrpo.tied_atoms])
def test_bad_rewards(function, change, told):
    with pytest.raises(ValueError, match=told): function(**(dict(reward_S=torch.zeros(1), ref_rewards_SR=torch.tensor([[0.0, 1.0]])) | change))


# -- the loss

def make_completions(n=8, seed=0, dtype=torch.float64):
    "Token log-probabilities of unequal length, and what else the loss reads"
    rng = random.Random(seed)
    rows = []
    for _ in range(n):
        refs = [float(rng.randint(0, 6)) for _ in range(rng.randint(2, 7))]
        logps = [-4 * rng.random() for _ in range(rng.randint(1, 9))]
        rows.append(dict(logps=torch.tensor(logps, dtype=dtype, requires_grad=True), ref=sum(logps) + rng.gauss(0, 2), reward=float(rng.randint(0, 6)), refs=refs))
    return rows


def oracle(rows, beta, transform, partition, by_beta, by_loss, bound, tied):
    "The definition, one completion after the other"
    total = 0.0
    mid = transform in ("log", "normal")
    for row in rows:
        y, n = row["logps"].double(), len(row["refs"])
        def f(k): return reward_at(transform, (k + 0.5) / (n + 1) if mid else k / n)
        b = beta / len(y) if by_beta else beta
        if bound: b = min(b, bound)
        if partition == "finite":
            pool = [*row["refs"], row["reward"]]
            ks = [sum(x <= r for x in pool) - 1 for r in pool] if tied else range(n + 1)
            z = b * math.log(math.fsum(math.exp((f(k) - f(n)) / b) for k in ks) / (n + 1)) + f(n)
        else: z = log_z(transform, b)
        term = (f(sum(x <= row["reward"] for x in row["refs"])) - z - b * (y.sum() - row["ref"]))**2
        total = total + (term / len(y) if by_loss else term)
    return total / len(rows)


def micro_batch(rows, layout, spare):
    "Tokens of a micro-batch as the trainer has them: a prompt before each completion, NaN wherever nothing may be read"
    dtype = rows[0]["logps"].dtype
    pieces = [(torch.cat([torch.full((2,), NAN, dtype=dtype), r["logps"]]), torch.tensor([0, 0] + [1] * len(r["logps"]))) for r in rows]
    pieces = [(lp, m, torch.full_like(m, i)) for i, (lp, m) in enumerate(pieces)]
    if layout == "packed": x = [torch.cat(p)[None] for p in zip(*pieces)]
    else:
        T = max(len(m) for _, m, _ in pieces) + 1
        def pad(v, fill):
            empty = torch.full((T - len(v),), fill, dtype=v.dtype)
            return torch.cat([v, empty] if layout == "right" else [empty, v])
        x = [torch.stack([pad(p[k], fill) for p in pieces]) for k, fill in enumerate((NAN, 1, -1))]  # a mask that is wrong on padding does no harm
    logps, lengths = qrpo.completion_sums(*x, number=len(rows))
    R = max(len(r["refs"]) for r in rows)
    refs, mask = [torch.tensor([v(r) + [e] * (R - len(r["refs"])) for r in rows]) for v, e in ((lambda r: r["refs"], NAN), (lambda r: [1] * len(r["refs"]), 0))]
    rewards = torch.tensor([r["reward"] for r in rows])
    n = qrpo.compared_references(rewards, refs, mask)[2]
    def slots(v, fill=NAN): return torch.cat([v, torch.full((spare, *v.shape[1:]), fill, dtype=v.dtype)])
    ref = torch.tensor([r["ref"] for r in rows], dtype=torch.float64)
    args = [slots(logps), slots(ref), slots(qrpo.quantile(rewards.double(), refs.double(), mask)), slots(lengths, 0)]
    return args, slots(n, 0), tuple(slots(a) for a in qrpo.tied_atoms(rewards.double(), refs.double(), mask))


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("cuts", [(8,), (1, 5, 2), (1,) * 8], ids=str)
def test_any_layout_and_any_micro_batches(layout, cuts):
    "Loss and gradient of a step are the oracle's however it is cut, padded or packed, with slots that hold nothing"
    for beta, tied in ((0.3, False), (2.0, True)):
        for choice in CHOICES:
            rows = make_completions()
            leaves = [r["logps"] for r in rows]
            want = oracle(rows, beta, *choice, tied)
            want_grad = torch.cat(torch.autograd.grad(want, leaves))
            left = iter(rows)
            batches = [micro_batch([next(left) for _ in range(n)], layout, spare) for spare, n in enumerate(cuts)]
            total = sum(qrpo.completion_count(args[3]) for args, *_ in batches)
            outs = [qrpo.qrpo_loss(*args, qrpo.QRPOSettings(beta, *choice), n, atoms if tied else None) for args, n, atoms in batches]
            got = sum(reduce_terms(o.terms, total) for o in outs)
            grad = torch.cat(torch.autograd.grad(got, leaves))
            assert abs(got - want) < 1e-12 * max(1, abs(want.item())), choice
            assert (grad - want_grad).norm() < 1e-11 * want_grad.norm(), choice
            assert sum(o.used_S.sum() for o in outs) == 8 and total.item() == 8


def flat(dtype=torch.float32, **change):
    base = dict(logps_S=torch.tensor([-7.0, -5.0, -6.0], dtype=dtype), ref_logps_S=torch.tensor([-8.0, -5.0, -2.0], dtype=dtype),
                quantiles_S=torch.tensor([1.0, 0.2, 0.5]), lengths_S=torch.tensor([4, 2, 7]), beta=0.1)
    return base | change


def loss_of(**kwargs):
    "The loss from flat arguments: those of the settings and those of the function"
    names = {f.name for f in dataclasses.fields(qrpo.QRPOSettings)}
    return qrpo.qrpo_loss(settings=qrpo.QRPOSettings(**{k: v for k, v in kwargs.items() if k in names}), **{k: v for k, v in kwargs.items() if k not in names})


def test_a_pair_is_two_completions():
    "The mean over completions is the mean over pairs of the mean of chosen and rejected"
    rows = make_completions()
    args, n, _ = micro_batch(rows, "right", 0)
    whole = reduce_terms(qrpo.qrpo_loss(*args, qrpo.QRPOSettings(0.1)).terms)
    pairs = [reduce_terms(qrpo.qrpo_loss(*[a[i:i + 2] for a in args], qrpo.QRPOSettings(0.1)).terms) for i in range(0, 8, 2)]
    assert torch.allclose(whole, torch.stack(pairs).mean())


def test_bf16_is_summed_in_fp32():
    out = loss_of(**flat(torch.bfloat16))
    assert out.terms[0].numerator.dtype == torch.float32 and torch.equal(out.log_ratio_S, torch.tensor([1.0, 0.0, -4.0]))
    sums, _ = qrpo.completion_sums(torch.full((1, 1000), -1.01).bfloat16(), torch.ones(1, 1000), torch.zeros(1, 1000, dtype=torch.long), 1)
    assert sums.dtype == torch.float32 and abs(sums.item() - 1000 * torch.tensor(-1.01).bfloat16().item()) < 1e-2


def test_what_is_told_has_no_gradient_and_fits():
    lp = torch.tensor([-7.0, -5.0, -6.0], requires_grad=True)
    out = loss_of(**flat(logps_S=lp))
    assert not any(x.requires_grad for x in out[1:])
    error = (out.target_S - out.beta_S * out.log_ratio_S)
    assert torch.allclose(out.terms[0].numerator, (error**2).sum())
    assert torch.allclose(out.predicted_S - out.beta_S * out.log_ratio_S + out.target_S, torch.tensor([1.0, 0.2, 0.5]))


def test_the_bound_is_counted_in_used_slots_only():
    out = loss_of(**flat(beta=1.0, lengths_S=torch.tensor([4, 0, 20])), normalize_beta_by_length=True, max_effective_beta=0.1)
    assert out.clamped.item() == 1 and out.beta_S.tolist() == pytest.approx([0.1, 0.0, 0.05])
    assert loss_of(**flat()).clamped.item() == 0


@pytest.mark.parametrize("beta", [5.0, 10.0])
def test_the_bound_of_the_published_runs(beta):
    """preference=published against the formulas of swiss-ai/posttraining (trainers/preference.py): beta / |y|, at most 0.1, beta log Z = 1 + beta ln beta
    (its form for small beta). The bound acts on answers of fewer than 10 beta tokens: 50 for beta 5, 100 for beta 10"""
    from post_training import config
    args = ["dataset=local", "dataset_args.dataset_name=x", "training_args.normalize_beta_by_length=true", f"training_args.beta={beta}"]
    t = config.compose("train_preference", args).cfg["training_args"]
    assert t["max_effective_beta"] == 0.1
    assert config.compose("train_preference", [*args, "training_args.loss_type=sigmoid"]).cfg["training_args"]["max_effective_beta"] is None  # its DPO has none
    lengths = torch.tensor([1, 49, 50, 51, 99, 100, 101, 400])
    logps, ref = torch.linspace(-300, -2, 8, dtype=torch.float64), torch.linspace(-280, -9, 8, dtype=torch.float64)
    quantiles = torch.linspace(0, 1, 8, dtype=torch.float64)
    out = loss_of(logps_S=logps, ref_logps_S=ref, quantiles_S=quantiles, lengths_S=lengths, beta=beta, normalize_beta_by_length=True, max_effective_beta=t["max_effective_beta"])
    losses = []
    for i, n in enumerate(lengths.tolist()):
        b = min(beta / n, 0.1)
        losses.append((quantiles[i].item() - (1 + b * math.log(b)) - b * (logps[i] - ref[i]).item())**2)
        assert out.beta_S[i].item() == pytest.approx(b, rel=1e-6)
    assert out.clamped.item() == sum(n < 10 * beta for n in lengths.tolist())
    assert reduce_terms(out.terms).item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("beta", [1e-6, 1e6])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_extreme_betas_in_fp32(beta, choice):
    lp = torch.tensor([-7.0, -5.0, -6.0], requires_grad=True)
    out = qrpo.qrpo_loss(*list(flat(logps_S=lp).values())[:4], qrpo.QRPOSettings(beta, *choice), torch.tensor([5, 5, 4]))
    loss = reduce_terms(out.terms)
    grad, = torch.autograd.grad(loss, lp)
    assert loss.isfinite() and grad.isfinite().all()


BAD_LOSS = [
    (dict(beta=0.0), "beta is 0.0"), (dict(beta=-0.1), "beta is -0.1"), (dict(beta=NAN), "beta is nan"), (dict(beta=math.inf), "beta is inf"),
    (dict(max_effective_beta=0.0), "max_effective_beta is 0.0"),
    (dict(transform="cube"), "unknown transform 'cube'; there are identity, log, square, sqrt, normal"),
    (dict(partition="discrete"), "there are continuous, finite"),
    (dict(partition="finite"), "needs n_refs_S"), (dict(transform="log"), "needs n_refs_S"), (dict(transform="normal"), "needs n_refs_S"),
    (dict(quantiles_S=torch.tensor([1.1, 0.2, 0.5])), "not between 0 and 1"), (dict(quantiles_S=torch.tensor([1.0, NAN, 0.5])), "not between 0 and 1"),
    (dict(quantiles_S=torch.tensor([1.0, -3.0, 0.5])), "not between 0 and 1"),
]


@pytest.mark.parametrize("change,told", BAD_LOSS, ids=str)
def test_bad_input(change, told):
    with pytest.raises(ValueError, match=told): loss_of(**flat(**change))


def test_nan_in_a_used_slot_is_seen():
    "Only slots without tokens are left out; a missing reference log-probability does not vanish"
    assert reduce_terms(loss_of(**flat(ref_logps_S=torch.tensor([NAN, -5.0, -2.0]))).terms).isnan()
