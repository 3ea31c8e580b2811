"""FSF-DMD: distribution matching distillation in which the generator is its own fake score.

Paper: Kim, Lee, Park, "Distribution Matching Distillation without Fake Score Network", arXiv 2605.19256 (its
equations: [n]).  Table 2 rows 7-8, Table 3, Table 4 row 6, Table 5 row 6, Tables 8-10 "FSF-DMD".  Its FID with 2 steps:
from an iMF 3.85 (M = 2, 4,000 steps) and 3.96 (M = 1, 3,000), from flow matching 4.70.

DMD moves generated samples along v_fake - v_teacher, taken at the sample noised to tau (v points to noise: this leads
from the fake mean to the teacher's), and trains a second network to know v_fake.  FSF-DMD trains none: it takes the
flow map's own average velocity from tau to 0, of an EMA of its weights: v_fake(x_tau, tau) ~ u_EMA(x_tau, tau, 0)
[10-13].  A fake network points to the mean of all samples that x_tau may come from, u(x_tau, tau, 0) to the one sample
at which the generator's own path from x_tau ends.  u(x, t, s): average velocity from t to s; z, eps: independent noise.

    rollout    U = sum_i (t_i - t_{i+1}) u(sg x_i, t_i, t_{i+1}),  t_i = 1 - i/M,   x_hat = z - U            [14, 18-20]
               x_i: the sample on its way, at t_i; at t_0 = 1 it is z
    perturb    tau = k r / (1 + (k-1) r),  r ~ U(0,1),   x_tau = (1 - tau) sg x_hat + tau eps
    L_FSF      q || U - sg( U - (u_EMA(x_tau, tau, 0) - v_teacher(x_tau, tau)) ) ||^2                        [14, 21-22]
               q = 1 / mean | v_teacher - (eps - x_hat) |  (--weight adaptive),  or 1  (--weight one)
    total      L = L_CD + lambda L_FSF,   L_CD: consistency distillation from the same frozen teacher        [15, 16]

|| . ||^2 is the mean over elements: the value of lambda depends on it.  t = 0 is data, t = 1 noise; sg: no gradient.

One sample is not the mean, so L_FSF alone does not have the data as its fixed point: it contracts (on N(0, 1) to a
deviation of 0.39..0.58; tests/test_methods.py), and the generator collapses.  L_CD stops the collapse; with a large
lambda the samples still contract.

    python fsf_dmd.py --init imf --M 2       # digits, 2 CPU cores: 1 to 2 minutes, the iMF it starts from included

--init imf      a guidance-conditioned flow map (consistency.py --loss imf, trained first if it is not there); a frozen
                copy of it is the teacher
--init fm       a velocity network (consistency.py --loss fm), made a flow map by decoupled conditioning; the teacher is
                the velocity network with CFG of two passes.  --warmup steps of L_CD alone come first (Table 4; B.1)
--init scratch  no teacher: v_teacher = sg u(x_tau, tau, tau) of the network in training, and L_CD becomes L_CT, the iMF
                loss on the data [23-25] (Table 5)

Cost in forward passes of one network (backward = 2): L_CD 5, rollout 3 M, teacher 1, fake side 1: 13 for M = 2, against
44 for dmd2.py with 5 fake updates and the GAN; fm 15 (CFG takes two), scratch (M = 1) 10.5.  The paper: 0.38 s/step
(M = 2) and 0.31 (M = 1), against 1.32-1.46, on a B200.  L_FSF is first in the step: its graph is the largest, and there
are no gradients in memory yet.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from common import (accumulate, autocast, batch_rows, compile_blocks, ema_decay, frozen_copy,
                    gradient_norm, main, micro_batches, rank, setup, sync_gradients, update_ema)
from consistency import distillation_loss, draw_guidance, draw_times, imf_loss, pretrained, whole_interval
from data import load_data
from evaluate import metric_space
from model import backward_simulation, guided_map, guided_velocity, interpolate, shift_time
from normuon import NorMuon, param_groups
from plumbing.checkpoints import starting_networks
from plumbing.flags import (checked, flow_map_flags, health_flag, number, parser, refuse, refuse_idle, resolve,
                            teacher_flag)
from plumbing.run_folder import Run, check_data, check_folder
from plumbing.watch import begin, finish, health, watch


# ---- method ----------------------------------------------------------------------------------------------------------

def rollout(u: Callable, z: Tensor, M: int, grad: str = "all") -> tuple[Tensor, Tensor]:
    """The generator unrolled on its own flow map, Eq. 18-20 -> (z, U): noise z [B, C, H, W], the samples are z - U.

    u: callable (x, t, s), times as floats.  Inputs are detached, so no gradient runs from step to step; with grad="all"
    every step keeps its own, with "last" only the last.  M = 1 is the one-step generator of Eq. 14.  ValueError if
    M < 1, or for another grad.
    """
    if M < 1 or grad not in ("all", "last"):
        raise ValueError(f"M {M}, grad {grad!r}: expected M >= 1, and grad 'all' or 'last'")
    x_i, U = z.detach(), torch.zeros_like(z)                                            # [B, C, H, W]
    for i in range(M):
        t, s = 1 - i / M, 1 - (i + 1) / M
        wanted = grad == "all" or i == M - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):                # under no_grad: never
            move = (t - s) * u(x_i, t, s)                                               # Eq. 18 at sg x_i
        U = U + move                                                                    # Eq. 19-20
        x_i = (x_i - move).detach()
    return z, U


def fsf_dmd_loss(z: Tensor, U: Tensor, fake: Callable, teacher: Callable, tau: Tensor, eps: Tensor,
                 weight: str = "adaptive", clip: float = 0.0, cosine_factor: bool = False) -> tuple[Tensor, Tensor]:
    """L_FSF of each sample, Eq. 14 (M = 1) and Eq. 21-22 -> (loss [B], gap [B] = mean |v_fake - v_teacher|).

    z, U [B, C, H, W]: of a rollout, x_hat = z - U, gradient in U.  fake, teacher: callables (x_tau, tau) -> velocity,
    never differentiated.  tau [B] in [0, 1], eps [B, C, H, W] noise of its own, not z.  weight: q, "adaptive" or "one".
    Mean over elements.  clip > 0 clamps v_fake - v_teacher to [-clip, clip]; cosine_factor: q times cos(pi tau / 2)
    (B.1).  ValueError for another weight or shape of tau.
    """
    if weight not in ("adaptive", "one") or tau.shape != z.shape[:1]:
        raise ValueError(f"weight {weight!r}, tau {list(tau.shape)}: expected adaptive or one, and [{len(z)}]")
    with torch.no_grad():
        x_hat = z - U
        x_tau = interpolate(x_hat, eps, tau)                                            # [B, C, H, W]
        v_fake, v_teacher = fake(x_tau, tau), teacher(x_tau, tau)
        delta = v_fake - v_teacher                                                      # Eq. 13: x_hat moves along it
        gap = delta.flatten(1).abs().mean(1)                                            # [B], for the log
        if clip:
            delta = delta.clamp(-clip, clip)
        q = torch.ones_like(tau)
        if weight == "adaptive":                                            # DMD's normaliser (Eq. 51) in v-space
            q = 1 / ((v_teacher - (eps - x_hat)).flatten(1).abs().mean(1) + 1e-6)       # 1e-6: against 0/0
        if cosine_factor:
            q = q * torch.cos(math.pi / 2 * tau)
        target = U - delta
    return q * (U - target).view_as(z).flatten(1).pow(2).mean(1), gap                   # Eq. 14, 22


# ---- flags -----------------------------------------------------------------------------------------------------------

# pixels: under 24 a side, as the digits.  images: 24 or more, as Fashion-MNIST.  RESULTS.md says which were searched.
# latents: the paper's Table 6.  Its lr is lost in our copy: 6e-4 is a guess.
PRESETS = {
    ("pixels", "imf"): dict(
        size="tiny", steps=200, lr=2e-3, M=2, lam=0.01, shift=10.0, omega=1.0, guide_to=1.0, omega_max=1.0,
        eval_every=100, health_every=100),
    ("pixels", "fm"): dict(
        size="tiny", steps=200, warmup=100, lr=1.5e-3, M=2, lam=0.001, shift=10.0, omega=1.0, guide_to=1.0,
        omega_max=1.0, eval_every=100, health_every=100),
    ("pixels", "scratch"): dict(
        size="tiny", steps=400, lr=1.2e-2, M=1, lam=0.01, shift=1.0, omega=1.0, guide_to=1.0, omega_max=1.0,
        eval_every=100, health_every=100),
    ("images", "imf"): dict(
        size="small", steps=174, lr=4e-3, M=2, lam=0.0003, shift=10.0, omega=1.5, guide_to=1.0, omega_max=4.0,
        eval_every=87, health_every=87),
    ("images", "fm"): dict(
        size="small", steps=210, warmup=100, lr=8e-3, M=2, lam=0.001, shift=10.0, omega=1.5, guide_to=1.0,
        omega_max=4.0, eval_every=105, health_every=105),
    ("images", "scratch"): dict(
        size="small", steps=1500, lr=1.6e-2, M=1, lam=0.001, shift=10.0, omega=1.5, guide_to=1.0, omega_max=4.0,
        eval_every=500, health_every=100),
    ("latents", "imf"): dict(
        size="B/1", steps=4_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", M=2, lam=0.05, shift=10.0,
        omega=6.0, guide_to=0.9, cd_guidance="drawn", omega_max=8.0, save_every=500, health_every=500),
    ("latents", "fm"): dict(
        size="B/1", steps=26_000, warmup=20_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", M=2,
        lam=0.001, shift=10.0, cosine_factor=1, omega=6.0, guide_to=0.9, cfg_channels=3,
        save_every=500, health_every=500),
    ("latents", "scratch"): dict(
        size="B/1", steps=400_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", M=1, lam=0.01, shift=1.0,
        omega=6.0, guide_to=0.9, omega_max=8.0, save_every=5_000, health_every=5_000),
}


def parse_args(argv=None):
    p = parser(__doc__, "imf or fm (the network of consistency.py --loss imf or fm, trained first if need be), "
               "scratch, or a model.pt")
    flow_map_flags(p)
    teacher_flag(p)
    health_flag(p)
    add = p.method.add_argument
    add("--M", type=number(int, 1, 1000), help="M of Eq. 18, steps of the rollout")
    add("--lam", type=number(float, 0), help="lambda of Eq. 15; 0: L_CD (scratch: L_CT) alone")
    add("--cd_guidance", choices=["fixed", "drawn"], default="fixed",
        help="L_CD: omega and its interval fixed, or drawn as in iMF")
    add("--warmup", type=number(int, 0), default=0,
        help="first steps with L_CD (scratch: L_CT) alone; 20,000 with --init fm in the paper")
    add("--shift", type=number(float, 0, open_low=True),
        help="k of tau = k r / (1 + (k-1) r); above 1: toward noise (Table 8)")
    add("--weight", choices=["adaptive", "one"], default="adaptive", help="q of Eq. 14 (Table 9)")
    add("--clip", type=number(float, 0), default=0.0,
        help="clamp v_fake - v_teacher to [-clip, clip]; 0: off (Table 9: 1, with --weight one)")
    add("--cosine_factor", type=number(int, 0, 1), default=0, help="1: q times cos(pi tau / 2) (App. B.1)")
    add("--rollout", choices=["flow_map", "dmd2"], default="flow_map",
        help="Eq. 18-20, or DMD2's renoised Eq. 17 (Table 3 row 3)")
    add("--rollout_grad", choices=["all", "last"], default="all", help="steps of Eq. 20 that carry gradient")
    p.set_defaults(init="imf")
    args = resolve(p, argv, PRESETS, __file__)
    refuse_idle(args)
    if args.lam == 0:
        refuse(args, ["M", "shift", "weight", "clip", "cosine_factor", "rollout", "rollout_grad", "warmup"],
               "--lam 0 has no L_FSF")
    if args.rollout == "dmd2":
        refuse(args, ["rollout_grad"], "Eq. 17 has gradient in its last call only")
    if args.M == 1:
        refuse(args, ["rollout", "rollout_grad"], "--M 1 has one call, with gradient")
    if args.lam > 0 and args.warmup >= args.steps and not args.dry_run and rank() == 0:
        print(f"fsf_dmd.py: all {args.steps} steps are L_CD alone, --warmup is {args.warmup}")
    args.sampler = "flow_map"                                   # of --rollout dmd2 too: L_CD trains every jump t -> s
    return checked(args)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    check_folder(args)
    data = load_data(args.data)
    check_data(args, data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    net, teacher = starting_networks(args, data, device, pretrained)
    ema = frozen_copy(net)
    opt = NorMuon(param_groups(net), lr=args.lr)
    compile_blocks(args, net, ema, teacher)
    state = dict(net=net, ema=ema, opt=opt, teacher=teacher)
    features = metric_space(data, args)
    channels = args.cfg_channels                                                # of a plain teacher's CFG; 0: all
    options = dict(h=args.fd_h, exact=args.jvp == "exact", c=args.huber_c, cosine=args.cosine)
    guided = args.omega_max > 1                                                 # omega is drawn, else it is always 1
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)     # (omega, t_min, t_max) where not drawn

    def u(y):
        return lambda x, t, s: guided_map(net, x, t, s, y, fixed)

    def v_fake(y):
        return lambda x, tau: guided_map(ema, x, tau, 0.0, y, fixed)            # Eq. 12

    def v_teacher(y):                                                           # scratch: the network itself, Eq. 23
        return lambda x, tau: guided_velocity(teacher or net, x, tau, y, fixed, channels)

    def draw(g, index):
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
        batch["tau"] = shift_time(g.uniform(B), args.shift)
        batch["eps_tau"] = g.normal(B, *shape)
        k = g.integers(args.M)                                  # Eq. 17: jumps before the one with gradient
        return batch, k

    def panel(run):                                                             # the health panel (METHODS.md)
        def generator(z, y):
            if args.rollout == "dmd2":
                return backward_simulation(u(y), z, args.M - 1, args.M)
            z, U = rollout(u(y), z[:, 0], args.M)
            return z - U

        health(run, generator, v_fake, v_teacher)

    with Run(args, state, ema, data) as run:
        begin(run, features)
        for step, (batch, k) in run.steps(draw):
            total = {}

            # -- generator turn
            for b in micro_batches(batch, args, device):
                if step >= args.warmup and args.lam > 0:
                    with autocast(args, device):
                        if args.rollout == "flow_map":
                            z, U = rollout(u(b.y), b.z[:, 0], args.M, args.rollout_grad)
                        else:
                            x_hat = backward_simulation(u(b.y), b.z, k, args.M)  # Eq. 17
                            z, U = b.z[:, 0], b.z[:, 0] - x_hat
                        loss, gap = fsf_dmd_loss(z, U, v_fake(b.y), v_teacher(b.y), b.tau, b.eps_tau,
                                                 args.weight, args.clip, args.cosine_factor)
                        objective = args.lam * loss                             # lambda of Eq. 15 (DMD2: 59)
                    (objective.sum() / B).backward()
                    accumulate(total, B, fsf=loss, gap=gap)

                with autocast(args, device):
                    if teacher:                                                 # Eq. 16
                        loss = distillation_loss(net, teacher, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance,
                                                 channels, moving=b.moving, **options)
                    else:                                                       # Eq. 6, 24
                        loss = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, guided, moving=b.moving,
                                        **options)
                (loss.sum() / B).backward()
                accumulate(total, B, cd=loss)
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
