"""The methods (see test_all.py): losses, rollouts, identities between methods, toys with a known answer."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.integrate
import torch
import torch.nn.functional as F

import common
import consistency
import dmd2
import evaluate
import fsf_dmd
import metrics
import model
import normuon
import sid
import twinflow
import vae
from test_helpers import gaussian_u, gaussian_v, rand, randomize, small_net, spread, uniform


def gradients(loss, net):
    """d loss / d every trainable parameter, in one vector."""
    params = [p for p in net.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, materialize_grads=True)])


def guidance_rows(n, omega, t_min, t_max):
    """The same guidance [n, 3] for every sample."""
    return torch.tensor([[omega, t_min, t_max]], dtype=torch.float64).expand(n, 3)


def gaussian_map(sigma):
    """The exact u(x, t, s) of data N(0, sigma^2), with times as floats."""
    def u(x, t, s):
        t, s = (torch.full((len(x),), time, dtype=torch.float64) for time in (t, s))
        return gaussian_u(x, t, s, sigma)
    return u


# ---- consistency losses ----------------------------------------------------------------------------------------------

def test_emd_meanflow_and_imf_have_one_gradient():
    """Eq. 35-38: AYF's EMD of weight 1/(t-s), MeanFlow's u-regression, iMF's V-regression, consistency_loss agree."""
    net = small_net("decoupled")
    n, y = 6, torch.tensor([0, 1, 2, 0, 1, 2])
    x, v, t = rand(n, 2, 4, 4), rand(n, 2, 4, 4, seed=1), uniform(n) * 0.5 + 0.5
    s = t * uniform(n, seed=1)
    u = lambda x, t, s: net(x, t, y, s)
    dt = model.expand(t - s, x)
    du_dt = model.total_derivative(u, x, t, s, v, exact=True)
    square = lambda e: e.pow(2).flatten(1).mean(1)                                      # [n]
    meanflow = gradients(square(u(x, t, s) - (v - dt * du_dt)).sum(), net)
    imf = gradients(square(u(x, t, s) + dt * du_dt - v).sum(), net)
    f = x - dt * u(x, t, s)
    df_dt = v - u(x, t, s).detach() - dt * du_dt                                        # Eq. 37
    emd = gradients((square(f - (f - df_dt).detach()) / (t - s)).sum(), net)
    c = 1e5                                                                             # 2c (sqrt(m + c^2) - c) -> m
    huber = consistency.consistency_loss(u, x, t, s, v, v, exact=True, c=c, cosine=False)
    ours = gradients(2 * c * huber.sum(), net)
    size = meanflow.norm().item()
    assert size > 0.1
    for other in (imf, emd):
        torch.testing.assert_close(other, meanflow, rtol=0, atol=1e-11 * size + 1e-12)
    torch.testing.assert_close(ours, meanflow, rtol=0, atol=1e-6 * size)


def test_consistency_loss_vanishes_at_the_exact_flow_map_and_is_finite_at_t_equal_s():
    sigma, n = 0.5, 200
    x, t = rand(n, 1), uniform(n) * 0.9 + 0.05
    s = torch.where(torch.arange(n) % 2 == 0, t, t * uniform(n, seed=1))                # half of the rows have s = t
    v = gaussian_v(x, t, sigma)
    u = lambda x, t, s: gaussian_u(x, t, s, sigma)
    off = lambda x, t, s: 1.05 * u(x, t, s)
    assert consistency.consistency_loss(u, x, t, s, v, v, h=1e-4).max() < 1e-5
    assert consistency.consistency_loss(off, x, t, s, v, v, h=1e-4).mean() > 1e-3
    net = small_net("in_context")
    x, eps, t = rand(4, 2, 4, 4), rand(4, 2, 4, 4, seed=1), torch.tensor([0.0, 0.3, 0.7, 1.0]).double()
    y, g = torch.tensor([0, 1, 2, 3]), guidance_rows(4, 4.0, 0.2, 0.6)
    for exact in (False, True):
        loss = consistency.imf_loss(net, x, eps, t, t.clone(), y, g, exact=exact)
        assert loss.isfinite().all() and gradients(loss.sum(), net).isfinite().all()


def test_the_cosine_term_does_not_stop_a_new_network():
    """Its output is 0, where F.cosine_similarity alone has a slope of 1e8, which AdamW's v remembers for 600 steps."""
    target = rand(3, 2, 4, 4)
    length = target.norm(dim=1)
    torch.testing.assert_close(consistency.cosine_distance(-2 * target, target), torch.full((3,), 2.0).double())
    angle = (target[:, 0] / length).flatten(1)                                          # to the first channel
    first = torch.zeros_like(target)
    first[:, 0] = 0.011                                                                 # longer than eps: the cosine
    torch.testing.assert_close(consistency.cosine_distance(first, target), 1 - angle.mean(1))
    pred = torch.zeros_like(target, requires_grad=True)
    slope, = torch.autograd.grad(consistency.cosine_distance(pred, target).sum(), pred)
    torch.testing.assert_close(slope, -100 * target / length[:, None] / 16)             # 1/eps, mean of 16 positions


def test_imf_is_flow_matching_at_t_equal_s_and_guides_as_classifier_free_guidance():
    net = small_net("in_context")
    x0, eps, t = rand(4, 2, 4, 4), rand(4, 2, 4, 4, seed=1), torch.tensor([0.2, 0.4, 0.6, 0.8]).double()
    y = torch.tensor([0, 1, 2, 3])                                                      # the last is dropped (null)
    x_t, null = model.interpolate(x0, eps, t), torch.full((4,), 3)
    g = guidance_rows(4, 4.0, 0.3, 0.5)
    at = guidance_rows(4, 4.0, 0.0, 1.0)                                                # s = t ignores the interval
    loss = consistency.imf_loss(net, x0, eps, t, t.clone(), y, g, c=1e5, cosine=False) * 2e5
    with torch.no_grad():
        v_cond, v_uncond = net(x_t, t, y, None, at), net(x_t, t, null)
        weight = 0.75 * torch.tensor([1, 1, 1, 0]).double().view(4, 1, 1, 1)            # 1 - 1/omega
        v_g = (eps - x0) + weight * (v_cond - v_uncond)
        expected = (v_cond - v_g).pow(2).flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    # off the diagonal omega acts inside [t_min, t_max] only: row 1 (t = 0.4) is guided, row 2 (t = 0.6) is not
    seen = []

    def spy(x, t, y, s, g):
        seen.append(g)
        return net(x, t, y, s, g)

    spy.num_classes = 3
    consistency.imf_loss(spy, x0, eps, t, t / 2, y, g)
    assert torch.equal(seen[0], g) and seen[1][:, 0].tolist() == [1, 4, 1, 1] and seen[2] is None
    # omega 1 in every row: the guided target is v, without a pass for it
    ones = guidance_rows(4, 1.0, 0.3, 0.5)
    losses = [consistency.imf_loss(net, x0, eps, t, t / 2, y, ones, guided) for guided in (True, False)]
    assert torch.equal(*losses)


class Counted:
    """A network that counts the rows it is asked for, with and without gradient."""

    def __init__(self, net):
        self.net, self.num_classes, self.conditioning, self.rows = net, net.num_classes, net.conditioning, {}

    def __call__(self, x, *rest):
        self.rows[torch.is_grad_enabled()] = self.rows.get(torch.is_grad_enabled(), 0) + len(x)
        return self.net(x, *rest)


def test_rows_at_s_equal_t_cost_no_difference_and_change_nothing():
    """imf_loss and distillation_loss are Eq. 6 and 16 of all rows at once, in fewer passes."""
    net = small_net("in_context")
    x0, eps = rand(8, 2, 4, 4), rand(8, 2, 4, 4, seed=1)
    t, s = consistency.draw_times(torch.rand(8, 2).double(), mask_prob=0.75)
    y, g = torch.arange(8) % 4, guidance_rows(8, 4.0, 0.2, 0.8)
    at_t, x_t = model.gate_guidance(g, t), model.interpolate(x0, eps, t)
    everywhere = consistency.whole_interval(g, t, s)
    plain = lambda guidance: lambda x, t, s: net(x, t, y, s, guidance)

    counted = Counted(net)
    loss = consistency.imf_loss(counted, x0, eps, t, s, y, g, cosine=False)
    assert counted.rows == {True: 8, False: 2 + 8 + 2 * 2}      # v_cond, v_uncond, two of the difference
    v_cond = net(x_t, t, y, None, model.gate_guidance(everywhere, t)).detach()
    v = consistency.guided_target(net, x_t, eps - x0, v_cond, t, y, everywhere)
    full = consistency.consistency_loss(plain(everywhere), x_t, t, s, v, v_cond, cosine=False)
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=1e-14)

    counted = Counted(net)
    loss = consistency.distillation_loss(counted, net, x0, eps, t, s, y, g, cosine=False)
    assert counted.rows == {True: 8, False: 2 * 2}
    v = model.guided_velocity(net, x_t, t, y, g).detach()
    asked = torch.where((s == t)[:, None], at_t, g)
    full = consistency.consistency_loss(plain(asked), x_t, t, s, v, v, cosine=False)
    torch.testing.assert_close(loss, full, rtol=1e-12, atol=1e-14)


def test_the_rows_with_s_below_t_come_with_a_batch():
    """Counted on the CPU as it is drawn, for each part of it: the losses are bit for bit those that count them."""
    net, seen = small_net("in_context"), []
    x0, eps = rand(8, 2, 4, 4), rand(8, 2, 4, 4, seed=1)
    t = uniform(8) * 0.5 + 0.5
    s = torch.where(torch.tensor([1, 0, 0, 1, 1, 1, 0, 1]).bool(), t, t / 2)            # moving: 1, 2 and 6
    batch = dict(x0=x0, eps=eps, t=t, s=s, y=torch.arange(8) % 4, g=guidance_rows(8, 4.0, 0.2, 0.8))
    args = SimpleNamespace(batch_size=8, micro_batch=3)
    for b in common.micro_batches(batch, args, torch.device("cpu")):
        seen.append(b.moving.tolist())
        inputs = b.x0, b.eps, b.t, b.s, b.y, b.g
        assert torch.equal(consistency.imf_loss(net, *inputs), consistency.imf_loss(net, *inputs, moving=b.moving))
        assert torch.equal(consistency.distillation_loss(net, net, *inputs),
                           consistency.distillation_loss(net, net, *inputs, moving=b.moving))
        without = consistency.imf_loss(net, *inputs, moving=b.moving[:0])                 # they are what is used
        assert (without != consistency.imf_loss(net, *inputs)).nonzero()[:, 0].tolist() == seen[-1]
    assert seen == [[1, 2], [], [0]]


def test_bf16_keeps_every_gradient_and_an_exact_derivative():
    """Networks are called with and without gradient in one autocast region: no weight may lose it to the cast cache."""
    net = small_net("in_context", torch.float32)
    params = [p for p in net.parameters() if p.requires_grad]
    x0, eps = rand(4, 2, 4, 4, dtype=torch.float32), rand(4, 2, 4, 4, seed=1, dtype=torch.float32)
    t, y, g = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([0, 1, 2, 3]), torch.tensor([[4.0, 0.2, 0.6]] * 4)
    u = lambda x, t, s: net(x, t, y, s, g)
    derivatives, grads, exact = [], [], []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = consistency.imf_loss(net, x0, eps, t, t / 2, y, g).sum()
            derivatives.append(model.total_derivative(u, x0, t, t / 2, eps))
            exact.append(consistency.imf_loss(net, x0, eps, t, t / 2, y, g, exact=True))
            exact.append(consistency.distillation_loss(net, net, x0, eps, t, t / 2, y, g, exact=True))
        grads.append(torch.autograd.grad(loss, params))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):                       # here without gradient first
            jumps = lambda x, t, s: net(x, torch.full((4,), t), y, torch.full((4,), s), g)
            x_hat = model.backward_simulation(jumps, torch.stack([x0, eps], dim=1), 1, 2)
        grads.append(torch.autograd.grad(x_hat.square().sum(), params))
    grads = grads[::2], grads[1::2]
    assert torch.equal(*derivatives)                                                    # differences are in float32
    for a, b in ((exact[0], exact[2]), (exact[1], exact[3])):                           # a tangent in bf16 is taken too
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3)
    for in_float32, in_bf16 in grads:
        for a, b in zip(in_float32, in_bf16):
            assert (a - b).norm() < 0.05 * a.norm() + 1e-6


def test_a_small_gap_of_twinflow_survives_bf16():
    """U and its target differ by the gap alone: in bf16 a hundredth of U would be rounded away."""
    z, eps, gap = (rand(8, 2, 4, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    weight = torch.nn.Parameter(torch.eye(32))
    tau = uniform(8, dtype=torch.float32)
    u = lambda z, t, s: (z.flatten(1) @ weight).view_as(z)                              # in bf16 under autocast
    zero, small = lambda x, t: u(0 * z, t, t).detach(), lambda x, t: u(0.01 * gap, t, t).detach()
    grads = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert u(z, 1, 0).dtype == (torch.bfloat16 if bf16 else torch.float32)
            loss = twinflow.twinflow_losses(u, small, zero, z, tau, eps, tau, eps)[1].sum()
        grads.append(torch.autograd.grad(loss, weight)[0])
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[0].norm()


def test_what_a_network_gives_under_autocast_is_fp32():
    """So v_fake - v_teacher, CFG's combination and the GAN's softplus are not rounded to bf16 once more."""
    x, t, y = rand(4, 2, 4, 4, dtype=torch.float32), uniform(4, dtype=torch.float32), torch.arange(4) % 3
    plain = small_net("plain", torch.float32)
    official = model.IMFDiT(input_size=4, in_channels=2, patch_size=2, hidden_size=32, num_heads=2, depth=2,
                            mlp_hidden=64, num_classes=3)
    guidance = torch.tensor([[3.0, 0, 1]]).expand(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        v, v_uncond = plain(x, t, y), plain(x, t, torch.full_like(y, 3))
        guided = model.guided_velocity(plain, x, t, y, guidance)
        others = official(x, t, y), model.DiscriminatorHead(plain)(plain, x, t, y)
    assert {out.dtype for out in (v, guided, *others)} == {torch.float32}
    assert torch.equal(v, v.bfloat16().float()) and not torch.equal(guided, guided.bfloat16().float())
    torch.testing.assert_close(guided, v + 2 * (v - v_uncond))


def test_the_gap_in_bf16_is_off_by_the_rounding_of_its_two_velocities():
    """Where they agree more closely than bf16 resolves, as in an untrained start, the loss in bf16 is noise."""
    net = small_net("in_context", torch.float32)
    z, eps = rand(64, 2, 4, 4, dtype=torch.float32), rand(64, 2, 4, 4, seed=1, dtype=torch.float32)
    tau, y = uniform(64, dtype=torch.float32), torch.arange(64) % 3
    fake = lambda x, tau: net(x, tau, y, torch.zeros_like(tau))
    teacher = lambda x, tau: net(x, tau, y)
    gaps, size = [], 0
    for bf16 in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            x, U = fsf_dmd.rollout(lambda x, t, s: net(x, t, y, s), z, 2)
            gaps.append(fsf_dmd.fsf_dmd_loss(x, U, fake, teacher, tau, eps)[1])
            size = max(size, teacher(x, tau).abs().max().item())
    off = (gaps[0] - gaps[1]).abs()
    assert 0 < off.max() < 2 * 2 ** -8 * size                                           # bf16 rounds to 2^-9 and 2^-8
    assert off.mean() > 0.05 * gaps[0].mean()                                           # so little do these two differ


def test_time_and_guidance_laws():
    r = uniform(20000, 2)
    t, s = consistency.draw_times(r, "uniform", 0.5)
    assert (s <= t).all()
    assert (s == t).double().mean() == 0.5
    assert t.mean() == pytest.approx(2 / 3, abs=0.01)
    t, s = consistency.draw_times(r, "logitnormal", 0.0)
    logit = torch.logit(torch.cat([t, s]))
    assert (s < t).all()
    assert logit.mean() == pytest.approx(-0.4, abs=0.02)
    assert logit.std() == pytest.approx(1, abs=0.02)
    omega, t_min, t_max = consistency.draw_guidance(uniform(20000, 3, seed=2), "loguniform", 8.0).unbind(1)
    assert omega.log().mean() == pytest.approx(math.log(8) / 2, abs=0.02)
    assert (t_min <= 0.5).all() and (t_max >= 0.5).all() and (t_max <= 1).all()
    omega = consistency.draw_guidance(uniform(20000, 3, seed=2), "truncexp", 8.0)[:, 0]
    assert omega.min() >= 1 and omega.max() <= 8
    assert omega.mean() == pytest.approx(1 + 1 - 7 * math.exp(-7) / (1 - math.exp(-7)), abs=0.03)
    assert (omega > 5).double().mean() == pytest.approx(0.017, abs=0.003)                # METHODS: 1.7%


def test_distance_is_pseudo_huber_plus_cosine():
    a, b = rand(5, 3, 4, 4), rand(5, 3, 4, 4, seed=1)
    rms = (a - b).flatten(1).pow(2).mean(1).sqrt()
    torch.testing.assert_close(consistency.distance(a, b, c=1e-9, cosine=False), rms, rtol=1e-6, atol=1e-8)
    gap = consistency.distance(a, b) - consistency.distance(a, b, cosine=False)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(gap, (1 - cosine).flatten(1).mean(1))
    one, other = a[:, :1], b[:, :1]                                                     # one channel has no cosine
    assert torch.equal(consistency.distance(one, other), consistency.distance(one, other, cosine=False))
    v = rand(5, 3, 4, 4, seed=2)
    x0, eps, t = a, b, uniform(5)
    loss = consistency.flow_matching_loss(lambda x, t, s: v, x0, eps, t)
    torch.testing.assert_close(loss, (v - (eps - x0)).pow(2).flatten(1).mean(1))


def test_the_guidance_interval_is_closed():
    """t = 1 is the first step of every sampler: with guide_to 1 it is guided."""
    t = torch.tensor([0.0, 0.25, 0.75, 1.0])
    for low, high, omega in ((0.0, 1.0, [6, 6, 6, 6]), (0.25, 0.75, [1, 6, 6, 1])):
        guidance = torch.tensor([[6.0, low, high]]).expand(4, 3)
        assert model.gate_guidance(guidance, t)[:, 0].tolist() == omega


def test_the_three_numbers_of_guidance_are_independent_and_uniform():
    g = consistency.draw_guidance(uniform(20000, 3), "loguniform", 8.0)
    r = torch.stack([g[:, 0].log() / np.log(8), 2 * g[:, 1], 2 * g[:, 2] - 1])          # each uniform on [0, 1]
    torch.testing.assert_close(r.sort(1).values, torch.linspace(0, 1, 20000).double().expand(3, -1), rtol=0, atol=0.02)
    torch.testing.assert_close(torch.corrcoef(r), torch.eye(3).double(), rtol=0, atol=0.03)


# ---- FSF-DMD ---------------------------------------------------------------------------------------------------------

def surrogate_drift(g, shift, sigma=1.0, weight="one"):
    """Drift of a 1-D generator x_hat = g eps under gradient descent on L_FSF, exact teacher for N(0, sigma^2).

    By quadrature: everything is linear in (eps, eps'), so three Gauss-Hermite points an axis are exact; 400
    Gauss-Legendre points in r.
    """
    z, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(3))
    r, wr = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(400))
    eps, eps2, r = (a.reshape(-1, 1) for a in torch.meshgrid(z, z, (r + 1) / 2, indexing="ij"))
    weights = (w[:, None, None] * w[None, :, None] * wr[None, None, :]).reshape(-1) / (w.sum() ** 2 * 2)
    tau = model.shift_time(r[:, 0], shift)
    g = torch.tensor(float(g), dtype=torch.float64, requires_grad=True)
    fake = lambda x, t: gaussian_u(x, t, torch.zeros_like(t), g.detach())
    teacher = lambda x, t: gaussian_v(x, t, sigma)
    x, U = fsf_dmd.rollout(lambda x, t, s: (1 - g) * x, eps, 1)
    loss, _ = fsf_dmd.fsf_dmd_loss(x, U, fake, teacher, tau, eps2, weight)
    return -torch.autograd.grad((weights * loss).sum(), g)[0].item() / 2


@pytest.mark.parametrize("sigma, shift, fixed_point", [
    (1, 1, 0.582),
    (1, 3, 0.527),
    (1, 10, 0.460),
    (2, 1, 0.597),
    (2, 3, 0.546),
    (2, 10, 0.477),
])
def test_surrogate_contracts_to_the_closed_form_fixed_point(sigma, shift, fixed_point):
    drift = lambda ratio: surrogate_drift(ratio * sigma, shift, sigma)                  # of g / sigma
    low, high = 0.05, 1.5
    assert drift(low) > 0 > drift(high)                                                 # toward it from both sides
    assert drift(1) < 0                                                                 # at the data: it contracts
    for _ in range(30):
        middle = (low + high) / 2
        if drift(middle) > 0:
            low = middle
        else:
            high = middle
    assert low == pytest.approx(fixed_point, abs=6e-4)


@pytest.mark.parametrize("g, shift, sigma", [(1.0, 1, 1.0), (0.3, 3, 1.0), (0.8, 10, 0.5), (1.2, 10, 2.0)])
def test_surrogate_drift_is_the_closed_form(g, shift, sigma):
    """E_tau[(1-tau)/tau g ((1-tau) sigma^2 / D_sigma - g / sqrt(D_g))], D_a = (1-tau)^2 a^2 + tau^2, by quadrature."""
    def integrand(r):
        tau = model.shift_time(r, shift)
        return (1 - tau) / tau * g * ((1 - tau) * sigma ** 2 / spread(tau, sigma) - g / math.sqrt(spread(tau, g)))

    expected, _ = scipy.integrate.quad(integrand, 0, 1, limit=200)
    assert surrogate_drift(g, shift, sigma) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("shift, fixed_point", [(1, 0.561), (3, 0.487), (10, 0.390)])
def test_with_the_adaptive_weight_many_dimensions_contract_further(shift, fixed_point):
    """In many dimensions q is sqrt(pi / 2) over the deviation of v_teacher - (eps' - x_hat), a number for each tau.

    The fixed point by quadrature; then that the loss itself, in 256 dimensions, pulls to it from both sides.
    """
    def integrand(r, g):
        tau = model.shift_time(r, shift)
        away = (2 * tau - 1) / spread(tau, 1.0)                                         # v_teacher = away x_tau
        of_eps, of_eps2 = (away * (1 - tau) + 1) * g, away * tau - 1
        drift = (1 - tau) / tau * g * ((1 - tau) / spread(tau, 1.0) - g / math.sqrt(spread(tau, g)))
        return math.sqrt(math.pi / 2) * drift / math.hypot(of_eps, of_eps2)

    found = scipy.optimize.brentq(lambda g: scipy.integrate.quad(integrand, 0, 1, args=(g,), limit=200)[0], 0.1, 1.5)
    assert found == pytest.approx(fixed_point, abs=6e-4)

    def drift_of_loss(g):
        noise = common.Stream("test", 0)
        eps, eps2, tau = noise.normal(4000, 256), noise.normal(4000, 256), model.shift_time(noise.uniform(4000), shift)
        g = torch.tensor(g, requires_grad=True)
        fake = lambda x, t: gaussian_u(x, t, torch.zeros_like(t), g.detach())
        teacher = lambda x, t: gaussian_v(x, t, 1.0)
        z, U = fsf_dmd.rollout(lambda x, t, s: (1 - g) * x, eps, 1)
        loss, _ = fsf_dmd.fsf_dmd_loss(z, U, fake, teacher, tau, eps2)
        return -torch.autograd.grad(loss.mean(), g)[0].item()

    assert drift_of_loss(found - 0.03) > 0 > drift_of_loss(found + 0.03)


def test_one_step_fsf_dmd_is_equation_14():
    net, ema, teacher = small_net("in_context"), small_net("in_context"), small_net("decoupled")
    eps, eps2, y = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1), torch.tensor([0, 1, 2])
    tau, zero, one = uniform(3) * 0.8 + 0.1, torch.zeros(3).double(), torch.ones(3).double()
    fake = lambda x, t: ema(x, t, y, torch.zeros_like(t))
    tea = lambda x, t: teacher(x, t, y)
    u_10 = net(eps, one, y, zero)
    with torch.no_grad():                                                               # Eq. 14 written out
        x_tau = (1 - tau.view(3, 1, 1, 1)) * (eps - u_10) + tau.view(3, 1, 1, 1) * eps2
        gap = ema(x_tau, tau, y, zero) - teacher(x_tau, tau, y)
        q = 1 / (teacher(x_tau, tau, y) - (eps2 - (eps - u_10))).abs().mean((1, 2, 3))
    for weight, clip, cosine in (("adaptive", 0, 0), ("one", 0, 0), ("one", 0.1, 0), ("adaptive", 0, 1)):
        g = gap.clamp(-clip, clip) if clip else gap
        w = q if weight == "adaptive" else one
        if cosine:
            w = w * torch.cos(math.pi * tau / 2)
        u_10 = net(eps, one, y, zero)
        expected = gradients((w * (u_10 - (u_10.detach() - g)).pow(2).mean((1, 2, 3))).sum(), net)
        x, U = fsf_dmd.rollout(lambda x, t, s: net(x, t, y, s), eps, 1)
        loss, size = fsf_dmd.fsf_dmd_loss(x, U, fake, tea, tau, eps2, weight, clip, cosine)
        torch.testing.assert_close(gradients(loss.sum(), net), expected, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(size, gap.abs().mean((1, 2, 3)))
    # gradient descent on U moves x_hat along +(v_fake - v_teacher)
    U = U.detach().requires_grad_()
    loss, _ = fsf_dmd.fsf_dmd_loss(x, U, fake, tea, tau, eps2, "one")
    on_U = torch.autograd.grad(loss.sum(), U)[0]                                        # = -d x_hat; 2 / 32 elements
    torch.testing.assert_close(on_U * 16, gap)


def one_parameter_a_step(M):
    """(theta [M], u): step i of a rollout on u has its own parameter theta[i]."""
    theta = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    return theta, lambda x, t, s: x * 0.3 + theta[round((1 - t) * M)]


@pytest.mark.parametrize("mode, alive", [("all", [True, True, True]), ("last", [False, False, True])])
def test_rollout_keeps_the_gradient_of_every_step_or_of_the_last(mode, alive):
    eps, M = rand(4, 2).requires_grad_(), 3
    theta, u = one_parameter_a_step(M)
    x, U = fsf_dmd.rollout(u, eps, M, mode)
    grad, on_eps = torch.autograd.grad(U.sum(), [theta, eps], materialize_grads=True)
    assert not on_eps.any()                                                             # nor into what made the noise
    assert [bool(g) for g in grad] == alive
    torch.testing.assert_close(grad[-1], torch.tensor(8 / 3).double())                  # dU/dtheta_i = t_i - t_{i+1}
    if mode == "all":                                                                   # none runs on
        torch.testing.assert_close(grad, torch.full((3,), 8 / 3).double())
    with torch.no_grad():                                                               # x_hat is the few-step sample
        sample = model.sample(lambda x, t, y, s: u(x, t[0].item(), s[0].item()), eps, None, M)
        torch.testing.assert_close(x - U, sample, rtol=0, atol=1e-6)                    # Eq. 19


# ---- DMD2's rollout, Eq. 17 ------------------------------------------------------------------------------------------

def test_backward_simulation_of_two_steps_is_equation_17():
    """What fsf_dmd.py --rollout dmd2 calls U is the first noise minus x_hat."""
    assert fsf_dmd.backward_simulation is dmd2.backward_simulation is sid.backward_simulation     # one for all
    sigma, M, eps = 0.5, 2, rand(5, 2, 3)
    x_hat = model.backward_simulation(gaussian_map(sigma), eps, 0, M)
    torch.testing.assert_close(x_hat, sigma * eps[:, 0])                                # k = 0: pure noise, one jump
    x_hat = model.backward_simulation(gaussian_map(sigma), eps, 1, M)
    x = 0.5 * sigma * eps[:, 0] + 0.5 * eps[:, 1]                                       # at t = 1/2, fresh noise
    torch.testing.assert_close(x_hat, x * sigma / spread(0.5, sigma) ** 0.5)
    theta, u = one_parameter_a_step(M)
    x, x_hat = eps[:, 0], model.backward_simulation(u, eps, 1, M)
    U = x - x_hat                                                                       # as fsf_dmd.py has it
    assert torch.autograd.grad(U.sum(), theta)[0].tolist() == [0, 7.5] and not x.requires_grad


def test_backward_simulation_of_three_steps_is_equation_17():
    sigma, M, eps = 0.5, 3, rand(5, 3, 2)
    u = gaussian_map(sigma)
    torch.testing.assert_close(model.backward_simulation(u, eps, 0, M), sigma * eps[:, 0])
    x = 2 / 3 * eps[:, 1] + 1 / 3 * sigma * eps[:, 0]
    torch.testing.assert_close(model.backward_simulation(u, eps, 1, M), x * sigma / spread(2 / 3, sigma) ** 0.5)
    theta, u = one_parameter_a_step(M)
    grad = torch.autograd.grad(model.backward_simulation(u, eps, 2, M).sum(), theta)[0]
    torch.testing.assert_close(grad, torch.tensor([0, 0, -10 / 3]).double())            # the last call only


def test_noise_of_backward_simulation_is_fresh_implied_or_fixed():
    sigma, M, eps = 0.5, 3, rand(5, 3, 2)
    rollout = lambda k, noise: model.backward_simulation(gaussian_map(sigma), eps, k, M, noise)
    for k in range(M):
        assert torch.equal(rollout(k, "fresh"), model.backward_simulation(gaussian_map(sigma), eps, k, M))
    x0 = sigma * eps[:, 0]                                                              # the first jump
    x = 2 / 3 * eps[:, 0] + 1 / 3 * x0                                                  # implied at t = 1: the first
    for noise in ("fixed", "ddim"):
        torch.testing.assert_close(rollout(1, noise), x * sigma / spread(2 / 3, sigma) ** 0.5)
    x0 = x * sigma / spread(2 / 3, sigma) ** 0.5
    implied = (x - x0 / 3) / (2 / 3)
    expected = (2 / 3 * x0 + implied / 3) * sigma / spread(1 / 3, sigma) ** 0.5
    torch.testing.assert_close(rollout(2, "ddim"), expected)
    assert (rollout(2, "ddim") - rollout(2, "fixed")).abs().max() > 1e-3
    theta, u = one_parameter_a_step(M)
    for noise in ("fresh", "ddim", "fixed"):
        grad = torch.autograd.grad(model.backward_simulation(u, eps, 2, M, noise).sum(), theta)[0]
        torch.testing.assert_close(grad, torch.tensor([0, 0, -10 / 3]).double())        # the last call only


# ---- DMD2 ------------------------------------------------------------------------------------------------------------

def some_velocities():
    """Two functions (x, t) with every derivative alive: fake, teacher."""
    fake = lambda x, t: torch.tanh(2 * x + t.view(-1, 1, 1, 1))
    teacher = lambda x, t: torch.sin(x) - t.view(-1, 1, 1, 1)
    return fake, teacher


def test_dmd_direction_is_the_same_in_x0_and_velocity_space():
    """Eq. 50 is 51.

    (f_fake - f_teacher) / mean |x_hat - f_teacher| = (v_teacher - v_fake) / mean |v_teacher - (eps - x_hat)|
    """
    x_hat, eps, t = rand(4, 3, 2, 2).requires_grad_(), rand(4, 3, 2, 2, seed=1), uniform(4) * 0.9 + 0.05
    fake, teacher = some_velocities()
    loss, gap = dmd2.dmd_loss(x_hat, fake, teacher, t, eps)
    found = torch.autograd.grad(loss.sum(), x_hat)[0] * 12                              # 12 elements in the mean
    x_hat = x_hat.detach()
    x_t = model.interpolate(x_hat, eps, t)
    f_fake, f_teacher = model.v_to_x0(x_t, fake(x_t, t), t), model.v_to_x0(x_t, teacher(x_t, t), t)
    expected = (f_fake - f_teacher) / (x_hat - f_teacher).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gap, (fake(x_t, t) - teacher(x_t, t)).abs().mean((1, 2, 3)))


def hermite_grid(points):
    """Quadrature over two independent standard normals: values z, e [points^2, 1] and weights that sum to 1."""
    z, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(points))
    zz, ee = (a.reshape(-1, 1) for a in torch.meshgrid(z, z, indexing="ij"))
    return zz, ee, (w[:, None] * w[None, :]).reshape(-1) / w.sum() ** 2


@pytest.mark.parametrize("lost", ["the channel axis", "the last axis"])
def test_a_network_that_loses_an_axis_is_refused_where_it_would_broadcast(lost):
    """[B, H, W] beside [B, 1, H, W] would make [B, B, H, W], and a loss of healthy size."""
    shape = (3, 1, 4, 4) if lost == "the channel axis" else (3, 2, 1)
    x, eps, t, s = rand(*shape), rand(*shape, seed=1), uniform(3), torch.zeros(3, dtype=torch.float64)
    right = lambda x, *times: 0.5 * x
    wrong = lambda x, *times: 0.5 * (x[:, 0] if lost == "the channel axis" else x[..., 0])
    losses = dict(
        fm=lambda u: consistency.flow_matching_loss(u, x, eps, t),
        ct=lambda u: consistency.consistency_loss(u, x, t, s, eps - x, eps - x, cosine=False),
        ct_norm=lambda u: consistency.consistency_loss(u, x, t, s, eps - x, eps - x, tangent_norm=0.1),
        rcgm=lambda u: consistency.rcgm_loss(u, right, x, t, s, eps - x, cosine=False),
        isg=lambda u: consistency.isg_loss(u, right, x, t, s, t / 2),
        fsf=lambda u: fsf_dmd.fsf_dmd_loss(x, x, u, u, t, eps)[0],
        dmd=lambda u: dmd2.dmd_loss(x, u, u, t, eps)[0],
        fake=lambda u: dmd2.fake_loss(u, x, t, eps),
        sid=lambda u: sid.sid_loss(x, u, u, t, eps)[0],
        twinflow=lambda u: sum(twinflow.twinflow_losses(u, right, right, x, t, eps, t, eps)),
    )
    for loss in losses.values():
        assert loss(right).isfinite().all()
        with pytest.raises(RuntimeError, match="shape|size"):
            loss(wrong)


@pytest.mark.parametrize("theta, t", [(1.5, 0.5), (0.6, 0.3), (2.0, 0.9)])
def test_dmd_gradient_is_the_kl_gradient_of_two_gaussians(theta, t):
    """x_hat = theta z against N(0, 1), in closed form.

    With the weight (1-t)^2/t on v_teacher - v_fake it is d/dtheta KL(q_t || p_t).
    """
    zz, ee, weights = hermite_grid(3)
    times = torch.full((9,), t, dtype=torch.float64)
    x_hat = (theta * zz).requires_grad_()
    fake, teacher = (lambda x, t: gaussian_v(x, t, theta)), (lambda x, t: gaussian_v(x, t, 1.0))
    loss, _ = dmd2.dmd_loss(x_hat, fake, teacher, times, ee)
    x_t = model.interpolate(x_hat.detach(), ee, times)
    scale = (teacher(x_t, times) - (ee - x_hat.detach())).abs() + 1e-6                  # undo the normaliser
    direction = torch.autograd.grad(loss.sum(), x_hat)[0] * scale
    found = ((1 - t) ** 2 / t * direction * zz)[:, 0] @ weights
    V, V_data = spread(t, theta), spread(t, 1.0)
    assert found.item() == pytest.approx((1 - t) ** 2 * theta * (1 / V_data - 1 / V), rel=1e-6)
    if (theta, t) == (1.5, 0.5):
        assert found.item() == pytest.approx(0.288462, abs=1e-6)                        # the reference value


def test_fake_gan_and_ida_are_their_formulas():
    x_hat, eps, t = rand(5, 2).requires_grad_(), rand(5, 2, seed=1), uniform(5)
    v = rand(5, 2, seed=2)
    loss = dmd2.fake_loss(lambda x, t: v, x_hat, t, eps)
    torch.testing.assert_close(loss, (v - (eps - x_hat)).pow(2).mean(1).detach())
    assert not loss.requires_grad                                                       # Eq. 52 spares the generator
    d = torch.tensor([[-2.0], [0.0], [3.0]])
    torch.testing.assert_close(dmd2.gan_generator_loss(d), torch.log1p(torch.exp(-d))[:, 0])
    torch.testing.assert_close(dmd2.gan_discriminator_loss(d, -d), 2 * torch.log1p(torch.exp(d))[:, 0])
    patches = rand(3, 2, 4, 4).to(memory_format=torch.channels_last)                    # or a number per patch, or [B]
    for logits, mean in ((d[:, 0], F.softplus(-d[:, 0])), (patches, F.softplus(-patches).mean((1, 2, 3)))):
        torch.testing.assert_close(dmd2.gan_generator_loss(logits), mean)
        torch.testing.assert_close(dmd2.gan_discriminator_loss(-logits, logits), 2 * mean)
    fake = small_net("in_context")
    generator = model.LightningDiT(**fake.config).double()
    before, theta = ({k: v.clone() for k, v in net.state_dict().items()} for net in (fake, generator))
    dmd2.ida_(fake, generator, 0.97)
    for k, v in fake.state_dict().items():
        torch.testing.assert_close(v - before[k], 0.03 * (theta[k] - before[k]), rtol=0, atol=1e-12, msg=k)
        assert torch.equal(generator.state_dict()[k], theta[k])


def test_discriminator_has_the_papers_size_and_feeds_the_generator_at_step_0():
    with torch.device("meta"):
        head = model.DiscriminatorHead(model.LightningDiT())
        assert sum(p.numel() for p in head.parameters()) == 21_275_393                  # 21.28M
        assert head.until == 5
    torch.manual_seed(0)
    net = model.LightningDiT("tiny", "in_context", input_size=8, in_channels=1, num_classes=10)     # at its zero start
    head = model.DiscriminatorHead(net)
    x, t, y = torch.randn(4, 1, 8, 8, requires_grad=True), torch.rand(4), torch.tensor([0, 1, 2, 9])
    logits = head(net, x, t, y)
    grad = torch.autograd.grad(dmd2.gan_generator_loss(logits).sum(), x)[0]
    assert grad.flatten(1).norm(dim=1).min() > 1e-4
    assert (head(net, x, t, (y + 1) % 10) - logits).abs().min() > 1e-6                  # it knows the class
    h = small_net("in_context")
    features = h(rand(2, 2, 4, 4), 0.5, torch.tensor([0, 1]), until=2)
    assert features.shape[1] == h.grid ** 2                                             # without in-context tokens

    embedded = []
    net.t_embedder.register_forward_hook(lambda module, inputs, output: embedded.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        head(net, x, t, y)
    assert embedded == [torch.float32] * 2                                              # times, of trunk and of head


def misspelt():
    x, t = rand(2, 1, 2, 2), torch.tensor([0.2, 0.4]).double()
    u, v = (lambda x, t, s: x), (lambda x, t: x)
    y, plain = torch.tensor([0, 1]), small_net("plain")
    return {
        "rollout": lambda: fsf_dmd.rollout(u, x, 2, grad="al"),
        "no step": lambda: fsf_dmd.rollout(u, x, 0),
        "weight": lambda: fsf_dmd.fsf_dmd_loss(x, x, v, v, t, x, weight="adaptve"),
        "times in a column": lambda: fsf_dmd.fsf_dmd_loss(x, x, v, v, t[:, None], x, weight="one"),  # would be [B, B]
        "times in a column, SiD": lambda: sid.sid_loss(x, v, v, t[:, None], x),
        "noise": lambda: model.backward_simulation(u, rand(2, 2, 1, 2, 2), 1, 2, noise="freshh"),
        "noise that is not used": lambda: model.backward_simulation(u, rand(2, 2, 1, 2, 2), 0, 2, noise="freshh"),
        "noise of one step for two": lambda: model.backward_simulation(u, x, 1, 2),
        "k": lambda: model.backward_simulation(u, rand(2, 2, 1, 2, 2), 2, 2),
        "no square": lambda: plain(rand(2, 2, 2, 8), t, y),                 # 4 tokens, as many as of 4 x 4 pixels
        "larger images": lambda: plain(rand(2, 2, 5, 5), t, y),
        "weight of SiD": lambda: sid.sid_loss(x, v, v, t, x, w="1-tt"),
        "sampler": lambda: evaluate.generate(plain.float(), 2, (2, 4, 4), 1, sampler="eulr"),
        "no step of a sampler": lambda: evaluate.generate(plain.float(), 2, (2, 4, 4), 0),
        "more classes than there are": lambda: evaluate.generate(plain.float(), 2, (2, 4, 4), 1, classes=4),
        "autoencoder": lambda: vae.VAE("vaave"),
        "dim of an autoencoder": lambda: vae.VAE(chh=3),
        "scores of no probabilities": lambda: metrics.inception_score(rand(8, 3)),
        "more splits than rows": lambda: metrics.inception_score(torch.eye(3), 4),
        "no split": lambda: metrics.inception_score(torch.eye(3), 0),
        "nan in the real features": lambda: metrics.precision_recall(rand(9, 2) * math.nan, rand(9, 2)),
        "rate of a group": lambda: normuon.NorMuon([dict(params=[torch.nn.Parameter(rand(2, 2))], lr=-5.0)]),
        "scale of a group": lambda: normuon.NorMuon([dict(params=[torch.nn.Parameter(rand(2, 2))], scale="rsm")]),
        "complex parameters": lambda: normuon.NorMuon([dict(params=[torch.nn.Parameter(rand(2) * 1j)], muon=False)]),
        "jumps of a plain network": lambda: evaluate.generate(plain.float(), 2, (2, 4, 4), 1, sampler="flow_map"),
        "law of omega": lambda: consistency.draw_guidance(uniform(2, 3), "log_uniform"),
        "law of times": lambda: consistency.draw_times(uniform(2, 2), "lognormal"),
        "law of times with numbers": lambda: consistency.draw_times(uniform(2, 2), "beta:1,1"),
    }


@pytest.mark.parametrize("option", list(misspelt()))
def test_a_misspelt_option_is_an_error_and_not_another_method(option):
    with pytest.raises((ValueError, KeyError)):
        misspelt()[option]()


# ---- guidance by network, RCGM, ISG, tangent normalisation -----------------------------------------------------------

def test_guided_velocity_is_cfg_where_the_network_has_no_guidance_input():
    x, t, y = rand(4, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9, 0.95]).double(), torch.tensor([0, 1, 2, 0])
    null = torch.full_like(y, 3)
    guidance = guidance_rows(4, 3.0, 0.0, 0.9)
    plain, decoupled, in_context = (small_net(c) for c in ("plain", "decoupled", "in_context"))
    cond, uncond = plain(x, t, y), plain(x, t, null)
    v = model.guided_velocity(plain, x, t, y, guidance)
    torch.testing.assert_close(v[:3], (uncond + 3 * (cond - uncond))[:3])
    torch.testing.assert_close(v[3], cond[3])                                           # 0.95 is outside [0, 0.9]
    first = model.guided_velocity(plain, x, t, y, guidance, 1)
    torch.testing.assert_close(first[:, 1:], cond[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(first[:, :1], v[:, :1])
    for omega, expected in ((1.0, cond), (0.0, uncond)):
        torch.testing.assert_close(model.guided_velocity(plain, x, t, y, guidance_rows(4, omega, 0, 1)), expected)
    torch.testing.assert_close(model.guided_velocity(decoupled, x, t, y, guidance), decoupled(x, t, y))
    gated = in_context(x, t, y, t, model.gate_guidance(guidance, t))
    torch.testing.assert_close(model.guided_velocity(in_context, x, t, y, guidance), gated)
    jump = in_context(x, t, y, t / 2, guidance)
    torch.testing.assert_close(model.guided_map(in_context, x, t, t / 2, y, guidance), jump)
    torch.testing.assert_close(model.guided_map(decoupled, x, t, t / 2, y, guidance), decoupled(x, t, y, t / 2))


def residual(loss, x, **options):
    """The residual e whose pseudo-Huber distance (no cosine) `loss(bias, x, ...)` returns, bias being added to u.

    The gradient in u is e / (n sqrt(mean e^2 + c^2)).
    """
    c = 1e-9
    bias = torch.zeros_like(x, requires_grad=True)
    value = loss(bias, x, c=c, cosine=False, **options)
    return torch.autograd.grad(value.sum(), bias)[0] * x[0].numel() * (value.detach() + c)[:, None]


def curved(x, t, s):
    """A u(x, t, s) with every derivative alive."""
    t, s = t[:, None], s[:, None]
    return torch.sin(2 * x + t) * (1 + s) + 0.5 * x * t ** 2


def biased(u, bias):
    return lambda x, t, s: u(x, t, s) + bias


T, S = torch.tensor([0.3, 0.5, 0.9, 0.7, 1.0, 0.4]).double(), torch.tensor([0.1, 0.0, 0.5, 0.2, 0.0, 0.2]).double()


def test_rcgm_with_one_jump_and_no_ema_is_meanflow_up_to_delta():
    x, v, t, s = rand(6, 3), rand(6, 3, seed=1), T, S

    def meanflow(bias, x, **rho):
        return consistency.consistency_loss(biased(curved, bias), x, t, s, v, v, exact=True, **rho)

    def rcgm(delta, N, clamp=math.inf):
        def loss(bias, x, **rho):
            return consistency.rcgm_loss(biased(curved, bias), curved, x, t, s, v, delta, N, clamp, **rho)
        return residual(loss, x)

    expected = residual(meanflow, x)
    errors = [(rcgm(delta, 1) - expected).abs().max().item() for delta in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 0.2 and all(8 < a / b < 12 for a, b in zip(errors, errors[1:])), errors      # O(delta)
    two = rcgm(0.01, 2)
    assert (two - rcgm(0.01, 1)).abs().max() > 0.1          # two jumps ask more than one of a map that is not exact
    torch.testing.assert_close(rcgm(0.01, 2, 0.25), two.clamp(-0.25, 0.25), rtol=1e-6, atol=1e-7)
    assert torch.equal(rcgm(0.01, 2, 0), two)               # 0: off


def test_rcgm_is_zero_at_the_exact_flow_map_and_flow_matching_on_short_intervals():
    x, t, s = rand(6, 3), T, S
    exact = lambda x, t, s: gaussian_u(x, t, s, 0.5)
    v = gaussian_v(x, t, 0.5)
    for N in (1, 2, 3):                                     # only the Euler step along v errs: O(delta^2), over delta
        coarse, fine = (consistency.rcgm_loss(exact, exact, x, t, s, v, delta, N, math.inf, cosine=False, c=1e-12)
                        for delta in (1e-3, 1e-4))
        torch.testing.assert_close(coarse / fine, torch.full((6,), 10.0).double(), rtol=0.05, atol=0)
        assert fine.max() < 2e-3
    point = lambda x, t, s: x / t[:, None]                  # all data at 0: straight paths
    straight = consistency.rcgm_loss(point, point, x, t, s, point(x, t, s), 0.05, 2, cosine=False)
    assert straight.abs().max() < 1e-9
    v = rand(6, 3, seed=2)
    for short in (t, t - 0.005):                            # s = t, and t - s below delta
        bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
        loss = consistency.rcgm_loss(biased(curved, bias), curved, x, t, short, v, 0.01, 2, math.inf, cosine=False)
        torch.testing.assert_close(loss.detach(), consistency.distance(curved(x, t, short), v, cosine=False))
        assert torch.autograd.grad(loss.sum(), bias)[0].isfinite().all()


def test_tangent_normalisation_keeps_the_direction_and_bounds_the_length():
    x, v, t, s = rand(6, 3), 5 * rand(6, 3, seed=1), uniform(6) * 0.5 + 0.5, uniform(6, seed=1) * 0.5

    def loss_of(bias, x, **rho):
        return consistency.consistency_loss(biased(curved, bias), x, t, s, v, v, exact=True, **rho)

    e = residual(loss_of, x)
    bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    loss = loss_of(bias, x, tangent_norm=0.1)
    norm = e.norm(dim=1, keepdim=True)
    half = torch.autograd.grad(loss.sum(), bias)[0] / 2
    torch.testing.assert_close(half, e / (norm + 0.1), rtol=1e-6, atol=1e-7)            # Eq. 57-58
    torch.testing.assert_close(loss.detach(), ((norm / (norm + 0.1)) ** 2)[:, 0], rtol=1e-6, atol=1e-7)


def test_isg_is_a_teacher_step_and_a_jump():
    x, t, s = rand(6, 3), torch.tensor([1.0, 0.5] * 3).double(), torch.tensor([0.5, 0.0] * 3).double()
    r = s + 0.2
    teacher = lambda x, t: torch.cos(x) * t[:, None]
    bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    loss = consistency.isg_loss(biased(curved, bias), teacher, x, t, s, r, c=1e-9)
    x_r = x + (r - t)[:, None] * teacher(x, t)                                          # Eq. 61
    e = x - 0.5 * curved(x, t, s) - (x_r - 0.2 * curved(x_r, r, s))                     # Eq. 62
    torch.testing.assert_close(loss.detach(), e.abs().mean(1), rtol=1e-6, atol=1e-6)
    grad = torch.autograd.grad(loss.sum(), bias)[0]                                     # none through the target
    torch.testing.assert_close(grad, -0.5 * e.sign() / 3, rtol=1e-5, atol=1e-6)
    point = lambda x, t, s: x / t[:, None]
    assert consistency.isg_loss(point, lambda x, t: x / t[:, None], x, t, s, r).abs().max() < 1e-12


def test_guided_rcgm_takes_velocities_and_jumps_of_its_target():
    """Row 0 has s = t outside of its interval: as in iMF it ignores the interval; row 3 has a dropped label."""
    net, target = small_net("in_context"), small_net("in_context")
    randomize(target, 0.8)
    x0, eps, y = rand(4, 2, 4, 4), rand(4, 2, 4, 4, seed=1), torch.tensor([0, 1, 2, 3])
    t, s = torch.tensor([0.2, 0.4, 0.6, 0.8]).double(), torch.tensor([0.2, 0.1, 0.3, 0.0]).double()
    guidance = torch.tensor([[4.0, 0.3, 0.5]] * 4).double()
    at = torch.tensor([[4.0, 0, 1], [4, 0, 1], [1, 0, 1], [1, 0, 1]]).double()          # at t: inside, outside
    asked = torch.tensor([[4.0, 0, 1], [4, 0.3, 0.5], [4, 0.3, 0.5], [4, 0.3, 0.5]]).double()
    x_t, null = model.interpolate(x0, eps, t), torch.full_like(y, 3)
    w = torch.tensor([0.75, 0.75, 0, 0]).double().view(4, 1, 1, 1)                      # 1 - 1 / omega
    with torch.no_grad():
        v = eps - x0 + w * (target(x_t, t, y, None, at) - target(x_t, t, null))
    expected = consistency.rcgm_loss(lambda x, t, s: net(x, t, y, s, asked), lambda x, t, s: target(x, t, y, s, asked),
                                     x_t, t, s, v, 0.05, 2, 1.0)
    found = consistency.guided_rcgm_loss(net, target, x0, eps, t, s, y, guidance, True, 0.05, 2, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# ---- TwinFlow --------------------------------------------------------------------------------------------------------

def test_twinflow_rectifies_along_dmd_and_trains_its_fake_side_as_dmd2_does():
    """With exact velocities of two Gaussians, generator 1.5 z, data N(0, 1)."""
    z, eps_t, eps_tau = (rand(8, 2, seed=i) for i in range(3))
    t, tau = uniform(8) * 0.9 + 0.05, uniform(8, seed=1) * 0.9 + 0.05
    fake, teacher = (lambda x, t: gaussian_v(x, t, 1.5)), (lambda x, t: gaussian_v(x, t, 1.0))
    U = (-0.5 * z).requires_grad_()
    u = lambda x, t, s: U
    losses = lambda fake, *clip: twinflow.twinflow_losses(u, fake, teacher, z, t, eps_t, tau, eps_tau, *clip)
    adv, rectify, gap = losses(fake, 0.0)
    x_hat = (z - U).detach().requires_grad_()
    loss, dmd_gap = dmd2.dmd_loss(x_hat, fake, teacher, tau, eps_tau)
    x_tau = model.interpolate(x_hat.detach(), eps_tau, tau)
    scale = (teacher(x_tau, tau) - (eps_tau - x_hat.detach())).abs().mean(1, keepdim=True) + 1e-6
    on_x_hat = -torch.autograd.grad(rectify.sum(), U)[0]                                # x_hat = z - U
    dmd = torch.autograd.grad(loss.sum(), x_hat)[0]
    torch.testing.assert_close(on_x_hat, 2 * scale * dmd, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gap, dmd_gap)
    torch.testing.assert_close(adv, dmd2.fake_loss(fake, x_hat, t, eps_t))              # Eq. 63 = 52, negative times
    assert not adv.requires_grad                                                        # never reaches the generator
    _, clipped, _ = losses(fake, 0.1)
    expected = (fake(x_tau, tau) - teacher(x_tau, tau)).clamp(-0.1, 0.1)
    torch.testing.assert_close(torch.autograd.grad(clipped.sum(), U)[0], expected)
    _, still, _ = losses(teacher)
    assert still.max() == 0                                                             # no gap, no move


def test_negative_times_are_another_side_of_the_same_network():
    net = small_net("in_context")
    x, t, y = rand(3, 2, 4, 4), torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([0, 1, 2])
    torch.testing.assert_close(net(x, -t, y), net(x, -t, y, -t))                        # both times, Eq. 63
    assert (net(x, -t, y) - net(x, t, y)).abs().amax((1, 2, 3)).min() > 1e-4


# ---- SiD -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("theta, t, expected", [
    (1.5, 0.5, {0: 0.288462, 0.5: 0.232988, 1: 0.177515, 1.2: 0.155325}),
    (0.6, 0.3, {0: -0.034014, 0.5: -0.054034, 1: -0.074054, 1.2: -0.082062}),
])
def test_sid_gradient_is_the_closed_form_of_two_gaussians(theta, t, expected):
    """x_hat = theta z against N(0, 1), exact networks: d/dtheta = 2 a theta D (a k - 1 - alpha a D).

    alpha = 0.5 is half the Fisher gradient.
    """
    zz, ee, weights = hermite_grid(5)
    times, a = torch.full((25,), t, dtype=torch.float64), 1 - t
    fake, teacher = (lambda x, t: gaussian_v(x, t, theta)), (lambda x, t: gaussian_v(x, t, 1.0))
    k, k_fake = a / spread(t, 1.0), a * theta ** 2 / spread(t, theta)
    D = k - k_fake
    for alpha, reference in expected.items():
        parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        loss, gap = sid.sid_loss(parameter * zz, fake, teacher, times, ee, alpha)
        mean = (loss / (1 - times)) @ weights                                           # w(t) = 1 - t divided out
        found = torch.autograd.grad(mean, parameter)[0].item()
        assert found == pytest.approx(2 * a * theta * D * (a * k - 1 - alpha * a * D), rel=1e-6)
        assert found == pytest.approx(reference, abs=1e-6)
        if alpha == 0.5:
            assert found == pytest.approx(a * theta * D * (a * D - 2 * t ** 2 / spread(t, theta)), rel=1e-6)
    assert gap.mean() > 0


def test_sid_with_both_networks_cut_off_is_dmd_for_every_alpha():
    x_hat, eps, t = rand(4, 3, 2, 2).requires_grad_(), rand(4, 3, 2, 2, seed=1), uniform(4) * 0.9 + 0.05
    fake, teacher = some_velocities()
    cut_fake, cut_teacher = (lambda x, t: fake(x, t).detach()), (lambda x, t: teacher(x, t).detach())
    loss, gap = dmd2.dmd_loss(x_hat, fake, teacher, t, eps)
    x_t = model.interpolate(x_hat.detach(), eps, t)
    scale = 12 * ((teacher(x_t, t) - (eps - x_hat.detach())).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
    dmd = torch.autograd.grad(loss.sum(), x_hat)[0] * scale                             # v_teacher - v_fake
    f_fake, f_teacher = model.v_to_x0(x_t, fake(x_t, t), t), model.v_to_x0(x_t, teacher(x_t, t), t)
    delta = f_teacher - f_fake
    weights = sid.WEIGHTS | {"sid": lambda t: 1 / (x_hat - f_teacher).abs().mean((1, 2, 3))}
    whole_grads = {}
    for alpha in (0.0, 0.5, 1.0, 1.2):
        cut, _ = sid.sid_loss(x_hat, cut_fake, cut_teacher, t, eps, alpha)
        expected = ((1 - t) * t ** 2).view(-1, 1, 1, 1) * dmd
        torch.testing.assert_close(torch.autograd.grad(cut.sum(), x_hat)[0], expected, rtol=1e-6, atol=1e-9)
        whole, found = sid.sid_loss(x_hat, fake, teacher, t, eps, alpha)
        whole_grads[alpha] = torch.autograd.grad(whole.sum(), x_hat)[0]
        torch.testing.assert_close(found, gap)
        x0_space = (delta * (f_teacher - x_hat - alpha * delta)).sum((1, 2, 3)).detach()
        for name, w in weights.items():                                                 # the x0-space form
            value = sid.sid_loss(x_hat, fake, teacher, t, eps, alpha, name)[0].detach()
            torch.testing.assert_close(value, (w(t) * x0_space).detach(), rtol=1e-9, atol=1e-12)
    for a in whole_grads:                                   # with gradient through the inputs alpha matters
        for b in whole_grads:
            assert a == b or (whole_grads[a] - whole_grads[b]).abs().max() > 1e-3


def test_the_weights_of_sid_are_what_they_are_called():
    assert {name: w(0.25) for name, w in sid.WEIGHTS.items()} == {
        "1-t": 0.75, "(1-t)^2": 0.5625, "1/t": 4, "1/t^2": 16, "snr": 9, "snr_sqrt": 3}


def test_sid_times_have_the_papers_quantiles():
    found = sid.draw_tau(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(found, torch.tensor([0.126, 0.405, 0.667, 0.855, 0.965]), rtol=0, atol=1e-3)


# ---- a toy whose answer is known -------------------------------------------------------------------------------------

class ToyFlowMap(torch.nn.Module):
    """u(x, t, s) of a 1-D problem."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))

    def forward(self, x, t, s):
        t, s = (torch.as_tensor(a, dtype=x.dtype).expand(len(x))[:, None] for a in (t, s))
        return self.net(torch.cat([x, t, s], 1))


def two_modes_v(x, t):
    """The exact velocity of data with two modes at -1 and 1, deviation 0.3 each (1.044 together)."""
    t = t[:, None]
    D = (1 - t) ** 2 * 0.09 + t ** 2
    right = torch.sigmoid(2 * x * (1 - t) / D)                                          # probability of that mode
    x0 = 0
    for weight, mode in ((right, 1), (1 - right, -1)):
        x0 = x0 + weight * (mode + (1 - t) * 0.09 / D * (x - mode * (1 - t)))
    return (x - x0) / t


@pytest.mark.slow
def test_without_consistency_distillation_the_generator_collapses():
    """The paper: "unstable when L_CD is omitted".  Two modes, exact teacher; M = 1, shift 10.

    Alone L_FSF pulls the samples together to less than half of the data's spread within 150 steps.
    """
    def cd(net, ema):
        x0 = torch.randint(2, (256, 1)) * 2 - 1 + 0.3 * torch.randn(256, 1)
        t, s = consistency.draw_times(torch.rand(256, 2) * 0.98 + 0.01, "uniform", 0.5)
        x_t = model.interpolate(x0, torch.randn(256, 1), t)
        v = two_modes_v(x_t, t)
        return consistency.consistency_loss(net, x_t, t, s, v, v).mean()

    def fsf(net, ema):
        x, U = fsf_dmd.rollout(net, torch.randn(256, 1), 1)
        tau = model.shift_time(torch.rand(256), 10.0).clamp(min=1e-2)
        fake = lambda x, t: ema(x, t, torch.zeros_like(t))
        return fsf_dmd.fsf_dmd_loss(x, U, fake, two_modes_v, tau, torch.randn(256, 1), "one")[0].mean()

    def train(net, loss, steps, lr):
        """-> the deviation of its 1-step samples"""
        opt, ema = torch.optim.Adam(net.parameters(), lr), common.frozen_copy(net)
        for _ in range(steps):
            opt.zero_grad()
            loss(net, ema).backward()
            opt.step()
            common.update_ema(ema, net, 0.9)
        with torch.no_grad():
            return model.flow_map(net, torch.randn(4000, 1), 1.0, 0.0).std().item()

    torch.manual_seed(0)
    net = ToyFlowMap()
    start = train(net, cd, 1000, 2e-3)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    alone = train(net, fsf, 150, 3e-4)
    net.load_state_dict(weights)
    both = train(net, lambda net, ema: cd(net, ema) + 0.05 * fsf(net, ema), 150, 3e-4)
    assert 0.9 < start < 1.2 and 0.9 < both < 1.2 and alone < 0.5, (start, both, alone)
