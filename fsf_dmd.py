"""FSF-DMD: distribution matching distillation in which the generator is its own fake score.

Paper: Kim, Lee, Park, "Distribution Matching Distillation without Fake Score Network", arXiv 2605.19256 (bracketed numbers).
Table 2 rows 7-8, Table 3, Tables 7-10 "FSF-DMD".

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

--init imf   a guidance-conditioned flow map (consistency.py --loss imf, trained first if it is not there); it is its own teacher.

Cost in forward passes of one network (backward = 2): L_CD 6, rollout 3 M, teacher 1, fake side 1: 14 for M = 2, against 46 for dmd2.py
with 5 fake updates and the GAN.  The paper: 0.38 s/step (M = 2) and 0.31 (M = 1), against 1.32-1.46, on a B200.
"""
import math

import torch

from common import (Run, autocast, batch_rows, compile_blocks, ema_decay, flow_map_flags, frozen_copy, gradient_norm, load_network,
                    main, micro_batches, number, parser, rank, refuse, resolve, setup, step_rng, sync_gradients, update_ema)
from consistency import consistency_loss, draw_guidance, draw_times, pretrained
from evaluate import Features, evaluate, finish, show
from model import gate_guidance, interpolate, shift_time
from normuon import NorMuon, param_groups
from vae import load_data

# "pixels": the digits presets, chosen by the search described in README.  "latents": the column of the paper's Table 6.
TABLE6 = dict(size="B/1", batch_size=128, precision="bf16", ema=0.99995, lr=6e-4, omega=6.0, guide_to=0.9, save_every=500)
DIGITS = dict(size="tiny", lr=3e-3, omega=1.0, guide_to=1.0, omega_max=2.0, save_every=50, eval_every=50)
PRESETS = {
    ("pixels", "imf"): DIGITS | dict(steps=200, M=2, lam=0.5, shift=1.0),
    ("latents", "imf"): TABLE6 | dict(steps=4_000, M=2, lam=0.05, shift=10.0),
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
    p = parser(__doc__, "imf (a flow map trained by consistency.py --loss imf, first if need be), or its model.pt")
    flow_map_flags(p)
    p.add_argument("--cd_guidance", choices=["fixed", "drawn"], default="fixed", help="L_CD: omega and its interval fixed, or drawn as in iMF")
    p.add_argument("--M", type=number(int, 1), help="M of Eq. 18, steps of the rollout")
    p.add_argument("--lam", type=number(float, 0), help="lambda of Eq. 15")
    p.add_argument("--shift", type=number(float, 0, open_low=True), help="k of tau = k r / (1 + (k-1) r); above 1: toward noise (Table 8)")
    p.add_argument("--weight", choices=["adaptive", "one"], default="adaptive", help="q of Eq. 14 (Table 9)")
    p.add_argument("--clip", type=number(float, 0), default=0.0, help="clamp v_fake - v_teacher to [-clip, clip]; 0: off (Table 9: 1, with --weight one)")
    p.add_argument("--cosine_factor", type=int, choices=[0, 1], default=0, help="1: q times cos(pi tau / 2) (App. B.1)")
    p.add_argument("--rollout", choices=["flow_map", "dmd2"], default="flow_map", help="Eq. 18-20, or DMD2's renoised Eq. 17 (Table 3 row 3)")
    p.add_argument("--rollout_grad", choices=["all", "last"], default="all", help="steps of Eq. 20 that carry gradient")
    p.set_defaults(init="imf")
    args = resolve(p, argv, PRESETS, "fsf_dmd")
    if args.rollout == "dmd2":
        refuse(args, ["rollout_grad"], "Eq. 17 has gradient in its last call only")
    if args.cd_guidance == "fixed":
        refuse(args, ["omega_max", "omega_law"], "omega is drawn with --cd_guidance drawn only")
    if args.jvp == "exact":
        refuse(args, ["fd_h"], "--jvp exact takes no difference")
    return args


# ---- training ----------------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    data = load_data(args.data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    path = pretrained(args, "imf") if args.init == "imf" else args.init
    net = load_network(path, data, ["in_context"])[0].to(device).train()
    teacher, ema = frozen_copy(net), frozen_copy(net)
    opt = NorMuon(param_groups(net), lr=args.lr)
    compile_blocks(args, net, ema, teacher)
    features = Features(data) if rank() == 0 else None
    rho = dict(h=args.fd_h, exact=args.jvp == "exact", c=args.huber_c, cosine=args.cosine)

    with Run(args, dict(net=net, ema=ema, teacher=teacher, opt=opt), ema, data) as run:
        if run.step == 0 and run.main:
            run.evaluated(evaluate(ema, features, args))
        for step in run.steps():
            # -- the global batch and its random numbers
            g, rows = step_rng(args.seed, step), batch_rows(len(data.x), B, args.seed, step)
            batch = dict(x0=data.x[rows], y=data.y[rows], eps=torch.randn(B, *shape, generator=g))
            batch["t"], batch["s"] = draw_times(torch.rand(B, 2, generator=g), torch.rand(B, generator=g), args.time_law, args.mask_prob)
            batch["y_drop"] = torch.where(torch.rand(B, generator=g) < args.label_drop, null, batch["y"])
            batch["fixed"] = torch.tensor([[args.omega, 0.0, args.guide_to]]).expand(B, 3)
            batch["guidance"] = draw_guidance(torch.rand(B, 3, generator=g), args.omega_law, args.omega_max) if args.cd_guidance == "drawn" else batch["fixed"]
            batch["z"] = torch.randn(B, args.M, *shape, generator=g)                                  # rollout noise; Eq. 17 needs M of them
            batch["tau"] = shift_time(torch.rand(B, generator=g), args.shift)
            batch["eps_tau"] = torch.randn(B, *shape, generator=g)
            k = int(torch.randint(args.M, (1,), generator=g))

            # -- one step
            opt.zero_grad()
            total = dict.fromkeys(("cd", "fsf", "gap"), torch.zeros((), device=device))
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    x_t, at_t = interpolate(b.x0, b.eps, b.t), gate_guidance(b.guidance, b.t)
                    guidance = torch.where((b.s == b.t)[:, None], at_t, b.guidance)
                    with torch.no_grad():
                        v = teacher(x_t, b.t, b.y_drop, None, at_t)
                    loss_cd = consistency_loss(lambda x, t, s: net(x, t, b.y_drop, s, guidance), x_t, b.t, b.s, v, v, **rho)    # Eq. 16
                loss_cd = loss_cd.sum() / B
                loss_cd.backward()                                                                    # frees its graph before the next

                with autocast(args, device):
                    if args.rollout == "flow_map":
                        x, U = rollout(lambda x, t, s: net(x, t, b.y, s, b.fixed), b.z[:, 0], args.M, args.rollout_grad)
                    else:
                        x, U = rollout_renoised(lambda x, t, s: net(x, t, b.y, s, b.fixed), b.z, k, args.M)
                    loss_fsf, gap = fsf_dmd_loss(x, U, lambda x, tau: ema(x, tau, b.y, torch.zeros_like(tau), b.fixed),         # Eq. 12
                                                 lambda x, tau: teacher(x, tau, b.y, None, gate_guidance(b.fixed, tau)),
                                                 b.tau, b.eps_tau, args.weight, args.clip, args.cosine_factor)
                loss_fsf = loss_fsf.sum() / B
                (args.lam * loss_fsf).backward()                                                      # Eq. 15
                for name, value in (("cd", loss_cd), ("fsf", loss_fsf), ("gap", gap.sum() / B)):
                    total[name] = total[name] + value.detach()
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            update_ema(ema, net, ema_decay(args, step))

            # -- log, measure, look, save
            run.log(total, dict(t=batch["t"], s=batch["s"], tau=batch["tau"]), grad_norm)
            if run.due(args.eval_every) and run.main:
                run.evaluated(evaluate(ema, features, args))
            if run.due(args.preview_every) and run.main:
                show(run.folder / f"samples_{run.step:06d}.png", [("start", teacher), (f"step {run.step}", ema)], data, args)
            if run.due(args.save_every):
                run.save()
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
