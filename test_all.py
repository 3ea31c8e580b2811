"""python -m pytest -q test_all.py        the whole suite, CPU only, under 10 minutes on 2 cores

Facts, not shapes: outputs of the official implementations (golden/), closed forms, identities between methods, exact resume, real
command lines in a subprocess.
"""
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import consistency
import evaluate
import fsf_dmd
import model
import normuon
import vae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "golden"))
from golden_weights import fingerprint, golden_features, golden_input, golden_ints, golden_state, golden_tensor  # noqa: E402

METHODS = ("consistency.py", "fsf_dmd.py")


def golden(name):
    z = np.load(HERE / "golden" / f"{name}.npz", allow_pickle=False)
    return z, json.loads(str(z["config"]))


def randomize(net, gain=1.0, dtype=torch.float64):
    """A network away from its zero initialisation: every tensor a fixed function of its name."""
    net.load_state_dict(golden_state({k: tuple(v.shape) for k, v in net.state_dict().items()}, net.state_dict(), keep=("pos_embed", "feat_rope."), gain=gain))
    return net.to(dtype)


def small_net(conditioning, dtype=torch.float64, **dims):
    dims = dict(input_size=4, in_channels=2, num_classes=3, depth=3, hidden_size=32, num_heads=2, patch_size=2, n_tokens=2, token_block=1) | dims
    return randomize(model.LightningDiT("tiny", conditioning, **dims), dtype=dtype)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(loss, net):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], materialize_grads=True)])


# ---- golden numbers of the official implementations ---------------------------------------------------------------------------

def golden_lightningdit():
    z, cfg = golden("lightningdit")
    m = cfg["model"]
    net = model.LightningDiT(conditioning="plain", qk_norm=m["use_qknorm"], **{k: m[k] for k in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes", "mlp_ratio")})
    state = golden_state({k: tuple(s) for k, s in cfg["keys"]}, net.state_dict(), **cfg["weights"])
    x = golden_input("input:x", cfg["inputs"]["x"]["shape"], cfg["weights"]["prefix"])
    return z, cfg, net, state, x, torch.tensor(cfg["inputs"]["tau"]), torch.tensor(cfg["inputs"]["y"])


def test_lightningdit_matches_the_official_network():
    z, cfg, net, state, x, tau, y = golden_lightningdit()
    assert [[k, list(v.shape)] for k, v in net.state_dict().items()] == cfg["keys"] or {k: list(v.shape) for k, v in net.state_dict().items()} == dict(map(tuple, cfg["keys"]))
    net.load_state_dict(state)
    for k, v in fingerprint(state).items():
        assert v == pytest.approx(cfg["fingerprint"][k], rel=1e-6), f"{k}: other random numbers, not another network"
    out, null = torch.tensor(z["out"]), torch.tensor(z["out_null"])
    assert (net(x, tau, y) - out).abs().max() <= 1e-4 * out.std()
    assert (net(x, tau, torch.full_like(y, cfg["model"]["null_class"])) - null).abs().max() <= 1e-4 * null.std()
    torch.testing.assert_close(net.t_embedder(tau), torch.tensor(z["t_embedder"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(net.pos_embed, torch.tensor(z["pos_embed"]), rtol=0, atol=1e-6, check_stride=False)
    torch.testing.assert_close(net.feat_rope.freqs_cos, torch.tensor(z["rope_cos"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(net.feat_rope.freqs_sin, torch.tensor(z["rope_sin"]), rtol=0, atol=1e-6)


def test_load_official_reverses_time_and_sign(tmp_path):
    z, cfg, net, state, x, tau, y = golden_lightningdit()
    torch.save({"model": {k: torch.zeros_like(v) for k, v in state.items()}, "ema": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "official.pt")
    out = torch.tensor(z["out"])
    loaded = model.load_official(str(tmp_path / "official.pt"))
    assert (loaded(x, 1 - tau, y) + out).abs().max() <= 1e-4 * out.std()                    # v(x, t) = -official(x, 1 - t)
    # Euler from t = 1 to 0 lands where the official direction lands, tau from 0 to 1 on the mirrored grid
    net.load_state_dict(state)
    z_ = x.clone()
    for i in range(8):
        with torch.no_grad():
            z_ = z_ + (1 / 8) * net(z_, torch.full((3,), i / 8), y)
    torch.testing.assert_close(model.euler_sample(loaded, x, y, 8), z_, rtol=0, atol=1e-5)
    for breakage, words in ((lambda s: s.pop("blocks.1.mlp.w3.bias"), "missing blocks.1.mlp.w3.bias"),
                            (lambda s: s.update({"blocks.0.extra": torch.zeros(1)}), "unexpected blocks.0.extra"),
                            (lambda s: s.update({"final_layer.linear.bias": torch.zeros(3)}), "final_layer.linear.bias is [3]"),
                            (lambda s: s.pop("pos_embed"), "pos_embed is missing")):
        broken = dict(state)
        breakage(broken)
        with pytest.raises(ValueError, match=re.escape(words)):
            model.load_official(broken)


def golden_gradient(shape, i):
    name = "x".join(map(str, shape))
    g = 0.5 * golden_input(f"input:g0:{name}", shape) + golden_input(f"input:g{i}:{name}", shape)
    return g * torch.linspace(0.2, 2.0, shape[0])[:, None]


@pytest.mark.parametrize("variant, tolerance, options", [("fp32", 2e-6, {}), ("fp32_wd", 2e-6, dict(weight_decay=0.1)), ("mixed", None, dict(ns_dtype=torch.bfloat16))])
def test_normuon_follows_the_official_trajectory(variant, tolerance, options):
    z, cfg = golden("normuon" if variant == "fp32" else "normuon_variants")
    shapes = [tuple(s) for s in cfg["shapes"]]
    params = [torch.nn.Parameter(golden_tensor("p:{}x{}".format(*s), s)) for s in shapes]
    start = [p.detach().clone() for p in params]
    opt = normuon.NorMuon(params, lr=cfg["hyper"]["lr"], ns_dtype=options.pop("ns_dtype", torch.float32), **options)
    compared = 0
    for i in range(1, cfg["steps"] + 1):
        for p, s in zip(params, shapes):
            p.grad = golden_gradient(s, i)
        before = params[0].grad.clone()
        opt.step()
        assert torch.equal(params[0].grad, before)                                          # the official step overwrites it
        for p, p0, s in zip(params, start, shapes):
            key = "{}.{}x{}.step{}".format(variant, *s, i)
            if key in z:
                expected = torch.tensor(z[key])
                bound = tolerance or 0.03 * (expected - p0).norm()                          # bf16 products: 3% of the distance moved
                assert (p - expected).abs().max() <= bound if tolerance else (p - expected).norm() <= bound, key
                compared += 1
    assert compared >= 2
    if variant == "fp32":
        torch.testing.assert_close(opt.state[params[0]]["momentum"], torch.tensor(z["fp32.64x32.m5"]), rtol=0, atol=2e-6)
        for p, s in zip(params, shapes):
            torch.testing.assert_close(opt.state[p]["second"], torch.tensor(z["fp32.{}x{}.v5".format(*s)]), rtol=0, atol=2e-6)


def test_normuon_auxiliary_adam_is_the_official_one():
    z, cfg = golden("normuon_variants")
    a = cfg["aux_adam"]
    p = torch.nn.Parameter(golden_tensor("p:64", (64,)))
    opt = normuon.NorMuon([dict(params=[p], muon=False)], adam_lr=a["lr"], adam_betas=tuple(a["betas"]), adam_eps=a["eps"], weight_decay=a["weight_decay"])
    for i in range(1, 6):
        p.grad = golden_input(f"input:g{i}:64", (64,))
        opt.step()
        torch.testing.assert_close(p.detach(), torch.tensor(z["aux_adam.64.all"][i - 1]), rtol=0, atol=2e-7)


def golden_set(cfg, name):
    s, prefix = dict(cfg["sets"][name]), cfg["weights"]["prefix"]
    if "ints" in s:
        n, d, low, high = s["ints"]
        return golden_ints(f"input:{name}:i", (n, d), low, high, prefix).float()
    return golden_features(**s, prefix=prefix)


def test_frechet_distance_matches_exact_values():
    z, cfg = golden("metrics")
    for case, sets in cfg["fid"].items():
        value = evaluate.frechet_distance(*evaluate.moments(golden_set(cfg, sets["real"])), *evaluate.moments(golden_set(cfg, sets["fake"])))
        assert value == pytest.approx(float(z[f"fid.{case}.exact"]), rel=1e-6, abs=1e-5), case


def test_inception_score_matches_torch_fidelity_and_stylegan3():
    z, cfg = golden("metrics")
    for case, s in cfg["is"].items():
        probs = (golden_input(f"input:{s['name']}", (s["n"], s["classes"]), cfg["weights"]["prefix"]) * s["scale"]).double().softmax(1)
        np.testing.assert_allclose(evaluate.inception_score(probs, s["splits"]), z[f"is.{case}.torch_fidelity_shuffled"], atol=1e-5)
        np.testing.assert_allclose(evaluate.inception_score(probs, s["splits"], shuffle=False), z[f"is.{case}.torch_fidelity_in_order"], atol=1e-5)


def test_precision_recall_match_brute_force():
    z, cfg = golden("metrics")
    for case, s in cfg["pr"].items():
        real, fake = golden_set(cfg, s["real"]), golden_set(cfg, s["fake"])
        found = evaluate.precision_recall(real, fake, s["k"], chunk=137)
        np.testing.assert_allclose(found, z[f"pr.{case}.float64_le"], atol=1e-9, err_msg=case)


# ---- metrics, closed forms ----------------------------------------------------------------------------------------------------

def test_frechet_distance_closed_forms():
    a, b = torch.linspace(0.5, 2, 20).double(), torch.linspace(2, 0.3, 20).double()
    expected = 20 * 0.09 + (a.sqrt() - b.sqrt()).square().sum().item()                      # diagonal Gaussians, means 0.3 apart
    assert evaluate.frechet_distance(torch.zeros(20), a.diag(), torch.full((20,), 0.3).double(), b.diag()) == pytest.approx(expected, rel=1e-8)
    features = rand(300, 20) @ rand(20, 20, seed=1)
    mu, cov = evaluate.moments(features)
    assert evaluate.frechet_distance(mu, cov, mu, cov) <= 1e-9 * cov.trace()
    with pytest.raises(ValueError, match="shapes"):
        evaluate.frechet_distance(mu, cov, mu[:5], cov[:5, :5])
    with pytest.raises(ValueError, match="NaN"):
        evaluate.frechet_distance(mu, cov * float("nan"), mu, cov)


def test_precision_and_recall_are_not_swapped():
    real = rand(400, 8)
    collapsed = real[:1] + 1e-3 * rand(400, 8, seed=1)                                      # one mode: all good, nothing covered
    precision, recall = evaluate.precision_recall(real, collapsed)
    assert precision == 1 and recall < 0.01
    assert evaluate.precision_recall(collapsed, real) == (recall, precision)
    assert evaluate.inception_score(torch.eye(10).double().repeat(20, 1), 1)[0] == pytest.approx(10)
    assert evaluate.inception_score(torch.full((50, 10), 0.1), 5)[0] == pytest.approx(1)


# ---- calculus of flow maps ----------------------------------------------------------------------------------------------------

def spread(t, sigma):
    """Variance of x_t for data N(0, sigma^2)."""
    return (1 - t) ** 2 * sigma ** 2 + t ** 2


def gaussian_v(x, t, sigma):
    """v(x, t) = E[eps - x0 | x_t] in closed form."""
    t = model.expand(t, x)
    return (t - (1 - t) * sigma ** 2) / spread(t, sigma) * x


def gaussian_u(x, t, s, sigma):
    """Exact average velocity: the flow keeps x / sqrt(spread) constant.  At s = t it is v."""
    t_, s_ = model.expand(t, x), model.expand(s, x)
    f = x * (spread(s_, sigma) / spread(t_, sigma)) ** 0.5
    same = (t_ == s_)
    return torch.where(same, gaussian_v(x, t, sigma), (x - f) / torch.where(same, torch.ones_like(x), (t_ - s_).expand_as(x)))


def test_velocity_score_and_sample_are_one_thing():
    x0, eps, t = rand(64, 3), rand(64, 3, seed=1), uniform(64).clamp(0.05, 0.95)
    x = model.interpolate(x0, eps, t)
    torch.testing.assert_close(model.v_to_x0(x, eps - x0, t), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.x0_to_v(x, x0, t), eps - x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(model.v_to_score(x, eps - x0, t), -eps / t[:, None], rtol=0, atol=1e-10)   # Eq. 26-27, conditional
    for sigma in (0.4, 1.0, 2.5):                                                                        # Eq. 28-32, marginal
        torch.testing.assert_close(model.v_to_score(x, gaussian_v(x, t, sigma), t), -x / spread(t, sigma)[:, None], rtol=1e-10, atol=1e-10)


def test_flow_map_and_semigroup_on_gaussian_data():
    sigma, x = 0.6, rand(50, 2)
    u = lambda x, t, s: gaussian_u(x, t, s, sigma)                                          # noqa: E731
    t = uniform(50) * 0.3 + 0.7
    m, s = t - 0.3, t - 0.6
    step = model.flow_map(u, model.flow_map(u, x, t, m), m, s)
    torch.testing.assert_close(step, model.flow_map(u, x, t, s), rtol=0, atol=1e-12)        # f(f(x, t, m), m, s) = f(x, t, s)
    for steps in (1, 2, 5):
        torch.testing.assert_close(model.sample(lambda x, t, y, s: u(x, t, s), x, None, steps), sigma * x, rtol=0, atol=1e-6)
    euler = [(model.euler_sample(lambda x, t, y: gaussian_v(x, t, sigma), x, None, n) - sigma * x).abs().max().item() for n in (100, 200)]
    assert euler[1] < 0.01 and euler[0] / euler[1] == pytest.approx(2, abs=0.1)             # first order
    # the identity that CT and CD regress on: u = v - (t - s) du/dt
    du_dt = model.total_derivative(u, x, t, s, gaussian_v(x, t, sigma), h=1e-4)
    torch.testing.assert_close(gaussian_v(x, t, sigma) - (t - s)[:, None] * du_dt, u(x, t, s), rtol=0, atol=1e-7)


@pytest.mark.parametrize("conditioning", ["decoupled", "in_context"])
def test_finite_difference_against_jvp_in_float64(conditioning):
    net = small_net(conditioning)
    x, tangent, y = rand(4, 2, 4, 4), rand(4, 2, 4, 4, seed=1), torch.tensor([0, 1, 2, 3])
    t = uniform(4) * 0.5 + 0.4
    s = t * torch.tensor([0.0, 0.5, 0.9, 1.0])
    u = lambda x, t, s: net(x, t, y, s)                                                     # noqa: E731
    exact = model.total_derivative(u, x, t, s, tangent, exact=True)
    error = [(model.total_derivative(u, x, t, s, tangent, h) - exact).abs().max().item() for h in (0.01, 0.005)]
    assert exact.abs().max() > 0.1 and error[1] < 1e-3 * exact.abs().max()
    assert error[0] / error[1] == pytest.approx(4, rel=0.05)                                # central: O(h^2)
    along_t = torch.autograd.functional.jvp(lambda t: u(x, t, s), t, torch.ones_like(t))[1]
    along_x = torch.autograd.functional.jvp(lambda x: u(x, t, s), x, tangent)[1]
    torch.testing.assert_close(exact, along_t + along_x, rtol=0, atol=1e-10)


def test_guidance_and_shift():
    c, u = rand(3, 4, 2, 2), rand(3, 4, 2, 2, seed=1)
    torch.testing.assert_close(model.cfg(c, u, 1.0), c, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.cfg(c, u, 0.0), u, rtol=0, atol=1e-12)
    w = torch.tensor([1.0, 2.0, 6.0]).double()
    guided = model.cfg(c, u, w, channels=3)
    torch.testing.assert_close(guided[:, :3], (u + w.view(3, 1, 1, 1) * (c - u))[:, :3])
    assert torch.equal(guided[:, 3:], c[:, 3:])
    r = uniform(1000)
    torch.testing.assert_close(model.shift_time(r, 1), r)
    torch.testing.assert_close(model.shift_time(model.shift_time(r, 10), 0.1), r)           # k and 1/k are inverse
    assert model.shift_time(torch.tensor(0.5), 3).item() == pytest.approx(0.75)
    g = torch.tensor([[6.0, 0.1, 0.9]] * 3)
    assert model.gate_guidance(g, torch.tensor([0.05, 0.5, 0.95])).tolist() == [[1, 0, 1], [6, 0, 1], [1, 0, 1]]


# ---- the network --------------------------------------------------------------------------------------------------------------

def test_parameter_counts_are_the_papers():
    with torch.device("meta"):
        count = lambda **kw: sum(p.numel() for p in model.LightningDiT(**kw).parameters())  # noqa: E731
        assert count() == count(conditioning="decoupled") == 130_557_728                    # the paper's 130.56M
        assert count(conditioning="in_context") == 133_783_328                              # 133.8M
        assert count(size="XL/1", qk_norm=False) == 675_256_736                             # LightningDiT's log: 675.26M
        assert count(size="L/1") == sum(p.numel() for p in model.LightningDiT(depth=24, hidden_size=1024, num_heads=16).parameters())
        muon, adam = normuon.param_groups(model.LightningDiT(conditioning="in_context"))
    assert len(muon["params"]) == 60 and sum(p.numel() for p in muon["params"]) == 127_401_984
    assert all(p.requires_grad for p in adam["params"])


def test_decoupled_is_plain_at_s_equal_t_and_a_flow_map_elsewhere():
    decoupled, plain = small_net("decoupled"), model.LightningDiT("tiny", "plain", **{k: v for k, v in small_net("decoupled").config.items() if k not in ("size", "conditioning")})
    plain.double().load_state_dict(decoupled.state_dict())
    x, t, y = rand(3, 2, 4, 4), uniform(3), torch.tensor([0, 1, 3])
    assert torch.equal(decoupled(x, t, y), plain(x, t, y)) and torch.equal(decoupled(x, t, y, t), plain(x, t, y))
    # early blocks see t only, late blocks and the final layer s only
    h_t, h_s = [], []
    for net, s, h in ((decoupled, t / 2, h_t), (decoupled, t / 3, h_s)):
        hook = net.blocks[net.switch].register_forward_pre_hook(lambda m, a, h=h: h.append(a[0]))
        h.append(net(x, t, y, s))
        hook.remove()
    assert torch.equal(h_t[0], h_s[0]) and (h_t[1] - h_s[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no target time"):
        plain(x, t, y, t)
    with pytest.raises(ValueError, match="no guidance input"):
        decoupled(x, t, y, t, torch.ones(3, 3))


def test_every_input_of_the_augmented_backbone_reaches_the_output():
    net = small_net("in_context")
    x, t, y, g = rand(3, 2, 4, 4), uniform(3), torch.tensor([0, 1, 3]), torch.tensor([[2.0, 0.1, 0.8]] * 3).double()
    base = net(x, t, y, t / 2, g)
    changed = [net(x, t * 0.9, y, t / 2, g), net(x, t, (y + 1) % 4, t / 2, g), net(x, t, y, t / 3, g)]
    changed += [net(x, t, y, t / 2, g + d) for d in torch.eye(3).double() * 0.1]
    assert all((c - base).abs().max() > 1e-5 for c in changed)
    assert torch.equal(net(x, t, y, t), net(x, t, y, None, torch.tensor([[1.0, 0.0, 1.0]] * 3)))   # None: unguided; s = None: s = t
    assert torch.equal(net(x[:2], 0.5, y[:2], 0.25), net(x[:2], torch.full((2,), 0.5).double(), y[:2], torch.full((2,), 0.25).double()))
    each = torch.cat([net(x[i:i + 1], t[i:i + 1], y[i:i + 1], t[i:i + 1] / 2, g[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(each, base, rtol=0, atol=1e-12)                              # rows do not see each other


def test_initial_output_is_zero_and_patches_go_back_where_they_came_from():
    net = model.LightningDiT("tiny", "in_context", input_size=8, in_channels=3, num_classes=5)
    assert torch.count_nonzero(net(torch.randn(2, 3, 8, 8), 0.3, torch.tensor([0, 5]))) == 0
    bias = torch.arange(12.0)                                                               # (row in patch, column in patch, channel)
    net.final_layer.linear.bias.data = bias
    out = net(torch.randn(1, 3, 8, 8), 0.3, torch.tensor([0]))[0]
    for a in range(2):
        for b in range(2):
            assert torch.equal(out[:, a::2, b::2], bias.view(2, 2, 3)[a, b].view(3, 1, 1).expand(3, 4, 4))
    for bad, words in ((dict(size="B/2"), "size 'B/2'"), (dict(conditioning="cross"), "conditioning 'cross'"), (dict(input_size=9, patch_size=2), "multiple of patch_size")):
        with pytest.raises(ValueError, match=words):
            model.LightningDiT(**bad)


# ---- NorMuon ------------------------------------------------------------------------------------------------------------------

def test_normuon_scales_batches_and_states():
    shapes = [(24, 8), (8, 24), (24, 8)]
    together = [torch.nn.Parameter(rand(*s, seed=i, dtype=torch.float32)) for i, s in enumerate(shapes)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    rms = [torch.nn.Parameter(p.detach().clone()) for p in together]
    opts = [normuon.NorMuon(together, lr=0.01)] + [normuon.NorMuon([p], lr=0.01) for p in alone]
    opt_rms = normuon.NorMuon(rms, lr=0.01, scale="rms")
    for step in range(3):
        for ps in (together, alone, rms):
            for i, p in enumerate(ps):
                p.grad = rand(*p.shape, seed=10 * step + i, dtype=torch.float32)
        before = [p.detach().clone() for p in rms]
        for o in (*opts, opt_rms):
            o.step()
        for p, b in zip(rms, before):
            assert (p - b).pow(2).mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=1e-4)   # the definition of "rms"
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)                                 # stacked = one by one
    # no gradient: moved by its momentum, never by weight decay; zero gradient at the start: no step, no NaN
    p, q = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(3))
    opt = normuon.NorMuon([p, q], lr=0.1, weight_decay=0.5)
    opt.step()
    assert torch.equal(p, torch.ones(4, 4)) and torch.equal(q, torch.ones(3))
    for bad in (dict(lr=0), dict(lr=float("nan")), dict(momentum=1.0), dict(scale="adam")):
        with pytest.raises(ValueError, match="NorMuon"):
            normuon.NorMuon([p], **bad)
    with pytest.raises(ValueError, match="matrices only"):
        normuon.NorMuon([dict(params=[q], muon=True)])


def test_normuon_takes_bfloat16_parameters_and_keeps_float32_states():
    p32 = [torch.nn.Parameter(rand(16, 8, dtype=torch.float32)), torch.nn.Parameter(rand(16, dtype=torch.float32))]
    p16 = [torch.nn.Parameter(p.detach().bfloat16()) for p in p32]
    opts = [normuon.NorMuon(ps, lr=0.05, adam_lr=0.05) for ps in (p32, p16)]
    for step in range(4):
        for ps in (p32, p16):
            for p in ps:
                p.grad = rand(*p.shape, seed=step, dtype=torch.float32).to(p.dtype)
        for o in opts:
            o.step()
    for a, b in zip(p32, p16):
        assert b.dtype == torch.bfloat16 and (a - b.float()).abs().max() < 0.03             # bf16 has 3 digits
    assert all(v.dtype == torch.float32 for s in opts[1].state.values() for v in s.values() if torch.is_tensor(v))
    clone = [torch.nn.Parameter(p.detach().clone()) for p in p16]
    fresh = normuon.NorMuon(clone, lr=0.05, adam_lr=0.05)
    buffer = io.BytesIO()
    torch.save(opts[1].state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for ps, o in ((p16, opts[1]), (clone, fresh)):
        for p in ps:
            p.grad = torch.ones_like(p)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(p16, clone))                               # a saved optimizer goes on exactly
    assert all(v.dtype == torch.float32 for s in fresh.state.values() for v in s.values() if torch.is_tensor(v))


def test_param_groups_cover_every_trainable_parameter_once():
    net = small_net("in_context")
    muon, adam = normuon.param_groups(net)
    names = {id(p): n for n, p in net.named_parameters()}
    assert {names[id(p)].split(".", 2)[2] for p in muon["params"]} == {"attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.w3.weight", "adaLN_modulation.1.weight"}
    assert "token_embed" in {names[id(p)] for p in adam["params"]} and "pos_embed" not in {names[id(p)] for p in adam["params"]}
    assert normuon.NorMuon([muon, adam], lr=6e-4).param_groups[1]["adam_lr"] == pytest.approx(1e-4)
    with pytest.raises(AssertionError, match="in no group, or in two"):
        normuon.param_groups(net, net)


# ---- consistency losses -------------------------------------------------------------------------------------------------------

def test_emd_meanflow_and_imf_have_one_gradient():
    """Eq. 35-38: AYF's EMD with weight 1/(t-s), MeanFlow's u-regression, iMF's V-regression and consistency_loss agree."""
    net = small_net("decoupled")
    n, y = 6, torch.tensor([0, 1, 2, 0, 1, 2])
    x, v, t = rand(n, 2, 4, 4), rand(n, 2, 4, 4, seed=1), uniform(n) * 0.5 + 0.5
    s = t * uniform(n, seed=1)
    u, dt = (lambda x, t, s: net(x, t, y, s)), model.expand(t - s, x)
    du_dt = model.total_derivative(u, x, t, s, v, exact=True)
    pred = u(x, t, s)
    mean = lambda e: e.pow(2).flatten(1).mean(1).sum()                                      # noqa: E731
    meanflow = gradients(mean(pred - (v - dt * du_dt)), net)
    imf = gradients(mean(u(x, t, s) + dt * du_dt - v), net)
    f = x - dt * u(x, t, s)
    df_dt = v - u(x, t, s).detach() - dt * du_dt                                            # Eq. 37
    emd = gradients((((f - (f - df_dt).detach()).pow(2).flatten(1).mean(1)) / (t - s)).sum(), net)
    c = 1e5                                                                                 # 2c (sqrt(m + c^2) - c) -> m
    ours = gradients(2 * c * consistency.consistency_loss(u, x, t, s, v, v, exact=True, c=c, cosine=False).sum(), net)
    assert meanflow.norm() > 0.1
    for other in (imf, emd):
        torch.testing.assert_close(other, meanflow, rtol=0, atol=1e-11 * meanflow.norm().item() + 1e-12)
    torch.testing.assert_close(ours, meanflow, rtol=0, atol=1e-6 * meanflow.norm().item())


def test_consistency_loss_vanishes_at_the_exact_flow_map_and_is_finite_at_t_equal_s():
    sigma, n = 0.5, 200
    x, t = rand(n, 1), uniform(n) * 0.9 + 0.05
    s = torch.where(torch.arange(n) % 2 == 0, t, t * uniform(n, seed=1))                    # half of the rows have s = t
    v = gaussian_v(x, t, sigma)
    u = lambda x, t, s: gaussian_u(x, t, s, sigma)                                          # noqa: E731
    assert consistency.consistency_loss(u, x, t, s, v, v, h=1e-4).max() < 1e-5
    assert consistency.consistency_loss(lambda x, t, s: 1.05 * u(x, t, s), x, t, s, v, v, h=1e-4).mean() > 1e-3
    net = small_net("in_context")
    x, eps, t = rand(4, 2, 4, 4), rand(4, 2, 4, 4, seed=1), torch.tensor([0.0, 0.3, 0.7, 1.0]).double()
    y, g = torch.tensor([0, 1, 2, 3]), torch.tensor([[4.0, 0.2, 0.6]] * 4).double()
    for exact in (False, True):
        loss = consistency.imf_loss(net, x, eps, t, t.clone(), y, g, exact=exact)
        assert loss.isfinite().all() and gradients(loss.sum(), net).isfinite().all()


def test_imf_is_flow_matching_at_t_equal_s_and_guides_as_classifier_free_guidance():
    net = small_net("in_context")
    x0, eps, t = rand(4, 2, 4, 4), rand(4, 2, 4, 4, seed=1), torch.tensor([0.2, 0.4, 0.6, 0.8]).double()
    y = torch.tensor([0, 1, 2, 3])                                                          # the last label is dropped (null)
    x_t, one, null = model.interpolate(x0, eps, t), torch.ones(4).double(), torch.full((4,), 3)
    g = torch.stack([one * 4, one * 0.3, one * 0.5], 1)
    at = torch.tensor([[4.0, 0.0, 1.0]] * 4).double()                                       # s = t rows ignore the interval (iMF)
    loss = consistency.imf_loss(net, x0, eps, t, t.clone(), y, g, c=1e5, cosine=False) * 2e5
    with torch.no_grad():
        v_g = (eps - x0) + (0.75 * torch.tensor([1, 1, 1, 0]).double()).view(4, 1, 1, 1) * (net(x_t, t, y, None, at) - net(x_t, t, null))
        expected = (net(x_t, t, y, None, at) - v_g).pow(2).flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    # off the diagonal omega acts inside [t_min, t_max] only: row 1 (t = 0.4) is guided, row 2 (t = 0.6) is not
    seen = []
    spy = lambda x, t, y, s, g: (seen.append(g), net(x, t, y, s, g))[1]                     # noqa: E731
    spy.num_classes = 3
    consistency.imf_loss(spy, x0, eps, t, t / 2, y, g)
    assert seen[0][:, 0].tolist() == [1, 4, 1, 1] and seen[1] is None and torch.equal(seen[-1], g)
    # fixed point v_c = E[v_g]:  v_c = v_u + omega (v - v_u)
    v, v_u, omega = 0.7, 0.2, 4.0
    v_c = v_u + omega * (v - v_u)
    assert v + (1 - 1 / omega) * (v_c - v_u) == pytest.approx(v_c)


def test_time_and_guidance_laws():
    r, mask = uniform(20000, 2), uniform(20000, seed=1)
    t, s = consistency.draw_times(r, mask, "uniform", 0.5)
    assert (s <= t).all() and (s == t).double().mean() == pytest.approx(0.5, abs=0.01) and t.mean() == pytest.approx(2 / 3, abs=0.01)
    t0, s0 = consistency.draw_times(r, mask, "logitnormal", 0.0)
    logit = torch.logit(torch.cat([t0, s0]))
    assert (s0 < t0).all() and logit.mean() == pytest.approx(-0.4, abs=0.02) and logit.std() == pytest.approx(1, abs=0.02)
    g = consistency.draw_guidance(uniform(20000, 3, seed=2), "loguniform", 8.0)
    assert g[:, 0].log().mean() == pytest.approx(math.log(8) / 2, abs=0.02) and (g[:, 1] <= 0.5).all() and (g[:, 2] >= 0.5).all() and (g[:, 2] <= 1).all()
    e = consistency.draw_guidance(uniform(20000, 3, seed=2), "truncexp", 8.0)[:, 0]
    assert e.min() >= 1 and e.max() <= 8 and e.mean() == pytest.approx(1 + 1 - 7 * math.exp(-7) / (1 - math.exp(-7)), abs=0.03)


def test_distance_is_pseudo_huber_plus_cosine():
    a, b = rand(5, 3, 4, 4), rand(5, 3, 4, 4, seed=1)
    rms = (a - b).flatten(1).pow(2).mean(1).sqrt()
    torch.testing.assert_close(consistency.distance(a, b, c=1e-9, cosine=False), rms, rtol=1e-6, atol=1e-8)
    gap = consistency.distance(a, b) - consistency.distance(a, b, cosine=False)
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    torch.testing.assert_close(gap, (1 - cosine).flatten(1).mean(1))
    assert torch.equal(consistency.distance(a[:, :1], b[:, :1]), consistency.distance(a[:, :1], b[:, :1], cosine=False))   # one channel
    v = rand(5, 3, 4, 4, seed=2)
    x0, eps, t = a, b, uniform(5)
    torch.testing.assert_close(consistency.flow_matching_loss(lambda x, t, s: v, x0, eps, t), (v - (eps - x0)).pow(2).flatten(1).mean(1))


# ---- FSF-DMD ------------------------------------------------------------------------------------------------------------------

def surrogate_drift(g, shift, sigma=1.0, weight="one"):
    """Drift of a 1-D generator x_hat = g eps under gradient descent on L_FSF, exact teacher for N(0, sigma^2), by quadrature.

    Everything is linear in (eps, eps'), so three Gauss-Hermite points an axis are exact; 400 Gauss-Legendre points in r.
    """
    z, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(3))
    r, wr = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(400))
    eps, eps2, r = (a.reshape(-1, 1) for a in torch.meshgrid(z, z, (r + 1) / 2, indexing="ij"))
    weights = (w[:, None, None] * w[None, :, None] * wr[None, None, :]).reshape(-1) / (w.sum() ** 2 * 2)
    tau = model.shift_time(r[:, 0], shift)
    g = torch.tensor(float(g), dtype=torch.float64, requires_grad=True)
    x, U = fsf_dmd.rollout(lambda x, t, s: (1 - g) * x, eps, 1)
    loss, _ = fsf_dmd.fsf_dmd_loss(x, U, lambda x, t: gaussian_u(x, t, torch.zeros_like(t), g.detach()), lambda x, t: gaussian_v(x, t, sigma), tau, eps2, weight)
    return -torch.autograd.grad((weights * loss).sum(), g)[0].item() / 2


@pytest.mark.parametrize("shift, fixed_point", [(1, 0.582), (3, 0.527), (10, 0.460)])
def test_surrogate_contracts_to_the_closed_form_fixed_point(shift, fixed_point):
    low, high = 0.05, 1.5
    assert surrogate_drift(low, shift) > 0 > surrogate_drift(high, shift)                   # toward the fixed point from both sides
    assert surrogate_drift(1.0, shift) < 0                                                  # not zero at the data: it contracts
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if surrogate_drift(middle, shift) > 0 else (low, middle)
    assert low == pytest.approx(fixed_point, abs=6e-4)
    assert surrogate_drift(2 * low, shift, sigma=2.0) == pytest.approx(0, abs=1e-3)         # scales with sigma


def test_surrogate_drift_is_the_closed_form():
    """E_tau[(1-tau)/tau g ((1-tau) sigma^2 / D_sigma - g / sqrt(D_g))], reference values -0.234 (k = 1) and -0.142 (k = 10) at g = 1."""
    assert surrogate_drift(1.0, 1) == pytest.approx(-0.234, abs=1e-3) and surrogate_drift(1.0, 10) == pytest.approx(-0.142, abs=1e-3)
    r = np.polynomial.legendre.leggauss(400)
    for g, shift in ((0.3, 3), (0.8, 10)):
        tau = model.shift_time((torch.tensor(r[0]) + 1) / 2, shift)
        drift = (1 - tau) / tau * g * ((1 - tau) / spread(tau, 1) - g / spread(tau, g).sqrt())
        assert surrogate_drift(g, shift) == pytest.approx((torch.tensor(r[1]) / 2 * drift).sum().item(), abs=1e-9)


def test_one_step_fsf_dmd_is_equation_14():
    net, ema, teacher = small_net("in_context"), small_net("in_context"), small_net("decoupled")
    eps, eps2, tau, y = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1), uniform(3) * 0.8 + 0.1, torch.tensor([0, 1, 2])
    fake, tea = (lambda x, t: ema(x, t, y, torch.zeros_like(t))), (lambda x, t: teacher(x, t, y))
    u_10 = net(eps, torch.ones(3).double(), y, torch.zeros(3).double())
    with torch.no_grad():                                                                   # Eq. 14 written out
        x_tau = (1 - tau.view(3, 1, 1, 1)) * (eps - u_10) + tau.view(3, 1, 1, 1) * eps2
        gap = ema(x_tau, tau, y, torch.zeros(3).double()) - teacher(x_tau, tau, y)
        q = 1 / (teacher(x_tau, tau, y) - (eps2 - (eps - u_10))).abs().mean((1, 2, 3))
    for weight, clip, cosine in (("adaptive", 0, 0), ("one", 0, 0), ("one", 0.1, 0), ("adaptive", 0, 1)):
        g = gap.clamp(-clip, clip) if clip else gap
        w = (q if weight == "adaptive" else torch.ones(3).double()) * (torch.cos(math.pi * tau / 2) if cosine else 1)
        expected = gradients((w * (u_10 - (u_10.detach() - g)).pow(2).mean((1, 2, 3))).sum(), net)
        u_10 = net(eps, torch.ones(3).double(), y, torch.zeros(3).double())
        x, U = fsf_dmd.rollout(lambda x, t, s: net(x, t, y, s), eps, 1)
        loss, size = fsf_dmd.fsf_dmd_loss(x, U, fake, tea, tau, eps2, weight, clip, cosine)
        torch.testing.assert_close(gradients(loss.sum(), net), expected, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(size, gap.abs().mean((1, 2, 3)))
    # gradient descent on U moves x_hat along +(v_fake - v_teacher)
    U = U.detach().requires_grad_()
    loss, _ = fsf_dmd.fsf_dmd_loss(x, U, fake, tea, tau, eps2, "one")
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), U)[0] * 16, gap)             # = -d x_hat; 2 / 32 elements


def test_rollout_keeps_the_gradient_of_every_step_or_of_the_last():
    eps, M = rand(4, 2), 3
    for mode, alive in (("all", [True, True, True]), ("last", [False, False, True])):
        theta = torch.zeros(M, dtype=torch.float64, requires_grad=True)                     # one parameter a step
        u = lambda x, t, s: x * 0.3 + theta[round((1 - t) * M)]                             # noqa: E731
        x, U = fsf_dmd.rollout(u, eps, M, mode)
        grad = torch.autograd.grad(U.sum(), theta)[0]
        assert [bool(g) for g in grad] == alive
        torch.testing.assert_close(grad[-1], torch.tensor(8 / 3).double())                  # dU/dtheta_i = t_i - t_{i+1}: none runs on
        if mode == "all":
            torch.testing.assert_close(grad, torch.full((3,), 8 / 3).double())
        with torch.no_grad():                                                               # x_hat is the few-step sample (Eq. 19)
            torch.testing.assert_close(x - U, model.sample(lambda x, t, y, s: u(x, t[0].item(), s[0].item()), eps, None, M), rtol=0, atol=1e-6)


def test_renoised_rollout_is_dmd2_backward_simulation():
    sigma, M = 0.5, 2
    eps = rand(5, M, 3)
    u = lambda x, t, s: gaussian_u(x, torch.full((len(x),), t).double(), torch.full((len(x),), s).double(), sigma)   # noqa: E731
    x, U = fsf_dmd.rollout_renoised(u, eps, 0, M)
    torch.testing.assert_close(x - U, sigma * eps[:, 0])                                    # k = 0: pure noise, one jump
    x, U = fsf_dmd.rollout_renoised(u, eps, 1, M)
    torch.testing.assert_close(x, 0.5 * sigma * eps[:, 0] + 0.5 * eps[:, 1])                # Eq. 17 at t = 1/2, fresh noise
    torch.testing.assert_close(x - U, x * sigma / spread(0.5, sigma) ** 0.5)
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    x, U = fsf_dmd.rollout_renoised(lambda x, t, s: x * 0.3 + theta[round((1 - t) * M)], eps, 1, M)
    assert torch.autograd.grad(U.sum(), theta)[0].tolist() == [0, 7.5] and not x.requires_grad


class ToyFlowMap(torch.nn.Module):
    """u(x, t, s) of a 1-D problem."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))

    def forward(self, x, t, s):
        t, s = (torch.as_tensor(a, dtype=x.dtype).expand(len(x))[:, None] for a in (t, s))
        return self.net(torch.cat([x, t, s], 1))


def test_without_consistency_distillation_the_generator_collapses():
    """The paper: "unstable when L_CD is omitted".  Data +-1 with deviation 0.3, exact teacher; std of the samples, truth 1.044."""
    def teacher(x, t):
        t = t[:, None]
        D, mean = (1 - t) ** 2 * 0.09 + t ** 2, (1 - t)
        p = torch.sigmoid(2 * x * mean / D)                                                 # which mode
        x0 = sum(w * (m + (1 - t) * 0.09 / D * (x - m * mean)) for w, m in ((p, 1), (1 - p, -1)))
        return (x - x0) / t
    def batch(n=256):
        x0 = (torch.randint(2, (n, 1)) * 2 - 1) + 0.3 * torch.randn(n, 1)
        t, s = consistency.draw_times(torch.rand(n, 2) * 0.98 + 0.01, torch.rand(n), "uniform", 0.5)
        return model.interpolate(x0, torch.randn(n, 1), t), t, s
    def cd(net):
        x_t, t, s = batch()
        v = teacher(x_t, t)
        return consistency.consistency_loss(net, x_t, t, s, v, v).mean()
    def fsf(net, ema):
        x, U = fsf_dmd.rollout(net, torch.randn(256, 1), 1)
        tau = model.shift_time(torch.rand(256), 1).clamp(min=1e-2)
        return fsf_dmd.fsf_dmd_loss(x, U, lambda x, t: ema(x, t, torch.zeros_like(t)), teacher, tau, torch.randn(256, 1))[0].mean()
    def train(net, loss, steps, lr):
        opt, ema = torch.optim.Adam(net.parameters(), lr), common.frozen_copy(net)
        for _ in range(steps):
            opt.zero_grad()
            loss(net, ema).backward()
            opt.step()
            common.update_ema(ema, net, 0.9)
        with torch.no_grad():
            return model.flow_map(net, torch.randn(4000, 1), 1.0, 0.0).std().item()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = ToyFlowMap()
    start = train(net, lambda n, e: cd(n), 1500, 2e-3)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    alone = train(net, fsf, 400, 1e-3)
    net.load_state_dict(weights)
    both = train(net, lambda n, e: cd(n) + 0.05 * fsf(n, e), 400, 1e-3)
    torch.set_num_threads(threads)
    assert 0.85 < start < 1.15 and 0.8 < both < 1.15 and alone < 0.3, (start, both, alone)
