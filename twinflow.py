"""TwinFlow: distribution matching inside one network, whose fake side lives at negative times.

Paper: Cheng et al., "TwinFlow", arXiv 2512.05150; as the baseline of Kim, Lee, Park, arXiv 2605.19256 (bracketed numbers), Table 5
"iMF + TwinFlow" and "RCGM + TwinFlow".

    base         --base imf: improved MeanFlow [6], --base rcgm: recursive consistency [66-67], both in consistency.py, on the data
    adversarial  x_hat = sg( z - u(z, 1, 0) ),  x_t = (1-t) x_hat + t eps:    || u(x_t, -t, -t) - (eps - x_hat) ||^2            [63]
    rectify      x_tau of the same x_hat,  gap = u(x_tau, -tau, -tau) - u(x_tau, tau, tau)  without gradient                    [64]
                 || u(z, 1, 0) - sg( u(z, 1, 0) - clamp(gap, -1, 1) ) ||^2                                                      [65]
    total        L_base + lambda_adv L_adv + lambda L_rectify

u(x, -t, -t) is the velocity of the generated samples: flow matching trains it as dmd2.py trains its fake network, but in the same
weights, and the teacher is the same network at positive times.  So nothing is frozen, and no second network or optimizer is kept.
With an exact fake side the rectify term has DMD's direction (test_all.py).  FSF-DMD asks u(x_tau, tau, 0) instead of training a side.

    python twinflow.py --base imf                       # digits, 2 CPU cores: about 2 minutes, from scratch
    python twinflow.py --base imf --init imf            # from the flow map that fsf_dmd.py starts from

Cost in forward passes of one network (backward = 2): base 7, one generator call 3, L_adv 3, gap 2: 15, against 12 for fsf_dmd.py --init scratch.
"""
import math

import torch

from common import (Run, autocast, batch_rows, compile_blocks, ema_decay, flow_map_flags, frozen_copy, gradient_norm, main, micro_batches,
                    number, parser, refuse, resolve, setup, step_rng, sync_gradients, update_ema)
from consistency import draw_guidance, draw_times, guided_target, imf_loss, rcgm_loss, starting_networks, whole_interval
from evaluate import evaluate, finish, health, metric_space, watch
from model import IMFDiT, guided_map, guided_velocity, interpolate
from normuon import NorMuon, param_groups
from vae import BadInput, load_data

# "pixels": the digits presets, chosen by the search described in README.  "latents": the setting of FSF-DMD's Table 6.
TABLE6 = dict(size="B/1", batch_size=128, precision="bf16", ema=0.99995, lr=6e-4, omega=6.0, guide_to=0.9, save_every=500, health_every=500)
DIGITS = dict(size="tiny", lr=3e-3, omega=1.0, guide_to=1.0, omega_max=2.0, save_every=50, eval_every=50, health_every=50)
PRESETS = {
    ("pixels", "scratch"): DIGITS | dict(steps=400, lam=0.1, lam_adv=0.1, lr=6e-3),
    ("pixels", "imf"): DIGITS | dict(steps=200, lam=0.1, lam_adv=0.1),
    ("latents", "scratch"): TABLE6 | dict(steps=400_000, lam=1.0, lam_adv=0.1),
    ("latents", "imf"): TABLE6 | dict(steps=40_000, lam=1.0, lam_adv=0.1),
}


# ---- method ------------------------------------------------------------------------------------------------------------------

def twinflow_losses(u, fake, teacher, z, t, eps_t, tau, eps_tau, clamp=1.0):
    """TwinFlow's two losses of each sample, Eq. 63-65 -> (L_adv [B], L_rectify [B], gap [B] = mean |v_fake - v_teacher|).

    u: callable (x, t, s) of the flow map, called once, at (z, 1, 0), with gradient.  fake: callable (x_t, t) -> u(x_t, -t, -t | y), with
    gradient in L_adv; teacher: callable (x_tau, tau), never differentiated.  z, eps_t, eps_tau [B, C, H, W] independent noise;
    t, tau [B] in (0, 1].  clamp: of the gap, inf = off (TwinFlow's tutorial has none, its large-scale code and the paper have 1).
    """
    U = u(z, 1.0, 0.0)                                                                                # [B, C, H, W]
    x_hat = (z - U).detach()
    adv = (fake(interpolate(x_hat, eps_t, t), t) - (eps_t - x_hat)).flatten(1).pow(2).mean(1)         # Eq. 63
    with torch.no_grad():
        x_tau = interpolate(x_hat, eps_tau, tau)
        gap = fake(x_tau, tau) - teacher(x_tau, tau)                                                  # Eq. 64
        size = gap.flatten(1).abs().mean(1)                                                           # [B], for the log
        target = U - gap.clamp(-clamp, clamp)
    return adv, (U - target).flatten(1).pow(2).mean(1), size                                          # Eq. 65


# ---- flags -------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = parser(__doc__, "scratch, imf (a flow map trained by consistency.py --loss imf, first if need be), or its model.pt")
    flow_map_flags(p)
    p.add_argument("--base", choices=["imf", "rcgm"], default="imf", help="the loss on the data that TwinFlow is added to (Table 5)")
    p.add_argument("--lam", type=number(float, 0, open_low=True), help="weight of L_rectify (1, TwinFlow's tutorial; 0.5 in its large-scale code)")
    p.add_argument("--lam_adv", type=number(float, 0, open_low=True), help="weight of L_adv beside the base loss, whose distance has a gradient of length one")
    p.add_argument("--clip", type=number(float, 0), default=1.0, help="clamp v_fake - v_teacher to [-clip, clip] (1, the paper); 0: off")
    p.add_argument("--delta", type=number(float, 0, 0.5, open_low=True), default=0.01, help="rcgm: delta of Eq. 66 (0.01, TwinFlow)")
    p.add_argument("--order", type=number(int, 1), default=2, help="rcgm: N, jumps of the EMA network in Eq. 66 (2, the paper)")
    p.add_argument("--clamp", type=number(float, 0), default=1.0, help="rcgm: clamp of its residual to [-clamp, clamp] (1, TwinFlow); 0: off")
    p.add_argument("--health_every", type=number(int, 0), default=0, help="steps between health panels (0: none)")
    p.set_defaults(init="scratch")
    args = resolve(p, argv, PRESETS, "twinflow")
    refuse(args, ["cfg_channels"], "the augmented network takes omega as an input")
    if args.base == "imf":
        refuse(args, ["delta", "order", "clamp"], "belongs to --base rcgm")
    else:
        refuse(args, ["jvp", "fd_h"], "belongs to --base imf")
    if args.jvp == "exact":
        refuse(args, ["fd_h"], "--jvp exact takes no difference")
    return args


# ---- training ----------------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    data = load_data(args.data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    net, _ = starting_networks(args, data, device)                                                     # it teaches itself
    if isinstance(net, IMFDiT):
        raise BadInput(f"--init {args.init}: iMF's own network sees t - s only, so it cannot tell (-t, -t) from (t, t); expected a LightningDiT flow map")
    ema = frozen_copy(net)
    opt = NorMuon(param_groups(net), lr=args.lr)
    compile_blocks(args, net, ema)
    features = metric_space(data, args)
    rho = dict(c=args.huber_c, cosine=args.cosine)
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)                           # guidance of all but the base loss

    def u(x, t, s, y):
        return guided_map(net, x, t, s, y, fixed.expand(len(x), 3))

    def v_fake(x, t, y):                                                                              # never guided
        return net(x, -t, y)                                                                          # both times are -t

    def v_teacher(x, t, y):
        return guided_velocity(net, x, t, y, fixed.expand(len(x), 3))

    def panel(run):
        health(run, lambda z, y: z[:, 0] - u(z[:, 0], 1.0, 0.0, y), v_fake, v_teacher)

    with Run(args, dict(net=net, ema=ema, opt=opt), ema, data) as run:
        if run.step == 0 and run.main:
            run.evaluated(evaluate(ema, features, args))
        for step in run.steps():
            # -- the global batch and its random numbers
            g, rows = step_rng(args.seed, step), batch_rows(len(data.x), B, args.seed, step)
            batch = dict(x0=data.x[rows], y=data.y[rows], eps=torch.randn(B, *shape, generator=g))
            batch["t"], batch["s"] = draw_times(torch.rand(B, 2, generator=g), torch.rand(B, generator=g), args.time_law, args.mask_prob)
            batch["y_drop"] = torch.where(torch.rand(B, generator=g) < args.label_drop, null, batch["y"])
            batch["guidance"] = draw_guidance(torch.rand(B, 3, generator=g), args.omega_law, args.omega_max)
            for name in ("z", "eps_adv", "eps_tau"):
                batch[name] = torch.randn(B, *shape, generator=g)
            for name in ("t_adv", "tau"):
                batch[name] = torch.rand(B, generator=g)

            # -- one step
            opt.zero_grad()
            total = dict.fromkeys((args.base, "adv", "rectify", "gap"), torch.zeros((), device=device))
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    if args.base == "imf":
                        base = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, h=args.fd_h, exact=args.jvp == "exact", **rho)
                    else:
                        x_t, guidance = interpolate(b.x0, b.eps, b.t), whole_interval(b.guidance, b.t, b.s)
                        v, _ = guided_target(ema, x_t, b.eps - b.x0, b.t, b.y_drop, guidance)
                        base = rcgm_loss(lambda x, t, s: net(x, t, b.y_drop, s, guidance), lambda x, t, s: ema(x, t, b.y_drop, s, guidance),
                                         x_t, b.t, b.s, v, args.delta, args.order, args.clamp or math.inf, **rho)
                (base.sum() / B).backward()                                                           # frees its graph before the next

                with autocast(args, device):
                    adv, rectify, gap = twinflow_losses(lambda x, t, s: u(x, t, s, b.y), lambda x, t: v_fake(x, t, b.y), lambda x, t: v_teacher(x, t, b.y),
                                                        b.z, b.t_adv, b.eps_adv, b.tau, b.eps_tau, args.clip or math.inf)
                ((args.lam_adv * adv + args.lam * rectify).sum() / B).backward()
                for name, value in ((args.base, base), ("adv", adv), ("rectify", rectify), ("gap", gap)):
                    total[name] = total[name] + value.detach().sum() / B
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            update_ema(ema, net, ema_decay(args, step))

            # -- log, measure, look, save
            run.log(total, dict(t=batch["t"], s=batch["s"], tau=batch["tau"]), grad_norm)
            watch(run, features, panel=panel)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
