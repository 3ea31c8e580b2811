"""DMD2: distribution matching with a fake-score network and a GAN, the baseline that FSF-DMD does away with.

Papers: Yin et al., "Improved Distribution Matching Distillation", arXiv 2405.14867; in the flow-map setting of Kim,
Lee, Park, arXiv 2605.19256 (its equations: [n]): Table 2 rows 4-6, Table 3 row 8, Table 4 rows 4-5, Table 5
"iMF + DMD2", Table 7.  FID with 2 steps from an iMF 4.18, + IDA 4.20, + L_CD 4.67 (masked 3.85); from flow matching
5.53, + L_CD 4.90.

    rollout      k ~ U{0..M-1}, shared by the batch: k jumps to 0, each renoised afresh, then from t_k = 1 - k/M
                 x_hat = x - t_k u(x, t_k, 0)                                                                 [17]
    perturb      x_tau = (1 - tau) sg x_hat + tau eps,  tau ~ U(0.02, 0.98)
    generator    || x_hat - sg( x_hat + (v_fake - v_teacher) / mean |v_teacher - (eps - x_hat)| ) ||^2 / 2    [50-51]
                 + lambda_G softplus(-D(x_hat noised))                                                        [53-54]
    fake side    || v_fake(x_t, t) - (eps - sg x_hat) ||^2,  x_t = (1 - t) sg x_hat + t eps,  t ~ U(0, 1)
                 + lambda_D [ softplus(D(fake)) + softplus(-D(real)) ]                                        [52-54]
    --ida A      after a generator update: fake <- A fake + (1 - A) generator                                 [60]
    --cd 1       the generator's loss becomes L_CD + lambda (all of the above) (rCM)                          [59]

|| . ||^2 is the mean over elements: the value of lambda depends on it.  t = 0 is data, t = 1 noise; sg: no gradient.

One step is ONE generator update and R = --ttur fake updates (1:R, DMD2's two time-scale update rule, TTUR): the first
fake update has the samples of the generator turn, the others their own rollouts.  Discriminator: two DDT blocks and a
class token on the features of the fake network's first blocks (model.DiscriminatorHead); its loss trains these too.

    python dmd2.py --init imf --ttur 5                  # digits, 2 CPU cores: about 2 minutes
    python dmd2.py --init imf --ttur 5 --no_gan         # without the GAN: it is not built at all

--init imf | fm | scratch: as in fsf_dmd.py, but from fm the student stays a plain network, which needs no target time:
its rollout and its sampler only ever jump to 0; with --cd 1 it is made a flow map.  From scratch the teacher is the
network in training, and L_CT (iMF) takes the place of L_CD.

A generator is sampled as it was trained: with Eq. 17 to its end (M jumps, renoised), with --cd 1 as a flow map.

Cost in forward passes of one network (backward = 2), M = 2, averaged over k: generator turn 5.5, first fake turn 3, the
others 4.5 each; the GAN adds 1.1 and 3.3 R at B/1.  At R = 5 that is 26.5 without and 44.1 with it (from fm 27.5
and 48.6); FSF-DMD takes 13 (15).
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (BadInput, accumulate, autocast, batch_rows, compile_blocks, ema_decay, frozen_copy,
                    frozen_view, gradient_norm, main, micro_batches, setup, sync_gradients, trainable, update_ema)
from consistency import distillation_loss, draw_guidance, draw_times, imf_loss, pretrained, whole_interval
from data import load_data
from evaluate import metric_space
from model import DiscriminatorHead, IMFDiT, backward_simulation, expand, guided_map, guided_velocity, interpolate
from normuon import NorMuon, param_groups
from plumbing.checkpoints import starting_networks
from plumbing.flags import (checked, flow_map_flags, health_flag, number, parser, refuse, refuse_idle, resolve,
                            teacher_flag)
from plumbing.run_folder import Run, check_data, check_folder
from plumbing.watch import begin, finish, health, watch


# ---- method ----------------------------------------------------------------------------------------------------------

def dmd_loss(x_hat: Tensor, fake: Callable, teacher: Callable, tau: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """DMD2's generator loss of each sample, Eq. 50-51 -> (loss [B], gap [B] = mean |v_fake - v_teacher|).

    x_hat [B, C, H, W] with gradient; fake, teacher: callables (x_tau, tau) -> velocity, never differentiated.
    tau [B], eps [B, C, H, W] fresh noise.  Mean over elements.  In x0-space, Eq. 50, the same gradient is
    (f_fake - f_teacher) / mean |x_hat - f_teacher| with f = x_tau - tau v: the factor tau cancels.
    """
    with torch.no_grad():
        x_tau = interpolate(x_hat, eps, tau)                                            # [B, C, H, W]
        v_fake, v_teacher = fake(x_tau, tau), teacher(x_tau, tau)
        delta = v_fake - v_teacher                                                      # Eq. 51: x_hat moves along it
        gap = delta.flatten(1).abs().mean(1)                                            # [B], for the log
        scale = (v_teacher - (eps - x_hat)).flatten(1).abs().mean(1) + 1e-6             # 1e-6: against 0/0
        target = x_hat + delta / expand(scale, x_hat)                                   # Eq. 51
    return 0.5 * (x_hat - target).view_as(eps).flatten(1).pow(2).mean(1), gap


def fake_loss(fake: Callable, x_hat: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Flow matching of the fake network on samples x_hat [B, C, H, W], Eq. 52 -> [B].  fake: callable (x_t, t).

    t [B] in [0, 1], eps [B, C, H, W] fresh noise.
    """
    x_hat = x_hat.detach()
    error = fake(interpolate(x_hat, eps, t), t) - (eps - x_hat)                         # Eq. 52
    return error.view_as(eps).flatten(1).pow(2).mean(1)


def gan_generator_loss(logits_fake: Tensor) -> Tensor:
    """softplus(-D), Eq. 53.  logits [B, ...] of D at a noised x_hat -> [B], their mean."""
    return F.softplus(-logits_fake).reshape(len(logits_fake), -1).mean(1)


def gan_discriminator_loss(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    """softplus(D(fake)) + softplus(-D(real)), Eq. 53.  logits [B, ...] of D at noised samples -> [B], their mean."""
    return (F.softplus(logits_fake) + F.softplus(-logits_real)).reshape(len(logits_fake), -1).mean(1)


@torch.no_grad()
def ida_(fake: torch.nn.Module, generator: torch.nn.Module, a: float) -> None:
    """Implicit distribution alignment, Eq. 60 (SenseFlow: a = 0.97 or 0.98).

    fake <- a fake + (1 - a) generator, weights only; a = 1 is off.
    """
    if a == 1:
        return
    torch._foreach_lerp_(list(fake.parameters()), list(generator.parameters()), 1 - a)


# ---- flags -----------------------------------------------------------------------------------------------------------

# pixels: under 24 a side, as the digits.  images: 24 or more, as Fashion-MNIST.  RESULTS.md says which were searched.
# latents: the paper's Table 6.  Its lr is lost in our copy: 6e-4 is a guess.  The steps are those of the peak in
# Table 10 (fm: 6,000, twice those).
PRESETS = {
    ("pixels", "imf"): dict(
        size="tiny", steps=100, lr=3e-4, fake_lr=3e-3, M=2, omega=1.0, guide_to=1.0, omega_max=1.0,
        eval_every=100, health_every=100),
    ("pixels", "fm"): dict(
        size="tiny", steps=100, lr=1e-3, fake_lr=3e-3, M=2, omega=1.0, guide_to=1.0, omega_max=1.0,
        eval_every=100, health_every=100),
    ("pixels", "scratch"): dict(
        size="tiny", steps=400, lr=1.2e-2, M=1, cd=1, ttur=1, lam=0.03, omega=1.0, guide_to=1.0, omega_max=1.0,
        eval_every=100, health_every=100),
    ("images", "imf"): dict(
        size="small", steps=50, lr=1e-3, fake_lr=3e-3, M=2, omega=1.5, guide_to=1.0, omega_max=4.0,
        eval_every=25, health_every=25),
    ("images", "fm"): dict(
        size="small", steps=50, lr=1e-3, fake_lr=3e-3, M=2, omega=1.5, guide_to=1.0, omega_max=4.0,
        eval_every=25, health_every=25),
    ("images", "scratch"): dict(
        size="small", steps=1500, lr=1.6e-2, M=1, cd=1, ttur=1, lam=0.01, omega=1.5, guide_to=1.0, omega_max=4.0,
        eval_every=500, health_every=100),
    ("latents", "imf"): dict(
        size="B/1", steps=15_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", M=2,
        omega=6.0, guide_to=0.9, omega_max=8.0, save_every=500, health_every=500),
    ("latents", "fm"): dict(
        size="B/1", steps=6_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", M=2,
        omega=6.0, guide_to=0.9, cfg_channels=3, save_every=500, health_every=500),
    ("latents", "scratch"): dict(
        size="B/1", steps=400_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", M=1, cd=1, ttur=1,
        omega=6.0, guide_to=0.9, omega_max=8.0, save_every=5_000, health_every=5_000),
}

# DMD2 + L_CD (--cd 1): the rates of its own searches; latents: the steps of its own peak in Table 10.
PRESETS_OF_CD = {
    ("pixels", "imf"): PRESETS["pixels", "imf"] | dict(lr=3e-3, fake_lr=3e-3, lam=1.0),
    ("pixels", "fm"): PRESETS["pixels", "fm"] | dict(lr=3e-3, fake_lr=3e-3, lam=1.0),
    ("images", "imf"): PRESETS["images", "imf"] | dict(lr=3e-3, fake_lr=3e-3, lam=1.0),
    ("images", "fm"): PRESETS["images", "fm"] | dict(lr=3e-3, fake_lr=3e-3, lam=1.0),
    ("latents", "imf"): PRESETS["latents", "imf"] | dict(steps=54_000, cd_guidance="drawn"),
    ("latents", "fm"): PRESETS["latents", "fm"] | dict(steps=33_000),
}

# Flags that only L_CD and L_CT read.
OF_L_CD = ("lam", "cd_guidance", "mask_prob", "time_law", "jvp", "fd_h", "huber_c", "cosine", "label_drop", "omega_max",
           "omega_law")


def parse_args(argv=None):
    p = parser(__doc__, "imf or fm (the network of consistency.py --loss imf or fm, trained first if need be), "
               "scratch, or a model.pt")
    flow_map_flags(p)
    teacher_flag(p)
    health_flag(p)
    add = p.method.add_argument
    add("--M", type=number(int, 1, 1000),
        help="M of Eq. 17, steps of the backward simulation; 1: single-step simulation (Table 3)")
    add("--lam", type=number(float, 0, open_low=True), default=0.01, help="lambda of Eq. 59, with --cd 1")
    add("--cd", type=number(int, 0, 1), default=0,
        help="1: generator loss L_CD + lambda L_DMD (Eq. 59); scratch: L_CT + lambda L_DMD; it has presets of its own")
    add("--cd_guidance", choices=["fixed", "drawn"], default="fixed",
        help="L_CD: omega and its interval fixed, or drawn as in iMF")
    add("--ttur", type=number(int, 1, 1000), default=5, help="R, fake updates per generator update (Table 7: 1 to 5)")
    add("--fake_lr", type=number(float, 0, open_low=True),
        help="learning rate of the fake side (default: the preset's, else --lr)")
    gan = p.method.add_mutually_exclusive_group().add_argument
    gan("--lambda_g", type=number(float, 0), default=3e-3,
        help="lambda_G of Eq. 54, the GAN term of the generator; 0: no GAN is built")
    gan("--no_gan", dest="lambda_g", action="store_const", const=0.0, help="the same as --lambda_g 0")
    add("--lambda_d", type=number(float, 0, open_low=True), default=1e-2,
        help="lambda_D of Eq. 54, the GAN term of the fake side")
    add("--disc_trunk", choices=["fake", "generator"], default="fake",
        help="whose first blocks the discriminator reads; those of the generator get no gradient from it")
    add("--ida", type=number(float, 0, 1), default=1.0, help="a of Eq. 60 (SenseFlow: 0.97); 1: off")
    p.set_defaults(init="imf")
    with_cd = p.parse_known_args(argv)[0].cd
    args = resolve(p, argv, PRESETS | (PRESETS_OF_CD if with_cd else {}), __file__)
    if args.lambda_g == 0:
        refuse(args, ["lambda_d", "disc_trunk"], "--lambda_g 0 builds no discriminator")
    if args.start == "scratch" and not args.cd:
        raise BadInput("--init scratch --cd 0: without a teacher nothing would tell the network of the data, "
                       "expected --cd 1")
    if not args.cd:
        refuse(args, OF_L_CD, "belongs to L_CD, which needs --cd 1")
        args.lam = 1.0                                                                  # Eq. 50-51 alone
    refuse_idle(args)
    args.sampler = "flow_map" if args.cd else "renoised"
    return checked(args)


# ---- training --------------------------------------------------------------------------------------------------------

def new_fake_side(args, net, device):
    """The fake side -> (fake, head, [fake, head], their optimizer).

    fake: a trainable copy of the student.  head: the discriminator's; None with --lambda_g 0, and the list is [fake].
    """
    if args.lambda_g and isinstance(net, IMFDiT):
        raise BadInput(f"--init {args.init}: the discriminator reads a LightningDiT; with iMF's own network pass "
                       "--lambda_g 0")
    fake = frozen_copy(net)
    head = DiscriminatorHead(fake).to(device) if args.lambda_g else None
    fake_side = [fake, head] if head else [fake]
    trainable(True, *fake_side)
    # torch 2.11 compiles the head wrong; that 2.13 does it right was seen on a CPU only.
    compile_blocks(args, fake, head if torch.__version__ >= "2.13" and device.type == "cpu" else None)
    return fake, head, fake_side, NorMuon(param_groups(*fake_side), lr=args.fake_lr or args.lr)


def train(args):
    device = setup(args)
    check_folder(args)
    data = load_data(args.data)
    check_data(args, data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    net, teacher = starting_networks(args, data, device, pretrained, flow_map=bool(args.cd))
    ema = frozen_copy(net)
    opt = NorMuon(param_groups(net), lr=args.lr)
    compile_blocks(args, net, ema, teacher)
    state = dict(net=net, ema=ema, opt=opt, teacher=teacher)
    fake, head, fake_side, opt_fake = new_fake_side(args, net, device)
    trunk = fake if args.disc_trunk == "fake" else frozen_view(args, net)
    state |= dict(fake=fake, head=head, opt_fake=opt_fake)
    features = metric_space(data, args)
    channels = args.cfg_channels                                                # of a plain teacher's CFG; 0: all
    options = dict(h=args.fd_h, exact=args.jvp == "exact", c=args.huber_c, cosine=args.cosine)
    guided = args.omega_max > 1                                                 # omega is drawn, else it is always 1
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)     # (omega, t_min, t_max) where not drawn

    def u(y):
        return lambda x, t, s: guided_map(net, x, t, s, y, fixed)

    def v_fake(y):
        return lambda x, tau: fake(x, tau, y)                                   # never guided

    def v_teacher(y):                                                           # scratch: the network itself, Eq. 23
        return lambda x, tau: guided_velocity(teacher or net, x, tau, y, fixed, channels)

    def D(y):
        return lambda x, t, eps: head(trunk, interpolate(x, eps, t), t, y)

    def draw_turn(g, index):
        """Global batch number `index` and its random numbers, drawn from g (common.Stream)."""
        rows = batch_rows(len(data.x), B, args.seed, index)
        batch = dict(x0=data.x[rows], y=data.y[rows], eps=g.normal(B, *shape))
        batch["t"], batch["s"] = draw_times(g.uniform(B, 2), args.time_law, args.mask_prob)
        batch["y_drop"] = torch.where(g.uniform(B) < args.label_drop, null, batch["y"])  # on data, never on samples
        batch["guidance"] = fixed.expand(B, 3)
        if args.cd_guidance == "drawn" or not teacher:          # without a teacher: the loss of iMF, which draws it
            drawn = draw_guidance(g.uniform(B, 3), args.omega_law, args.omega_max)
            batch["guidance"] = whole_interval(drawn, batch["t"], batch["s"])
        batch["z"] = g.normal(B, args.M, *shape)                # rollout noise: Eq. 17 takes M, Eq. 18 the first
        batch["tau"] = 0.02 + 0.96 * g.uniform(B)               # U(0.02, 0.98), as DMD2
        batch["eps_tau"] = g.normal(B, *shape)
        for name in ("fake", "gen", "real"):
            batch[f"t_{name}"], batch[f"eps_{name}"] = g.uniform(B), g.normal(B, *shape)
        k = g.integers(args.M)                                  # Eq. 17: jumps before the one with gradient
        return batch, k

    def draw(g, step):
        return [draw_turn(g, step * args.ttur + turn) for turn in range(args.ttur)]

    def panel(run):                                                             # the health panel (METHODS.md)
        def generator(z, y):
            return backward_simulation(u(y), z, args.M - 1, args.M)

        def dm(x, tau, eps, y):
            return args.lam * dmd_loss(x, v_fake(y), v_teacher(y), tau, eps)[0]

        def gan(x, tau, eps, y):
            return args.lam * args.lambda_g * gan_generator_loss(D(y)(x, tau, eps))

        health(run, generator, v_fake, v_teacher, dm, gan if head else None)

    with Run(args, state, ema, data) as run:
        begin(run, features)
        for step, drawn in run.steps(draw):
            total = {}
            batch, k = drawn[0]

            # -- generator turn
            trainable(False, *fake_side)                                        # gradient passes through them to x_hat
            samples = []
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    x_hat = backward_simulation(u(b.y), b.z, k, args.M)         # Eq. 17
                    loss, gap = dmd_loss(x_hat, v_fake(b.y), v_teacher(b.y), b.tau, b.eps_tau)
                    objective = args.lam * loss                                 # lambda of Eq. 15 (DMD2: 59)
                    if head:
                        gan = gan_generator_loss(D(b.y)(x_hat, b.t_gen, b.eps_gen))
                        objective = objective + args.lam * args.lambda_g * gan  # Eq. 54
                        accumulate(total, B, gan_g=gan)
                (objective.sum() / B).backward()
                accumulate(total, B, dm=loss, gap=gap)
                samples.append(x_hat.detach())

                if args.cd:
                    with autocast(args, device):
                        if teacher:                                             # Eq. 16
                            loss = distillation_loss(net, teacher, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance,
                                                     channels, moving=b.moving, **options)
                        else:                                                   # Eq. 6, 24
                            loss = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, guided, moving=b.moving,
                                            **options)
                    (loss.sum() / B).backward()
                    accumulate(total, B, cd=loss)
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            opt.zero_grad()                                                     # frees the gradients' memory
            update_ema(ema, net, ema_decay(args, step))
            ida_(fake, net, args.ida)                                           # Eq. 60

            # -- fake turns: the generator is fixed; the first has the samples of the generator turn
            trainable(True, *fake_side)
            for turn, (fake_batch, k) in enumerate(drawn):
                for i, b in enumerate(micro_batches(fake_batch, args, device)):
                    with autocast(args, device):
                        with torch.no_grad():
                            x_hat = samples[i] if turn == 0 else backward_simulation(u(b.y), b.z, k, args.M)
                        loss = fake_loss(v_fake(b.y), x_hat, b.t_fake, b.eps_fake)                # Eq. 52
                        accumulate(total, B * args.ttur, fake=loss)
                        if head:
                            gan = gan_discriminator_loss(D(b.y)(x_hat, b.t_gen, b.eps_gen),
                                                         D(b.y)(b.x0, b.t_real, b.eps_real))
                            loss = loss + args.lambda_d * gan                   # Eq. 54
                            accumulate(total, B * args.ttur, gan_d=gan)
                    (loss.sum() / B).backward()
                sync_gradients(*fake_side)
                opt_fake.step()
                opt_fake.zero_grad()

            # -- log, measure, look, save
            run.log(total, batch, grad_norm)
            watch(run, features, teacher, panel)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
