"""python -m pytest -q -n 2        the whole suite, CPU only, under 10 minutes on 2 cores

Here: networks, optimizer, methods, command lines, README.  test_data.py: data, autoencoder, official weights, metrics.  test_reproduce.py: the tables.

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
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import common
import consistency
import dmd2
import evaluate
import fsf_dmd
import model
import normuon
import reproduce  # noqa: F401  (its commands in README are parsed)
import sid
import twinflow
import vae

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "golden"))
from golden_weights import fingerprint, golden_input, golden_state, golden_tensor  # noqa: E402

torch.set_num_threads(1)                                                                     # the two workers of pytest -n 2 have a core each
METHODS = ("consistency.py", "dmd2.py", "fsf_dmd.py", "sid.py", "twinflow.py")


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
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == dict(cfg["keys"])      # the official key names
    net.load_state_dict(state)
    found = fingerprint(state)
    for k, v in cfg["fingerprint"].items():
        assert found[k] == pytest.approx(v, rel=1e-6), f"{k}: other random numbers, not another network"
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
    for shift in (1.0, 3.33):
        euler = [(model.euler_sample(lambda x, t, y: gaussian_v(x, t, sigma), x, None, n, shift) - sigma * x).abs().max().item() for n in (100, 200)]
        assert euler[1] < 0.03 and euler[0] / euler[1] == pytest.approx(2, abs=0.1)         # first order
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
    with sdpa_kernel(SDPBackend.MATH):
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


def test_bf16_keeps_every_gradient_and_an_exact_derivative():
    """Networks are called with and without gradient in one autocast region: no weight may lose its gradient to the cast cache."""
    net = small_net("in_context", torch.float32)
    x0, eps = rand(4, 2, 4, 4, dtype=torch.float32), rand(4, 2, 4, 4, seed=1, dtype=torch.float32)
    t, y, g = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([0, 1, 2, 3]), torch.tensor([[4.0, 0.2, 0.6]] * 4)
    found = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = consistency.imf_loss(net, x0, eps, t, t / 2, y, g).sum()
            du_dt = model.total_derivative(lambda x, t, s: net(x, t, y, s, g), x0, t, t / 2, eps)
        params = [p for p in net.parameters() if p.requires_grad]
        found.append((du_dt, torch.autograd.grad(loss, params)))
    assert torch.equal(found[0][0], found[1][0])                                            # the difference is taken in float32
    for a, b in zip(found[0][1], found[1][1]):
        assert (a - b).norm() < 0.05 * a.norm() + 1e-6


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


@pytest.mark.parametrize("sigma, shift, fixed_point", [(1, 1, 0.582), (1, 3, 0.527), (1, 10, 0.460), (2, 1, 0.597), (2, 3, 0.546), (2, 10, 0.477)])
def test_surrogate_contracts_to_the_closed_form_fixed_point(sigma, shift, fixed_point):
    low, high = 0.05, 1.5                                                                   # g / sigma
    assert surrogate_drift(low * sigma, shift, sigma) > 0 > surrogate_drift(high * sigma, shift, sigma)   # toward it from both sides
    assert surrogate_drift(sigma, shift, sigma) < 0                                         # not zero at the data: it contracts
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if surrogate_drift(middle * sigma, shift, sigma) > 0 else (low, middle)
    assert low == pytest.approx(fixed_point, abs=6e-4)


def test_surrogate_drift_is_the_closed_form():
    """E_tau[(1-tau)/tau g ((1-tau) sigma^2 / D_sigma - g / sqrt(D_g))], D_a = (1-tau)^2 a^2 + tau^2, by scipy's quadrature."""
    for g, shift, sigma in ((1.0, 1, 1.0), (0.3, 3, 1.0), (0.8, 10, 0.5), (1.2, 10, 2.0)):
        def integrand(r):
            tau = model.shift_time(r, shift)
            return (1 - tau) / tau * g * ((1 - tau) * sigma ** 2 / spread(tau, sigma) - g / math.sqrt(spread(tau, g)))
        assert surrogate_drift(g, shift, sigma) == pytest.approx(scipy.integrate.quad(integrand, 0, 1, limit=200)[0], abs=1e-7)


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


# ---- DMD2 ---------------------------------------------------------------------------------------------------------------------

def test_dmd_direction_is_the_same_in_x0_and_velocity_space():
    """Eq. 50 = Eq. 51: (f_fake - f_teacher) / mean |x_hat - f_teacher| = (v_teacher - v_fake) / mean |v_teacher - (eps - x_hat)|."""
    x_hat, eps, t = rand(4, 3, 2, 2).requires_grad_(), rand(4, 3, 2, 2, seed=1), uniform(4) * 0.9 + 0.05
    fake, teacher = (lambda x, t: torch.tanh(2 * x + t.view(-1, 1, 1, 1))), (lambda x, t: torch.sin(x) - t.view(-1, 1, 1, 1))
    loss, gap = dmd2.dmd_loss(x_hat, fake, teacher, t, eps)
    found = torch.autograd.grad(loss.sum(), x_hat)[0] * 12                                  # 12 elements in the mean
    x_t = model.interpolate(x_hat.detach(), eps, t)
    f_fake, f_teacher = model.v_to_x0(x_t, fake(x_t, t), t), model.v_to_x0(x_t, teacher(x_t, t), t)
    expected = (f_fake - f_teacher) / (x_hat.detach() - f_teacher).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gap, (fake(x_t, t) - teacher(x_t, t)).abs().mean((1, 2, 3)))


@pytest.mark.parametrize("theta, t", [(1.5, 0.5), (0.6, 0.3), (2.0, 0.9)])
def test_dmd_gradient_is_the_kl_gradient_of_two_gaussians(theta, t):
    """x_hat = theta z against N(0, 1): with the weight (1-t)^2/t on v_teacher - v_fake it is d/dtheta KL(q_t || p_t), in closed form."""
    z, w = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(3))
    zz, ee = (a.reshape(-1, 1) for a in torch.meshgrid(z, z, indexing="ij"))
    weights, times = (w[:, None] * w[None, :]).reshape(-1) / w.sum() ** 2, torch.full((9,), t, dtype=torch.float64)
    x_hat = (theta * zz).requires_grad_()
    fake, teacher = (lambda x, t: gaussian_v(x, t, theta)), (lambda x, t: gaussian_v(x, t, 1.0))
    loss, _ = dmd2.dmd_loss(x_hat, fake, teacher, times, ee)
    x_t = model.interpolate(x_hat.detach(), ee, times)
    scale = (teacher(x_t, times) - (ee - x_hat.detach())).abs() + 1e-6                      # undo the normaliser
    direction = torch.autograd.grad(loss.sum(), x_hat)[0] * scale
    found = ((1 - t) ** 2 / t * direction * zz)[:, 0] @ weights
    V, V_data = spread(t, theta), spread(t, 1.0)
    assert found.item() == pytest.approx((1 - t) ** 2 * theta * (1 / V_data - 1 / V), rel=1e-6)
    if (theta, t) == (1.5, 0.5):
        assert found.item() == pytest.approx(0.288462, abs=1e-6)                            # the reference value


def test_fake_gan_and_ida_are_their_formulas():
    x_hat, eps, t = rand(5, 2).requires_grad_(), rand(5, 2, seed=1), uniform(5)
    v = rand(5, 2, seed=2)
    loss = dmd2.fake_loss(lambda x, t: v, x_hat, t, eps)
    torch.testing.assert_close(loss, (v - (eps - x_hat)).pow(2).mean(1).detach())
    assert not loss.requires_grad                                                           # Eq. 52 never reaches the generator
    d = torch.tensor([[-2.0], [0.0], [3.0]])
    torch.testing.assert_close(dmd2.gan_generator_loss(d), torch.log1p(torch.exp(-d))[:, 0])
    torch.testing.assert_close(dmd2.gan_discriminator_loss(d, -d), 2 * torch.log1p(torch.exp(d))[:, 0])
    fake, generator = small_net("in_context"), model.LightningDiT(**small_net("in_context").config).double()
    before, theta = ({k: v.clone() for k, v in net.state_dict().items()} for net in (fake, generator))
    dmd2.ida_(fake, generator, 0.97)
    for k, v in fake.state_dict().items():
        torch.testing.assert_close(v - before[k], 0.03 * (theta[k] - before[k]), rtol=0, atol=1e-12, msg=k)
        assert torch.equal(generator.state_dict()[k], theta[k])


def test_backward_simulation_follows_equation_17():
    sigma, M, eps = 0.5, 3, rand(5, 3, 2)
    u = lambda x, t, s: gaussian_u(x, torch.full((len(x),), t).double(), torch.full((len(x),), s).double(), sigma)   # noqa: E731
    for k in range(M):
        x, U = fsf_dmd.rollout_renoised(u, eps, k, M)
        torch.testing.assert_close(dmd2.backward_simulation(u, eps, k, M), x - U)
    torch.testing.assert_close(dmd2.backward_simulation(u, eps, 0, M), sigma * eps[:, 0])
    x = 2 / 3 * eps[:, 1] + 1 / 3 * sigma * eps[:, 0]
    torch.testing.assert_close(dmd2.backward_simulation(u, eps, 1, M), x * sigma / spread(2 / 3, sigma) ** 0.5)
    theta = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    x_hat = dmd2.backward_simulation(lambda x, t, s: x * 0.3 + theta[round((1 - t) * M)], eps, 2, M)
    grad = torch.autograd.grad(x_hat.sum(), theta)[0]
    torch.testing.assert_close(grad, torch.tensor([0, 0, -10 / 3]).double())                # the last call only


def test_discriminator_has_the_papers_size_and_feeds_the_generator_at_step_0():
    with torch.device("meta"):
        assert sum(p.numel() for p in model.DiscriminatorHead(model.LightningDiT()).parameters()) == 21_275_393   # 21.28M
        assert model.DiscriminatorHead(model.LightningDiT()).until == 5
    torch.manual_seed(0)
    net = model.LightningDiT("tiny", "in_context", input_size=8, in_channels=1, num_classes=10)   # at its zero initialisation
    head = model.DiscriminatorHead(net)
    x, t, y = torch.randn(4, 1, 8, 8, requires_grad=True), torch.rand(4), torch.tensor([0, 1, 2, 9])
    logits = head(net, x, t, y)
    grad = torch.autograd.grad(dmd2.gan_generator_loss(logits).sum(), x)[0]
    assert grad.flatten(1).norm(dim=1).min() > 1e-4
    assert (head(net, x, t, (y + 1) % 10) - logits).abs().min() > 1e-6                      # it knows the class
    h = small_net("in_context")
    features = h(rand(2, 2, 4, 4), 0.5, torch.tensor([0, 1]), until=2)
    assert features.shape[1] == h.grid ** 2                                                 # the in-context tokens are left out


@pytest.mark.parametrize("script, order", [("dmd2.py --ttur 3", [0, 1, 1, 1, 0, 1, 1, 1]), ("sid.py --lambda_g 0.1", [1, 0, 1, 0])])   # TTUR 1:3 as DMD2 counts; 1:1, fake first
def test_every_turn_leaves_the_other_networks_alone(home, monkeypatch, capsys, script, order):
    """Around each optimizer step all parameters and states of the other side are bit-identical, and have no gradient."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((1,), 60, 0, False))
    sides, turns = [], []

    class Spy(normuon.NorMuon):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            sides.append(self)

        def step(self):
            def photo(o):
                return [p.detach().clone() for group in o.param_groups for p in group["params"]] + [v.clone() for s in o.state.values() for v in s.values() if torch.is_tensor(v)]
            other = sides[1 - sides.index(self)]
            assert all(p.grad is None for group in other.param_groups for p in group["params"])
            assert any(p.grad is not None for group in self.param_groups for p in group["params"])
            now = photo(other)
            if turns and turns[-1][0] is not self:                                          # what the other side did since its own last turn: nothing
                assert all(torch.equal(a, b) for a, b in zip(turns[-1][1], now))
            own = photo(self)
            super().step()
            assert all(torch.equal(a, b) for a, b in zip(now, photo(other))) and not all(torch.equal(a, b) for a, b in zip(own, photo(self)))
            turns.append((self, photo(self)))

    module, out = sys.modules[script.split(".")[0]], f"isolated-{script[:3]}"
    monkeypatch.setattr(module, "NorMuon", Spy)
    module.train(module.parse_args([*script.split()[1:], *f"--init imf/model.pt --data toy.npz --steps 2 --health_every 1 --out {out}".split()]))
    assert [sides.index(o) for o, _ in turns] == order
    start, end = common.load_checkpoint("imf/model.pt")["weights"], state(home, out)
    assert all(torch.equal(v, end["teacher"][k]) for k, v in start.items())                 # nothing trains the teacher
    assert any(not torch.equal(v, end["net"][k]) for k, v in start.items()) and any(not torch.equal(v, end["fake"][k]) for k, v in start.items())
    health = [json.loads(line) for line in (home / out / "metrics.jsonl").read_text().splitlines() if "gap_0.2" in line]
    assert [line["step"] for line in health] == [1, 2] and all(line["gan_dm_ratio"] > 0 for line in health) and (home / out / "health_000002.png").exists()
    capsys.readouterr()


@pytest.mark.parametrize("script", ["dmd2", "sid"])
def test_without_gan_the_real_images_are_never_seen(home, monkeypatch, capsys, script):
    """The rollout and the fake loss need noise and labels only: other images, the same weights."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((1,), 60, 0, False))
    with np.load("toy.npz") as toy:
        np.savez("negative_toy.npz", images=255 - toy["images"], labels=toy["labels"])
    weights, module = {}, sys.modules[script]
    for data in ("toy.npz", "negative_toy.npz"):
        for gan in ("0", "1"):
            module.train(module.parse_args(f"--init imf/model.pt --data {data} --steps 2 --health_every 0 --lambda_g {gan} --out unseen-{script}-{data[:3]}-{gan}".split()))
            weights[data, gan] = state(home, f"unseen-{script}-{data[:3]}-{gan}")
    assert_same(weights["toy.npz", "0"]["net"], weights["negative_toy.npz", "0"]["net"])
    assert_same(weights["toy.npz", "0"]["fake"], weights["negative_toy.npz", "0"]["fake"])
    assert not torch.equal(weights["toy.npz", "1"]["fake"]["blocks.0.mlp.w3.weight"], weights["negative_toy.npz", "1"]["fake"]["blocks.0.mlp.w3.weight"])
    assert "head" in weights["toy.npz", "1"] and "head" not in weights["toy.npz", "0"]      # switched off: not built
    capsys.readouterr()


# ---- guidance by network, RCGM, ISG, tangent normalisation ---------------------------------------------------------------------

def test_guided_velocity_is_cfg_where_the_network_has_no_guidance_input():
    x, t, y = rand(4, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9, 0.95]).double(), torch.tensor([0, 1, 2, 0])
    null = torch.full_like(y, 3)
    guidance = torch.tensor([[3.0, 0.0, 0.9]]).double().expand(4, 3)
    plain, decoupled, in_context = (small_net(c) for c in ("plain", "decoupled", "in_context"))
    cond, uncond = plain(x, t, y), plain(x, t, null)
    v = model.guided_velocity(plain, x, t, y, guidance)
    torch.testing.assert_close(v[:3], (uncond + 3 * (cond - uncond))[:3])
    torch.testing.assert_close(v[3], cond[3])                                               # t = 0.95 lies outside [0, 0.9]
    torch.testing.assert_close(model.guided_velocity(plain, x, t, y, guidance, 1)[:, 1:], cond[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(model.guided_velocity(plain, x, t, y, guidance, 1)[:, :1], v[:, :1])
    for omega, expected in ((1.0, cond), (0.0, uncond)):
        torch.testing.assert_close(model.guided_velocity(plain, x, t, y, torch.tensor([[omega, 0, 1]]).double().expand(4, 3)), expected)
    torch.testing.assert_close(model.guided_velocity(decoupled, x, t, y, guidance), decoupled(x, t, y))
    torch.testing.assert_close(model.guided_velocity(in_context, x, t, y, guidance), in_context(x, t, y, t, model.gate_guidance(guidance, t)))
    torch.testing.assert_close(model.guided_map(in_context, x, t, t / 2, y, guidance), in_context(x, t, y, t / 2, guidance))
    torch.testing.assert_close(model.guided_map(decoupled, x, t, t / 2, y, guidance), decoupled(x, t, y, t / 2))


def residual(loss, *args, **options):
    """The residual e whose pseudo-Huber distance (no cosine) `loss` returns: its gradient in u is e / (n sqrt(mean e^2 + c^2))."""
    x, c = args[0], 1e-9
    bias = torch.zeros_like(x, requires_grad=True)
    value = loss(bias, *args, c=c, cosine=False, **options)
    return torch.autograd.grad(value.sum(), bias)[0] * x[0].numel() * (value.detach() + c)[:, None]


def curved(x, t, s):
    """A u(x, t, s) with every derivative alive."""
    t, s = t[:, None], s[:, None]
    return torch.sin(2 * x + t) * (1 + s) + 0.5 * x * t ** 2


def test_rcgm_with_one_jump_and_no_ema_is_meanflow_up_to_delta():
    x, v, t, s = rand(6, 3), rand(6, 3, seed=1), torch.tensor([0.3, 0.5, 0.9, 0.7, 1.0, 0.4]).double(), torch.tensor([0.1, 0.0, 0.5, 0.2, 0.0, 0.2]).double()
    meanflow = residual(lambda bias, x, **rho: consistency.consistency_loss(lambda x, t, s: curved(x, t, s) + bias, x, t, s, v, v, exact=True, **rho), x)

    def rcgm(delta, N, clamp=math.inf):
        return residual(lambda bias, x, **rho: consistency.rcgm_loss(lambda x, t, s: curved(x, t, s) + bias, curved, x, t, s, v, delta, N, clamp, **rho), x)
    errors = [(rcgm(delta, 1) - meanflow).abs().max().item() for delta in (1e-2, 1e-3, 1e-4)]
    assert errors[0] < 0.2 and all(8 < a / b < 12 for a, b in zip(errors, errors[1:])), errors           # O(delta)
    two = rcgm(0.01, 2)
    assert (two - rcgm(0.01, 1)).abs().max() > 0.1                                          # two jumps ask more than one of a map that is not exact
    torch.testing.assert_close(rcgm(0.01, 2, 0.25), two.clamp(-0.25, 0.25), rtol=1e-6, atol=1e-7)


def test_rcgm_is_zero_at_the_exact_flow_map_and_flow_matching_on_short_intervals():
    x, t = rand(6, 3), torch.tensor([0.3, 0.5, 0.9, 0.7, 1.0, 0.4]).double()
    s = torch.tensor([0.1, 0.0, 0.5, 0.2, 0.0, 0.2]).double()
    exact = lambda x, t, s: gaussian_u(x, t, s, 0.5)                                        # noqa: E731
    for N in (1, 2, 3):                                                                     # only the Euler step along v errs: O(delta^2), over delta
        coarse, fine = (consistency.rcgm_loss(exact, exact, x, t, s, gaussian_v(x, t, 0.5), delta, N, math.inf, cosine=False, c=1e-12) for delta in (1e-3, 1e-4))
        torch.testing.assert_close(coarse / fine, torch.full((6,), 10.0).double(), rtol=0.05, atol=0)
        assert fine.max() < 2e-3
    point = lambda x, t, s: x / t[:, None]                                                  # noqa: E731    all data at 0: straight paths
    assert consistency.rcgm_loss(point, point, x, t, s, point(x, t, s), 0.05, 2, cosine=False).abs().max() < 1e-9
    v = rand(6, 3, seed=2)
    for short in (t, t - 0.005):                                                            # s = t, and t - s below delta
        bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
        loss = consistency.rcgm_loss(lambda x, t, s: curved(x, t, s) + bias, curved, x, t, short, v, 0.01, 2, math.inf, cosine=False)
        torch.testing.assert_close(loss.detach(), consistency.distance(curved(x, t, short), v, cosine=False))
        assert torch.autograd.grad(loss.sum(), bias)[0].isfinite().all()


def test_tangent_normalisation_keeps_the_direction_and_bounds_the_length():
    x, v, t, s = rand(6, 3), 5 * rand(6, 3, seed=1), uniform(6) * 0.5 + 0.5, uniform(6, seed=1) * 0.5
    e = residual(lambda bias, x, **rho: consistency.consistency_loss(lambda x, t, s: curved(x, t, s) + bias, x, t, s, v, v, exact=True, **rho), x)
    bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    loss = consistency.consistency_loss(lambda x, t, s: curved(x, t, s) + bias, x, t, s, v, v, exact=True, tangent_norm=0.1)
    norm = e.norm(dim=1, keepdim=True)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), bias)[0] / 2, e / (norm + 0.1), rtol=1e-6, atol=1e-7)   # Eq. 57-58
    torch.testing.assert_close(loss.detach(), ((norm / (norm + 0.1)) ** 2)[:, 0], rtol=1e-6, atol=1e-7)


def test_isg_is_a_teacher_step_and_a_jump():
    x, t, s = rand(6, 3), torch.tensor([1.0, 0.5] * 3).double(), torch.tensor([0.5, 0.0] * 3).double()
    r = s + 0.2
    teacher = lambda x, t: torch.cos(x) * t[:, None]                                        # noqa: E731
    bias = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    loss = consistency.isg_loss(lambda x, t, s: curved(x, t, s) + bias, teacher, x, t, s, r, c=1e-9)
    x_r = x + (r - t)[:, None] * teacher(x, t)                                              # Eq. 61
    e = x - 0.5 * curved(x, t, s) - (x_r - 0.2 * curved(x_r, r, s))                         # Eq. 62
    torch.testing.assert_close(loss.detach(), e.abs().mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), bias)[0], -0.5 * e.sign() / 3, rtol=1e-5, atol=1e-6)   # none through the target
    point = lambda x, t, s: x / t[:, None]                                                  # noqa: E731
    assert consistency.isg_loss(point, lambda x, t: x / t[:, None], x, t, s, r).abs().max() < 1e-12


# ---- TwinFlow -----------------------------------------------------------------------------------------------------------------

def test_twinflow_rectifies_along_dmd_and_trains_its_fake_side_as_dmd2_does():
    """With exact velocities of two Gaussians, generator 1.5 z, data N(0, 1)."""
    z, eps_t, eps_tau, t, tau = rand(8, 2), rand(8, 2, seed=1), rand(8, 2, seed=2), uniform(8) * 0.9 + 0.05, uniform(8, seed=1) * 0.9 + 0.05
    fake, teacher = (lambda x, t: gaussian_v(x, t, 1.5)), (lambda x, t: gaussian_v(x, t, 1.0))
    U = (-0.5 * z).requires_grad_()
    adv, rectify, gap = twinflow.twinflow_losses(lambda x, t, s: U, fake, teacher, z, t, eps_t, tau, eps_tau, clamp=math.inf)
    x_hat = (z - U).detach().requires_grad_()
    loss, dmd_gap = dmd2.dmd_loss(x_hat, fake, teacher, tau, eps_tau)
    x_tau = model.interpolate(x_hat.detach(), eps_tau, tau)
    scale = (teacher(x_tau, tau) - (eps_tau - x_hat.detach())).abs().mean(1, keepdim=True) + 1e-6
    on_x_hat = -torch.autograd.grad(rectify.sum(), U)[0]                                    # x_hat = z - U
    torch.testing.assert_close(on_x_hat, 2 * scale * torch.autograd.grad(loss.sum(), x_hat)[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gap, dmd_gap)
    torch.testing.assert_close(adv, dmd2.fake_loss(fake, x_hat, t, eps_t))                  # Eq. 63 = Eq. 52 at negative times
    assert not adv.requires_grad                                                            # never reaches the generator
    _, clipped, _ = twinflow.twinflow_losses(lambda x, t, s: U, fake, teacher, z, t, eps_t, tau, eps_tau, clamp=0.1)
    torch.testing.assert_close(torch.autograd.grad(clipped.sum(), U)[0], (fake(x_tau, tau) - teacher(x_tau, tau)).clamp(-0.1, 0.1))
    _, still, _ = twinflow.twinflow_losses(lambda x, t, s: U, teacher, teacher, z, t, eps_t, tau, eps_tau)
    assert still.max() == 0                                                                 # no gap, no move


def test_negative_times_are_another_side_of_the_same_network():
    net = small_net("in_context")
    x, t, y = rand(3, 2, 4, 4), torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([0, 1, 2])
    torch.testing.assert_close(net(x, -t, y), net(x, -t, y, -t))                            # both times, Eq. 63
    assert (net(x, -t, y) - net(x, t, y)).abs().amax((1, 2, 3)).min() > 1e-4


# ---- SiD ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("theta, t, expected", [(1.5, 0.5, {0: 0.288462, 0.5: 0.232988, 1: 0.177515, 1.2: 0.155325}), (0.6, 0.3, {0: -0.034014, 0.5: -0.054034, 1: -0.074054, 1.2: -0.082062})])
def test_sid_gradient_is_the_closed_form_of_two_gaussians(theta, t, expected):
    """x_g = theta z against N(0, 1), exact networks: d/dtheta = 2 a theta D (a k - 1 - alpha a D); alpha = 0.5 is half the Fisher gradient."""
    z, w = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(5))
    zz, ee = (v.reshape(-1, 1) for v in torch.meshgrid(z, z, indexing="ij"))
    weights, times, a = (w[:, None] * w[None, :]).reshape(-1) / w.sum() ** 2, torch.full((25,), t, dtype=torch.float64), 1 - t
    k, k_fake = a / spread(t, 1.0), a * theta ** 2 / spread(t, theta)
    D = k - k_fake
    for alpha, reference in expected.items():
        parameter = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        loss, gap = sid.sid_loss(parameter * zz, lambda x, t: gaussian_v(x, t, theta), lambda x, t: gaussian_v(x, t, 1.0), times, ee, alpha)
        found = torch.autograd.grad((loss / (1 - times)) @ weights, parameter)[0].item()    # w(t) = 1 - t divided out
        assert found == pytest.approx(2 * a * theta * D * (a * k - 1 - alpha * a * D), rel=1e-6)
        assert found == pytest.approx(reference, abs=1e-6)
        if alpha == 0.5:
            assert found == pytest.approx(a * theta * D * (a * D - 2 * t ** 2 / spread(t, theta)), rel=1e-6)
    assert gap.mean() > 0


def test_sid_with_both_networks_cut_off_is_dmd_for_every_alpha():
    x_g, eps, t = rand(4, 3, 2, 2).requires_grad_(), rand(4, 3, 2, 2, seed=1), uniform(4) * 0.9 + 0.05
    fake, teacher = (lambda x, t: torch.tanh(2 * x + t.view(-1, 1, 1, 1))), (lambda x, t: torch.sin(x) - t.view(-1, 1, 1, 1))
    loss, gap = dmd2.dmd_loss(x_g, fake, teacher, t, eps)
    x_t = model.interpolate(x_g.detach(), eps, t)
    scale = 12 * ((teacher(x_t, t) - (eps - x_g.detach())).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
    dmd = torch.autograd.grad(loss.sum(), x_g)[0] * scale                                   # v_teacher - v_fake
    sids = {}
    for alpha in (0.0, 0.5, 1.0, 1.2):
        cut, _ = sid.sid_loss(x_g, lambda x, t: fake(x, t).detach(), lambda x, t: teacher(x, t).detach(), t, eps, alpha)
        torch.testing.assert_close(torch.autograd.grad(cut.sum(), x_g)[0], ((1 - t) * t ** 2).view(-1, 1, 1, 1) * dmd, rtol=1e-6, atol=1e-9)
        whole, found = sid.sid_loss(x_g, fake, teacher, t, eps, alpha)
        sids[alpha] = torch.autograd.grad(whole.sum(), x_g)[0]
        torch.testing.assert_close(found, gap)
        f_fake, f_teacher = x_t - t.view(-1, 1, 1, 1) * fake(x_t, t), x_t - t.view(-1, 1, 1, 1) * teacher(x_t, t)
        delta = f_teacher - f_fake                                                          # the x0-space form, for every weight
        x0_space = (delta * (f_teacher - x_g - alpha * delta)).sum((1, 2, 3)).detach()
        for name, w in (*sid.WEIGHTS.items(), ("sid", lambda t: 1 / (x_g - f_teacher).abs().mean((1, 2, 3)))):
            torch.testing.assert_close(sid.sid_loss(x_g, fake, teacher, t, eps, alpha, name)[0].detach(), (w(t) * x0_space).detach(), rtol=1e-9, atol=1e-12)
    assert all((sids[a] - sids[b]).abs().max() > 1e-3 for a in sids for b in sids if a < b)   # with gradient through the inputs alpha matters


def test_sid_rollout_and_times():
    sigma, M, eps = 0.5, 3, rand(5, 3, 2)
    u = lambda x, t, s: gaussian_u(x, torch.full((len(x),), t).double(), torch.full((len(x),), s).double(), sigma)   # noqa: E731
    for k in range(M):
        torch.testing.assert_close(sid.rollout(u, eps, k, M, "fresh"), dmd2.backward_simulation(u, eps, k, M))
    x0 = sigma * eps[:, 0]                                                                  # the first jump
    x = {"fixed": 2 / 3 * eps[:, 0] + 1 / 3 * x0, "ddim": 2 / 3 * eps[:, 0] + 1 / 3 * x0}   # at t = 1 the implied noise is the first noise
    for noise, at in x.items():
        torch.testing.assert_close(sid.rollout(u, eps, 1, M, noise), at * sigma / spread(2 / 3, sigma) ** 0.5)
    x0 = x["ddim"] * sigma / spread(2 / 3, sigma) ** 0.5
    implied = (x["ddim"] - x0 / 3) / (2 / 3)
    torch.testing.assert_close(sid.rollout(u, eps, 2, M, "ddim"), (2 / 3 * x0 + implied / 3) * sigma / spread(1 / 3, sigma) ** 0.5)
    assert (sid.rollout(u, eps, 2, M, "ddim") - sid.rollout(u, eps, 2, M, "fixed")).abs().max() > 1e-3
    theta = torch.zeros(M, dtype=torch.float64, requires_grad=True)
    for noise in ("fresh", "ddim", "fixed"):
        x_g = sid.rollout(lambda x, t, s: x * 0.3 + theta[round((1 - t) * M)], eps, 2, M, noise)
        torch.testing.assert_close(torch.autograd.grad(x_g.sum(), theta)[0], torch.tensor([0, 0, -10 / 3]).double())   # the last call only
    quantiles = sid.draw_times(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]))
    torch.testing.assert_close(quantiles, torch.tensor([0.126, 0.405, 0.667, 0.855, 0.965]), rtol=0, atol=1e-3)


class ToyFlowMap(torch.nn.Module):
    """u(x, t, s) of a 1-D problem."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1))

    def forward(self, x, t, s):
        t, s = (torch.as_tensor(a, dtype=x.dtype).expand(len(x))[:, None] for a in (t, s))
        return self.net(torch.cat([x, t, s], 1))


def test_without_consistency_distillation_the_generator_collapses():
    """The paper: "unstable when L_CD is omitted".  Two modes at -1 and 1, deviation 0.3 (std 1.044), exact teacher; M = 1, shift 10.

    Alone L_FSF pulls the samples together to less than half of the data's spread within 150 steps.
    """
    def teacher(x, t):
        t = t[:, None]
        D = (1 - t) ** 2 * 0.09 + t ** 2
        p = torch.sigmoid(2 * x * (1 - t) / D)                                              # probability of the right mode
        x0 = sum(w * (m + (1 - t) * 0.09 / D * (x - m * (1 - t))) for w, m in ((p, 1), (1 - p, -1)))
        return (x - x0) / t

    def cd(net):
        x0 = torch.randint(2, (256, 1)) * 2 - 1 + 0.3 * torch.randn(256, 1)
        t, s = consistency.draw_times(torch.rand(256, 2) * 0.98 + 0.01, torch.rand(256), "uniform", 0.5)
        x_t = model.interpolate(x0, torch.randn(256, 1), t)
        v = teacher(x_t, t)
        return consistency.consistency_loss(net, x_t, t, s, v, v).mean()

    def fsf(net, ema):
        x, U = fsf_dmd.rollout(net, torch.randn(256, 1), 1)
        tau = model.shift_time(torch.rand(256), 10.0).clamp(min=1e-2)
        return fsf_dmd.fsf_dmd_loss(x, U, lambda x, t: ema(x, t, torch.zeros_like(t)), teacher, tau, torch.randn(256, 1), "one")[0].mean()

    def train(net, loss, steps, lr):
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
    start = train(net, lambda net, ema: cd(net), 1000, 2e-3)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    alone = train(net, fsf, 150, 3e-4)
    net.load_state_dict(weights)
    both = train(net, lambda net, ema: cd(net) + 0.05 * fsf(net, ema), 150, 3e-4)
    assert 0.9 < start < 1.2 and 0.9 < both < 1.2 and alone < 0.5, (start, both, alone)


# ---- real command lines -------------------------------------------------------------------------------------------------------

def small_images(path, n):
    """n images of 4 x 4 pixels in 3 classes: three greys with noise."""
    y = np.arange(n) % 3
    images = np.clip(np.array([40, 120, 200])[y][:, None, None] + np.random.default_rng(0).normal(0, 40, (n, 4, 4)), 0, 255).astype(np.uint8)
    np.savez(path, images=images, labels=y)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A working folder with a small image set of 3 classes, with an iMF and a velocity network trained on it for 8 steps."""
    folder = tmp_path_factory.mktemp("home")
    small_images(folder / "toy.npz", 90)
    run(folder, "consistency.py --loss imf --data toy.npz --steps 8 --out imf")             # alone: it trains the classifier of the metrics
    run(folder, "consistency.py --loss fm --data toy.npz --steps 8 --out fm")
    return folder


def environment(threads=1):
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | dict(OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")


def run(folder, command, code=0, processes=1, threads=1):
    """A command as a user types it, in `folder`.  -> its output, after checking the exit code"""
    return together(folder, command, code=code, processes=processes, threads=threads)[0]


def together(folder, *commands, code=0, processes=1, threads=1):
    """Commands side by side, each process with `threads` threads.  -> their outputs"""
    started = []
    for command in commands:
        words = shlex.split(command)
        words = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []), str(HERE / words[0]), *words[1:]]
        started.append(subprocess.Popen(words, cwd=folder, env=environment(threads), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=500) for process in started]
    for command, process, (out, err) in zip(commands, started, outputs):
        assert process.returncode == code, f"{command}: exit {process.returncode}\n{out}\n{err}"
    return [out + err for out, err in outputs]


def state(folder, out):
    return torch.load(folder / out / "state.pt", weights_only=True)


def tensors(tree, prefix=""):
    for k, v in (tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()):
        yield from tensors(v, f"{prefix}{k}.")
    if torch.is_tensor(tree):
        yield prefix, tree


def assert_same(a, b, atol=0.0):
    a, b = dict(tensors(a)), dict(tensors(b))
    assert a.keys() == b.keys() and len(a) > 50
    for k in a:
        assert torch.equal(a[k], b[k]) if atol == 0 else (a[k] - b[k]).abs().max() <= atol, f"{k}: {(a[k].float() - b[k].float()).abs().max()}"


TOY = {"consistency.py": "consistency.py --loss cd --init imf/model.pt --data toy.npz", "fsf_dmd.py": "fsf_dmd.py --init imf/model.pt --data toy.npz --M 2 --health_every 0",
       "dmd2.py": "dmd2.py --init imf/model.pt --data toy.npz --M 2 --ttur 2 --ida 0.97 --cd 1 --health_every 0",
       "sid.py": "sid.py --init imf/model.pt --data toy.npz --lambda_g 0.1 --health_every 0", "twinflow.py": "twinflow.py --base rcgm --init imf/model.pt --data toy.npz --health_every 0"}


@pytest.mark.parametrize("script", TOY)
def test_killed_and_resumed_is_never_interrupted(home, script):
    """3 + kill -9 + 3 steps = 6 steps, every tensor of networks, EMA and optimizer equal."""
    command, out = TOY[script], f"killed-{script[:-3]}"
    words = [sys.executable, str(HERE / script), *shlex.split(command)[1:], "--save_every", "3", "--out", out, "--steps", "5000", "--log_every", "1"]
    process = subprocess.Popen(words, cwd=home, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (home / out / "state.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    stopped = state(home, out)["step"]
    assert stopped % 3 == 0 and stopped >= 3
    printed, _ = together(home, f"{command} --save_every 3 --out {out} --steps {stopped + 3} --log_every 1", f"{command} --out whole-{out} --steps {stopped + 3} --log_every 1")
    assert f"resuming at step {stopped}" in printed
    assert_same(state(home, out), state(home, f"whole-{out}"))
    lines = [[json.loads(line) for line in (home / o / "metrics.jsonl").read_text().splitlines()] for o in (out, f"whole-{out}")]
    timing = ("sec_per_step", "images_per_sec", "memory_gb")
    a, b = ([{k: v for k, v in line.items() if k not in timing} for line in part] for part in lines)
    assert a == b                                                                           # one history, no step twice
    assert "is done" in run(home, f"{command} --save_every 3 --out {out} --steps {stopped + 3}")


@pytest.mark.parametrize("script", TOY)
def test_processes_and_micro_batches_change_nothing(home, script):
    """Two gloo processes = one, micro-batch 32 = 128: 1e-5 in float32 after 20 steps (8 of the dearer scripts)."""
    command, name = f"{TOY[script]} --steps {8 if script in ('dmd2.py', 'sid.py', 'twinflow.py') else 20} --log_every 4 --batch_size 128", script[:-3]
    together(home, f"{command} --out one-{name}", f"{command} --out micro-{name} --micro_batch 32")
    run(home, f"{command} --out two-{name}", processes=2)
    for other in ("micro", "two"):
        for part in ("net", "ema"):
            assert_same(state(home, f"one-{name}")[part], state(home, f"{other}-{name}")[part], atol=1e-5)
    one, two = (json.loads((home / f"{o}-{name}" / "metrics.jsonl").read_text().splitlines()[-2]) for o in ("one", "two"))
    for k in set(one) - {"sec_per_step", "images_per_sec", "memory_gb"}:
        assert two[k] == pytest.approx(one[k], rel=1e-3, abs=1e-4), k                       # logs are of the global batch


def test_ctrl_c_saves_and_says_how_to_go_on(home):
    words = [sys.executable, str(HERE / "fsf_dmd.py"), *shlex.split(TOY["fsf_dmd.py"])[1:], "--out", "stopped", "--steps", "5000", "--log_every", "1"]
    for sig, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(words, cwd=home, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        seen = (home / "stopped" / "metrics.jsonl")
        lines = len(seen.read_text().splitlines()) if seen.exists() else 0
        while not (seen.exists() and len(seen.read_text().splitlines()) > lines + 3) and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(sig)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code and "run the same command again to resume" in err and "Traceback" not in err
    assert "resuming at step" in run(home, f"{TOY['fsf_dmd.py']} --out stopped --steps {state(home, 'stopped')['step'] + 1}")


def test_the_main_command_leaves_a_picture_a_table_and_a_checkpoint(tmp_path):
    """`python fsf_dmd.py --init imf --M 2` on the digits, shortened: pretrains once, distils, evaluates; then resumes from there."""
    printed = run(tmp_path, "fsf_dmd.py --init imf --M 2 --steps 3")
    assert "consistency.py --loss imf" in printed and "real images, half against half" in printed and "after 3 steps" in printed
    out = tmp_path / "runs" / "fsf_dmd-digits-imf"
    result = json.loads((out / "result.json").read_text())
    assert {"fd_1step", "fd_2step", "is_2step", "precision_2step", "recall_2step", "acc_2step"} <= set(result["last"]) and result["last"]["step"] == 3
    start = json.loads((tmp_path / "runs" / "consistency_imf-digits-scratch" / "result.json").read_text())["last"]
    assert {k: v for k, v in result["evaluations"][0].items() if k != "step"} == {k: v for k, v in start.items() if k != "step"}   # it starts where the iMF ended
    assert result["best"]["fd_2step"]["value"] <= result["last"]["fd_2step"] and "64 features" in result["definition"]
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    net = model.LightningDiT(**checkpoint["config"])
    net.load_state_dict(checkpoint["weights"])                                              # what a student does with it
    x, y = evaluate.generate(net, 200, (1, 8, 8), 2, omega=1.0)
    features = evaluate.Features(vae.load_data("digits"), tmp_path / "runs" / "cache")
    assert features.metrics(x, y)["acc"] > 0.6                                              # they are digits, of the right class
    with Image.open(out / "samples_000003.png") as picture:
        assert picture.size[0] > 300 and len(picture.convert("L").getcolors()) > 50
    printed = run(tmp_path, "fsf_dmd.py --init imf --M 2 --steps 3")
    assert "is done (3 steps)" in printed
    imf = "runs/consistency_imf-digits-scratch/model.pt"
    run(tmp_path, "consistency.py --loss imf --steps 201")                                  # someone trains the start on
    assert f"expected --init {imf}" in run(tmp_path, "fsf_dmd.py --init imf --steps 4", code=2)
    printed = run(tmp_path, f"evaluate.py {out / 'model.pt'} --steps 2 --n 300 --omega 1 --guide_to 1 --seed 5 --out there")
    assert "weights" in printed and json.loads((tmp_path / "there" / "evaluation.json").read_text())["fd_2step"] > 0 and (tmp_path / "there" / "samples.png").exists()


FM, SCRATCH = "--init fm/model.pt --data toy.npz --health_every 0", "--init scratch --data toy.npz --health_every 0"
FLAGS = {  # base command: each of these flips one flag of it, and the trained weights must answer
    TOY["consistency.py"]: ["--mask_prob 0", "--time_law logitnormal", "--jvp exact", "--fd_h 0.1", "--huber_c 1", "--label_drop 0.9", "--cd_guidance drawn --omega_max 3",
                            "--cd_guidance drawn --omega_max 3 --omega_law truncexp", "--lr 1e-2", "--ema 0.05", "--ema_warmup 0", "--seed 1", "--precision bf16",
                            "--batch_size 64", "--tangent_norm 0.1", "--tangent_norm 1", "--init fm/model.pt", "--init fm/model.pt --omega 3", "--init fm/model.pt --omega 3 --guide_to 0.5"],
    "consistency.py --loss rcgm --data toy.npz": ["--delta 0.1", "--order 1", "--clamp 0.2", "--clamp 0", "--omega_max 5", "--mask_prob 0", "--huber_c 1"],
    "consistency.py --loss isg --init imf/model.pt --data toy.npz": ["--M 1", "--huber_c 1", "--omega 3", "--cd_guidance drawn --omega_max 3", "--init fm/model.pt"],
    TOY["dmd2.py"]: ["--M 1", "--ttur 3", "--fake_lr 1e-2", "--lambda_g 0", "--lambda_g 1", "--lambda_d 1", "--disc_trunk teacher", "--ida 1", "--ida 0.5", "--cd 0", "--lam 0.3",
                     "--cd 1 --mask_prob 0"],
    f"dmd2.py {FM} --ttur 1": ["--cd 1", "--omega 3"],
    f"dmd2.py {SCRATCH}": ["--lam 1", "--ttur 2", "--omega_max 3"],
    TOY["fsf_dmd.py"]: ["--M 1", "--M 3", "--lam 3", "--shift 9", "--weight one", "--weight one --clip 0.01", "--cosine_factor 1", "--rollout dmd2", "--rollout_grad last",
                        "--omega 3", "--omega 3 --guide_to 0.5", "--cd_guidance drawn --omega_max 3", "--warmup 1"],
    f"fsf_dmd.py {FM} --warmup 0": ["--lam 3", "--omega 3", "--warmup 2"],
    f"fsf_dmd.py {SCRATCH}": ["--lam 3", "--omega 3", "--omega_max 3", "--n_tokens 2"],
    TOY["sid.py"]: ["--M 3", "--M 1", "--noise ddim", "--M 3 --noise ddim", "--M 3 --noise fixed", "--alpha 0.5", "--weight sid", *(f"--weight '{w}'" for w in sid.WEIGHTS if w != "1-t"), "--fake_lr 1e-2",
                    "--lambda_g 0", "--lambda_d 1", "--omega 3", "--omega 3 --guide_to 0.5"],
    f"sid.py {FM}": ["--omega 3"],
    TOY["twinflow.py"]: ["--base imf", "--base imf --jvp exact", "--lam 3", "--lam_adv 3", "--clip 1e-4", "--clip 2e-4", "--delta 0.1", "--order 1", "--clamp 0.2", "--omega 3", "--init scratch"],
}


@pytest.mark.parametrize("command", FLAGS, ids=range(len(FLAGS)))
def test_every_flag_changes_what_is_trained(home, monkeypatch, capsys, command):
    """In one process for speed, through the scripts' own parse_args and train."""
    monkeypatch.chdir(home)
    script, *base = f"{command} --steps 3".split()
    module, flags = sys.modules[script[:-3]], FLAGS[command]
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((1,), 60, 0, False))                   # few samples: the metrics are not asked here
    def weights(extra, out):
        module.train(module.parse_args([*base, *shlex.split(extra), "--out", out]))
        return torch.cat([p.flatten() for p in torch.load(home / out / "model.pt", weights_only=True)["weights"].values()])
    name = f"flag-{list(FLAGS).index(command)}"
    found = {"": weights("", name)}
    assert torch.equal(weights("", f"{name}-again"), found[""])                             # and the same command gives the same weights
    for i, extra in enumerate(flags):
        found[extra] = weights(extra, f"{name}-{i}")
    names = list(found)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not torch.equal(found[a], found[b]), f"{a!r} and {b!r} train the same network"
    capsys.readouterr()


def test_the_run_folder_is_named_after_what_differs_from_the_preset():
    names = [fsf_dmd.parse_args(shlex.split(command)).out for command in ("", "--init imf --M 2", "--M 1", "--seed 3", "--lam 0.1 --M 1 --steps 9 --device cpu")]
    assert names == [f"runs/fsf_dmd-digits-imf{end}" for end in ("", "", "-M1", "-seed3", "-M1-lam0.1")]
    assert consistency.parse_args(["--loss", "imf", "--seed", "3"]).out == "runs/consistency_imf-digits-scratch-seed3"
    assert consistency.parse_args(["--loss", "cd", "--mask_prob", "0"]).out == "runs/consistency_cd-digits-imf-mask_prob0.0"
    assert dmd2.parse_args(["--no_gan"]).lambda_g == 0 and dmd2.parse_args([]).lambda_g == 3e-3 and dmd2.parse_args(["--no_gan"]).out == "runs/dmd2-digits-imf-lambda_g0.0"
    args = fsf_dmd.parse_args(["--data", "shards", "--M", "1"])                             # latents: Table 6
    assert (args.size, args.lam, args.shift, args.steps, args.batch_size, args.ema, args.omega, args.guide_to, args.M) == ("B/1", 0.05, 10, 4000, 128, 0.99995, 6, 0.9, 1)
    assert args.precision == "bf16" and args.sources["init"] == "default"
    for init, column in (("imf", (0.05, 10, 2, 4_000, 0, 0)), ("fm", (0.001, 10, 2, 26_000, 20_000, 3)), ("scratch", (0.01, 1, 1, 400_000, 0, 0))):
        a = fsf_dmd.parse_args(["--data", "shards", "--init", init])
        assert (a.lam, a.shift, a.M, a.steps, a.warmup, a.cfg_channels) == column and (a.batch_size, a.ema, a.omega, a.guide_to, a.label_drop) == (128, 0.99995, 6, 0.9, 0.1)
    assert args.sources["lam"] == "preset" and args.sources["M"] == "given" and args.sources["fd_h"] == "default"


def test_pretraining_flags_and_the_other_losses(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", (None, 60, 0, False))
    nets = {}
    for extra in ("--loss imf", "--loss imf --omega_max 5", "--loss imf --n_tokens 3", "--loss imf --token_block 0", "--loss fm", "--loss ct", "--loss imf --size B/1 --batch_size 2 --micro_batch 1 --dry_run"):
        args = [*extra.split(), "--data", "toy.npz", "--steps", "3", "--out", f"pre{len(nets)}"]
        if "--dry_run" in args:
            with pytest.raises(SystemExit) as stop:
                consistency.parse_args(args)
            assert stop.value.code == 0 and re.search(r"--size +B/1 +given", capsys.readouterr().out) and not (home / f"pre{len(nets)}").exists()
            continue
        consistency.train(consistency.parse_args(args))
        nets[extra] = common.load_checkpoint(home / f"pre{len(nets)}" / "model.pt")
    config = {k: v["config"] for k, v in nets.items()}
    assert config["--loss fm"]["conditioning"] == "plain" and config["--loss ct"]["conditioning"] == "decoupled"
    assert config["--loss imf --n_tokens 3"]["n_tokens"] == 3 and config["--loss imf --token_block 0"]["token_block"] == 0
    assert all(c["num_classes"] == 3 for c in config.values())
    a, b = nets["--loss imf"]["weights"], nets["--loss imf --omega_max 5"]["weights"]
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert any(line.startswith('{"step": 3, "fd_25step"') for line in (home / "pre4" / "metrics.jsonl").read_text().splitlines())   # fm: Euler
    capsys.readouterr()


def test_without_its_own_term_fsf_dmd_is_its_baseline(home, monkeypatch, capsys):
    """During --warmup FSF-DMD is consistency distillation (from a flow map and from flow matching); from scratch, with lambda 0, it is iMF."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((1,), 60, 0, False))
    pairs = [("--init imf/model.pt --warmup 3", "--loss cd --init imf/model.pt"), ("--init fm/model.pt --warmup 3 --omega 2", "--loss cd --init fm/model.pt --omega 2"),
             ("--init scratch --lam 0", "--loss imf")]
    for i, (ours, baseline) in enumerate(pairs):
        common_flags = ["--data", "toy.npz", "--steps", "3", "--lr", "3e-3"]
        fsf_dmd.train(fsf_dmd.parse_args([*ours.split(), *common_flags, "--health_every", "0", "--out", f"term-{i}"]))
        consistency.train(consistency.parse_args([*baseline.split(), *common_flags, "--out", f"base-{i}"]))
        assert_same(state(home, f"term-{i}")["net"], state(home, f"base-{i}")["net"])
    for out, start in (("term-0", "imf"), ("base-0", "imf"), ("term-1", "fm"), ("base-1", "fm")):
        assert all(torch.equal(v, state(home, out)["teacher"][k]) for k, v in common.load_checkpoint(f"{start}/model.pt")["weights"].items())   # nothing trains the teacher
    assert state(home, "term-1")["teacher"].keys() == state(home, "term-1")["net"].keys()   # decoupled conditioning: no new parameters
    assert common.load_checkpoint("term-1/model.pt")["config"]["conditioning"] == "decoupled" and "teacher" not in state(home, "term-2")
    capsys.readouterr()


def test_a_velocity_network_becomes_a_flow_map_and_stays_the_teacher(home, monkeypatch):
    monkeypatch.chdir(home)
    net, teacher = common.load_start("fm/model.pt", vae.load_data("toy.npz"))
    x, t, y = torch.randn(3, 1, 4, 4), torch.rand(3), torch.tensor([0, 1, 2])
    assert net.conditioning == "decoupled" and teacher.conditioning == "plain" and not any(p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(net(x, t, y, t), teacher(x, t, y))
    assert (net(x, t, y, t / 2) - teacher(x, t, y)).abs().max() > 1e-5
    assert sum(p.requires_grad for p in net.parameters()) == sum(p.requires_grad for p in model.LightningDiT(**net.config).parameters())
    net, teacher = common.load_start("imf/model.pt", vae.load_data("toy.npz"))
    torch.testing.assert_close(net(x, t, y, t / 2), teacher(x, t, y, t / 2))
    assert next(net.blocks.parameters()).requires_grad


def test_cosine_reaches_multi_channel_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((1,), 60, 0, False))
    y = np.arange(60) % 2
    np.savez("rgb.npz", images=np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3)).astype(np.uint8), labels=y)
    weights = []
    for cosine in ("1", "0"):
        consistency.train(consistency.parse_args(["--loss", "imf", "--data", "rgb.npz", "--steps", "3", "--cosine", cosine, "--out", cosine]))
        weights.append(common.load_checkpoint(Path(cosine) / "model.pt")["weights"]["final_layer.linear.bias"])
    assert not torch.equal(*weights)
    consistency.train(consistency.parse_args("--loss fm --data rgb.npz --steps 3 --out fm".split()))
    for channels in ("0", "1"):                                                             # CFG on the first channel only: another teacher
        consistency.train(consistency.parse_args(f"--loss cd --init fm/model.pt --data rgb.npz --steps 3 --omega 3 --cfg_channels {channels} --out cfg{channels}".split()))
    weights = [common.load_checkpoint(Path(f"cfg{c}") / "model.pt")["weights"]["final_layer.linear.bias"] for c in "01"]
    assert not torch.equal(*weights)
    velocity, _ = common.load_network("fm/model.pt")                                        # and other samples, where the channel is guided
    whole, first, none = (evaluate.generate(velocity, 6, (3, 4, 4), 2, omega, 1.0, channels)[0] for omega, channels in ((3.0, None), (3.0, 1), (1.0, None)))
    assert not torch.equal(whole, first) and not torch.equal(first, none)
    evaluate.run(evaluate.parse_args("fm/model.pt --omega 3 --cfg_channels 1 --n 40 --out measured".split()))
    capsys.readouterr()


def test_compile_trains_the_same_network(home):
    together(home, *(f"{TOY['fsf_dmd.py']} --steps 3 --batch_size 32 --compile {i} --out compile-{i}" for i in (0, 1)))
    a, b = state(home, "compile-0")["net"], state(home, "compile-1")["net"]
    assert a.keys() == b.keys()                                                             # no _orig_mod in the key names
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4


def test_intervals_and_starting_over(home):
    run(home, f"{TOY['fsf_dmd.py']} --steps 4 --log_every 1 --eval_every 2 --preview_every 2 --save_every 1 --device cpu --out often")
    lines = [json.loads(line) for line in (home / "often" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fsf" in line] == [1, 2, 3, 4] and [line["step"] for line in lines if "fd_2step" in line] == [0, 2, 4]
    assert sorted(p.name for p in (home / "often").glob("*.png")) == ["samples_000002.png", "samples_000004.png"]
    assert {"cd", "fsf", "gap", "grad_norm", "sec_per_step", "images_per_sec", "memory_gb"} <= set(lines[1])
    refused = run(home, f"{TOY['fsf_dmd.py']} --steps 4 --lam 9 --out often", code=2)
    assert "--lam" in refused and "(there) 9.0 (here)" in refused and len(refused.strip().splitlines()) == 1
    run(home, f"{TOY['fsf_dmd.py']} --steps 2 --lam 9 --out often --resume no")
    assert state(home, "often")["step"] == 2 and not list((home / "often").glob("samples_000004.png"))


# ---- bad input: one line, exit code 2, nothing written ------------------------------------------------------------------------

def write_bad_inputs(folder):
    images, labels = np.zeros((9, 4, 4), np.uint8), np.arange(9) % 3
    images[0] = 9
    np.savez(folder / "noimages.npz", labels=labels)
    np.savez(folder / "floats.npz", images=images.astype(np.float32), labels=labels)
    np.savez(folder / "oblong.npz", images=np.zeros((9, 4, 6), np.uint8), labels=labels)
    np.savez(folder / "odd.npz", images=np.random.default_rng(0).integers(0, 255, (9, 5, 5)).astype(np.uint8), labels=labels)
    np.savez(folder / "few.npz", images=images, labels=labels[:4])
    np.savez(folder / "negative.npz", images=images, labels=labels - 1)
    np.savez(folder / "alike.npz", images=np.zeros((9, 4, 4), np.uint8), labels=labels)
    np.savez(folder / "four.npz", images=np.random.default_rng(0).integers(0, 255, (9, 4, 4)).astype(np.uint8), labels=np.arange(9) % 4)
    np.savez(folder / "three.npz", images=images[:3], labels=labels[:3])
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    np.savez(folder / "pickled.npz", images=np.array([Evil()], dtype=object), labels=np.zeros(1, int))
    (folder / "truncated.npz").write_bytes((folder / "toy.npz").read_bytes()[:300])
    (folder / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": Evil()}, folder / "evil.pt")
    torch.save({"a": 1}, folder / "other.pt")
    (folder / "cut.pt").write_bytes((folder / "imf" / "model.pt").read_bytes()[:2000])
    broken = torch.load(folder / "imf" / "model.pt", weights_only=True)
    broken["weights"].pop("pos_embed")
    torch.save(broken, folder / "incomplete.pt")
    plain = model.LightningDiT("tiny", "decoupled", input_size=4, in_channels=1, num_classes=3)
    torch.save(dict(config=plain.config, weights=plain.state_dict(), data=broken["data"], args={}), folder / "decoupled.pt")


class Evil:
    """Unpickling this would run code."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


BAD = [  # command, words of the one line
    ("fsf_dmd.py --data nowhere.npz", "nowhere.npz: no such file"),
    ("fsf_dmd.py --data nowhere", "expected `digits`, an .npz file with `images` and `labels`, a folder of latent shards"),
    ("fsf_dmd.py --data noimages.npz --init imf/model.pt", "has no array images"),
    ("fsf_dmd.py --data floats.npz --init imf/model.pt", "images are float32 [9, 4, 4, 1], expected uint8"),
    ("fsf_dmd.py --data oblong.npz --init imf/model.pt", "images are uint8 [9, 4, 6, 1], expected uint8"),
    ("consistency.py --loss imf --data odd.npz", "input_size 5 must be a multiple of patch_size 2"),
    ("fsf_dmd.py --data few.npz --init imf/model.pt", "labels are int64 [4], expected 9 integers"),
    ("fsf_dmd.py --data negative.npz --init imf/model.pt", "labels start at -1"),
    ("fsf_dmd.py --data alike.npz --init imf/model.pt", "not all alike"),
    ("fsf_dmd.py --data pickled.npz --init imf/model.pt", "without pickled objects"),
    ("fsf_dmd.py --data truncated.npz --init imf/model.pt", "truncated.npz"),
    ("fsf_dmd.py --data four.npz --init imf/model.pt", "was made for num_classes 3, but --data four.npz has 4"),
    ("fsf_dmd.py --init imf/model.pt", "was made for shape [1, 4, 4], but --data digits has [1, 8, 8]"),
    ("fsf_dmd.py --data toy.npz --init missing.pt", "--init missing.pt: expected fm or imf or scratch, or the path of a model.pt"),
    ("fsf_dmd.py --data toy.npz --init text.pt", "text.pt: not a model.pt"),
    ("fsf_dmd.py --data toy.npz --init evil.pt", "evil.pt: not a model.pt"),
    ("fsf_dmd.py --data toy.npz --init other.pt", "other.pt: not a model.pt of this project"),
    ("fsf_dmd.py --data toy.npz --init cut.pt", "cut.pt: not a model.pt"),
    ("fsf_dmd.py --data toy.npz --init incomplete.pt", "weights do not fit its configuration"),
    ("twinflow.py --data toy.npz --init decoupled.pt", "holds a decoupled network, expected one for --init imf or scratch"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --size B/1 --n_tokens 7", "not --size B/1 (it has tiny), --n_tokens 7 (it has 1)"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --out mine", "exists and is no run folder"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --out mine --resume no", "exists and is no run folder"),
    ("consistency.py --loss imf --data three.npz", "too few to evaluate against"),
    ("consistency.py --loss imf --data toy.npz --out mine/thesis.txt", "exists and is no run folder"),
    ("consistency.py --loss imf --data toy.npz --out mine/thesis.txt/run", "thesis.txt/run: Not a directory"),
    ("fsf_dmd.py --M 0", "--M: 0 is out of range, expected an integer of at least 1"),
    ("fsf_dmd.py --mask_prob 1.5", "--mask_prob: 1.5 is out of range"),
    ("fsf_dmd.py --lam nan", "--lam: nan is out of range"),
    ("fsf_dmd.py --lr 0", "--lr: 0 is out of range, expected a number above 0"),
    ("fsf_dmd.py --shift -1", "--shift: -1 is out of range"),
    ("fsf_dmd.py --weight cosine", "--weight: invalid choice: 'cosine'"),
    ("fsf_dmd.py --momentum 0.9", "unrecognized arguments: --momentum 0.9"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --device tpu", "--device tpu: not usable here"),
    ("fsf_dmd.py --rollout dmd2 --rollout_grad all", "Eq. 17 has gradient in its last call only"),
    ("dmd2.py --lambda_g 0 --disc_trunk teacher", "builds no discriminator"),
    ("dmd2.py --mask_prob 0.1 --lam 1", "--lam, --mask_prob: belongs to L_CD, which needs --cd 1"),
    ("dmd2.py --cd 1 --omega_max 3", "--omega_max: omega is drawn with --cd_guidance drawn only"),
    ("fsf_dmd.py --omega_law truncexp", "--omega_law: omega is drawn with --cd_guidance drawn only"),
    ("fsf_dmd.py --jvp exact --fd_h 0.1", "--fd_h: --jvp exact takes no difference"),
    ("consistency.py --loss fm --jvp exact", "--jvp: belongs to --loss ct or imf or cd"),
    ("consistency.py --loss ct --omega 2", "--omega: belongs to --loss fm or imf"),
    ("consistency.py --loss imf --cd_guidance drawn", "belongs to --loss cd"),
    ("consistency.py --loss cd --omega_max 4", "drawn with --cd_guidance drawn only"),
    ("fsf_dmd.py --init fm --n_tokens 3", "--n_tokens: the network of --init fm has no guidance input"),
    ("fsf_dmd.py --init fm/model.pt --data toy.npz --cd_guidance drawn", "--cd_guidance: the network of --init fm has no guidance input"),
    ("fsf_dmd.py --cfg_channels 3", "--cfg_channels: belongs to --init fm"),
    ("fsf_dmd.py --init scratch --cd_guidance drawn", "L_CT of --init scratch draws omega"),
    ("dmd2.py --init scratch --cd 0", "without a teacher nothing would tell the network of the data"),
    ("dmd2.py --init scratch --disc_trunk teacher", "there is no teacher, expected --disc_trunk fake"),
    ("sid.py --init scratch", "--init scratch: expected fm or imf, or the path of a model.pt"),
    ("sid.py --lambda_d 1", "--lambda_g 0 builds no discriminator"),
    ("sid.py --M 1 --noise ddim", "--noise: --M 1 never renoises"),
    ("sid.py --weight t", "--weight: invalid choice: 't'"),
    ("sid.py --cfg_channels 3", "--cfg_channels: belongs to --init fm"),
    ("sid.py --mask_prob 0", "unrecognized arguments: --mask_prob 0"),
    ("twinflow.py --base imf --delta 0.1", "--delta: belongs to --base rcgm"),
    ("twinflow.py --base rcgm --jvp exact", "--jvp: belongs to --base imf"),
    ("twinflow.py --base rcgm --delta 0.7", "--delta: 0.7 is out of range"),
    ("twinflow.py --init fm/model.pt --data toy.npz", "holds a plain network, expected one for --init imf or scratch"),
    ("consistency.py --loss rcgm --jvp exact", "--jvp: belongs to --loss ct or imf or cd"),
    ("consistency.py --loss cd --order 3", "--order: belongs to --loss rcgm"),
    ("consistency.py --loss isg --mask_prob 0", "--mask_prob: belongs to --loss ct or imf or cd or rcgm"),
    ("consistency.py --loss isg --init scratch", "distillation needs a teacher"),
    ("consistency.py --loss cd --tangent_norm 0.1 --huber_c 1", "--huber_c: --tangent_norm takes the squared distance"),
    ("dmd2.py --no_gan --lambda_d 1", "--lambda_g 0 builds no discriminator"),
    ("dmd2.py --ida 1.2", "--ida: 1.2 is out of range"),
    ("consistency.py", "the following arguments are required: --loss"),
    ("consistency.py --loss cd --init scratch", "distillation needs a teacher"),
    ("consistency.py --loss fm --init imf/model.pt --data toy.npz", "trains from scratch"),
    ("evaluate.py missing.pt", "missing.pt: no such file"),
    ("evaluate.py evil.pt", "evil.pt: not a model.pt"),
    ("evaluate.py imf/model.pt --data digits", "was made for shape [1, 4, 4], but --data digits has [1, 8, 8]"),
    ("evaluate.py imf/model.pt --device tpu", "--device tpu: not usable here"),
    ("evaluate.py imf/model.pt --n 3", "--n: 3 is out of range"),
]


def refusal(command, capsys, monkeypatch):
    """The one line that a refused command prints, run in process through its own parse_args; exit code 2, no traceback."""
    script, *argv = shlex.split(command)
    module = sys.modules[script[:-3]]
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as stop:
        common.main(getattr(module, "train" if script in METHODS else "run"), module.parse_args)
    said = [line for line in capsys.readouterr().err.splitlines() if line and "/s]" not in line]          # without progress bars
    assert stop.value.code == 2 and len(said) == 1 and said[0].startswith(f"{script}: error: "), (command, said)
    return said[0]


def test_bad_input_is_one_line_and_exit_code_2(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    write_bad_inputs(home)
    before = sorted(home.rglob("*"))
    for command, words in BAD:
        said = refusal(command, capsys, monkeypatch)
        assert words in said, (command, said)
        assert sorted(home.rglob("*")) == before, f"{command} wrote something"
    assert not (home / "executed").exists()
    # and as a user sees it
    printed = run(home, "fsf_dmd.py --data toy.npz --init evil.pt", code=2)
    assert len(printed.strip().splitlines()) == 1 and not (home / "executed").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_state(home):
    _, printed = together(home, f"{TOY['fsf_dmd.py']} --steps 2 --out diverges --lr 1e30 --log_every 1",
                          f"{TOY['fsf_dmd.py']} --steps 50 --out diverges2 --lr 1e20 --log_every 1 --save_every 1", code=2)
    assert "is not finite at step" in printed and "tau in [" in printed and "Traceback" not in printed
    path = home / "diverges2" / "state.pt"
    assert not path.exists() or all(v.isfinite().all() for _, v in tensors(state(home, "diverges2")["net"]))
    run(home, f"{TOY['fsf_dmd.py']} --steps 2 --out damaged")
    (home / "damaged" / "state.pt").write_bytes((home / "damaged" / "state.pt").read_bytes()[:5000])
    assert "cannot be resumed" in run(home, f"{TOY['fsf_dmd.py']} --steps 4 --out damaged", code=2)


def test_a_full_disk_is_one_line_and_spares_the_last_state(home):
    run(home, f"{TOY['fsf_dmd.py']} --steps 2 --out full")
    (home / "full" / "state.tmp").symlink_to("/dev/full")                                   # the device that is always full
    printed = run(home, f"{TOY['fsf_dmd.py']} --steps 4 --out full", code=2)
    assert "no space left on the disk" in printed and "Traceback" not in printed and state(home, "full")["step"] == 2
    run(home, f"{TOY['fsf_dmd.py']} --steps 4 --out full")                                  # with space again, the same command goes on
    assert state(home, "full")["step"] == 4


# ---- the project itself -------------------------------------------------------------------------------------------------------

def test_line_budgets():
    lines = {p.name: len(p.read_text().splitlines()) for p in HERE.glob("*.py")}
    assert all(lines[m] <= 450 for m in METHODS) and lines["model.py"] <= 620 and lines["test_all.py"] <= 1500 and all(n <= 700 for name, n in lines.items() if name != "test_all.py"), lines


def test_readme_commands_exist_and_parse(monkeypatch, capsys):
    readme = (HERE / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", readme, re.S))
    parts = [part.strip() for line in blocks.splitlines() for part in line.split("#")[0].split("&&")]
    commands = [part for part in parts if re.match(r"(\S*/)?(python\S*|torchrun \S+) \w+\.py", part)]
    assert len(commands) >= 4
    for command in commands:
        script, *argv = shlex.split(command.replace('torchrun ', ''))[1:]
        if script in ("evaluate.py", "vae.py", "reproduce.py"):
            sys.modules[script[:-3]].parse_args(argv)
        else:
            with pytest.raises(SystemExit) as stop:
                sys.modules[script[:-3]].parse_args([*argv, "--dry_run"])
            assert stop.value.code == 0, command
    capsys.readouterr()


def test_every_unsettled_choice_of_the_paper_is_a_flag_in_readme():
    readme = (HERE / "README.md").read_text()
    silent = readme[readme.index("Where the paper is silent"):]
    for flag in ("jvp", "fd_h", "huber_c", "cosine", "time_law", "mask_prob", "rollout_grad", "weight", "clip", "cosine_factor", "ema_warmup",
                 "omega_law", "omega_max", "n_tokens", "token_block", "lr", "cd_guidance", "disc_trunk", "ttur", "lam", "lam_adv", "clamp", "delta", "order", "warmup",
                 "cfg_channels"):
        assert f"--{flag}" in silent, flag
    for name in re.findall(r"`--(\w+)", readme):
        assert any(f'"--{name}"' in (HERE / f).read_text() for f in ("common.py", "evaluate.py", "vae.py", "reproduce.py", *METHODS)), f"README names --{name}, no script has it"
    for name in re.findall(r"\]\(([\w/.-]+\.(?:png|json|md|py))\)", readme):
        assert (HERE / name).exists(), name


def test_readme_numbers_come_from_the_results():
    """Those of no table (of reproduce.py's: test_reproduce.py)."""
    readme, results = (HERE / "README.md").read_text(), json.loads((HERE / "results" / "digits.json").read_text())
    [row] = results["rows"]
    collapsed = [e[-1] for e in row["evaluations"].values()]
    assert len(collapsed) == 5 and f"(distance {statistics.mean(e['fd_1step'] for e in collapsed):.0f}, accuracy {statistics.mean(e['acc_1step'] for e in collapsed):.3f};" in readme
    ratio = json.loads((HERE / "results" / "frechet_benchmark.json").read_text())
    assert f"{ratio['ratio']} times less CPU" in readme and ratio["relative_difference"] < 1e-9 and ratio["ratio"] >= 5
    script, *argv = shlex.split(row["command"].replace(" S", " 0"))[1:]                     # the command still parses
    sys.modules[script[:-3]].parse_args(argv)
