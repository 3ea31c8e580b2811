"""SiD: score identity distillation of flow matching models.  A fake network as in DMD2, but the gradient of a Fisher divergence.

Papers: Zhou et al., "Score Distillation of Flow Matching Models", arXiv 2509.25127 (SiD-DiT); "Score identity Distillation", arXiv
2404.04057 (SiD); "Adversarial Score identity Distillation", arXiv 2410.14919 (the optional GAN).

    rollout      k ~ U{0..M-1}, shared by the batch and by both turns of a step: k jumps to 0 without gradient, each renoised
                 (--noise fresh: new noise; ddim: the noise the jump implies; fixed: the first noise), then x_g = x - t u(x, t, 0)
    fake         || v_fake(x_t, t) - (eps - sg x_g) ||^2
    generator    w(t) t^2 < v_fake - v_teacher,  (v_c - v_teacher) - alpha (v_fake - v_teacher) >,       v_c = eps - x_g
                 in x0-space, f = x_t - t v:  w(t) < f_teacher - f_fake,  (f_teacher - x_g) - alpha (f_teacher - f_fake) >
    both at      x_t = (1 - t) x_g + t eps,  t = sigmoid(N(ln 2, 1.6^2))

The generator's gradient runs through x_g AND through the inputs of both networks, whose weights are fixed: with both cut off, this
loss is DMD's direction for every alpha, the classic silent bug (test_all.py).  On Gaussians alpha = 0.5 is half the gradient of the
Fisher divergence, alpha = 1 always has the right sign, and above 1 it may flip at small t.

    python sid.py --init imf                            # digits, 2 CPU cores: about 2 minutes
    python sid.py --init imf --lambda_g 0.01            # data-aided: with a discriminator; without it no image is ever read

One step is one fake update, then one generator update, each on its own fresh samples (1:1, fake first, as the official code).
Cost in forward passes of one network (backward = 2; backward to the input alone = 1), M = 2, averaged over k: fake turn 4.5,
generator turn 3.5 and 2 each for teacher and fake: 12.
"""
import math

import torch

from common import (Run, autocast, batch_rows, compile_blocks, ema_decay, frozen_copy, gradient_norm, main, micro_batches, number, parser,
                    refuse, resolve, setup, step_rng, sync_gradients, update_ema)
from consistency import starting_networks
from dmd2 import fake_loss, gan_discriminator_loss, gan_generator_loss, new_fake_side
from evaluate import evaluate, finish, health, metric_space, watch
from model import guided_map, guided_velocity, interpolate, v_to_x0
from normuon import NorMuon, param_groups
from vae import load_data

# "pixels": the digits presets, chosen by the search described in README.  "latents": the setting of FSF-DMD's Table 6, for comparison.
TABLE6 = dict(size="B/1", batch_size=128, precision="bf16", ema=0.99995, lr=6e-4, omega=6.0, guide_to=0.9, save_every=500, health_every=500)
DIGITS = dict(size="tiny", lr=1e-4, fake_lr=1e-3, omega=1.0, guide_to=1.0, save_every=50, eval_every=50, health_every=50)
PRESETS = {
    ("pixels", "imf"): DIGITS | dict(steps=200),
    ("pixels", "fm"): DIGITS | dict(steps=200, omega=2.0),
    ("latents", "imf"): TABLE6 | dict(steps=15_000),
    ("latents", "fm"): TABLE6 | dict(steps=15_000, cfg_channels=3),
}
WEIGHTS = {                      # w(t) on the loss in x0-space; SiD-DiT found that the choice changes contrast and saturation, not much else
    "1-t": lambda t: 1 - t,                                             # its default
    "(1-t)^2": lambda t: (1 - t) ** 2,
    "1/t": lambda t: 1 / t,
    "1/t^2": lambda t: 1 / t ** 2,
    "snr": lambda t: ((1 - t) / t) ** 2,
    "snr_sqrt": lambda t: (1 - t) / t,
}                                # and "sid": SiD's own, 1 / mean |x_g - f_teacher|


# ---- method ------------------------------------------------------------------------------------------------------------------

def rollout(u, eps, k, M, noise="fresh"):
    """The M-step generator stopped at step k -> x_g [B, C, H, W]: k jumps to 0 without gradient, each renoised, then one with gradient.

    u: callable (x, t, s), times as floats; eps [B, M, C, H, W]; k in 0 .. M-1.  noise: how a jump's x0 goes back to the next time:
    fresh noise, the noise that the jump implies (ddim: the generator becomes deterministic), or the first noise again (fixed).
    """
    x = eps[:, 0]
    for i in range(k):
        t, s = 1 - i / M, 1 - (i + 1) / M
        with torch.no_grad():
            x0 = x - t * u(x, t, 0.0)
            back = {"fresh": eps[:, i + 1], "ddim": (x - (1 - t) * x0) / t, "fixed": eps[:, 0]}[noise]
            x = (1 - s) * x0 + s * back
    t = 1 - k / M
    return x - t * u(x, t, 0.0)


def draw_times(r):
    """Uniform draws r [B] -> t = sigmoid(N(ln 2, 1.6^2)): median 2/3, quantiles 5 and 95% at .126 and .965."""
    return torch.sigmoid(math.log(2) + 1.6 * torch.special.ndtri(r.clamp(1e-6, 1 - 1e-6)))


def sid_loss(x_g, fake, teacher, t, eps, alpha=1.0, w="1-t"):
    """SiD's generator loss of each sample -> (loss [B], gap [B] = mean |v_fake - v_teacher|).  Summed over elements, as the paper.

    x_g [B, C, H, W] with gradient; fake, teacher: callables (x_t, t) -> velocity that let the gradient through to x_t (no no_grad, no
    detach) while their weights ask for none; t [B] in (0, 1), eps fresh noise; w: a key of WEIGHTS, or "sid".
    With alpha = 1 the loss swings around 0 and says nothing; watch the gap.
    """
    x_t = interpolate(x_g, eps, t)                                                                    # gradient stays
    v_fake, v_teacher = fake(x_t, t), teacher(x_t, t)
    delta = v_fake - v_teacher                                                                        # (f_teacher - f_fake) / t
    residual = (eps - x_g) - v_teacher                                                                # (f_teacher - x_g) / t
    if w == "sid":
        weight = 1 / (x_g - v_to_x0(x_t, v_teacher, t)).detach().flatten(1).abs().mean(1).clamp(min=1e-5)
    else:
        weight = WEIGHTS[w](t)
    loss = weight * t ** 2 * (delta * (residual - alpha * delta)).flatten(1).sum(1)
    return loss, delta.detach().flatten(1).abs().mean(1)


# ---- flags -------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = parser(__doc__, "imf or fm (the network of consistency.py --loss imf or fm, trained first if need be), or a model.pt")
    p.add_argument("--omega", type=number(float, 1), default=6.0, help="CFG scale omega of teacher and samples (Table 6); the fake side is not guided")
    p.add_argument("--guide_to", type=number(float, 0, 1), default=0.9, help="guidance acts for t in [0, guide_to] (Table 6: 0.9)")
    p.add_argument("--cfg_channels", type=number(int, 0), default=0, help="CFG of a plain teacher on this many first channels; 0: all (Table 4: 3 of 32)")
    p.add_argument("--M", type=number(int, 1), default=2, help="steps of the generator (SiD-DiT: 4; FSF-DMD's tables: 2)")
    p.add_argument("--noise", choices=["fresh", "ddim", "fixed"], default="fresh", help="renoising between the steps; equally effective in the paper")
    p.add_argument("--alpha", type=number(float, -2), default=1.0, help="alpha of the loss (SiD-DiT: 1; SiD: 1.2; a port to speech needed 0.5)")
    p.add_argument("--weight", choices=[*WEIGHTS, "sid"], default="1-t", help="w(t); sid: 1 / mean |x_g - f_teacher|")
    p.add_argument("--fake_lr", type=number(float, 0, open_low=True), help="learning rate of the fake side (default: --lr)")
    p.add_argument("--lambda_g", type=number(float, 0), default=0.0, help="weight of the GAN term of the generator; 0: no GAN is built, no image is read")
    p.add_argument("--lambda_d", type=number(float, 0, open_low=True), default=1e-2, help="weight of the GAN term of the fake side (DMD2's)")
    p.add_argument("--health_every", type=number(int, 0), default=0, help="steps between health panels (0: none)")
    p.set_defaults(init="imf")
    args = resolve(p, argv, PRESETS, "sid")
    if args.lambda_g == 0:
        refuse(args, ["lambda_d"], "--lambda_g 0 builds no discriminator")
    if args.start == "imf":
        refuse(args, ["cfg_channels"], "belongs to --init fm; the augmented network takes omega as an input")
    if args.M == 1:
        refuse(args, ["noise"], "--M 1 never renoises")
    return args


# ---- training ----------------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    data = load_data(args.data)
    B, shape = args.batch_size, data.x.shape[1:]

    net, teacher = starting_networks(args, data, device)
    ema = frozen_copy(net)
    fake, head, fake_params = new_fake_side(args, net, device)
    fake_side = [m for m in (fake, head) if m is not None]
    opt = NorMuon(param_groups(net), lr=args.lr)
    opt_fake = NorMuon(param_groups(*fake_side), lr=args.fake_lr or args.lr)
    compile_blocks(args, net, ema, teacher, *fake_side)
    features = metric_space(data, args)
    networks = dict(net=net, ema=ema, teacher=teacher, fake=fake) | (dict(head=head) if head else {})
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)                           # guidance of all but the fake side

    def u(x, t, s, y):
        return guided_map(net, x, t, s, y, fixed.expand(len(x), 3))

    def v_fake(x, t, y):                                                                              # never guided
        return fake(x, t, y)

    def v_teacher(x, t, y):
        return guided_velocity(teacher, x, t, y, fixed.expand(len(x), 3), args.cfg_channels or None)

    def panel(run):
        def dm(x, t, eps, y):
            return sid_loss(x, lambda x, t: v_fake(x, t, y), lambda x, t: v_teacher(x, t, y), t, eps, args.alpha, args.weight)[0] / shape.numel()

        def gan(x, t, eps, y):
            return args.lambda_g * gan_generator_loss(head(fake, interpolate(x, eps, t), t, y))

        health(run, lambda z, y: rollout(lambda x, t, s: u(x, t, s, y), z, args.M - 1, args.M, args.noise), v_fake, v_teacher, dm, gan if head else None, args.M)

    with Run(args, networks | dict(opt=opt, opt_fake=opt_fake), ema, data) as run:
        if run.step == 0 and run.main:
            run.evaluated(evaluate(ema, features, args))
        for step in run.steps():
            g, total = step_rng(args.seed, step), {}
            k = int(torch.randint(args.M, (1,), generator=g))                                         # of both turns
            for turn in ("fake", "generator"):
                # -- the global batch of this turn and its random numbers
                rows = batch_rows(len(data.x), B, args.seed, 2 * step + (turn == "generator"))
                batch = dict(y=data.y[rows], z=torch.randn(B, args.M, *shape, generator=g), eps=torch.randn(B, *shape, generator=g))
                batch["t"] = draw_times(torch.rand(B, generator=g))
                if head:
                    batch["x0"] = data.x[rows]
                for p in fake_params:
                    p.requires_grad_(turn == "fake")
                optimizer, trained = (opt_fake, fake_side) if turn == "fake" else (opt, [net])
                optimizer.zero_grad()
                for b in micro_batches(batch, args, device):
                    with autocast(args, device):
                        if turn == "fake":
                            with torch.no_grad():
                                x_g = rollout(lambda x, t, s: u(x, t, s, b.y), b.z, k, args.M, args.noise)
                            losses = dict(fake=fake_loss(lambda x, t: v_fake(x, t, b.y), x_g, b.t, b.eps))
                            objective = losses["fake"]
                            if head:                                                                  # real and fake share noise and t, as SiD-DiT
                                logits_fake = head(fake, interpolate(x_g, b.eps, b.t), b.t, b.y)
                                logits_real = head(fake, interpolate(b.x0, b.eps, b.t), b.t, b.y)
                                losses["gan_d"] = gan_discriminator_loss(logits_fake, logits_real)
                                objective = objective + args.lambda_d * losses["gan_d"]
                        else:
                            x_g = rollout(lambda x, t, s: u(x, t, s, b.y), b.z, k, args.M, args.noise)
                            loss, gap = sid_loss(x_g, lambda x, t: v_fake(x, t, b.y), lambda x, t: v_teacher(x, t, b.y), b.t, b.eps, args.alpha, args.weight)
                            losses = dict(sid=loss / shape.numel(), gap=gap)                          # per element, so that lambda_g weighs as in dmd2.py
                            objective = losses["sid"]
                            if head:
                                losses["gan_g"] = gan_generator_loss(head(fake, interpolate(x_g, b.eps, b.t), b.t, b.y))
                                objective = objective + args.lambda_g * losses["gan_g"]
                    (objective.sum() / B).backward()
                    for name, value in losses.items():
                        total[name] = total.get(name, 0) + value.detach().sum() / B
                for m in trained:
                    sync_gradients(m)
                if turn == "generator":
                    grad_norm = gradient_norm(net)
                optimizer.step()
                optimizer.zero_grad()
            update_ema(ema, net, ema_decay(args, step))

            # -- log, measure, look, save
            run.log(total, dict(t=batch["t"]), grad_norm)
            watch(run, features, teacher, panel)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
