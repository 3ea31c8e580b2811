"""FSF-DMD: distribution matching distillation in which the generator is its own fake score.

Paper: Kim, Lee, Park, "Distribution Matching Distillation without Fake Score Network", arXiv 2605.19256 (bracketed numbers).
Table 2 rows 7-8, Table 3, Table 4 row 6, Table 5 row 6, Tables 8-10 "FSF-DMD".

DMD moves generated samples along v_fake - v_teacher at perturbed points, and trains a second network to know v_fake.  A flow map
needs none: its own average velocity from tau to 0 is the velocity of its own samples, v_fake(x_tau, tau) ~ u(x_tau, tau, 0) [10-13].

    rollout      U = sum_i (t_i - t_{i+1}) u(sg x_i, t_i, t_{i+1}),  t_i = 1 - i/M,   x_hat = eps - U            [14, 18-20]
    perturb      tau = k r / (1 + (k-1) r),  r ~ U(0,1),   x_tau = (1 - tau) sg x_hat + tau eps'
    L_FSF        q || U - sg( U - (u_EMA(x_tau, tau, 0) - v_teacher(x_tau, tau)) ) ||^2                          [14, 21-22]
                 q = 1 / mean | v_teacher - (eps' - x_hat) |  (--weight adaptive),  or 1  (--weight one)
    total        L = L_CD + lambda L_FSF,   L_CD: consistency distillation from the same frozen teacher          [15, 16]

L_FSF alone does not have the data as its fixed point: it compares a sample, f(x_tau, tau, 0), with a posterior mean, so it contracts
(on N(0, sigma^2) to 0.46..0.58 sigma; test_all.py).  L_CD holds it up; without L_CD the generator collapses.

    python fsf_dmd.py --init imf --M 2                 # digits, 2 CPU cores: about 2 minutes, the iMF it starts from included

--init imf      a guidance-conditioned flow map (consistency.py --loss imf, trained first if it is not there); it is its own teacher
--init fm       a velocity network (consistency.py --loss fm), made a flow map by decoupled conditioning; the teacher is the velocity
                network with real CFG.  --warmup steps of L_CD alone come first (Table 4; B.1)
--init scratch  no teacher: v_teacher = sg u(x_tau, tau, tau) of the network in training, and L_CD becomes L_CT, the iMF loss on the
                data [23-25] (Table 5)

Cost in forward passes of one network (backward = 2): L_CD 6, rollout 3 M, teacher 1, fake side 1: 14 for M = 2, against 46 for dmd2.py
with 5 fake updates and the GAN; fm 16 (CFG takes two), scratch (M = 1) 12.  The paper: 0.38 s/step (M = 2) and 0.31 (M = 1), against
1.32-1.46, on a B200.
"""
import math

import torch

from common import (Run, autocast, batch_rows, compile_blocks, ema_decay, flow_map_flags, frozen_copy, gradient_norm, main, micro_batches,
                    number, parser, refuse, refuse_idle, resolve, setup, step_rng, sync_gradients, update_ema)
from consistency import distillation_loss, draw_guidance, draw_times, imf_loss, starting_networks
from evaluate import evaluate, finish, health, metric_space, watch
from model import guided_map, guided_velocity, interpolate, shift_time
from normuon import NorMuon, param_groups
from vae import load_data

# "pixels": the digits presets, chosen by the search described in README.  "latents": the column of the paper's Table 6.
TABLE6 = dict(size="B/1", batch_size=128, precision="bf16", ema=0.99995, lr=6e-4, omega=6.0, guide_to=0.9, save_every=500, health_every=500)
DIGITS = dict(size="tiny", lr=3e-3, omega=1.0, guide_to=1.0, omega_max=2.0, save_every=50, eval_every=50, health_every=50)
PRESETS = {
    ("pixels", "imf"): DIGITS | dict(steps=200, M=2, lam=0.5, shift=1.0),
    ("pixels", "fm"): DIGITS | dict(steps=200, warmup=100, M=2, lam=0.02, shift=1.0),
    ("pixels", "scratch"): DIGITS | dict(steps=400, M=1, lam=0.01, shift=1.0, lr=6e-3),
    ("latents", "imf"): TABLE6 | dict(steps=4_000, M=2, lam=0.05, shift=10.0),
    ("latents", "fm"): TABLE6 | dict(steps=26_000, warmup=20_000, M=2, lam=0.001, shift=10.0, cfg_channels=3),
    ("latents", "scratch"): TABLE6 | dict(steps=400_000, M=1, lam=0.01, shift=1.0),
}


# ---- method ------------------------------------------------------------------------------------------------------------------

def rollout(u, eps, M, grad="all"):
    """The generator unrolled on its own flow map, Eq. 18-20 -> (x, U) with x_hat = x - U, here x = eps [B, C, H, W].

    u: callable (x, t, s), times as floats.  Inputs are detached, so no gradient runs from step to step; with grad="all" every step
    keeps its own, with "last" only the last.  M = 1 is the one-step generator of Eq. 14.
    """
    x, U = eps, torch.zeros_like(eps)
    for i in range(M):
        t, s = 1 - i / M, 1 - (i + 1) / M
        with torch.set_grad_enabled(torch.is_grad_enabled() and (grad == "all" or i == M - 1)):
            move = (t - s) * u(x, t, s)                                                               # Eq. 18 at sg x_i
        U = U + move                                                                                  # Eq. 19-20
        x = (x - move).detach()
    return eps, U


def rollout_renoised(u, eps, k, M):
    """DMD2's backward simulation, Eq. 17 -> (x, U) with x_hat = x - U: k jumps to 0, each renoised afresh, then one with gradient.

    eps [B, M, C, H, W]: fresh noise for every step.  k in 0 .. M-1, the same for the whole batch.  Table 3 row 3.
    """
    x = eps[:, 0]
    for i in range(k):
        with torch.no_grad():
            x0, s = x - (1 - i / M) * u(x, 1 - i / M, 0.0), 1 - (i + 1) / M
            x = (1 - s) * x0 + s * eps[:, i + 1]
    t = 1 - k / M
    return x, t * u(x, t, 0.0)


def fsf_dmd_loss(x, U, fake, teacher, tau, eps, weight="adaptive", clip=0.0, cosine_factor=False):
    """L_FSF of each sample, Eq. 14 (M = 1) and Eq. 21-22 -> (loss [B], gap [B] = mean |v_fake - v_teacher|).

    x, U [B, C, H, W]: of a rollout, x_hat = x - U, gradient in U.  fake, teacher: callables (x_tau, tau) -> velocity, never
    differentiated.  tau [B] in (0, 1], eps [B, C, H, W] fresh noise.  clip > 0 clamps v_fake - v_teacher to [-clip, clip].
    """
    with torch.no_grad():
        x_hat = x - U
        x_tau = interpolate(x_hat, eps, tau)
        v_fake, v_teacher = fake(x_tau, tau), teacher(x_tau, tau)
        gap = v_fake - v_teacher                                                                      # Eq. 13: x_hat moves along +gap
        size = gap.flatten(1).abs().mean(1)                                                           # [B], for the log
        if clip:
            gap = gap.clamp(-clip, clip)
        q = torch.ones_like(tau)
        if weight == "adaptive":                                                                      # DMD's normaliser in v-space (Eq. 51)
            q = 1 / ((v_teacher - (eps - x_hat)).flatten(1).abs().mean(1) + 1e-6)                     # 1e-6: as FastGen, against 0/0
        if cosine_factor:
            q = q * torch.cos(math.pi / 2 * tau)
        target = U - gap
    return q * (U - target).flatten(1).pow(2).mean(1), size                                           # Eq. 14, 22


# ---- flags -------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = parser(__doc__, "imf or fm (the network of consistency.py --loss imf or fm, trained first if need be), scratch, or a model.pt")
    flow_map_flags(p)
    p.add_argument("--cd_guidance", choices=["fixed", "drawn"], default="fixed", help="L_CD: omega and its interval fixed, or drawn as in iMF")
    p.add_argument("--M", type=number(int, 1), help="M of Eq. 18, steps of the rollout")
    p.add_argument("--lam", type=number(float, 0), help="lambda of Eq. 15; 0: L_CD (scratch: L_CT) alone")
    p.add_argument("--warmup", type=number(int, 0), default=0, help="first steps with L_CD (scratch: L_CT) alone; 20,000 with --init fm in the paper")
    p.add_argument("--shift", type=number(float, 0, open_low=True), help="k of tau = k r / (1 + (k-1) r); above 1: toward noise (Table 8)")
    p.add_argument("--weight", choices=["adaptive", "one"], default="adaptive", help="q of Eq. 14 (Table 9)")
    p.add_argument("--clip", type=number(float, 0), default=0.0, help="clamp v_fake - v_teacher to [-clip, clip]; 0: off (Table 9: 1, with --weight one)")
    p.add_argument("--cosine_factor", type=int, choices=[0, 1], default=0, help="1: q times cos(pi tau / 2) (App. B.1)")
    p.add_argument("--rollout", choices=["flow_map", "dmd2"], default="flow_map", help="Eq. 18-20, or DMD2's renoised Eq. 17 (Table 3 row 3)")
    p.add_argument("--rollout_grad", choices=["all", "last"], default="all", help="steps of Eq. 20 that carry gradient")
    p.add_argument("--health_every", type=number(int, 0), default=0, help="steps between health panels (0: none)")
    p.set_defaults(init="imf")
    args = resolve(p, argv, PRESETS, "fsf_dmd")
    refuse_idle(args)
    if args.rollout == "dmd2":
        refuse(args, ["rollout_grad"], "Eq. 17 has gradient in its last call only")
    return args


# ---- training ----------------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    data = load_data(args.data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    net, teacher = starting_networks(args, data, device)
    ema = frozen_copy(net)
    opt = NorMuon(param_groups(net), lr=args.lr)
    frozen = dict(teacher=teacher) if teacher else {}
    compile_blocks(args, net, ema, *frozen.values())
    features = metric_space(data, args)
    rho = dict(h=args.fd_h, exact=args.jvp == "exact", c=args.huber_c, cosine=args.cosine)

    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)                           # guidance of every term but L_CT

    def u(x, t, s, y):
        return guided_map(net, x, t, s, y, fixed.expand(len(x), 3))

    def v_fake(x, tau, y):
        return guided_map(ema, x, tau, torch.zeros_like(tau), y, fixed.expand(len(x), 3))             # Eq. 12

    def v_teacher(x, tau, y):                                                                         # scratch: the network itself, Eq. 23
        return guided_velocity(teacher or net, x, tau, y, fixed.expand(len(x), 3), args.cfg_channels or None)

    def panel(run):
        health(run, lambda z, y: z[:, 0] - rollout(lambda x, t, s: u(x, t, s, y), z[:, 0], args.M)[1], v_fake, v_teacher)

    with Run(args, dict(net=net, ema=ema, opt=opt) | frozen, ema, data) as run:
        if run.step == 0 and run.main:
            run.evaluated(evaluate(ema, features, args))
        for step in run.steps():
            # -- the global batch and its random numbers
            g, rows = step_rng(args.seed, step), batch_rows(len(data.x), B, args.seed, step)
            batch = dict(x0=data.x[rows], y=data.y[rows], eps=torch.randn(B, *shape, generator=g))
            batch["t"], batch["s"] = draw_times(torch.rand(B, 2, generator=g), torch.rand(B, generator=g), args.time_law, args.mask_prob)
            batch["y_drop"] = torch.where(torch.rand(B, generator=g) < args.label_drop, null, batch["y"])
            batch["guidance"] = torch.tensor([[args.omega, 0.0, args.guide_to]]).expand(B, 3)
            if args.cd_guidance == "drawn" or not teacher:
                batch["guidance"] = draw_guidance(torch.rand(B, 3, generator=g), args.omega_law, args.omega_max)
            batch["z"] = torch.randn(B, args.M, *shape, generator=g)                                  # rollout noise; Eq. 17 needs M of them
            batch["tau"] = shift_time(torch.rand(B, generator=g), args.shift)
            batch["eps_tau"] = torch.randn(B, *shape, generator=g)
            k = int(torch.randint(args.M, (1,), generator=g))

            # -- one step
            opt.zero_grad()
            total = dict.fromkeys(("cd", "fsf", "gap"), torch.zeros((), device=device))
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    if teacher:
                        loss_cd = distillation_loss(net, teacher, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, args.cfg_channels or None, **rho)  # Eq. 16
                    else:
                        loss_cd = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, **rho)                             # Eq. 6, 24
                loss_cd = loss_cd.sum() / B
                loss_cd.backward()                                                                    # frees its graph before the next
                total["cd"] = total["cd"] + loss_cd.detach()
                if step < args.warmup or args.lam == 0:
                    continue

                with autocast(args, device):
                    if args.rollout == "flow_map":
                        x, U = rollout(lambda x, t, s: u(x, t, s, b.y), b.z[:, 0], args.M, args.rollout_grad)
                    else:
                        x, U = rollout_renoised(lambda x, t, s: u(x, t, s, b.y), b.z, k, args.M)
                    loss_fsf, gap = fsf_dmd_loss(x, U, lambda x, tau: v_fake(x, tau, b.y), lambda x, tau: v_teacher(x, tau, b.y),
                                                 b.tau, b.eps_tau, args.weight, args.clip, args.cosine_factor)
                loss_fsf = loss_fsf.sum() / B
                (args.lam * loss_fsf).backward()                                                      # Eq. 15
                total["fsf"], total["gap"] = total["fsf"] + loss_fsf.detach(), total["gap"] + gap.sum() / B
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            update_ema(ema, net, ema_decay(args, step))

            # -- log, measure, look, save
            run.log(total, dict(t=batch["t"], s=batch["s"], tau=batch["tau"]), grad_norm)
            watch(run, features, teacher, panel)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
