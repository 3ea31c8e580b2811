"""SiD: score identity distillation of flow matching models.

It has a fake network as DMD2 has, but its generator descends a Fisher divergence, not the KL divergence.

Papers: Zhou et al., "Score Distillation of Flow Matching Models", arXiv 2509.25127 (SiD-DiT); "Score identity
Distillation", arXiv 2404.04057 (SiD); "Adversarial Score identity Distillation", arXiv 2410.14919 (the optional GAN).

    rollout      k ~ U{0..M-1}, shared by the batch and by both turns of a step: k jumps to 0 without gradient, each
                 renoised (--noise fresh: new noise; ddim: the noise the jump implies; fixed: the first noise), then
                 x_hat = x - t u(x, t, 0)
    fake         || v_fake(x_tau, tau) - (eps - sg x_hat) ||^2
    generator    w(tau) tau^2 < v_fake - v_teacher,  (v_c - v_teacher) - alpha (v_fake - v_teacher) >,
                 v_c = eps - x_hat;  in x0-space, f = x_tau - tau v:
                 w(tau) < f_teacher - f_fake,  (f_teacher - x_hat) - alpha (f_teacher - f_fake) >
    both at      x_tau = (1 - tau) x_hat + tau eps,  tau = sigmoid(N(ln 2, 1.6^2))

< , > sums over elements, || . ||^2 is their mean.  t = 0 is data, t = 1 noise; sg: no gradient.

The generator's gradient runs through x_hat AND through the inputs of both networks, whose weights are fixed: with both
cut off, this loss is DMD's direction for every alpha, the classic silent bug (tests/test_methods.py).  On Gaussians
alpha = 0.5 is half the gradient of the Fisher divergence, alpha = 1 always has the right sign, above 1 it may flip at
small tau.

    python sid.py --init imf                            # digits, 2 CPU cores: about 2 minutes
    python sid.py --init imf --lambda_g 0.01            # data-aided: a discriminator; without it no image is trained on

One step is one fake update, then one generator update, each on its own fresh samples (1:1, fake first, as the official
code).  From fm the student stays a plain network: its rollout and its sampler only ever jump to 0.

Cost in forward passes of one network (backward = 2; backward to the input alone = 1), M = 2, averaged over k: fake turn
4.5, generator turn 3.5 and 2 each for teacher and fake: 12; from fm, whose CFG takes two, 14.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from common import (accumulate, autocast, batch_rows, compile_blocks, ema_decay, frozen_copy,
                    gradient_norm, main, micro_batches, setup, sync_gradients, trainable, update_ema)
from consistency import pretrained
from data import load_data
from dmd2 import fake_loss, gan_discriminator_loss, gan_generator_loss, new_fake_side
from evaluate import metric_space
from model import backward_simulation, guided_map, guided_velocity, interpolate, v_to_x0
from normuon import NorMuon, param_groups
from plumbing.checkpoints import starting_networks
from plumbing.flags import (checked, guidance_flags, health_flag, number, parser, refuse, refuse_guidance, resolve,
                            teacher_flag)
from plumbing.run_folder import Run, check_data, check_folder
from plumbing.watch import begin, finish, health, watch


# ---- method ----------------------------------------------------------------------------------------------------------

# w(tau) on the loss in x0-space; SiD-DiT found that the choice changes contrast and saturation, not much else.
# And "sid": SiD's own, 1 / mean |x_hat - f_teacher|.
WEIGHTS = {
    "1-t": lambda t: 1 - t,                                             # its default
    "(1-t)^2": lambda t: (1 - t) ** 2,
    "1/t": lambda t: 1 / t,
    "1/t^2": lambda t: 1 / t ** 2,
    "snr": lambda t: ((1 - t) / t) ** 2,
    "snr_sqrt": lambda t: (1 - t) / t,
}


def draw_tau(r: Tensor) -> Tensor:
    """Uniform draws r [B] -> tau = sigmoid(N(ln 2, 1.6^2)), clamped: at tau = 0 w may be infinite."""
    return torch.sigmoid(math.log(2) + 1.6 * torch.special.ndtri(r.clamp(1e-6, 1 - 1e-6)))


def sid_loss(x_hat: Tensor, fake: Callable, teacher: Callable, tau: Tensor, eps: Tensor,
             alpha: float = 1.0, w: str = "1-t") -> tuple[Tensor, Tensor]:
    """SiD's generator loss of each sample -> (loss [B], gap [B] = mean |v_fake - v_teacher|).

    Summed over elements, as the paper.  x_hat [B, C, H, W] with gradient.  fake, teacher: callables (x_tau, tau) ->
    velocity that let the gradient through to x_tau (no no_grad, no detach) while their weights ask for none.
    tau [B] in (0, 1), eps fresh noise.  w: a key of WEIGHTS, or "sid".  With alpha = 1 the loss swings around 0 and
    says nothing; watch the gap.  ValueError for another w or shape of tau.
    """
    if w not in (*WEIGHTS, "sid") or tau.shape != x_hat.shape[:1]:
        raise ValueError(f"w {w!r}, tau {list(tau.shape)}: expected {', '.join(WEIGHTS)} or sid, and [{len(x_hat)}]")
    x_tau = interpolate(x_hat, eps, tau)                                # [B, C, H, W], gradient stays
    v_fake, v_teacher = fake(x_tau, tau), teacher(x_tau, tau)
    delta = v_fake - v_teacher                                          # (f_teacher - f_fake) / tau
    residual = (eps - x_hat) - v_teacher                                # (f_teacher - x_hat) / tau
    if w == "sid":
        error = (x_hat - v_to_x0(x_tau, v_teacher, tau)).detach()
        weight = 1 / error.flatten(1).abs().mean(1).clamp(min=1e-5)          # 1e-5: as SiD's code, against 0/0
    else:
        weight = WEIGHTS[w](tau)
    gap = delta.detach().flatten(1).abs().mean(1)                       # [B], for the log
    return weight * tau ** 2 * (delta * (residual - alpha * delta)).view_as(eps).flatten(1).sum(1), gap


# ---- flags -----------------------------------------------------------------------------------------------------------

# pixels: under 24 a side, as the digits.  images: 24 or more, as Fashion-MNIST.  RESULTS.md says which were searched.
# latents: Table 6 of arXiv 2605.19256.  Its lr is lost in our copy: ours is a guess.  The steps are dmd2.py's (imf).
PRESETS = {
    ("pixels", "imf"): dict(
        size="tiny", steps=200, lr=3e-4, fake_lr=3e-3, omega=1.0, guide_to=1.0, eval_every=100, health_every=100),
    ("pixels", "fm"): dict(
        size="tiny", steps=200, lr=1e-3, fake_lr=3e-3, omega=1.0, guide_to=1.0, eval_every=100, health_every=100),
    ("images", "imf"): dict(
        size="small", steps=188, lr=3e-4, fake_lr=1e-3, omega=1.5, guide_to=1.0, eval_every=94, health_every=94),
    ("images", "fm"): dict(
        size="small", steps=200, lr=3e-4, fake_lr=3e-3, omega=1.5, guide_to=1.0, eval_every=100, health_every=100),
    ("latents", "imf"): dict(
        size="B/1", steps=15_000, batch_size=128, lr=6e-5, fake_lr=6e-4, ema=0.99995, precision="bf16",
        omega=6.0, guide_to=0.9, save_every=500, health_every=500),
    ("latents", "fm"): dict(
        size="B/1", steps=15_000, batch_size=128, lr=6e-5, fake_lr=6e-4, ema=0.99995, precision="bf16",
        omega=6.0, guide_to=0.9, cfg_channels=3, save_every=500, health_every=500),
}


def parse_args(argv=None):
    p = parser(__doc__, "imf or fm (the network of consistency.py --loss imf or fm, trained first if need be), "
               "or a model.pt")
    teacher_flag(p)
    health_flag(p)
    add = p.method.add_argument
    add("--M", type=number(int, 1, 1000), default=2, help="steps of the generator (SiD-DiT: 4; FSF-DMD's tables: 2)")
    add("--noise", choices=["fresh", "ddim", "fixed"], default="fresh",
        help="renoising between the steps; equally effective in the paper")
    add("--alpha", type=number(float, -2), default=1.0,
        help="alpha of the loss (SiD-DiT: 1; SiD: 1.2; a port to speech needed 0.5)")
    add("--weight", choices=[*WEIGHTS, "sid"], default="1-t", help="w(tau); sid: 1 / mean |x_hat - f_teacher|")
    guidance_flags(p)
    add("--fake_lr", type=number(float, 0, open_low=True),
        help="learning rate of the fake side (default: the preset's, else --lr)")
    add("--lambda_g", type=number(float, 0), default=0.0,
        help="weight of the GAN term of the generator; 0: no GAN is built, no image is trained on")
    add("--lambda_d", type=number(float, 0, open_low=True), default=1e-2,
        help="weight of the GAN term of the fake side (DMD2's)")
    p.set_defaults(init="imf")
    args = resolve(p, argv, PRESETS, __file__)
    if args.lambda_g == 0:
        refuse(args, ["lambda_d"], "--lambda_g 0 builds no discriminator")
    refuse_guidance(args)
    if args.M == 1:
        refuse(args, ["noise"], "--M 1 never renoises")
    args.sampler = "renoised" if args.noise == "fresh" else f"renoised_{args.noise}"
    return checked(args)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    check_folder(args)
    data = load_data(args.data)
    check_data(args, data)
    B, shape = args.batch_size, data.x.shape[1:]

    net, teacher = starting_networks(args, data, device, pretrained, flow_map=False)
    ema = frozen_copy(net)
    opt = NorMuon(param_groups(net), lr=args.lr)
    compile_blocks(args, net, ema, teacher)
    state = dict(net=net, ema=ema, opt=opt, teacher=teacher)
    fake, head, fake_side, opt_fake = new_fake_side(args, net, device)
    state |= dict(fake=fake, head=head, opt_fake=opt_fake)
    features = metric_space(data, args)
    channels = args.cfg_channels                                                # of a plain teacher's CFG; 0: all
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)     # (omega, t_min, t_max) where not drawn

    def u(y):
        return lambda x, t, s: guided_map(net, x, t, s, y, fixed)

    def v_fake(y):
        return lambda x, tau: fake(x, tau, y)                                   # never guided

    def v_teacher(y):
        return lambda x, tau: guided_velocity(teacher, x, tau, y, fixed, channels)

    def D(y):
        return lambda x, t, eps: head(fake, interpolate(x, eps, t), t, y)

    def draw_turn(g, index):
        """Global batch number `index` and its random numbers, drawn from g (common.Stream)."""
        rows = batch_rows(len(data.x), B, args.seed, index)
        batch = dict(y=data.y[rows])
        batch["z"] = g.normal(B, args.M, *shape)                # rollout noise: of its start and each renoising
        batch["eps_tau"] = g.normal(B, *shape)
        batch["tau"] = draw_tau(g.uniform(B))
        if head:
            batch["x0"] = data.x[rows]
        return batch

    def draw(g, step):
        return g.integers(args.M), draw_turn(g, 2 * step), draw_turn(g, 2 * step + 1)           # one k for both turns

    def panel(run):                                                             # the health panel (METHODS.md)
        def generator(z, y):
            return backward_simulation(u(y), z, args.M - 1, args.M, args.noise)

        def dm(x, tau, eps, y):
            return sid_loss(x, v_fake(y), v_teacher(y), tau, eps, args.alpha, args.weight)[0] / shape.numel()

        def gan(x, tau, eps, y):
            return args.lambda_g * gan_generator_loss(D(y)(x, tau, eps))

        health(run, generator, v_fake, v_teacher, dm, gan if head else None)

    with Run(args, state, ema, data) as run:
        begin(run, features)
        for step, (k, fake_batch, batch) in run.steps(draw):
            total = {}

            # -- fake turn: the generator is fixed
            trainable(True, *fake_side)
            for b in micro_batches(fake_batch, args, device):
                with autocast(args, device):
                    with torch.no_grad():
                        x_hat = backward_simulation(u(b.y), b.z, k, args.M, args.noise)
                    loss = fake_loss(v_fake(b.y), x_hat, b.tau, b.eps_tau)
                    accumulate(total, B, fake=loss)
                    if head:                                                    # one noise and tau for both, as SiD-DiT
                        gan = gan_discriminator_loss(D(b.y)(x_hat, b.tau, b.eps_tau),
                                                     D(b.y)(b.x0, b.tau, b.eps_tau))
                        loss = loss + args.lambda_d * gan
                        accumulate(total, B, gan_d=gan)
                (loss.sum() / B).backward()
            sync_gradients(*fake_side)
            opt_fake.step()
            opt_fake.zero_grad()

            # -- generator turn
            trainable(False, *fake_side)                                        # gradient passes through them to x_hat
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    x_hat = backward_simulation(u(b.y), b.z, k, args.M, args.noise)
                    loss, gap = sid_loss(x_hat, v_fake(b.y), v_teacher(b.y), b.tau, b.eps_tau, args.alpha, args.weight)
                    loss = loss / shape.numel()                                 # lambda_g weighs as in dmd2.py
                    objective = loss
                    if head:
                        gan = gan_generator_loss(D(b.y)(x_hat, b.tau, b.eps_tau))
                        objective = objective + args.lambda_g * gan
                        accumulate(total, B, gan_g=gan)
                (objective.sum() / B).backward()
                accumulate(total, B, sid=loss, gap=gap)
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            opt.zero_grad()                                                     # frees the gradients' memory
            update_ema(ema, net, ema_decay(args, step))

            # -- log, measure, look, save
            run.log(total, batch, grad_norm)
            watch(run, features, teacher, panel)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
