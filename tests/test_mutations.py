"""Facts that the other tests let pass: each fails for one plausible slip, found by changing the code line by line."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import consistency
import dmd2
import evaluate
import fid
import fsf_dmd
import metrics
import model
import normuon
import sid
import twinflow
from plumbing import checkpoints
from test_flags import velocity_network_of_colours
from test_helpers import rand, read_metrics, small_net, state, train, uniform
from test_metrics import evaluate_here, write_inception
from test_steps import RUN, Steps


@pytest.mark.parametrize("script, flags", [
    ("dmd2", "--M 2 --ttur 1 --cd 1 --lam 0.3 --lambda_g 0.5"), ("sid", "--M 2 --lambda_g 0.5 --alpha 1.2"),
    ("twinflow", "")])
def test_the_health_panel_is_of_the_weights_and_losses_of_a_step(random_starts, in_home, script, flags):
    """x_hat of the rollout to its end; the GAN's gradient at it over that of the other term, both as weighted."""
    out, n = f"panel-of-{script}", 100
    train(f"{script}.py --init a.pt {flags} --data toy.npz --steps 1 --batch_size 8 --health_every 1 --out {out}")
    saved = state(in_home, out)
    net, _ = checkpoints.load_network("a.pt")
    teacher, _ = checkpoints.load_network("a.pt")
    net.load_state_dict(saved["net"])
    M = 1 if script == "twinflow" else 2
    noise = common.noise_by_index("health", metrics.EVAL_SEED, range(n), (M + 1, 1, 4, 4))
    z, eps, y, tau = noise[:, :M], noise[:, M], torch.arange(n) % 3, torch.linspace(0.02, 0.98, n)
    with torch.no_grad():
        x_hat = model.backward_simulation(lambda x, t, s: net(x, t, y, s), z, M - 1, M)     # --omega 1, the preset
    panel, = (line for line in read_metrics(in_home, out) if "x_hat_std" in line)
    assert panel["x_hat_mean"] == pytest.approx(x_hat.mean().item(), abs=1e-5)
    assert panel["x_hat_std"] == pytest.approx(x_hat.std().item(), rel=1e-5)
    if script == "twinflow":
        return
    fake, head = model.build(net.config), model.DiscriminatorHead(net)
    fake.load_state_dict(saved["fake"])
    head.load_state_dict(saved["head"])
    x_hat.requires_grad_()
    velocities = (lambda x, tau: fake(x, tau, y)), (lambda x, tau: teacher(x, tau, y))
    if script == "dmd2":
        dm = 0.3 * dmd2.dmd_loss(x_hat, *velocities, tau, eps)[0]
    else:
        dm = sid.sid_loss(x_hat, *velocities, tau, eps, 1.2)[0] / 16
    gan = 0.5 * F.softplus(-head(fake, model.interpolate(x_hat, eps, tau), tau, y)) * (0.3 if script == "dmd2" else 1)
    of_gan, of_dm = (torch.autograd.grad(loss.sum(), x_hat)[0].flatten(1).norm(dim=1) for loss in (gan, dm))
    assert panel["gan_dm_ratio"] == pytest.approx((of_gan / of_dm).median().item(), rel=1e-3)


def test_the_discriminators_class_token_knows_the_class_and_alone_gives_the_logit():
    net, seen = small_net("in_context"), []
    torch.manual_seed(0)
    head = model.DiscriminatorHead(net).double()
    head.blocks[0].register_forward_pre_hook(lambda m, inputs: seen.extend(inputs[:2]))
    head.blocks[-1].register_forward_hook(lambda m, inputs, output: seen.append(output))
    x, t, y = rand(2, 2, 4, 4), uniform(2), torch.tensor([0, 1])
    logits = head(net, x, t, y)
    h, condition, out = seen
    c_t, c_y = net.t_embedder(t), net.y_embedder(y)
    torch.testing.assert_close(h, torch.cat([head.class_token + c_y[:, None], head.x_embedder(x)], dim=1))
    torch.testing.assert_close(condition[:, 0], F.silu(c_t + c_y))
    token = out[:, 0]
    torch.testing.assert_close(logits, head.linear(token / (token.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()))


def test_dmd2_without_l_cd_has_the_weight_one():
    assert dmd2.parse_args(["--data", "shards"]).lam == 1                               # Eq. 50-51 alone
    assert dmd2.parse_args(["--data", "shards", "--cd", "1"]).lam == 0.01               # Eq. 59, rCM's


def test_a_step_of_dmd2_from_scratch_has_itself_as_the_teacher(random_starts, monkeypatch):
    def generator(n, b, _):
        x_hat = model.backward_simulation(n.u(b), b.z, n.k, 1)
        loss, _ = dmd2.dmd_loss(x_hat, lambda x, tau: n.fake(x, tau, b.y), n.v(n.net, b), b.tau, b.eps_tau)
        return n.imf(b) + 0.3 * loss                                                    # L_CT [23-25, 59]

    def fake_side(n, b, x_hat):
        return dmd2.fake_loss(lambda x, t: n.fake(x, t, b.y), x_hat, b.t_fake, b.eps_fake)

    n = Steps(monkeypatch, "dmd2", f"--init scratch --lam 0.3 --M 1 --lambda_g 0 --omega_max 4 {RUN} --out "
              "step-dmd2-scratch", net=generator, fake=fake_side)
    assert n.teacher is None and n.updates == ["net", "fake"] * 2


def test_the_ends_of_sids_times_stay_inside():
    """r = 0 is drawn once in 2^24: there 1 / tau^2 would make the loss nan."""
    tau = sid.draw_tau(torch.tensor([0.0, 1.0]))
    assert 0 < tau[0] < tau[1] < 1
    x, eps = rand(2, 1, 2, 2, dtype=torch.float32), rand(2, 1, 2, 2, seed=1, dtype=torch.float32)
    for w in sid.WEIGHTS:
        assert sid.sid_loss(x, lambda x, t: x, lambda x, t: 2 * x, tau, eps, w=w)[0].isfinite().all(), w


def test_the_images_of_fid_keep_their_pixels_beside_other_data(in_home):
    """--data of another brightness: it brings its own mean and deviation, a network's pixels stay what they are."""
    with np.load("toy.npz") as file:
        np.savez("darker.npz", images=file["images"] // 2, labels=file["labels"])
    found = []
    for name in ("toy", "darker"):
        words = f"imf/model.pt --data {name}.npz --steps 2 --inception none --ref none".split()
        images, _ = evaluate.samples_as_images(evaluate.parse_args(words), torch.device("cpu"))
        found.append(images(0, 30).int())
    assert found[0].float().std() > 10 and (found[0] - found[1]).abs().max() <= 1


def test_a_start_that_is_trained_first_gets_what_decides_its_network_and_its_data(monkeypatch):
    """A flag that did not reach it would be ignored in silence: the student has the start's configuration."""
    class Begun(Exception):
        pass

    def begun(own):
        found.append(own)
        raise Begun

    found = []
    monkeypatch.setattr(consistency, "train", begun)
    given = dict(data="shards", vae="v.pt", size="L/1", seed=3, precision="fp32", n_tokens=2, token_block=5,
                 device="cpu", micro_batch=4, compile=0)
    for loss in ("imf", "fm"):
        flags = {k: v for k, v in given.items() if loss == "imf" or "token" not in k}
        args = fsf_dmd.parse_args([word for k, v in flags.items() for word in (f"--{k}", str(v))] + ["--init", loss])
        with pytest.raises(Begun):
            consistency.pretrained(args, loss)
        assert {k: getattr(found[-1], k) for k in flags} == flags and found[-1].loss == loss


def test_the_gradient_norm_is_the_length_of_all_gradients_together():
    net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1))
    net[0].weight.grad, net[1].weight.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0]])          # no bias.grad
    assert common.gradient_norm(net).item() == 5


def test_the_rms_of_a_small_vector_is_bounded_as_in_the_official_code():
    torch.testing.assert_close(model.RMSNorm(8)(torch.full((1, 8), 1e-3)), torch.full((1, 8), 0.5 ** 0.5))


def test_a_teacher_that_is_right_to_the_last_bit_does_not_divide_by_zero():
    x_hat, eps, tau = torch.zeros(2, 1, 2, 2, requires_grad=True), torch.ones(2, 1, 2, 2), torch.tensor([0.2, 0.8])
    exact = lambda x, tau: eps - 0 * x                                                  # eps' - x_hat, as x_hat is 0
    losses = (fsf_dmd.fsf_dmd_loss(torch.zeros_like(eps), x_hat, exact, exact, tau, eps),
              dmd2.dmd_loss(x_hat, exact, exact, tau, eps), sid.sid_loss(x_hat, exact, exact, tau, eps, w="sid"))
    for loss, _ in losses:
        assert loss.isfinite().all() and torch.autograd.grad(loss.sum(), x_hat)[0].isfinite().all()


def test_a_rollout_without_gradient_keeps_no_graph():
    seen = []
    with torch.no_grad():
        fsf_dmd.rollout(lambda x, t, s: seen.append(torch.is_grad_enabled()) or x, rand(2, 3), 2)
    assert seen == [False, False]


def test_sids_own_weight_is_a_number_without_gradient():
    """w = "sid": the gradient is that of the loss with the weight written in as a constant."""
    x_hat, eps, t = rand(4, 3, 2, 2).requires_grad_(), rand(4, 3, 2, 2, seed=1), uniform(4) * 0.9 + 0.05
    fake = lambda x, t: torch.tanh(2 * x + t.view(-1, 1, 1, 1))
    teacher = lambda x, t: torch.sin(x) - t.view(-1, 1, 1, 1)
    x_t = model.interpolate(x_hat, eps, t)
    weight = 1 / (x_hat - model.v_to_x0(x_t, teacher(x_t, t), t)).detach().abs().mean((1, 2, 3))
    own, plain = (sid.sid_loss(x_hat, fake, teacher, t, eps, w=w)[0] for w in ("sid", "1-t"))
    found, expected = (torch.autograd.grad(loss.sum(), x_hat, retain_graph=True)[0]
                       for loss in (own, plain * weight / (1 - t)))
    torch.testing.assert_close(found, expected)


def test_both_turns_of_a_step_of_sid_have_one_last_jump(random_starts, monkeypatch):
    found, real = [], sid.backward_simulation
    monkeypatch.setattr(sid, "backward_simulation", lambda u, eps, k, *rest: found.append(k) or real(u, eps, k, *rest))
    flags = "--M 4 --steps 8 --batch_size 4 --micro_batch 4 --preview_every 0"
    sid.train(sid.parse_args(f"--init a.pt {RUN} {flags} --out one-k".split()))
    fake_turns, generator_turns = found[:16:2], found[1:16:2]
    assert fake_turns == generator_turns and len(fake_turns) == 8 and len(set(fake_turns)) > 1


@pytest.mark.parametrize("name, flags", [("twinflow", "--base rcgm --lam 0.3 --lam_adv 0.7"),
                                         ("consistency", "--loss rcgm")])
def test_the_distance_of_rcgm_is_that_of_the_flags(random_starts, monkeypatch, name, flags):
    """On images of three channels, where --cosine counts."""
    velocity_network_of_colours()

    def objective(n, b, _):
        loss = consistency.guided_rcgm_loss(n.net, n.target, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, True, 0.03, 3,
                                            0.2, c=0.5, cosine=False)
        if name == "consistency":
            return loss
        adv, rectify, _ = twinflow.twinflow_losses(n.u(b), lambda x, t: n.net(x, -t, b.y, -t), n.v(n.net, b), b.z,
                                                   b.t_fake, b.eps_fake, b.tau, b.eps_tau)
        return loss + 0.7 * adv + 0.3 * rectify

    run = RUN.replace("toy.npz", "rgb.npz")
    if name == "consistency":
        run = run.replace("--health_every 0 ", "")
    n = Steps(monkeypatch, name, f"{flags} --init scratch --omega_max 4 --delta 0.03 --order 3 --clamp 0.2 "
              f"--huber_c 0.5 --cosine 0 {run} --out rho-{name}", net=objective)
    assert n.updates == ["net"] * 2


def test_as_many_samples_are_measured_as_for_the_tables():
    """As the help of --n says; README: n=2000 of the digits, results/: n=5000 of Fashion-MNIST."""
    counts = (8, 999, 1000, 9_999, 10_000, 60_000)
    assert [metrics.samples_for(images, 10) for images in counts] == [500, 500, 2000, 2000, 5000, 5000]
    assert metrics.samples_for(900, 600) == 600                                         # one of each class


def test_flow_matching_has_the_cosine_term_of_its_flag(random_starts, monkeypatch):
    velocity_network_of_colours()

    def objective(n, b, _):
        u = lambda x, t, s: n.net(x, t, b.y_drop)
        return consistency.flow_matching_loss(u, b.x0, b.eps, b.t, cosine=True)

    run = RUN.replace("toy.npz", "rgb.npz").replace("--health_every 0 ", "")
    n = Steps(monkeypatch, "consistency", f"--loss fm --cosine 1 {run} --out cosine-fm", net=objective)
    assert n.updates == ["net"] * 2


def test_a_closure_is_run_with_gradient_and_its_loss_comes_back():
    p = torch.nn.Parameter(rand(4, 4, dtype=torch.float32))
    opt, before = normuon.NorMuon([p], lr=0.1), p.detach().clone()

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == pytest.approx(before.square().sum().item()) and not torch.equal(p, before)


def test_a_frechet_distance_is_never_below_zero():
    for seed in range(20):
        mu, cov = metrics.moments(rand(300, 20, seed=seed))
        assert metrics.frechet_distance(mu, cov, mu, cov) >= 0


@pytest.mark.slow
def test_features_of_another_number_of_images_are_others(tmp_path, monkeypatch):
    """--n takes images evenly over a set: with another n the second batch holds other images."""
    monkeypatch.chdir(tmp_path)
    write_inception()
    np.savez("images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3)).astype(np.uint8))
    for out, flags in (("out", "--n 4"), ("out", ""), ("new", "")):
        evaluate_here(f"ref --data images.npz --inception inception.pth --few 1 --batch_size 2 --out {out} {flags}")
    found, expected = (fid.read_reference(f"{out}/reference.npz")["features"] for out in ("out", "new"))
    np.testing.assert_array_equal(found, expected)


def test_what_is_kept_of_sampled_images_is_known_by_all_that_decides_them(in_home):
    """The text that the features on the disk are known by: other flags of sampling, other features."""
    said = []
    for flags in ("", "--seed 5", "--steps 3", "--sampler renoised", "--omega 2", "--guide_to 0.5",
                  "--sampler euler", "--sampler euler --shift 3"):
        words = f"imf/model.pt --steps 2 --inception none --ref none {flags}".split()
        said.append(evaluate.samples_as_images(evaluate.parse_args(words), torch.device("cpu"))[1])
    assert len(set(said)) == 8


EVERY = dict(size="B/1", batch_size=128, ema=0.99995, precision="bf16", omega=6, guide_to=0.9, label_drop=0.1)
ON_LATENTS = [  # script, flags, what its preset has of its own
    (dmd2, "--init imf", dict(steps=15_000, M=2, ttur=5, lambda_g=3e-3, lambda_d=1e-2)),
    (dmd2, "--init fm", dict(steps=6_000, M=2, cfg_channels=3)),
    (dmd2, "--init scratch", dict(steps=400_000, M=1, cd=1, ttur=1, omega_max=8)),
    (sid, "--init imf", dict(steps=15_000)), (sid, "--init fm", dict(steps=15_000, cfg_channels=3, fake_lr=6e-4)),
    (twinflow, "--init imf", dict(steps=40_000, lam=0.1, lam_adv=0.1, omega_max=8)),
    (twinflow, "--init scratch", dict(steps=400_000, lam=0.1, lam_adv=0.1, omega_max=8)),
    (consistency, "--loss imf", dict(steps=400_000)), (consistency, "--loss cd --init imf", dict(steps=40_000)),
    (consistency, "--loss cd --init fm", dict(steps=20_000, cfg_channels=3)),
    (consistency, "--loss fm", dict(steps=400_000, cfg_channels=3)),
    *((fsf_dmd, f"--init {init}", {}) for init in ("imf", "fm", "scratch")),
]


@pytest.mark.parametrize("script, flags, own", ON_LATENTS)
def test_every_preset_of_latents_has_what_the_paper_gives_all_of_them(script, flags, own):
    args = script.parse_args([*flags.split(), "--data", "shards"])
    expected = EVERY | own
    expected |= {} if script is sid else dict(lr=6e-4)                                  # README: our guess
    if script is sid:
        del expected["label_drop"]                                                      # it has no loss on data
    assert {name: getattr(args, name) for name in expected} == expected
