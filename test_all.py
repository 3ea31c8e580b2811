"""python -m pytest -q -n 2        the whole suite, CPU only, 5 to 8 minutes on 2 cores
python -m pytest -q -n 2 -m "not slow"        the fast lane: what takes at most about 3 seconds a test

Here: networks, calculus of flow maps, optimizer, the project itself.  In tests/, test_methods.py: losses, rollouts,
identities between methods.  test_steps.py: the gradient of every update in the training loops.  test_flags.py: that
the flags reach them.  test_commands.py: the scripts as a user runs them.  test_survive.py, test_input.py: what goes
wrong.  test_data.py, test_images.py, test_metrics.py: data, autoencoder, official weights, metrics.  test_paper.py: the
presets.  test_reproduce.py: the tables.  test_results.py, test_searches.py, test_benchmarks.py: the numbers that the
texts say.

Facts, not shapes: outputs of the official implementations (golden/), closed forms, identities between methods, exact
resume, real command lines in a subprocess.
"""
import ast
import copy
import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_weights import fingerprint, golden_input, golden_state, golden_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fsf_dmd
import model
import normuon
from plumbing import kept_runs
from test_helpers import HERE, METHODS, environment, gaussian_u, gaussian_v, golden, rand, small_net, spread, uniform
from told import words_of_the_texts

# ---- golden numbers of the official implementations ------------------------------------------------------------------

def golden_lightningdit():
    z, cfg = golden("lightningdit")
    m = cfg["model"]
    names = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes", "mlp_ratio")
    net = model.LightningDiT(conditioning="plain", qk_norm=m["use_qknorm"], **{name: m[name] for name in names})
    weights = golden_state({k: tuple(s) for k, s in cfg["keys"]}, net.state_dict(), **cfg["weights"])
    x = golden_input("input:x", cfg["inputs"]["x"]["shape"], cfg["weights"]["prefix"])
    return z, cfg, net, weights, x, torch.tensor(cfg["inputs"]["tau"]), torch.tensor(cfg["inputs"]["y"])


def test_lightningdit_matches_the_official_network():
    z, cfg, net, weights, x, tau, y = golden_lightningdit()
    shapes = {k: list(v.shape) for k, v in net.state_dict().items()}
    assert shapes == dict(cfg["keys"])                                                  # the official key names
    net.load_state_dict(weights)
    found = fingerprint(weights)
    for k, v in cfg["fingerprint"].items():
        assert found[k] == pytest.approx(v, rel=1e-6), f"{k}: other random numbers, not another network"
    out, out_null = torch.tensor(z["out"]), torch.tensor(z["out_null"])
    null = torch.full_like(y, cfg["model"]["null_class"])
    assert (net(x, tau, y) - out).abs().max() <= 1e-4 * out.std()
    assert (net(x, tau, null) - out_null).abs().max() <= 1e-4 * out_null.std()
    torch.testing.assert_close(net.t_embedder(tau), torch.tensor(z["t_embedder"]), rtol=0, atol=1e-5)
    positions = torch.tensor(z["pos_embed"])
    torch.testing.assert_close(net.pos_embed, positions, rtol=0, atol=1e-6, check_stride=False)
    torch.testing.assert_close(net.feat_rope.freqs_cos, torch.tensor(z["rope_cos"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(net.feat_rope.freqs_sin, torch.tensor(z["rope_sin"]), rtol=0, atol=1e-6)


def test_load_official_reverses_time_and_sign(tmp_path):
    z, cfg, net, weights, x, tau, y = golden_lightningdit()
    zeros = {k: torch.zeros_like(v) for k, v in weights.items()}
    averaged = {f"module.{k}": v for k, v in weights.items()}
    torch.save({"model": zeros, "ema": averaged}, tmp_path / "official.pt")
    out = torch.tensor(z["out"])
    loaded = model.load_official(str(tmp_path / "official.pt"))
    assert (loaded(x, 1 - tau, y) + out).abs().max() <= 1e-4 * out.std()                # v(x, t) = -official(x, 1 - t)
    # Euler from t = 1 to 0 lands where the official direction lands, tau from 0 to 1 on the mirrored grid
    net.load_state_dict(weights)
    z_ = x.clone()
    for i in range(8):
        with torch.no_grad():
            z_ = z_ + (1 / 8) * net(z_, torch.full((3,), i / 8), y)
    torch.testing.assert_close(model.euler_sample(loaded, x, y, 8), z_, rtol=0, atol=1e-5)


@pytest.mark.parametrize("damage, words", [
    (lambda s: s.pop("blocks.1.mlp.w3.bias"), "1 differences: missing blocks.1.mlp.w3.bias"),
    (lambda s: s.update({"blocks.0.extra": torch.zeros(1)}), "unexpected blocks.0.extra"),
    (lambda s: s.update({"final_layer.linear.bias": torch.zeros(3)}), "final_layer.linear.bias is [3]"),
    (lambda s: s.pop("pos_embed"), "pos_embed is missing"),
], ids=["missing", "unexpected", "shape", "table"])
def test_load_official_names_what_does_not_fit(damage, words):
    weights = dict(golden_lightningdit()[3])
    damage(weights)
    with pytest.raises(ValueError, match=re.escape(words)):
        model.load_official(weights)


def golden_gradient(shape, i):
    name = "x".join(map(str, shape))
    g = 0.5 * golden_input(f"input:g0:{name}", shape) + golden_input(f"input:g{i}:{name}", shape)
    return g * torch.linspace(0.2, 2.0, shape[0])[:, None]


@pytest.mark.parametrize("variant, tolerance, options", [
    ("fp32", 2e-6, dict(ns_dtype=torch.float32)),
    ("fp32_wd", 2e-6, dict(ns_dtype=torch.float32, weight_decay=0.1)),
    ("mixed", None, dict(ns_dtype=torch.bfloat16)),
])
def test_normuon_follows_the_official_trajectory(variant, tolerance, options):
    z, cfg = golden("normuon" if variant == "fp32" else "normuon_variants")
    shapes = [tuple(s) for s in cfg["shapes"]]
    params = [torch.nn.Parameter(golden_tensor("p:{}x{}".format(*s), s)) for s in shapes]
    start = [p.detach().clone() for p in params]
    opt = normuon.NorMuon(params, lr=cfg["hyper"]["lr"], **options)
    compared = 0
    for i in range(1, cfg["steps"] + 1):
        for p, s in zip(params, shapes):
            p.grad = golden_gradient(s, i)
        before = params[0].grad.clone()
        opt.step()
        assert torch.equal(params[0].grad, before)                                     # the official step overwrites it
        for p, p0, s in zip(params, start, shapes):
            key = "{}.{}x{}.step{}".format(variant, *s, i)
            if key not in z:
                continue
            expected = torch.tensor(z[key])
            if tolerance:
                assert (p - expected).abs().max() <= tolerance, key
            else:                                               # bfloat16 products: 3% of the distance moved
                assert (p - expected).norm() <= 0.03 * (expected - p0).norm(), key
            compared += 1
    assert compared >= 2
    if variant == "fp32":
        momentum = torch.tensor(z["fp32.64x32.m5"])
        torch.testing.assert_close(opt.state[params[0]]["momentum"], momentum, rtol=0, atol=2e-6)
        for p, s in zip(params, shapes):
            second = torch.tensor(z["fp32.{}x{}.v5".format(*s)])
            torch.testing.assert_close(opt.state[p]["second"], second, rtol=0, atol=2e-6)


def test_normuon_auxiliary_adam_is_the_official_one():
    z, cfg = golden("normuon_variants")
    a = cfg["aux_adam"]
    p = torch.nn.Parameter(golden_tensor("p:64", (64,)))
    opt = normuon.NorMuon([dict(params=[p], muon=False)], adam_lr=a["lr"], weight_decay=a["weight_decay"])
    assert (opt.defaults["adam_betas"], opt.defaults["adam_eps"]) == (tuple(a["betas"]), a["eps"])
    for i in range(1, 6):
        p.grad = golden_input(f"input:g{i}:64", (64,))
        opt.step()
        torch.testing.assert_close(p.detach(), torch.tensor(z["aux_adam.64.all"][i - 1]), rtol=0, atol=2e-7)


# ---- calculus of flow maps -------------------------------------------------------------------------------------------

def test_velocity_score_and_sample_are_one_thing():
    x0, eps, t = rand(64, 3), rand(64, 3, seed=1), uniform(64).clamp(0.05, 0.95)
    x = model.interpolate(x0, eps, t)
    torch.testing.assert_close(model.v_to_x0(x, eps - x0, t), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.x0_to_v(x, x0, t), eps - x0, rtol=0, atol=1e-11)
    conditional = -eps / t[:, None]                                                     # Eq. 26-27
    torch.testing.assert_close(model.v_to_score(x, eps - x0, t), conditional, rtol=0, atol=1e-10)
    for sigma in (0.4, 1.0, 2.5):
        marginal = -x / spread(t, sigma)[:, None]                                       # Eq. 28-32
        found = model.v_to_score(x, gaussian_v(x, t, sigma), t)
        torch.testing.assert_close(found, marginal, rtol=1e-10, atol=1e-10)


def test_flow_map_and_semigroup_on_gaussian_data():
    sigma, x = 0.6, rand(50, 2)
    u = lambda x, t, s: gaussian_u(x, t, s, sigma)
    v = lambda x, t, y: gaussian_v(x, t, sigma)
    t = uniform(50) * 0.3 + 0.7
    m, s = t - 0.3, t - 0.6
    step = model.flow_map(u, model.flow_map(u, x, t, m), m, s)
    torch.testing.assert_close(step, model.flow_map(u, x, t, s), rtol=0, atol=1e-12)    # f(f(x,t,m),m,s) = f(x,t,s)
    for steps in (1, 2, 5):
        found = model.sample(lambda x, t, y, s: u(x, t, s), x, None, steps)
        torch.testing.assert_close(found, sigma * x, rtol=0, atol=1e-6)
    for shift in (1.0, 3.33):
        error = [(model.euler_sample(v, x, None, n, shift) - sigma * x).abs().max().item() for n in (100, 200)]
        assert error[1] < 0.03 and error[0] / error[1] == pytest.approx(2, abs=0.1)     # first order
    # the identity that CT and CD regress on: u = v - (t - s) du/dt
    velocity = gaussian_v(x, t, sigma)
    du_dt = model.total_derivative(u, x, t, s, velocity, h=1e-4)
    torch.testing.assert_close(velocity - (t - s)[:, None] * du_dt, u(x, t, s), rtol=0, atol=1e-7)


@pytest.mark.parametrize("conditioning", ["decoupled", "in_context"])
def test_finite_difference_against_jvp_in_float64(conditioning):
    net = small_net(conditioning)
    x, tangent, y = rand(4, 2, 4, 4), rand(4, 2, 4, 4, seed=1), torch.tensor([0, 1, 2, 3])
    t = uniform(4) * 0.5 + 0.4
    s = t * torch.tensor([0.0, 0.5, 0.9, 1.0])
    u = lambda x, t, s: net(x, t, y, s)
    exact = model.total_derivative(u, x, t, s, tangent, exact=True)
    error = [(model.total_derivative(u, x, t, s, tangent, h) - exact).abs().max().item() for h in (0.01, 0.005)]
    assert exact.abs().max() > 0.1 and error[1] < 1e-3 * exact.abs().max()
    assert error[0] / error[1] == pytest.approx(4, rel=0.05)                            # central: O(h^2)
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
    assert torch.equal(model.cfg(c, u, w, channels=0), model.cfg(c, u, w))              # as of the flags: all
    r = uniform(1000)
    torch.testing.assert_close(model.shift_time(r, 1), r)
    torch.testing.assert_close(model.shift_time(model.shift_time(r, 10), 0.1), r)       # k and 1/k are inverse
    assert model.shift_time(torch.tensor(0.5), 3).item() == pytest.approx(0.75)
    g = torch.tensor([[6.0, 0.1, 0.9]] * 3)
    gated = model.gate_guidance(g, torch.tensor([0.05, 0.5, 0.95]))
    assert gated.tolist() == [[1, 0, 1], [6, 0, 1], [1, 0, 1]]


# ---- the network -----------------------------------------------------------------------------------------------------

def test_parameter_counts_are_the_papers():
    count = lambda **dims: sum(p.numel() for p in model.LightningDiT(**dims).parameters())
    with torch.device("meta"):
        assert count() == count(conditioning="decoupled") == 130_557_728                # the paper's 130.56M
        assert count(conditioning="in_context") == 133_783_328                          # 133.8M
        assert count(size="XL/1", qk_norm=False) == 675_256_736                         # LightningDiT's log: 675.26M
        assert count(size="L/1") == count(depth=24, hidden_size=1024, num_heads=16)
        net = model.LightningDiT(conditioning="in_context")
        muon, adam = normuon.param_groups(net)
    assert (net.n_tokens, net.token_block) == (16, 4)                                   # METHODS: n and k
    assert len(muon["params"]) == 60 and sum(p.numel() for p in muon["params"]) == 127_401_984
    assert all(p.requires_grad for p in adam["params"])


def test_decoupled_is_plain_at_s_equal_t_and_a_flow_map_elsewhere():
    decoupled, plain = small_net("decoupled"), small_net("plain")
    plain.load_state_dict(decoupled.state_dict())
    x, t, y = rand(3, 2, 4, 4), uniform(3), torch.tensor([0, 1, 3])
    assert torch.equal(decoupled(x, t, y), plain(x, t, y))
    assert torch.equal(decoupled(x, t, y, t), plain(x, t, y))
    # early blocks see t only, late blocks and the final layer s only
    h_t, h_s = [], []
    for s, h in ((t / 2, h_t), (t / 3, h_s)):
        hook = decoupled.blocks[decoupled.switch].register_forward_pre_hook(lambda m, a, h=h: h.append(a[0]))
        h.append(decoupled(x, t, y, s))
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
    unguided = torch.tensor([[1.0, 0.0, 1.0]] * 3)
    assert torch.equal(net(x, t, y, t), net(x, t, y, None, unguided))                   # None: s = t; no guidance
    half, quarter = torch.full((2,), 0.5).double(), torch.full((2,), 0.25).double()
    assert torch.equal(net(x[:2], 0.5, y[:2], 0.25), net(x[:2], half, y[:2], quarter))
    rows = [slice(i, i + 1) for i in range(3)]
    each = torch.cat([net(x[i], t[i], y[i], t[i] / 2, g[i]) for i in rows])
    torch.testing.assert_close(each, base, rtol=0, atol=1e-12)                          # rows do not see each other


def test_the_last_third_and_the_output_of_a_decoupled_network_see_s():
    net, seen = small_net("decoupled"), []
    for part in (*net.blocks, net.final_layer):
        part.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[1]))
    t, s, y = uniform(3), uniform(3) / 2, torch.tensor([0, 1, 3])
    net(rand(3, 2, 4, 4), t, y, s)
    of_t, of_s = (net.t_embedder(time) + net.y_embedder(y) for time in (t, s))
    for found, expected in zip(seen, (of_t, of_t, of_s, of_s), strict=True):            # 3 blocks and the final layer
        torch.testing.assert_close(found, expected)


def test_a_new_network_is_initialised_as_lightningdits():
    """adaLN-zero, N(0, 0.02) embeddings, Xavier elsewhere: |w| up to sqrt(6 / (fan_in + fan_out))."""
    torch.manual_seed(0)
    net = model.LightningDiT("tiny", "in_context", input_size=8, in_channels=1, num_classes=1000, n_tokens=16)
    for name, p in net.named_parameters():
        if name == "pos_embed" or "norm" in name:
            continue
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer.linear"):
            assert not p.any(), name
        elif "embedder.mlp" in name or "y_embedder" in name or name == "token_embed":
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif p.ndim > 1:
            bound = (6 / (len(p) + p[0].numel())) ** 0.5
            assert 0.9 * bound < p.abs().max() <= bound, name


def test_initial_output_is_zero_and_patches_go_back_where_they_came_from():
    net = model.LightningDiT("tiny", "in_context", input_size=8, in_channels=3, num_classes=5)
    assert torch.count_nonzero(net(torch.randn(2, 3, 8, 8), 0.3, torch.tensor([0, 5]))) == 0
    bias = torch.arange(12.0)                                   # (row in patch, column in patch, channel)
    net.final_layer.linear.bias.data = bias
    out = net(torch.randn(1, 3, 8, 8), 0.3, torch.tensor([0]))[0]
    for a in range(2):
        for b in range(2):
            expected = bias.view(2, 2, 3)[a, b].view(3, 1, 1).expand(3, 4, 4)
            assert torch.equal(out[:, a::2, b::2], expected)


@pytest.mark.parametrize("bad, words", [
    (dict(size="B/2"), "size 'B/2'"),
    (dict(conditioning="cross"), "conditioning 'cross'"),
    (dict(input_size=9, patch_size=2), "multiple of patch_size"),
    (dict(deph=3), "unknown dims"),
    (dict(depth=0), "dims must be positive"),
    (dict(num_heads=0), "dims must be positive"),
    (dict(input_size=0), "dims must be positive"),
    (dict(mlp_ratio=0), "dims must be positive"),
], ids=["size", "conditioning", "input_size", "dims", "depth", "heads", "no_pixels", "no_mlp"])
def test_a_network_that_cannot_be_is_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        model.LightningDiT(**bad)


def test_two_thirds_of_the_blocks_see_t():
    with torch.device("meta"):
        switches = [model.LightningDiT(size).switch for size in ("B/1", "L/1", "XL/1")]
    assert switches == [8, 16, 18]                                                      # of 12, 24, 28


def test_conditions_are_tokens_that_are_not_rotated_and_omega_is_iMFs():
    net, seen = small_net("in_context"), {}
    net.omega_embedder.register_forward_pre_hook(lambda m, inputs: seen.update(omega=inputs[0]))
    for i, block in enumerate(net.blocks):
        block.register_forward_pre_hook(lambda m, inputs, i=i: seen.update({i: inputs}))
    guidance = torch.tensor([[1.0, 0.1, 0.8], [4.0, 0.1, 0.8]]).double()
    net(rand(2, 2, 4, 4), 0.5, torch.tensor([0, 1]), 0.25, guidance)
    assert seen["omega"].tolist() == [0, 0.75]                                          # 1 - 1 / omega
    assert [seen[i][0].shape[1] for i in range(3)] == [4, 16, 16]                       # 6 x 2 tokens from block 1 on
    cos, sin = seen[2][2:]
    assert (cos[:12] == 1).all() and (sin[:12] == 0).all()
    assert torch.equal(cos[12:], net.feat_rope.freqs_cos) and torch.equal(sin[12:], net.feat_rope.freqs_sin)


def test_the_six_modulations_of_a_ddt_block_stand_in_its_order():
    """shift, scale and gate of the attention, then of the MLP; here each a number of its own."""
    torch.manual_seed(0)
    block, x = model.DDTBlock(16, 2).double(), rand(2, 5, 16)
    cos, sin = torch.ones(5, 8).double(), torch.zeros(5, 8).double()                    # no rotation
    with torch.no_grad():
        block.adaLN_modulation.weight.zero_()
        block.adaLN_modulation.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).repeat_interleave(16))
    h = x + 0.3 * block.attn(block.norm1(x) * 1.2 + 0.1, cos, sin)
    torch.testing.assert_close(block(x, x, cos, sin), h + 0.6 * block.mlp(block.norm2(h) * 1.5 + 0.4))


def test_the_discriminator_reads_its_trunk_and_turns_all_but_its_class_token():
    net, seen = small_net("in_context"), []
    torch.manual_seed(0)
    head = model.DiscriminatorHead(net).double()
    head.blocks[0].register_forward_pre_hook(lambda m, inputs: seen.extend(inputs))
    x, t, y = rand(2, 2, 4, 4), uniform(2), torch.tensor([0, 1])
    before = head(net, x, t, y)
    h, condition, cos, sin = seen
    assert (cos[0] == 1).all() and (sin[0] == 0).all() and torch.equal(cos[1:], net.feat_rope.freqs_cos)
    features = net(x, t, y, until=1) + net.t_embedder(t)[:, None]                       # after round(5/12 3) = 1 block
    torch.testing.assert_close(condition[:, 1:], torch.nn.functional.silu(features))
    with torch.no_grad():
        net.blocks[0].mlp.w3.bias.add_(1)
    assert (head(net, x, t, y) - before).abs().min() > 1e-6


# ---- NorMuon ---------------------------------------------------------------------------------------------------------

def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def test_normuon_scales_batches_and_states():
    shapes = [(24, 8), (8, 24), (24, 8)]
    together = [torch.nn.Parameter(rand(*s, seed=i, dtype=torch.float32)) for i, s in enumerate(shapes)]
    alone, rms = copies(together), copies(together)
    opts = [normuon.NorMuon(together, lr=0.01)]
    opts += [normuon.NorMuon([p], lr=0.01) for p in alone]
    opts += [normuon.NorMuon(rms, lr=0.01, scale="rms")]
    for step in range(3):
        for ps in (together, alone, rms):
            for i, p in enumerate(ps):
                p.grad = rand(*p.shape, seed=10 * step + i, dtype=torch.float32)
        before = [p.detach().clone() for p in rms]
        for o in opts:
            o.step()
        for p, b in zip(rms, before):
            moved = (p - b).pow(2).mean().sqrt().item()
            assert moved == pytest.approx(0.2 * 0.01, rel=1e-4)                         # the definition of "rms"
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)                             # stacked = one by one
    # no gradient: moved by its momentum, never by weight decay; zero gradient at the start: no step, no NaN
    p, q = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(3))
    opt = normuon.NorMuon([p, q], lr=0.1, weight_decay=0.5)
    opt.step()
    assert torch.equal(p, torch.ones(4, 4)) and torch.equal(q, torch.ones(3))
    p.grad = rand(4, 4, dtype=torch.float32)
    opt.step()
    p.grad, before = None, p.detach().clone()
    opt.step()
    with torch.no_grad():
        direction = normuon.newton_schulz(opt.state[p]["momentum"][None])[0]
    assert torch.cosine_similarity((before - p).flatten(), direction.flatten(), dim=0) > 0.9
    for bad in (dict(lr=0), dict(lr=float("nan")), dict(momentum=1.0), dict(scale="adam"), dict(adam_betas=(2, 2)),
                dict(adam_betas=(0.9,)), dict(adam_betas=0.9), dict(adam_eps=-1), dict(ns_steps=0), dict(ns_steps=2.5)):
        with pytest.raises(ValueError, match="NorMuon"):
            normuon.NorMuon([p], **bad)
    with pytest.raises(ValueError, match="matrices only"):
        normuon.NorMuon([dict(params=[q], muon=True)])
    with pytest.raises(ValueError, match="none of these parameters is a matrix"):
        normuon.NorMuon([q])
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        normuon.NorMuon([dict(params=[table.weight], muon=False)]).step()
    # a group that is added later has the same rules, and is not there when it was refused
    opt = normuon.NorMuon([p], lr=0.3)
    opt.add_param_group(dict(params=[q], muon=False))
    assert opt.param_groups[-1]["lr"] == pytest.approx(0.05)
    with pytest.raises(ValueError, match="matrices only"):
        opt.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(3))]))
    opt.step()
    assert len(opt.param_groups) == 3


def is_float32(opt):
    """Whether every tensor of an optimizer's states is."""
    return all(v.dtype == torch.float32 for s in opt.state.values() for v in s.values() if torch.is_tensor(v))


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
        assert b.dtype == torch.bfloat16 and (a - b.float()).abs().max() < 0.03         # bfloat16 has 3 digits
    assert is_float32(opts[1])
    clone = copies(p16)
    fresh = normuon.NorMuon(clone, lr=0.05, adam_lr=0.05)
    buffer = io.BytesIO()
    torch.save(opts[1].state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for ps, o in ((p16, opts[1]), (clone, fresh)):
        for p in ps:
            p.grad = torch.ones_like(p)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(p16, clone))                           # it goes on exactly
    assert is_float32(fresh)
    clone = copies(p32)
    live = normuon.NorMuon(clone, lr=0.05, adam_lr=0.05)
    live.load_state_dict(opts[0].state_dict())                                          # of an optimizer in memory,
    before = copy.deepcopy(opts[0].state_dict()["state"])
    for p in clone:
        p.grad = torch.ones_like(p)
    live.step()
    for name, moments in opts[0].state_dict()["state"].items():                         # which keeps its own moments
        for k, v in moments.items():
            assert torch.equal(torch.as_tensor(v), torch.as_tensor(before[name][k])), (name, k)


def test_param_groups_cover_every_trainable_parameter_once():
    net = small_net("in_context")
    muon, adam = normuon.param_groups(net)
    name_of = {id(p): n for n, p in net.named_parameters()}
    in_muon, in_adam = ({name_of[id(p)] for p in group["params"]} for group in (muon, adam))
    assert {name.split(".", 2)[2] for name in in_muon} == {
        "attn.qkv.weight", "attn.proj.weight", "mlp.w12.weight", "mlp.w3.weight", "adaLN_modulation.1.weight"}
    assert "token_embed" in in_adam and "pos_embed" not in in_adam
    assert normuon.NorMuon([muon, adam], lr=6e-4).param_groups[1]["lr"] == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="a parameter is in two of these networks"):
        normuon.param_groups(net, net)
    with pytest.raises(ValueError, match="takes no .name, parameter. pairs"):
        normuon.NorMuon(net.named_parameters())


# ---- the project itself: the code ------------------------------------------------------------------------------------

PARTS = ("benchmarks", "plumbing", "tests")                     # the folders of code


def module_of(script):
    return importlib.import_module(script.removesuffix(".py"))


def test_line_budgets():
    """A method is one page to hold in one's head; nothing grows sideways instead."""
    lines = {path.name: len(path.read_text().splitlines()) for path in [*HERE.glob("*.py"), HERE / "README.md"]}
    assert all(lines[script] <= 450 for script in METHODS), lines
    assert lines["model.py"] <= 700 and lines["README.md"] <= 190, lines
    for path in [*HERE.glob("*.py"), *(path for part in PARTS for path in HERE.glob(f"{part}/*.py"))]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{number} has {len(line)} columns"


def own_imports(tree, own):
    """Names of our modules that the import statements below a node of the syntax tree import."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module == "plumbing"):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        yield from own.intersection(name.removeprefix("plumbing.") for name in names)


def our_trees():
    """{name of a module: its syntax tree} of all but the benchmarks."""
    paths = [*HERE.glob("*.py"), *HERE.glob("plumbing/[a-z]*.py"), *HERE.glob("tests/*.py")]
    return {path.stem: ast.parse(path.read_text()) for path in paths}


@pytest.mark.parametrize("script", [*METHODS, "evaluate.py"])
def test_a_kept_run_knows_every_file_that_it_was_made_by(script):
    trees, found, ahead = our_trees(), set(), [script.removesuffix(".py")]
    while ahead:
        name = ahead.pop()
        found.add(name)
        ahead += set(own_imports(trees[name], set(trees))) - found
    listed = kept_runs.sources(script)
    assert {Path(file).stem for file in listed} == found | {"torch"}
    assert "plumbing/run_folder.py" in listed and "model.py" in listed


def test_imports_have_one_direction():
    """No circle among our modules, and none is imported inside a function, which would hide one."""
    trees = our_trees()
    own = set(trees)
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                assert not [*own_imports(node, own)], f"{name}.py imports {[*own_imports(node, own)]} in a function"
    above = {name: set(own_imports(tree, own)) for name, tree in trees.items()}
    assert above["model"] == above["normuon"] == above["files"] == set() and above["checkpoints"] == {"files", "model"}
    while above:                                                # take away what imports nothing that is left
        ground = {name for name, imported in above.items() if not imported & above.keys()}
        assert ground, f"a circle among {sorted(above)}"
        above = {name: imported for name, imported in above.items() if name not in ground}


def train_lines(script):
    """Lines of a script's `train` as `diff -w` sees them: without white space; and without the blank ones."""
    lines = inspect.getsource(module_of(script).train).splitlines()
    return [folded for folded in ("".join(line.split()) for line in lines) if folded]


@pytest.mark.parametrize("one, other, bound", [                 # measured, rounded up
    ("dmd2.py", "fsf_dmd.py", 0.36),
    ("sid.py", "dmd2.py", 0.53),
    ("twinflow.py", "fsf_dmd.py", 0.44),
    ("consistency.py", "fsf_dmd.py", 0.54),
])
def test_the_diff_of_two_scripts_is_the_method(one, other, bound):
    """The share of the lines of both `train` functions that the shortest diff marks."""
    a, b = train_lines(one), train_lines(other)
    common = [0] * (len(b) + 1)                                 # of the lines of a so far and b[:j]
    for line in a:
        before = 0
        for j in range(1, len(b) + 1):
            longer = before + 1 if line == b[j - 1] else max(common[j], common[j - 1])
            before, common[j] = common[j], longer
    share = 1 - 2 * common[-1] / (len(a) + len(b))
    assert share <= bound, f"{share:.3f} of the lines of train differ"


def local_functions(script):
    """{name: text} of the functions that a script's `train` defines, white space folded."""
    tree = ast.parse(inspect.getsource(module_of(script).train))
    return {node.name: " ".join(ast.unparse(node).split()) for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)}


def test_what_the_scripts_share_is_written_the_same():
    fsf_dmd, dmd2, sid, twinflow = (local_functions(f"{name}.py") for name in ("fsf_dmd", "dmd2", "sid", "twinflow"))
    assert fsf_dmd["u"] == dmd2["u"] == sid["u"] == twinflow["u"]
    assert fsf_dmd["v_teacher"] == dmd2["v_teacher"] and dmd2["v_fake"] == sid["v_fake"]
    update = "".join("""
        sync_gradients(net)
        grad_norm = gradient_norm(net)
        opt.step()
        opt.zero_grad()                                                     # frees the gradients' memory
        update_ema(ema, net, ema_decay(args, step))
        """.split())
    for script in METHODS:
        sections = re.findall(r"^# ---- (\w+) -+$", (HERE / script).read_text(), re.M)
        assert sections == ["method", "flags", "training"], script
        lines = train_lines(script)
        begin = ["deftrain(args):", "device=setup(args)", "check_folder(args)", "data=load_data(args.data)",
                 "check_data(args,data)"]
        assert lines[:5] == begin, script
        assert update in "".join(lines), script
        end = lines[lines.index("#--log,measure,look,save"):]
        assert end[1] == "run.log(total,batch,grad_norm)" and end[2].startswith("watch(run,features"), script
        assert end[3:] == ["finish(run,features)"], script


PUBLIC = {                                                      # what others import and paste
    "model": ["LightningDiT", "load_official", "interpolate", "v_to_x0", "x0_to_v", "v_to_score", "cfg", "shift_time",
              "flow_map", "total_derivative", "sample"],
    "normuon": ["NorMuon"],
    "consistency": ["consistency_loss", "imf_loss", "flow_matching_loss", "rcgm_loss"],
    "fsf_dmd": ["rollout", "fsf_dmd_loss"],
    "dmd2": ["dmd_loss", "fake_loss", "gan_generator_loss", "gan_discriminator_loss", "backward_simulation", "ida_"],
    "twinflow": ["twinflow_losses"],
    "sid": ["sid_loss"],
    "vae": ["VAE", "load_data", "normalize", "denormalize"],
    "evaluate": ["frechet_distance", "inception_score", "precision_recall", "Inception"],
}
WITHOUT_HINT = {"NorMuon.params"}                               # whatever torch.optim.Optimizer takes


@pytest.mark.parametrize("module, name", [(module, name) for module, names in PUBLIC.items() for name in names])
def test_public_names_have_a_docstring_and_type_hints(module, name):
    thing = getattr(importlib.import_module(module), name)
    assert thing.__doc__ and len(thing.__doc__) > 20
    signature = inspect.signature(thing)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        hinted = parameter.annotation is not parameter.empty
        assert hinted or f"{name}.{parameter.name}" in WITHOUT_HINT, f"{name}: {parameter.name} has no type hint"
    if not inspect.isclass(thing):
        assert signature.return_annotation is not signature.empty, f"{name}: what it returns has no type hint"


def names_needed(function):
    """What a copy of a function has to bring along from this project, and what that needs in turn."""
    found = set()
    for name, value in inspect.getclosurevars(inspect.unwrap(function)).globals.items():
        of_a_library = getattr(value, "__module__", "").startswith(("torch", "collections", "typing"))
        if not inspect.ismodule(value) and not of_a_library:
            found.add(name)
            found |= names_needed(value) if inspect.isfunction(value) else set()
    return found


def test_the_table_of_losses_to_paste_names_all_that_a_copy_needs():
    modules = [importlib.import_module(name) for name in ("consistency", "fsf_dmd", "dmd2", "sid", "twinflow", "model")]
    written = (HERE / "METHODS.md").read_text()
    rows = re.findall(r"^\| (`\w+\(.*)\|(.*)\|(.*)\|(.*)\|$", written[written.index("## Losses to paste"):], re.M)
    assert len(rows) == 11
    imports = re.search(r"under these lines:\n\n```python\n(.*?)```", written, re.S)[1]
    for what, _, _, beside in rows:
        functions, listed = re.findall(r"`(\w+)\(", what), set(re.findall(r"`(\w+)`", beside))
        needed = set()
        for name in functions:
            [function] = {getattr(module, name) for module in modules if hasattr(module, name)}
            needed |= names_needed(function)
        assert needed - set(functions) <= listed <= needed | set(functions), what
        names = {}
        exec(imports, names)
        for name in {*functions, *listed}:                                              # pasted, and nothing is missing
            found = next(getattr(module, name) for module in modules if hasattr(module, name))
            if inspect.isfunction(found):
                exec(inspect.getsource(found), names)
            else:
                names[name] = found                                                     # a table
        for name in functions:
            unbound = inspect.getclosurevars(inspect.unwrap(names[name])).unbound       # attributes are among them
            assert not [each for each in unbound if any(hasattr(module, each) for module in modules)], name


# ---- the project itself: the texts -----------------------------------------------------------------------------------

TEXTS = ("README.md", "RESULTS.md", "METHODS.md")


@pytest.mark.parametrize("text", TEXTS)
def test_commands_of_the_texts_exist_and_parse(text):
    written = (HERE / text).read_text()
    blocks = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", written, re.S))
    parts = [part.strip() for line in blocks.splitlines() for part in line.split("#")[0].split("&&")]
    commands = [part for part in parts if re.match(r"(\S*/)?(python\S*|torchrun \S+) \w+\.py", part)]
    if text == "README.md":
        commands += re.findall(r"`(python \w+\.py [^`]*)` \|$", written, re.M)          # the map
        assert len(commands) >= 4 + 7
    for command in commands:
        script, *argv = shlex.split(command.replace("torchrun ", ""))[1:]
        parse_args = module_of(script).parse_args
        if script not in METHODS:
            parse_args(argv)
            continue
        with pytest.raises(SystemExit) as stop:
            parse_args([*argv, "--dry_run"])
        assert stop.value.code == 0, command


def test_every_unsettled_choice_of_the_paper_is_a_flag_in_methods():
    methods = (HERE / "METHODS.md").read_text()
    silent = methods[methods.index("## Where the paper is silent"):]
    for flag in ("jvp", "fd_h", "huber_c", "cosine", "time_law", "mask_prob", "rollout_grad", "weight", "clip",
                 "cosine_factor", "ema_warmup", "omega_law", "omega_max", "n_tokens", "token_block", "lr",
                 "cd_guidance", "disc_trunk", "ttur", "lam", "lam_adv", "clamp", "delta", "order", "warmup",
                 "cfg_channels"):
        assert f"--{flag}" in silent, flag


@pytest.mark.parametrize("text", TEXTS)
def test_flags_and_links_of_the_texts_exist(text):
    written = (HERE / text).read_text()
    code = "".join((HERE / script).read_text()
                   for script in ("plumbing/flags.py", "evaluate.py", "vae.py", "reproduce.py", "cost.py", *METHODS))
    for name in re.findall(r"`--(\w+)", written):
        assert f'"--{name}"' in code, f"{text} names --{name}, no script has it"
    for name, anchor in re.findall(r"\]\(([\w/.-]*)(?:#([\w-]+))?\)", written):
        target = HERE / (name or text)
        assert target.exists(), name
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor


def test_numbers_of_the_texts_come_from_the_results():
    """Those of no table (of reproduce.py's: test_reproduce.py)."""
    words = words_of_the_texts()
    benchmark = json.loads((HERE / "results" / "frechet-benchmark" / "runs.json").read_text())
    assert f"{benchmark['ratio']} times less CPU" in words
    assert benchmark["relative_difference"] < 1e-9 and benchmark["ratio"] >= 5


def test_the_five_lines_of_readme_are_the_method():
    """They run on what they name, and give L = L_CD + lambda L_FSF of Eq. 15."""
    lines = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)[1]

    def linear(slope):
        return lambda x, t, s: slope * x + model.expand(0.1 * t - s, x)

    net, ema, teacher = linear(0.9), linear(0.8), linear(0.5)
    z, eps, tau, cd, lam = rand(3, 2), rand(3, 2, seed=1), uniform(3, seed=2), torch.tensor(2.0), 0.05
    names = dict(vars(fsf_dmd), net=net, ema=ema, teacher=teacher, z=z, eps=eps, tau=tau, cd=cd, lam=lam)
    exec(lines, names)
    x = z
    for t in (1.0, 0.5):
        x = x - 0.5 * (0.9 * x + 0.1 * t - (t - 0.5))
    x_tau = (1 - tau[:, None]) * x + tau[:, None] * eps
    gap = (0.8 * x_tau + 0.1 * tau[:, None]) - (0.5 * x_tau - 0.9 * tau[:, None])
    q = 1 / (0.5 * x_tau - 0.9 * tau[:, None] - (eps - x)).abs().mean(1)
    torch.testing.assert_close(names["loss"], cd + lam * (q * gap.square().mean(1)).mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_example_of_methods_runs_as_it_is_pasted(tmp_path):
    """In an empty folder; it prints what its comments say, as far as another machine rounds alike."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "METHODS.md").read_text(), re.S)
    example = next(block for block in blocks if "fsf_dmd_loss" in block)
    pasted = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True,
                            env=environment() | dict(PYTHONPATH=str(HERE)))
    assert pasted.returncode == 0, pasted.stderr
    said = [float(value) for value in re.findall(r"# deviation (\S+)", example)]
    printed = [float(value) for value in re.findall(r"deviation (\S+);", pasted.stdout)]
    assert len(said) == 2 and printed == pytest.approx(said, abs=0.05)
    assert not list(tmp_path.iterdir())
