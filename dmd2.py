"""DMD2: distribution matching with a fake-score network and a GAN, the baseline that FSF-DMD does away with.

Papers: Yin et al., "Improved Distribution Matching Distillation", arXiv 2405.14867; in the flow-map setting of Kim, Lee, Park, arXiv
2605.19256 (bracketed numbers): Table 2 rows 4-6, Table 3 row 8, Table 4 rows 4-5, Table 5 "iMF + DMD2", Table 7.

    rollout      i ~ U{0..M-1}, shared by the batch: i jumps to 0, each renoised afresh, then x_hat = x - t_i u(x, t_i, 0)   [17]
    generator    || x_hat - sg( x_hat - (v_teacher - v_fake) / mean |v_teacher - (eps - x_hat)| ) ||^2 / 2               [50-51]
                 + lambda_G softplus(-D(x_hat noised))                                                                  [53-54]
    fake side    || v_fake(x_t, t) - (eps - sg x_hat) ||^2  + lambda_D [ softplus(D(fake)) + softplus(-D(real)) ]        [52-54]
    --ida A      after a generator update: fake <- A fake + (1 - A) generator                                           [60]
    --cd 1       the generator's loss becomes L_CD + lambda L_DMD (rCM)                                                 [59]

One step is ONE generator update and R = --ttur fake updates (TTUR 1:R counted as DMD2 does): the first fake update sees the samples
of the generator turn, the others their own rollouts.  Discriminator: two DDT blocks and a class token on the features of the fake
network's first blocks (model.DiscriminatorHead), which lambda_D L_D also trains.

    python dmd2.py --init imf --ttur 5                  # digits, 2 CPU cores: about 2 minutes
    python dmd2.py --init imf --ttur 5 --no_gan         # without the GAN: it is not built at all

--init imf | fm | scratch: as in fsf_dmd.py.  From scratch the teacher is the network in training, and L_CT (iMF) takes the place of L_CD.

Cost in forward passes of one network (backward = 2), M = 2, averaged over i: generator turn 5.5, first fake turn 3, the others 4.5
each; the GAN adds 1.1 and 3.3 R.  At R = 5 that is 26.5 without and 44.1 with it; FSF-DMD takes 14.
"""
import torch
import torch.nn.functional as F

from common import (CONSISTENCY_FLAGS, Run, autocast, batch_rows, compile_blocks, ema_decay, flow_map_flags, frozen_copy, gradient_norm, main,
                    micro_batches, number, parser, refuse, refuse_idle, resolve, setup, step_rng, sync_gradients, update_ema)
from consistency import distillation_loss, draw_guidance, draw_times, imf_loss, starting_networks
from evaluate import evaluate, finish, health, metric_space, watch
from model import DiscriminatorHead, IMFDiT, expand, guided_map, guided_velocity, interpolate
from normuon import NorMuon, param_groups
from vae import BadInput, load_data

# "pixels": the digits presets, chosen by the search described in README.  "latents": the column of the paper's Table 6.
TABLE6 = dict(size="B/1", batch_size=128, precision="bf16", ema=0.99995, lr=6e-4, omega=6.0, guide_to=0.9, save_every=500, health_every=500)
DIGITS = dict(size="tiny", lr=1e-3, omega=1.0, guide_to=1.0, omega_max=2.0, save_every=50, eval_every=50, health_every=50)
PRESETS = {
    ("pixels", "imf"): DIGITS | dict(steps=100, M=2, lr=3e-4, fake_lr=3e-3, lam=1.0),
    ("pixels", "fm"): DIGITS | dict(steps=100, M=2, lam=1.0),
    ("pixels", "scratch"): DIGITS | dict(steps=400, M=1, cd=1, ttur=1, lam=0.1, lr=6e-3),
    ("latents", "imf"): TABLE6 | dict(steps=15_000, M=2),
    ("latents", "fm"): TABLE6 | dict(steps=6_000, M=2, cfg_channels=3),
    ("latents", "scratch"): TABLE6 | dict(steps=400_000, M=1, cd=1, ttur=1),
}


# ---- method ------------------------------------------------------------------------------------------------------------------

def backward_simulation(u, eps, k, M):
    """DMD2's rollout, Eq. 17 -> x_hat [B, C, H, W]: k jumps to 0 without gradient, each renoised afresh, then one with gradient.

    u: callable (x, t, s), times as floats.  eps [B, M, C, H, W]: fresh noise for every step; real data never enter.  k in 0 .. M-1.
    """
    x = eps[:, 0]
    for i in range(k):
        with torch.no_grad():
            x0, s = x - (1 - i / M) * u(x, 1 - i / M, 0.0), 1 - (i + 1) / M
            x = (1 - s) * x0 + s * eps[:, i + 1]
    t = 1 - k / M
    return x - t * u(x, t, 0.0)


def dmd_loss(x_hat, fake, teacher, t, eps):
    """DMD2's generator loss of each sample, Eq. 50-51 -> (loss [B], gap [B] = mean |v_fake - v_teacher|).

    x_hat [B, C, H, W] with gradient; fake, teacher: callables (x_t, t) -> velocity, never differentiated; t [B], eps fresh noise.
    In x0-space the same gradient reads (f_fake - f_teacher) / mean |x_hat - f_teacher|: the factor t cancels.
    """
    with torch.no_grad():
        x_t = interpolate(x_hat, eps, t)
        v_fake, v_teacher = fake(x_t, t), teacher(x_t, t)
        scale = (v_teacher - (eps - x_hat)).flatten(1).abs().mean(1) + 1e-6                           # 1e-6: as FastGen, against 0/0
        target = x_hat - (v_teacher - v_fake) / expand(scale, x_hat)
        gap = (v_fake - v_teacher).flatten(1).abs().mean(1)
    return 0.5 * (x_hat - target).flatten(1).pow(2).mean(1), gap


def fake_loss(fake, x_hat, t, eps):
    """Flow matching of the fake network on generated samples, Eq. 52 -> [B].  fake: callable (x_t, t)."""
    x_hat = x_hat.detach()
    return (fake(interpolate(x_hat, eps, t), t) - (eps - x_hat)).flatten(1).pow(2).mean(1)


def gan_generator_loss(logits_fake):
    """softplus(-D(x_hat)), Eq. 53-54.  logits [B, 1] -> [B]."""
    return F.softplus(-logits_fake).flatten(1).mean(1)


def gan_discriminator_loss(logits_fake, logits_real):
    """softplus(D(fake)) + softplus(-D(real)), Eq. 53.  logits [B, 1] -> [B]."""
    return (F.softplus(logits_fake) + F.softplus(-logits_real)).flatten(1).mean(1)


@torch.no_grad()
def ida_(fake, generator, a):
    """Implicit distribution alignment, Eq. 60 (SenseFlow: a = 0.97 or 0.98): fake <- a fake + (1 - a) generator, weights only."""
    torch._foreach_lerp_(list(fake.parameters()), list(generator.parameters()), 1 - a)


# ---- flags -------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = parser(__doc__, "imf or fm (the network of consistency.py --loss imf or fm, trained first if need be), scratch, or a model.pt")
    flow_map_flags(p)
    p.add_argument("--cd_guidance", choices=["fixed", "drawn"], default="fixed", help="L_CD: omega and its interval fixed, or drawn as in iMF")
    p.add_argument("--M", type=number(int, 1), help="M of Eq. 17, steps of the backward simulation; 1: single-step simulation (Table 3)")
    p.add_argument("--ttur", type=number(int, 1), default=5, help="R, fake updates per generator update (Table 7: 1 to 5)")
    p.add_argument("--fake_lr", type=number(float, 0, open_low=True), help="learning rate of the fake side (default: --lr)")
    p.add_argument("--lambda_g", type=number(float, 0), default=3e-3, help="lambda_G of Eq. 54, the GAN term of the generator; 0: no GAN is built")
    p.add_argument("--no_gan", dest="lambda_g", action="store_const", const=0.0, help="the same as --lambda_g 0")
    p.add_argument("--lambda_d", type=number(float, 0, open_low=True), default=1e-2, help="lambda_D of Eq. 54, the GAN term of the fake side")
    p.add_argument("--disc_trunk", choices=["fake", "teacher"], default="fake", help="whose first blocks the discriminator reads; the teacher's stay frozen")
    p.add_argument("--ida", type=number(float, 0, 1), default=1.0, help="a of Eq. 60 (SenseFlow: 0.97); 1: off")
    p.add_argument("--cd", type=int, choices=[0, 1], default=0, help="1: generator loss L_CD + lambda L_DMD (Eq. 59); scratch: L_CT + lambda L_DMD")
    p.add_argument("--lam", type=number(float, 0, open_low=True), default=0.01, help="lambda of Eq. 59, with --cd 1")
    p.add_argument("--health_every", type=number(int, 0), default=0, help="steps between health panels (0: none)")
    p.set_defaults(init="imf")
    args = resolve(p, argv, PRESETS, "dmd2")
    if args.lambda_g == 0:
        refuse(args, ["lambda_d", "disc_trunk"], "--lambda_g 0 builds no discriminator")
    if args.start == "scratch" and not args.cd:
        raise BadInput("--init scratch --cd 0: without a teacher nothing would tell the network of the data, expected --cd 1")
    if args.start == "scratch" and args.disc_trunk == "teacher":
        raise BadInput("--init scratch --disc_trunk teacher: there is no teacher, expected --disc_trunk fake")
    if not args.cd:
        refuse(args, ["lam", "cd_guidance", *CONSISTENCY_FLAGS], "belongs to L_CD, which needs --cd 1")
    refuse_idle(args)
    return args


def new_fake_side(args, net, device):
    """(fake network, a copy of the start; discriminator head, or None where lambda_g is 0; the parameters of both that are trained)."""
    if args.lambda_g and isinstance(net, IMFDiT):
        raise BadInput(f"--init {args.init}: the discriminator reads a LightningDiT; with iMF's own network pass --lambda_g 0")
    fake = frozen_copy(net)
    head = DiscriminatorHead(fake).to(device) if args.lambda_g else None
    params = [p for m in (fake, head) if m is not None for name, p in m.named_parameters() if name != "pos_embed"]    # pos_embed: a fixed table
    for p in params:
        p.requires_grad_(True)
    return fake, head, params


# ---- training ----------------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    data = load_data(args.data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    net, teacher = starting_networks(args, data, device)
    ema = frozen_copy(net)
    fake, head, fake_params = new_fake_side(args, net, device)
    fake_side = [m for m in (fake, head) if m is not None]
    trunk = fake if args.disc_trunk == "fake" else teacher
    opt = NorMuon(param_groups(net), lr=args.lr)
    opt_fake = NorMuon(param_groups(*fake_side), lr=args.fake_lr or args.lr)
    frozen = dict(teacher=teacher) if teacher else {}
    compile_blocks(args, net, ema, *frozen.values(), *fake_side)
    features = metric_space(data, args)
    rho = dict(h=args.fd_h, exact=args.jvp == "exact", c=args.huber_c, cosine=args.cosine)
    networks = dict(net=net, ema=ema, fake=fake) | frozen | (dict(head=head) if head else {})
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)                           # guidance of all but the fake side

    def u(x, t, s, y):
        return guided_map(net, x, t, s, y, fixed.expand(len(x), 3))

    def v_fake(x, t, y):                                                                              # never guided
        return fake(x, t, y)

    def v_teacher(x, t, y):                                                                           # scratch: the network itself
        return guided_velocity(teacher or net, x, t, y, fixed.expand(len(x), 3), args.cfg_channels or None)

    def panel(run):
        def dm(x, t, eps, y):
            return (args.lam if args.cd else 1.0) * dmd_loss(x, lambda x, t: v_fake(x, t, y), lambda x, t: v_teacher(x, t, y), t, eps)[0]

        def gan(x, t, eps, y):
            return args.lambda_g * gan_generator_loss(head(trunk, interpolate(x, eps, t), t, y))

        health(run, lambda z, y: backward_simulation(lambda x, t, s: u(x, t, s, y), z, args.M - 1, args.M), v_fake, v_teacher, dm, gan if head else None, args.M)

    with Run(args, networks | dict(opt=opt, opt_fake=opt_fake), ema, data) as run:
        if run.step == 0 and run.main:
            run.evaluated(evaluate(ema, features, args))
        for step in run.steps():
            g, total = step_rng(args.seed, step), {}
            for turn in range(args.ttur):
                # -- the global batch of this turn and its random numbers
                rows = batch_rows(len(data.x), B, args.seed, step * args.ttur + turn)
                batch = dict(x0=data.x[rows], y=data.y[rows], eps=torch.randn(B, *shape, generator=g))
                batch["t"], batch["s"] = draw_times(torch.rand(B, 2, generator=g), torch.rand(B, generator=g), args.time_law, args.mask_prob)
                batch["y_drop"] = torch.where(torch.rand(B, generator=g) < args.label_drop, null, batch["y"])
                batch["guidance"] = torch.tensor([[args.omega, 0.0, args.guide_to]]).expand(B, 3)
                if args.cd_guidance == "drawn" or not teacher:
                    batch["guidance"] = draw_guidance(torch.rand(B, 3, generator=g), args.omega_law, args.omega_max)
                batch["z"] = torch.randn(B, args.M, *shape, generator=g)                              # rollout noise, fresh at every step
                batch["t_dm"] = 0.02 + 0.96 * torch.rand(B, generator=g)                              # U(0.02, 0.98), as DMD2
                for name in ("t_fake", "t_gen", "t_real"):
                    batch[name] = torch.rand(B, generator=g)
                for name in ("eps_dm", "eps_fake", "eps_gen", "eps_real"):
                    batch[name] = torch.randn(B, *shape, generator=g)
                k = int(torch.randint(args.M, (1,), generator=g))
                parts, samples = list(micro_batches(batch, args, device)), []

                # -- generator turn: fake side and head are fixed, gradient passes through them to x_hat
                if turn == 0:
                    for p in fake_params:
                        p.requires_grad_(False)
                    opt.zero_grad()
                    for b in parts:
                        with autocast(args, device):
                            x_hat = backward_simulation(lambda x, t, s: u(x, t, s, b.y), b.z, k, args.M)
                            loss, gap = dmd_loss(x_hat, lambda x, t: v_fake(x, t, b.y), lambda x, t: v_teacher(x, t, b.y), b.t_dm, b.eps_dm)  # Eq. 51
                            losses = dict(dm=loss, gap=gap)
                            objective = loss * (args.lam if args.cd else 1.0)                         # Eq. 59
                            if head:
                                losses["gan_g"] = gan_generator_loss(head(trunk, interpolate(x_hat, b.eps_gen, b.t_gen), b.t_gen, b.y))
                                objective = objective + args.lambda_g * losses["gan_g"]               # Eq. 54
                        (objective.sum() / B).backward()
                        samples.append(x_hat.detach())
                        if args.cd:
                            with autocast(args, device):
                                if teacher:
                                    losses["cd"] = distillation_loss(net, teacher, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, args.cfg_channels or None, **rho)
                                else:
                                    losses["cd"] = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, **rho)
                            (losses["cd"].sum() / B).backward()
                        for name, value in losses.items():
                            total[name] = total.get(name, 0) + value.detach().sum() / B
                    sync_gradients(net)
                    grad_norm = gradient_norm(net)
                    opt.step()
                    opt.zero_grad()
                    update_ema(ema, net, ema_decay(args, step))
                    if args.ida < 1:
                        ida_(fake, net, args.ida)                                                     # Eq. 60
                    for p in fake_params:
                        p.requires_grad_(True)

                # -- fake turn: the generator is fixed
                opt_fake.zero_grad()
                for i, b in enumerate(parts):
                    with autocast(args, device):
                        if turn == 0:
                            x_hat = samples[i]
                        else:
                            with torch.no_grad():
                                x_hat = backward_simulation(lambda x, t, s: u(x, t, s, b.y), b.z, k, args.M)
                        losses = dict(fake=fake_loss(lambda x, t: v_fake(x, t, b.y), x_hat, b.t_fake, b.eps_fake))      # Eq. 52
                        objective = losses["fake"]
                        if head:
                            logits_fake = head(trunk, interpolate(x_hat, b.eps_gen, b.t_gen), b.t_gen, b.y)
                            logits_real = head(trunk, interpolate(b.x0, b.eps_real, b.t_real), b.t_real, b.y)
                            losses["gan_d"] = gan_discriminator_loss(logits_fake, logits_real)
                            objective = objective + args.lambda_d * losses["gan_d"]                   # Eq. 54
                    (objective.sum() / B).backward()
                    for name, value in losses.items():
                        total[name] = total.get(name, 0) + value.detach().sum() / (B * args.ttur)
                for m in fake_side:
                    sync_gradients(m)
                opt_fake.step()
                opt_fake.zero_grad()

            # -- log, measure, look, save
            run.log(total, {name: batch[name] for name in ("t_dm", "t_fake")}, grad_norm)
            watch(run, features, teacher, panel)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
