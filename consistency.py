"""Flow matching, improved MeanFlow, consistency training and consistency distillation: everything FSF-DMD starts from, and its L_CD.

Paper: Kim, Lee, Park, "Distribution Matching Distillation without Fake Score Network", arXiv 2605.19256 (bracketed numbers).

    --loss fm    flow matching [1]                 E || u(x_t,t,t) - (eps - x0) ||^2, the velocity network others start from
    --loss imf   improved MeanFlow [6]             Geng et al.: guidance omega and its interval [t_min, t_max] are inputs
    --loss ct    consistency training [6]          the same without guidance, tangent eps - x0 (MeanFlow)
    --loss cd    consistency distillation [16]     target and tangent from a frozen guided teacher (Table 2 row 3, Table 3 rows 1, 9)

All but fm are one regression of the average velocity u(x_t, t, s) onto its own identity,

    rho( u(x_t,t,s),  sg( v - (t-s) du/dt ) ),        du/dt along dx/dt = a, ds/dt = 0                        [6, 16, 37-38]

             v (target)                                            a (tangent)
    ct       eps - x0                                              eps - x0
    imf      eps - x0 + (1 - 1/omega)(u(x_t,t,t|y,omega) - u(x_t,t,t|null,1))      u(x_t,t,t|y,omega)
    cd       v_teacher(x_t, t)                                     v_teacher(x_t, t)

    python consistency.py --loss imf                       # digits, 2 CPU cores: half a minute; the initialisation of fsf_dmd.py
    python consistency.py --loss cd --init imf             # the baseline that FSF-DMD is compared with

Cost in forward passes of one network (backward = 2): fm 3, ct 5, imf 7, cd 6.
"""
import torch
import torch.nn.functional as F

from common import (CONSISTENCY_FLAGS, BadInput, Run, autocast, batch_rows, compile_blocks, ema_decay, flow_map_flags, frozen_copy, gradient_norm, load_checkpoint,
                    load_network, main, micro_batches, new_network, parser, rank, refuse, resolve, setup, step_rng, sync_gradients, update_ema)
from evaluate import Features, evaluate, finish, show
from model import expand, gate_guidance, interpolate, total_derivative
from normuon import NorMuon, param_groups
from vae import load_data

# "pixels": the digits presets, chosen by the search described in README.  "latents": the paper's Table 6.
TABLE6 = dict(size="B/1", batch_size=128, precision="bf16", ema=0.99995, lr=6e-4, omega=6.0, guide_to=0.9, save_every=500)
DIGITS = dict(size="tiny", lr=3e-3, omega=1.0, guide_to=1.0, omega_max=2.0, save_every=50, eval_every=50)
PRESETS = {
    ("pixels", "scratch"): DIGITS | dict(steps=200, lr=6e-3),
    ("pixels", "imf"): DIGITS | dict(steps=200),
    ("latents", "scratch"): TABLE6 | dict(steps=400_000),
    ("latents", "imf"): TABLE6 | dict(steps=40_000),
}


# ---- method ------------------------------------------------------------------------------------------------------------------

def draw_times(r, mask, law="uniform", mask_prob=0.5):
    """Uniform draws r [B, 2], mask [B] -> times t, s [B] with 0 <= s <= t <= 1: two draws of the law, sorted; s := t where mask < mask_prob."""
    if law == "logitnormal":
        r = torch.sigmoid(-0.4 + torch.special.ndtri(r))                                              # iMF: logit-normal(-0.4, 1)
    t, s = r.amax(1), r.amin(1)
    return t, torch.where(mask < mask_prob, t, s)


def draw_guidance(r, law="loguniform", omega_max=8.0):
    """Uniform draws r [B, 3] -> (omega, t_min, t_max) [B, 3]: omega on [1, omega_max], t_min ~ U[0, .5], t_max ~ U[.5, 1] (iMF)."""
    if law == "loguniform":
        omega = omega_max ** r[:, 0]
    else:                                                                                             # density ~ exp(-omega), truncated
        omega = 1 - torch.log(1 - r[:, 0] * (1 - torch.exp(torch.tensor(1 - omega_max))))
    return torch.stack([omega, r[:, 1] / 2, 0.5 + r[:, 2] / 2], dim=1)


def distance(pred, target, c=1e-3, cosine=True):
    """rho of each sample [B]: pseudo-Huber sqrt(mean e^2 + c^2) - c, plus the mean over positions of 1 - cosine over channels.

    pred, target [B, C, ...]; the cosine needs C >= 2 and is left out otherwise.
    """
    d = ((pred - target).flatten(1).pow(2).mean(1) + c ** 2).sqrt() - c
    if cosine and pred.shape[1] > 1:
        d = d + (1 - F.cosine_similarity(pred, target, dim=1)).flatten(1).mean(1)
    return d


def flow_matching_loss(u, x0, eps, t):
    """Flow matching, Eq. 1: mean over elements of (u(x_t,t,t) - (eps - x0))^2 for each sample -> [B].  u: callable (x, t, s)."""
    x_t = interpolate(x0, eps, t)                                                                     # [B, C, H, W]
    return (u(x_t, t, t) - (eps - x0)).flatten(1).pow(2).mean(1)


def consistency_loss(u, x_t, t, s, v, tangent, h=0.005, exact=False, c=1e-3, cosine=True):
    """Consistency training (Eq. 6) and distillation (Eq. 16) of each sample -> [B]:  rho( u(x_t,t,s), sg( v - (t-s) du/dt ) ).

    u: callable (x [B, C, H, W], t [B], s [B]) -> average velocity.  v: target velocity and tangent: dx/dt, both [B, C, H, W];
    for Eq. 16 both are the teacher's v(x_t, t).  s <= t; rows with s = t are flow matching onto v.
    Half its gradient is AYF's EMD with weight 1/(t-s) (Eq. 35-38), and for the squared distance MeanFlow's.
    """
    du_dt = total_derivative(u, x_t, t, s, tangent, h, exact)                                         # no gradient
    target = v - expand(t - s, v) * du_dt                                                             # Eq. 37 at df/dt = 0
    return distance(u(x_t, t, s), target.detach(), c, cosine)


def imf_loss(net, x0, eps, t, s, y, guidance, h=0.005, exact=False, c=1e-3, cosine=True):
    """Improved MeanFlow of each sample -> [B]: Eq. 6 with the predicted tangent, guidance as a condition.

    net: callable (x, t, y, s, guidance) with attribute num_classes, the null label.  y [B], null where dropped; guidance [B, 3].
    The V form of iMF, || u + (t-s) sg(du/dt) - sg(v_g) ||^2, has this gradient exactly.  Its fixed point is CFG of scale omega.
    """
    guidance = torch.where((s == t)[:, None], guidance * guidance.new_tensor([1, 0, 0]) + guidance.new_tensor([0, 0, 1]), guidance)
    at_t, null = gate_guidance(guidance, t), torch.full_like(y, net.num_classes)
    x_t = interpolate(x0, eps, t)                                                                     # [B, C, H, W]
    with torch.no_grad():
        v_cond, v_uncond = net(x_t, t, y, None, at_t), net(x_t, t, null, None, None)                  # None: omega = 1 on [0, 1]
        w = torch.where(y == null, 0.0, 1 - 1 / at_t[:, 0])                                           # dropped labels: not guided
        v_g = (eps - x0) + expand(w, x0) * (v_cond - v_uncond)
    return consistency_loss(lambda x, t, s: net(x, t, y, s, guidance), x_t, t, s, v_g, v_cond, h, exact, c, cosine)


# ---- flags -------------------------------------------------------------------------------------------------------------------

def parse_args(argv=None):
    p = parser(__doc__, "scratch (fm, imf, ct), imf (cd: the network of --loss imf, trained first if need be), or a model.pt")
    p.add_argument("--loss", choices=["fm", "imf", "ct", "cd"], required=True, help="see above")
    flow_map_flags(p)
    p.add_argument("--cd_guidance", choices=["fixed", "drawn"], default="fixed", help="cd: omega and its interval fixed, or drawn as in iMF")
    loss = p.parse_known_args(argv)[0].loss
    p.set_defaults(init="imf" if loss == "cd" else "scratch")
    args = resolve(p, argv, PRESETS, f"consistency_{loss}")
    if args.loss == "cd" and args.init == "scratch":
        raise BadInput("--loss cd --init scratch: distillation needs a teacher, expected --init imf or a model.pt")
    if args.loss in ("fm", "imf") and args.init != "scratch":
        raise BadInput(f"--loss {args.loss} --init {args.init}: trains from scratch; leave --init out")
    if args.loss != "cd":
        refuse(args, ["cd_guidance"], "belongs to --loss cd")
    if args.loss == "fm":
        refuse(args, sorted(CONSISTENCY_FLAGS - {"time_law", "label_drop"}), "flow matching has no such term")
    if args.loss in ("fm", "ct") and args.init == "scratch":
        refuse(args, ["omega", "guide_to", "n_tokens", "token_block"], f"the network of --loss {args.loss} has no guidance input")
    if args.loss == "ct" or args.loss == "cd" and args.cd_guidance == "fixed":
        refuse(args, ["omega_max", "omega_law"], "omega is drawn by --loss imf and --cd_guidance drawn only")
    if args.jvp == "exact":
        refuse(args, ["fd_h"], "--jvp exact takes no difference")
    return args


def pretrained(args, loss):
    """Path of the model.pt that `consistency.py --loss LOSS` trains with the same data, size and seed; trains it now if it is not there."""
    argv = ["--loss", loss]
    for flag in ("data", "size", "seed", "n_tokens", "token_block", "device", "micro_batch", "compile"):
        if args.sources[flag] == "given":
            argv += [f"--{flag}", str(getattr(args, flag))]
    own = parse_args(argv)
    if rank() == 0:
        print(f"starts from {own.out}/model.pt, which comes from: python consistency.py {' '.join(argv)}")
    train(own)
    found = load_checkpoint(f"{own.out}/model.pt")["step"]
    if found != own.steps:
        raise BadInput(f"{own.out}/model.pt has been trained for {found} steps since, not {own.steps}: expected --init {own.out}/model.pt if that is meant")
    return f"{own.out}/model.pt"


# ---- training ----------------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    data = load_data(args.data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    teacher = None
    if args.init == "scratch":
        net = new_network(args, data, {"fm": "plain", "imf": "in_context", "ct": "decoupled", "cd": None}[args.loss]).to(device)
    else:
        path = pretrained(args, "imf") if args.init == "imf" else args.init
        net = load_network(path, data, ["in_context"])[0].to(device)
        teacher = frozen_copy(net) if args.loss == "cd" else None
    net.train()
    ema = frozen_copy(net)
    opt = NorMuon(param_groups(net), lr=args.lr)
    frozen = dict(teacher=teacher) if teacher is not None else {}
    compile_blocks(args, net, ema, *frozen.values())
    features = Features(data) if rank() == 0 else None
    rho = dict(h=args.fd_h, exact=args.jvp == "exact", c=args.huber_c, cosine=args.cosine)

    with Run(args, dict(net=net, ema=ema, opt=opt) | frozen, ema, data) as run:
        if run.step == 0 and run.main:
            run.evaluated(evaluate(ema, features, args))
        for step in run.steps():
            # -- the global batch and its random numbers
            g, rows = step_rng(args.seed, step), batch_rows(len(data.x), B, args.seed, step)
            batch = dict(x0=data.x[rows], y=data.y[rows], eps=torch.randn(B, *shape, generator=g))
            r = torch.rand(B, 2, generator=g)
            r = r[:, :1].expand(B, 2) if args.loss == "fm" else r                                     # Eq. 1: one draw of the law
            batch["t"], batch["s"] = draw_times(r, torch.rand(B, generator=g), args.time_law, args.mask_prob)
            batch["y"] = torch.where(torch.rand(B, generator=g) < args.label_drop, null, batch["y"])
            batch["guidance"] = draw_guidance(torch.rand(B, 3, generator=g), args.omega_law, args.omega_max)
            if args.loss == "cd" and args.cd_guidance == "fixed":
                batch["guidance"] = torch.tensor([[args.omega, 0.0, args.guide_to]]).expand(B, 3)

            # -- one step
            opt.zero_grad()
            total = torch.zeros((), device=device)
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    if args.loss == "fm":
                        loss = flow_matching_loss(lambda x, t, s: net(x, t, b.y), b.x0, b.eps, b.t)
                    elif args.loss == "imf":
                        loss = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y, b.guidance, **rho)
                    elif args.loss == "ct":
                        v = b.eps - b.x0
                        loss = consistency_loss(lambda x, t, s: net(x, t, b.y, s), interpolate(b.x0, b.eps, b.t), b.t, b.s, v, v, **rho)
                    else:                                                                             # Eq. 16
                        x_t, at_t = interpolate(b.x0, b.eps, b.t), gate_guidance(b.guidance, b.t)
                        guidance = torch.where((b.s == b.t)[:, None], at_t, b.guidance)
                        with torch.no_grad():
                            v = teacher(x_t, b.t, b.y, None, at_t)
                        loss = consistency_loss(lambda x, t, s: net(x, t, b.y, s, guidance), x_t, b.t, b.s, v, v, **rho)
                loss = loss.sum() / B
                loss.backward()
                total += loss.detach()
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            update_ema(ema, net, ema_decay(args, step))

            # -- log, measure, look, save
            run.log({args.loss: total}, dict(t=batch["t"], s=batch["s"]), grad_norm)
            if run.due(args.eval_every) and run.main:
                run.evaluated(evaluate(ema, features, args))
            if run.due(args.preview_every) and run.main:
                show(run.folder / f"samples_{run.step:06d}.png", [(f"step {run.step}", ema)], data, args)
            if run.due(args.save_every):
                run.save()
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
