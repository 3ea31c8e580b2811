"""TwinFlow: distribution matching inside one network, whose fake side lives at negative times.

Paper: Cheng et al., "TwinFlow", arXiv 2512.05150; as the baseline of Kim, Lee, Park, arXiv 2605.19256 (its
equations: [n]), Table 5 "iMF + TwinFlow" and "RCGM + TwinFlow".

    base         on the data, both in consistency.py: --base imf, improved MeanFlow [6],
                 or --base rcgm, recursive consistency                                                          [66-67]
    adversarial  x_hat = sg( z - u(z, 1, 0) ),  x_t = (1-t) x_hat + t eps:
                 || u(x_t, -t, -t) - (eps - x_hat) ||^2                                                         [63]
    rectify      x_tau of the same x_hat,  delta = u(x_tau, -tau, -tau) - u(x_tau, tau, tau)  without gradient  [64]
                 || u(z, 1, 0) - sg( u(z, 1, 0) - clamp(delta, -1, 1) ) ||^2                                    [65]
    total        L_base + lambda_adv L_adv + lambda L_rectify

t, tau ~ U(0, 1), eps: fresh noise in each term.
|| . ||^2 is the mean over elements: the value of lambda depends on it.  t = 0 is data, t = 1 noise; sg: no gradient.

u(x, -t, -t) is the velocity of the generated samples: flow matching trains it as dmd2.py trains its fake network, but
in the same weights, and the teacher is the same network at positive times.  So nothing is frozen, and no second network
or optimizer is kept.  With an exact fake side the rectify term has DMD's direction (tests/test_methods.py).  FSF-DMD
asks u(x_tau, tau, 0) instead of training a side.

    python twinflow.py --base imf                       # digits, 2 CPU cores: about 2 minutes, from scratch
    python twinflow.py --base imf --init imf            # from the flow map that fsf_dmd.py starts from

Cost in forward passes of one network (backward = 2): base 5.5 (rcgm 7), one generator call 3, L_adv 3, gap 2: 13.5,
against 10.5 for fsf_dmd.py --init scratch.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from common import (BadInput, accumulate, autocast, batch_rows, compile_blocks, ema_decay, frozen_copy,
                    gradient_norm, main, micro_batches, setup, sync_gradients, target_decay, update_ema)
from consistency import draw_guidance, draw_times, guided_rcgm_loss, imf_loss, pretrained, whole_interval
from data import load_data
from evaluate import metric_space
from model import IMFDiT, guided_map, guided_velocity, interpolate
from normuon import NorMuon, param_groups
from plumbing.checkpoints import starting_networks
from plumbing.flags import (checked, flow_map_flags, health_flag, number, parser, rcgm_flags, refuse,
                            refuse_idle_terms, resolve)
from plumbing.run_folder import Run, check_data, check_folder
from plumbing.watch import begin, finish, health, watch


# ---- method ----------------------------------------------------------------------------------------------------------

def twinflow_losses(u: Callable, fake: Callable, teacher: Callable, z: Tensor, t: Tensor, eps_t: Tensor, tau: Tensor,
                    eps_tau: Tensor, clip: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """TwinFlow's losses of each sample, Eq. 63-65 -> (L_adv [B], L_rectify [B], gap [B] = mean |v_fake - v_teacher|).

    u: callable (x, t, s) of the flow map, called once, at (z, 1, 0), with gradient.  fake: callable (x_t, t) ->
    u(x_t, -t, -t | y), with gradient in L_adv; teacher: callable (x_tau, tau), never differentiated.  z, eps_t, eps_tau
    [B, C, H, W] independent noise; t, tau [B] in [0, 1].  Means over elements.  clip > 0 clamps v_fake - v_teacher to
    [-clip, clip] (TwinFlow's tutorial does not, its large-scale code and the paper have 1).
    """
    # u of a network of yours may be bf16 under autocast: in z's precision U - target does not lose a small gap.
    U = u(z, 1.0, 0.0).to(z.dtype)                                                      # [B, C, H, W]
    x_hat = (z - U).detach()
    error = fake(interpolate(x_hat, eps_t, t), t) - (eps_t - x_hat)
    adv = error.view_as(z).flatten(1).pow(2).mean(1)                                    # Eq. 63
    with torch.no_grad():
        x_tau = interpolate(x_hat, eps_tau, tau)                                        # [B, C, H, W]
        v_fake, v_teacher = fake(x_tau, tau), teacher(x_tau, tau)
        delta = v_fake - v_teacher                                                      # Eq. 64
        gap = delta.flatten(1).abs().mean(1)                                            # [B], for the log
        if clip:
            delta = delta.clamp(-clip, clip)
        target = U - delta
    return adv, (U - target).view_as(z).flatten(1).pow(2).mean(1), gap                  # Eq. 65


# ---- flags -----------------------------------------------------------------------------------------------------------

# pixels: under 24 a side, as the digits.  images: 24 or more, as Fashion-MNIST.  RESULTS.md says which were searched.
# latents: the paper's Table 6.  Its lr is lost in our copy: 6e-4 is a guess, and so are the steps from an iMF.
PRESETS = {
    ("pixels", "imf"): dict(
        size="tiny", steps=200, lr=3e-3, lam=0.1, lam_adv=0.1, omega=1.0, guide_to=1.0, omega_max=1.0,
        eval_every=100, health_every=100),
    ("pixels", "scratch"): dict(
        size="tiny", steps=400, lr=1.2e-2, lam=0.03, lam_adv=0.1, omega=1.0, guide_to=1.0, omega_max=1.0,
        eval_every=100, health_every=100),
    ("images", "imf"): dict(
        size="small", steps=300, lr=2e-3, lam=0.1, lam_adv=0.1, omega=1.5, guide_to=1.0, omega_max=4.0,
        eval_every=150, health_every=150),
    ("images", "scratch"): dict(
        size="small", steps=1500, lr=1.6e-2, lam=0.03, lam_adv=0.1, omega=1.5, guide_to=1.0, omega_max=4.0,
        eval_every=500, health_every=100),
    ("latents", "imf"): dict(
        size="B/1", steps=40_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", lam=0.1, lam_adv=0.1,
        omega=6.0, guide_to=0.9, omega_max=8.0, save_every=500, health_every=500),
    ("latents", "scratch"): dict(
        size="B/1", steps=400_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16", lam=0.1, lam_adv=0.1,
        omega=6.0, guide_to=0.9, omega_max=8.0, save_every=5_000, health_every=5_000),
}

# From scratch RCGM has the lr, delta and target_ema of consistency.py --loss rcgm; lam is from a search of its own.
PRESETS_OF_RCGM = {
    ("pixels", "scratch"): PRESETS["pixels", "scratch"] | dict(lr=2.4e-2, target_ema=0.5, delta=0.05, lam=0.1),
    ("images", "scratch"): PRESETS["images", "scratch"] | dict(target_ema=0.5, delta=0.05, lam=0.1),
}


def parse_args(argv=None):
    p = parser(__doc__, "scratch, imf (the network of consistency.py --loss imf, trained first if need be), "
               "or a model.pt")
    flow_map_flags(p)
    health_flag(p)
    add = p.method.add_argument
    add("--base", choices=["imf", "rcgm"], default="imf",
        help="the loss on the data that TwinFlow is added to (Table 5)")
    add("--lam", type=number(float, 0, open_low=True),
        help="weight of L_rectify (1, TwinFlow's tutorial; 0.5 in its large-scale code)")
    add("--lam_adv", type=number(float, 0, open_low=True),
        help="weight of L_adv beside the base loss (1 in TwinFlow's code; at 1 a trained flow map breaks here)")
    add("--clip", type=number(float, 0), default=1.0,
        help="clamp v_fake - v_teacher to [-clip, clip] (1, the paper); 0: off")
    rcgm_flags(p)
    p.set_defaults(init="scratch")
    base = p.parse_known_args(argv)[0].base
    args = resolve(p, argv, PRESETS | (PRESETS_OF_RCGM if base == "rcgm" else {}), __file__)
    refuse(args, ["cfg_channels"], "the augmented network takes omega as an input")
    if args.base == "imf":
        refuse(args, ["delta", "order", "clamp", "target_ema"], "belongs to --base rcgm")
    else:
        refuse(args, ["jvp", "fd_h"], "belongs to --base imf")
    refuse_idle_terms(args)
    args.sampler = "flow_map"
    return checked(args)


# ---- training --------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    check_folder(args)
    data = load_data(args.data)
    check_data(args, data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    net = starting_networks(args, data, device, pretrained)[0]                  # it teaches itself: no teacher is kept
    if isinstance(net, IMFDiT):
        raise BadInput(f"--init {args.init}: iMF's own network sees t - s only, so it cannot tell (-t, -t) from "
                       "(t, t); expected a LightningDiT flow map")
    ema = frozen_copy(net)
    target_net = frozen_copy(net) if args.base == "rcgm" else None              # RCGM's own EMA, of a short memory
    opt = NorMuon(param_groups(net), lr=args.lr)
    compile_blocks(args, net, ema, target_net)
    state = dict(net=net, ema=ema, opt=opt, target=target_net)
    features = metric_space(data, args)
    rho = dict(c=args.huber_c, cosine=args.cosine)
    options = dict(h=args.fd_h, exact=args.jvp == "exact", **rho)
    guided = args.omega_max > 1                                                 # omega is drawn, else it is always 1
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)     # (omega, t_min, t_max) where not drawn

    def u(y):
        return lambda x, t, s: guided_map(net, x, t, s, y, fixed)

    def v_fake(y):
        return lambda x, tau: net(x, -tau, y)                                   # never guided; both times are -tau

    def v_teacher(y):
        return lambda x, tau: guided_velocity(net, x, tau, y, fixed)

    def draw(g, index):
        """Global batch number `index` and its random numbers, drawn from g (common.Stream)."""
        rows = batch_rows(len(data.x), B, args.seed, index)
        batch = dict(x0=data.x[rows], y=data.y[rows], eps=g.normal(B, *shape))
        batch["t"], batch["s"] = draw_times(g.uniform(B, 2), args.time_law, args.mask_prob)
        batch["y_drop"] = torch.where(g.uniform(B) < args.label_drop, null, batch["y"])  # on data, never on samples
        drawn = draw_guidance(g.uniform(B, 3), args.omega_law, args.omega_max)
        batch["guidance"] = whole_interval(drawn, batch["t"], batch["s"])
        for name in ("z", "eps_fake", "eps_tau"):
            batch[name] = g.normal(B, *shape)
        for name in ("t_fake", "tau"):
            batch[name] = g.uniform(B)
        return batch

    def panel(run):                                                             # the health panel (METHODS.md)
        def generator(z, y):
            return z[:, 0] - u(y)(z[:, 0], 1.0, 0.0)

        health(run, generator, v_fake, v_teacher)

    with Run(args, state, ema, data) as run:
        begin(run, features)
        for step, batch in run.steps(draw):
            total = {}

            # -- generator turn
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    adv, rectify, gap = twinflow_losses(u(b.y), v_fake(b.y), v_teacher(b.y), b.z, b.t_fake, b.eps_fake,
                                                        b.tau, b.eps_tau, args.clip)
                    objective = args.lam_adv * adv + args.lam * rectify
                (objective.sum() / B).backward()
                accumulate(total, B, adv=adv, rectify=rectify, gap=gap)

                with autocast(args, device):
                    if args.base == "imf":                                      # Eq. 6
                        loss = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, guided, moving=b.moving,
                                        **options)
                    else:                                                       # Eq. 66-67
                        loss = guided_rcgm_loss(net, target_net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, guided,
                                                args.delta, args.order, args.clamp, **rho)
                (loss.sum() / B).backward()
                accumulate(total, B, **{args.base: loss})
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            opt.zero_grad()                                                     # frees the gradients' memory
            update_ema(ema, net, ema_decay(args, step))
            if target_net:
                update_ema(target_net, net, target_decay(args, step))

            # -- log, measure, look, save
            run.log(total, batch, grad_norm)
            watch(run, features, panel=panel)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
