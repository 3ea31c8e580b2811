"""Flow matching, iMF, RCGM, consistency training and distillation: FSF-DMD's starts, its L_CD and its baselines.

Paper: Kim, Lee, Park, "Distribution Matching Distillation without Fake Score Network", arXiv 2605.19256 (its
equations: [n]).  Table 2 row 3, Table 3 rows 1 and 9, Table 4 row 3, Table 5 "iMF" and "RCGM".  FID with 2 steps: the
iMF 9.10, CD from it 6.06, with random masking 4.98, CD from flow matching 5.53.

    --loss fm    flow matching [1]               E || u(x_t,t,t) - (eps - x0) ||^2, the velocity that others start from
    --loss imf   improved MeanFlow [6]           Geng et al.: guidance omega and its interval [t_min, t_max] are inputs
    --loss ct    consistency training [6]        the same without guidance, tangent eps - x0 (MeanFlow)
    --loss cd    consistency distillation [16]   target and tangent from a frozen guided teacher
    --loss rcgm  recursive consistency [66-67]   TwinFlow's base: du/dt by a step of delta and N jumps of its target EMA
    --loss isg   intra-segment guidance [61-62]  SenseFlow's: a teacher step in the segment, then the student's jump

imf, ct and cd are one regression of the average velocity u(x_t, t, s) onto its own identity,

    rho( u(x_t,t,s),  sg( v - (t-s) du/dt ) ),        du/dt along dx/dt = a, ds/dt = 0              [6, 16, 37-38]

             v (target)                                            a (tangent)
    ct       eps - x0                                              eps - x0
    imf      eps - x0 + (1 - 1/omega)(u(x_t,t,t|y,omega) - u(x_t,t,t|null,1))      u(x_t,t,t|y,omega)
    cd       v_teacher(x_t, t)                                     v_teacher(x_t, t)

and rcgm is the same with imf's v as tangent, d/dt [(t-s) u] taken as a backward difference over delta.

    python consistency.py --loss imf              # digits, 2 CPU cores: half a minute; fsf_dmd.py starts from it
    python consistency.py --loss cd --init imf    # the baseline that FSF-DMD is compared with

Cost in forward passes of one network (backward = 2), half of the rows masked: fm 3, ct 5, imf 5.5, cd and isg 5 (from
fm 6: CFG takes two), rcgm 7.  Masked rows (s = t) save imf and cd the 2 passes of du/dt, and imf one for its velocity.
"""
import gc
import shlex
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import (BadInput, accumulate, autocast, batch_rows, compile_blocks, ema_decay, frozen_copy,
                    gradient_norm, main, micro_batches, rank, setup, sync_gradients, target_decay, update_ema)
from data import load_data
from evaluate import metric_space
from model import expand, flow_map, gate_guidance, guided_map, guided_velocity, interpolate, total_derivative
from normuon import NorMuon, param_groups
from plumbing.checkpoints import load_checkpoint, starting_networks
from plumbing.flags import (checked, flow_map_flags, number, parser, rcgm_flags, refuse, refuse_idle, resolve,
                            teacher_flag)
from plumbing.run_folder import Run, check_data, check_folder, refuse_folder_of_start
from plumbing.watch import begin, finish, watch


# ---- method ----------------------------------------------------------------------------------------------------------

def draw_times(r: Tensor, law: str = "uniform", mask_prob: float = 0.5) -> tuple[Tensor, Tensor]:
    """Uniform r [B, 2] -> times t, s [B], 0 <= s <= t <= 1: two draws of the law, sorted.  [B, 1]: one, s = t.

    law: "uniform", or "logitnormal:MEAN,SCALE" (left out: iMF's -0.4,1).  Masking sets s := t in floor(B mask_prob)
    rows, evenly spread over the batch, so that shapes never change.  These keep the larger draw, as in iMF's code.
    """
    if law != "uniform":
        mean, scale = map(float, (law.removeprefix("logitnormal").lstrip(":") or "-0.4,1").split(","))
        r = torch.sigmoid(mean + scale * torch.special.ndtri(r))
    t, s = r.amax(1), r.amin(1)
    # of the first i rows floor(i p) are masked; 1e-9: 100 * 0.29 < 29
    count = (torch.arange(len(r) + 1, dtype=torch.float64) * mask_prob + 1e-9).floor()
    return t, torch.where((count.diff() > 0).to(t.device), t, s)


def draw_guidance(r: Tensor, law: str = "loguniform", omega_max: float = 8.0) -> Tensor:
    """Uniform draws r [B, 3] -> (omega on [1, omega_max], t_min ~ U[0, .5], t_max ~ U[.5, 1]) [B, 3], as iMF."""
    laws = dict(
        loguniform=omega_max ** r[:, 0],
        truncexp=1 - torch.log(1 - r[:, 0] * (1 - torch.exp(torch.tensor(1 - omega_max)))))     # ~ exp(-omega)
    return torch.stack([laws[law], r[:, 1] / 2, 0.5 + r[:, 2] / 2], dim=1)


def distance(pred: Tensor, target: Tensor, c: float = 1e-3, cosine: bool = True) -> Tensor:
    """rho of each sample [B]: pseudo-Huber sqrt(mean e^2 + c^2) - c, plus the mean over positions of 1 - cosine.

    pred, target [B, C, ...]; the cosine over channels needs C >= 2 and is left out otherwise.  view_as, here and in all
    losses, raises an error where a network returned [B, H, W] for [B, 1, H, W]: the difference would be [B, B, H, W].
    """
    huber = ((pred - target).view_as(pred).flatten(1).pow(2).mean(1) + c ** 2).sqrt() - c
    return huber + (cosine_distance(pred, target) if cosine and pred.shape[1] > 1 else 0.0)


def cosine_distance(pred: Tensor, target: Tensor) -> Tensor:
    """1 - cosine over channels, mean over positions -> [B].  By eps its slope at 0, a new network's output, is 100."""
    return (1 - F.cosine_similarity(pred, target, dim=1, eps=1e-2)).view(len(pred), -1).mean(1)


def flow_matching_loss(u: Callable, x0: Tensor, eps: Tensor, t: Tensor, cosine: bool = False) -> Tensor:
    """Flow matching, Eq. 1: mean over elements of (u(x_t,t,t) - (eps - x0))^2 for each sample -> [B].

    u: callable (x, t, s).  cosine: LightningDiT's recipe adds 1 - cosine over the channels.
    """
    v = u(interpolate(x0, eps, t), t, t)                                                # [B, C, H, W]
    loss = (v - (eps - x0)).view_as(x0).flatten(1).pow(2).mean(1)
    return loss + (cosine_distance(v, eps - x0) if cosine and x0.shape[1] > 1 else 0.0)


def consistency_loss(u: Callable, x_t: Tensor, t: Tensor, s: Tensor, v: Tensor, tangent: Tensor, h: float = 0.005,
                     exact: bool = False, c: float = 1e-3, cosine: bool = True, tangent_norm: float = 0.0) -> Tensor:
    """Consistency training (Eq. 6) and distillation (Eq. 16) of each sample -> [B].

    rho( u(x_t,t,s), sg( v - (t-s) du/dt ) ).  u: callable (x [B, C, H, W], t [B], s [B]) -> average velocity.
    v: target velocity; tangent: dx/dt; both [B, C, H, W], in Eq. 16 both the teacher's v(x_t, t).  s <= t; rows with
    s = t are flow matching onto v.  With the squared distance its gradient is MeanFlow's, and up to a factor AYF's EMD
    (arXiv 2506.14603) of weight 1/(t-s), Eq. 35-38.  imf_loss and distillation_loss are this, du/dt only where s < t.
    """
    du_dt = total_derivative(u, x_t, t, s, tangent, h, exact)                           # no gradient
    return regression(u(x_t, t, s), v - expand(t - s, v) * du_dt, c, cosine, tangent_norm)              # Eq. 6, 16


def regression(pred: Tensor, target: Tensor, c: float = 1e-3, cosine: bool = True, tangent_norm: float = 0.0) -> Tensor:
    """rho(pred, sg target) for each sample -> [B]; tangent_norm > 0: AYF's and rCM's normalised tangent, Eq. 57-58."""
    if tangent_norm:
        g = (target - pred).view_as(pred).detach()                                      # Eq. 58
        g = g / expand(g.flatten(1).norm(dim=1) + tangent_norm, g)
        return (pred - (pred + g).detach()).flatten(1).pow(2).sum(1)                    # Eq. 57, summed as there
    return distance(pred, target.detach(), c, cosine)


@torch.no_grad()
def derivative_where_needed(net: Callable, x_t: Tensor, t: Tensor, s: Tensor, y: Tensor, guidance: Tensor,
                            tangent: Tensor, h: float = 0.005, exact: bool = False,
                            moving: Tensor | None = None) -> Tensor:
    """d/dt of net(x_t, t, y, s, guidance) [B, C, H, W] in the rows with s < t; 0 in others: their factor t - s is 0."""
    moving = (s < t).nonzero()[:, 0] if moving is None else moving
    du_dt = torch.zeros_like(x_t)
    if len(moving):
        y, guidance = y[moving], guidance[moving]
        du_dt[moving] = total_derivative(lambda x, t, s: net(x, t, y, s, guidance), x_t[moving], t[moving], s[moving],
                                       tangent[moving], h, exact)
    return du_dt


@torch.no_grad()
def guided_target(net: Callable, x_t: Tensor, v: Tensor, v_cond: Tensor, t: Tensor, y: Tensor,
                  guidance: Tensor) -> Tensor:
    """iMF's guided velocity v + (1 - 1/omega)(v_cond - v_uncond) [B, C, H, W].  Its fixed point is CFG of scale omega.

    net: callable (x, t, y, s, guidance) with attribute num_classes, the null label.  v = eps - x0; v_cond: of net.
    Rows with a dropped label are not guided.  TwinFlow's "enhancement" of RCGM has a constant for 1 - 1/omega.
    """
    omega, null = gate_guidance(guidance, t)[:, 0], torch.full_like(y, net.num_classes)
    v_uncond = net(x_t, t, null, None, None)                                            # None: omega = 1 on [0, 1]
    w = torch.where(y == null, 0.0, 1 - 1 / omega)
    return v + expand(w, v) * (v_cond - v_uncond)


def whole_interval(guidance: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """iMF's rule for guidance [B, 3]: rows with s = t, which learn the velocity, ignore the interval."""
    everywhere = torch.stack([guidance[:, 0], torch.zeros_like(t), torch.ones_like(t)], dim=1)    # (omega, 0, 1)
    return torch.where((s == t)[:, None], everywhere, guidance)


def imf_loss(net: Callable, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, y: Tensor, guidance: Tensor,
             guided: bool = True, h: float = 0.005, exact: bool = False, moving: Tensor | None = None, **rho) -> Tensor:
    """Improved MeanFlow of each sample -> [B]: Eq. 6 with the predicted tangent, guidance as a condition.

    net: see guided_target.  y [B], null where dropped; guidance [B, 3]; guided=False: every omega is 1, which saves a
    pass; h, exact: see total_derivative; moving: the rows with s < t, None: found here; rho: options of `regression`.
    The V form of iMF, u + (t-s) sg(du/dt) against sg(v_g), has this gradient exactly, but for the cosine of rho.
    """
    guidance = whole_interval(guidance, t, s)
    moving = (s < t).nonzero()[:, 0] if moving is None else moving
    x_t, v = interpolate(x0, eps, t), eps - x0                                          # [B, C, H, W]
    pred = net(x_t, t, y, s, guidance)
    with torch.no_grad():
        v_cond = pred.clone()                                                           # where s = t it is pred
        if len(moving):
            v_cond[moving] = net(x_t[moving], t[moving], y[moving], None, gate_guidance(guidance[moving], t[moving]))
        if guided:
            v = guided_target(net, x_t, v, v_cond, t, y, guidance)
    du_dt = derivative_where_needed(net, x_t, t, s, y, guidance, v_cond, h, exact, moving)
    return regression(pred, v - expand(t - s, v) * du_dt, **rho)


def distillation_loss(net: Callable, teacher: Callable, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, y: Tensor,
                      guidance: Tensor, channels: int | None = None, h: float = 0.005, exact: bool = False,
                      moving: Tensor | None = None, **rho) -> Tensor:
    """Consistency distillation of each sample -> [B]: Eq. 16 from a frozen guided teacher (model.guided_velocity).

    net: a LightningDiT flow map; y [B], null where dropped; guidance [B, 3]; the rest as in imf_loss.
    """
    x_t = interpolate(x0, eps, t)                                                       # [B, C, H, W]
    with torch.no_grad():
        v = guided_velocity(teacher, x_t, t, y, guidance, channels)
    guidance = torch.where((s == t)[:, None], gate_guidance(guidance, t), guidance)     # s = t: the guidance of v
    du_dt = derivative_where_needed(lambda x, t, y, s, guidance: guided_map(net, x, t, s, y, guidance), x_t, t, s, y,
                                    guidance, v, h, exact, moving)
    return regression(guided_map(net, x_t, t, s, y, guidance), v - expand(t - s, v) * du_dt, **rho)


def rcgm_loss(u: Callable, u_ema: Callable, x_t: Tensor, t: Tensor, s: Tensor, v: Tensor, delta: float = 0.01,
              N: int = 2, clamp: float = 1.0, c: float = 1e-3, cosine: bool = True) -> Tensor:
    """Recursive consistency (RCGM) of each sample, Eq. 66-67 -> [B]: (t-s) u(x_t,t,s) = delta v + I.

    I: the sum of (a - b) u_ema(x, a, b) over N jumps from t - delta to s.  u, u_ema: callables (x, t, s), no gradient
    in the second; v [B, C, H, W]: (guided) velocity at (x_t, t).  As TwinFlow's code, u is regressed onto u - clamp(e),
    e = ((t-s) u - I) / delta - v, which for N = 1, u_ema = u and no clamp is MeanFlow's residual up to O(delta).
    Where t - s < delta, e = u - v: flow matching.  clamp: on e; 0: off.  In bf16, as there, e is off by 8% (digits).
    """
    with torch.no_grad():
        t_next = torch.maximum(t - delta, s)
        x, I = x_t - delta * v, torch.zeros_like(x_t)                                   # Eq. 66: a step along v
        for i in range(N):
            a = t_next + (s - t_next) * (i / N)
            b = t_next + (s - t_next) * ((i + 1) / N)
            move = expand(a - b, x) * u_ema(x, a, b)
            x, I = x - move, I + move
    pred = u(x_t, t, s)                                                                 # [B, C, H, W]
    v_u = (expand(t - s, x_t) * pred - I) / delta                                       # Eq. 66 solved for v
    e = (torch.where(expand(t - s < delta, x_t), pred, v_u) - v).detach()
    e = e.clamp(-clamp, clamp) if clamp else e
    return distance(pred, pred.detach() - e, c, cosine)                                 # Eq. 67


def guided_rcgm_loss(net: Callable, target_net: Callable, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, y: Tensor,
                     guidance: Tensor, guided: bool, delta: float, N: int, clamp: float, **rho) -> Tensor:
    """RCGM on the data of each sample -> [B], guided as iMF is, with the target network's velocities.

    target_net: an EMA of net with a short memory.  The others as in imf_loss; delta, N, clamp, rho: of rcgm_loss.
    """
    guidance = whole_interval(guidance, t, s)
    x_t, v = interpolate(x0, eps, t), eps - x0                                          # [B, C, H, W]
    if guided:
        with torch.no_grad():
            v_cond = target_net(x_t, t, y, None, gate_guidance(guidance, t))
        v = guided_target(target_net, x_t, v, v_cond, t, y, guidance)
    return rcgm_loss(lambda x, t, s: net(x, t, y, s, guidance), lambda x, t, s: target_net(x, t, y, s, guidance),
                     x_t, t, s, v, delta, N, clamp, **rho)


def isg_loss(u: Callable, teacher: Callable, x_t: Tensor, t: Tensor, s: Tensor, r: Tensor, c: float = 1e-3) -> Tensor:
    """Intra-segment guidance (SenseFlow) of each sample, Eq. 61-62 -> [B].

    The jump t -> s must equal a teacher step t -> r and a jump r -> s.  u: callable (x, t, s); teacher: callable (x, t)
    -> velocity; s < r < t [B].  Pseudo-Huber of each element, as its code.
    """
    with torch.no_grad():
        x_r = x_t - expand(t - r, x_t) * teacher(x_t, t)                                # Eq. 61
        target = flow_map(u, x_r, r, s)
    error = flow_map(u, x_t, t, s) - target                                             # Eq. 62
    return ((error ** 2 + c ** 2).sqrt() - c).view_as(x_t).flatten(1).mean(1)


# ---- flags -----------------------------------------------------------------------------------------------------------

# pixels: under 24 a side, as the digits.  images: 24 or more, as Fashion-MNIST.  RESULTS.md says which were searched.
# latents: the paper's Table 6.  Its lr is lost in our copy: 6e-4 is a guess.  CD's steps go past its best.
PRESETS = {
    ("pixels", "scratch"): dict(                    # mostly s = t: the velocity, which teaches, is ahead of the map
        size="tiny", steps=400, lr=6e-3, mask_prob=0.9, omega=1.0, guide_to=1.0, omega_max=1.0, eval_every=200),
    ("pixels", "imf"): dict(
        size="tiny", steps=200, lr=2e-3, omega=1.0, guide_to=1.0, omega_max=1.0, eval_every=100),
    ("pixels", "fm"): dict(
        size="tiny", steps=200, lr=1.5e-3, omega=1.0, guide_to=1.0, omega_max=1.0, eval_every=100),
    ("images", "scratch"): dict(
        size="small", steps=1500, lr=4e-3, mask_prob=0.9, omega=1.5, guide_to=1.0, omega_max=4.0, eval_every=500),
    ("images", "imf"): dict(                        # 2,250 forward passes, as FSF-DMD
        size="small", steps=450, lr=4e-3, omega=1.5, guide_to=1.0, omega_max=4.0, eval_every=150),
    ("images", "fm"): dict(                         # 2,250 forward passes, as FSF-DMD
        size="small", steps=375, lr=8e-3, omega=1.5, guide_to=1.0, omega_max=4.0, eval_every=125),
    ("latents", "scratch"): dict(
        size="B/1", steps=400_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16",
        omega=6.0, guide_to=0.9, omega_max=8.0, save_every=5_000, eval_every=5_000, preview_every=5_000),
    ("latents", "imf"): dict(
        size="B/1", steps=40_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16",
        omega=6.0, guide_to=0.9, cd_guidance="drawn", omega_max=8.0, save_every=500),
    ("latents", "fm"): dict(
        size="B/1", steps=20_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16",
        omega=6.0, guide_to=0.9, cfg_channels=3, save_every=500),
}
PRESETS_OF_LOSS = {                                  # from scratch, two losses have rows of their own
    "fm": {
        ("pixels", "scratch"): dict(
            size="tiny", steps=400, lr=1.2e-2, cosine=0, omega=1.0, guide_to=1.0),
        ("images", "scratch"): dict(
            size="small", steps=3000, lr=4e-3, cosine=0, omega=1.5, guide_to=1.0),
        ("latents", "scratch"): dict(                                                   # LightningDiT's recipe
            size="B/1", steps=400_000, batch_size=128, lr=6e-4, ema=0.99995, precision="bf16",
            time_law="logitnormal:0,1", cosine=1, omega=6.0, guide_to=0.9, cfg_channels=3, save_every=5_000,
            eval_every=5_000, preview_every=5_000),
    },
    "rcgm": {
        ("pixels", "scratch"): dict(
            size="tiny", steps=400, lr=2.4e-2, target_ema=0.5, delta=0.05, omega=1.0, guide_to=1.0, omega_max=1.0,
            eval_every=100),
        ("images", "scratch"): dict(
            size="small", steps=1500, lr=1.6e-2, target_ema=0.5, delta=0.05, omega=1.5, guide_to=1.0, omega_max=4.0,
            eval_every=500),
    },
}
CONDITIONING = dict(fm="plain", ct="decoupled", imf="in_context", rcgm="in_context")    # from scratch
# The losses that read a flag: with any other it would do nothing, and is refused.
READ_BY = {
    ("ct", "imf", "cd"): "jvp fd_h tangent_norm",
    ("ct", "imf", "cd", "rcgm"): "mask_prob",
    ("fm", "ct", "imf", "cd", "rcgm"): "time_law cosine",
    ("ct", "imf", "cd", "rcgm", "isg"): "huber_c",
    ("fm", "imf", "cd", "rcgm", "isg"): "omega guide_to",
    ("imf", "cd", "rcgm", "isg"): "omega_max omega_law n_tokens token_block",
    ("fm", "cd", "isg"): "cfg_channels",
    ("cd", "isg"): "cd_guidance teacher",
    ("rcgm",): "target_ema delta order clamp",
    ("isg",): "M",
}


def parse_args(argv=None):
    p = parser(__doc__, "scratch (fm, imf, ct, rcgm), imf or fm (cd, isg: the network of that --loss, trained first "
               "if need be), or a model.pt")
    flow_map_flags(p)
    teacher_flag(p)
    add = p.method.add_argument
    add("--loss", choices=["fm", "imf", "ct", "cd", "rcgm", "isg"], required=True, help="see above")
    add("--cd_guidance", choices=["fixed", "drawn"], default="fixed",
        help="cd, isg: omega and its interval fixed, or drawn as in iMF")
    add("--tangent_norm", type=number(float, 0), default=0.0,
        help="constant of AYF's and rCM's tangent normalisation (theirs: 0.1); 0: off, the paper found it hurts")
    rcgm_flags(p)
    add("--M", type=number(int, 1, 1000), default=2, help="isg: segments of [0, 1]")
    loss = p.parse_known_args(argv)[0].loss
    distils = loss in ("cd", "isg")
    p.set_defaults(init="imf" if distils else "scratch")
    args = resolve(p, argv, PRESETS | PRESETS_OF_LOSS.get(loss, {}), __file__)
    if distils == (args.init == "scratch"):
        what = "distillation needs a teacher: imf, fm or a model.pt" if distils else "it trains from scratch"
        raise BadInput(f"--loss {loss} --init {args.init}: {what}")
    for losses, names in READ_BY.items():
        if loss not in losses:
            refuse(args, names.split(), f"belongs to --loss {' or '.join(losses)}")
    refuse_idle(args)
    if args.tangent_norm:
        refuse(args, ["huber_c", "cosine"], "--tangent_norm takes the squared distance")
    args.sampler = "euler" if loss == "fm" else "flow_map"
    return checked(args)


def pretrained(args, loss):
    """Path of the model.pt of `consistency.py --loss LOSS` with the same data, size and seed; trained if not there."""
    argv = ["--loss", loss]
    for flag in "data vae size seed precision n_tokens token_block device micro_batch compile".split():
        if args.sources.get(flag) == "given":
            argv += [f"--{flag}", str(getattr(args, flag))]
    own = parse_args(argv)
    own.wait, path = True, f"{own.out}/model.pt"                # wait: for another run that is training it
    refuse_folder_of_start(args, own)
    if rank() == 0:
        print(f"starts from {path}, of {own.steps} steps: python {own.script}.py {shlex.join(argv)}")
    train(own)
    gc.collect()                                                # a compiled network is freed here alone
    found = load_checkpoint(path)["step"]
    if found != own.steps:
        raise BadInput(f"{path} has been trained for {found} steps, not {own.steps}: pass --init {path} if you mean it")
    return path


# ---- training --------------------------------------------------------------------------------------------------------

def train(args):
    device = setup(args)
    check_folder(args)
    data = load_data(args.data)
    check_data(args, data)
    B, shape, null = args.batch_size, data.x.shape[1:], data.num_classes

    net, teacher = starting_networks(args, data, device, pretrained, CONDITIONING.get(args.loss))
    ema = frozen_copy(net)
    target_net = frozen_copy(net) if args.loss == "rcgm" else None              # RCGM's own EMA, of a short memory
    opt = NorMuon(param_groups(net), lr=args.lr)
    compile_blocks(args, net, ema, teacher, target_net)
    state = dict(net=net, ema=ema, opt=opt, teacher=teacher, target=target_net)
    features = metric_space(data, args)
    channels = args.cfg_channels                                                # of a plain teacher's CFG; 0: all
    rho = dict(c=args.huber_c, cosine=args.cosine)
    options = dict(h=args.fd_h, exact=args.jvp == "exact", tangent_norm=args.tangent_norm, **rho)
    guided = args.omega_max > 1                                                 # omega is drawn, else it is always 1
    fixed = torch.tensor([[args.omega, 0.0, args.guide_to]], device=device)     # (omega, t_min, t_max) where not drawn

    def u(y, guidance=None):
        return lambda x, t, s: guided_map(net, x, t, s, y, guidance)

    def v_teacher(y, guidance):
        return lambda x, t: guided_velocity(teacher, x, t, y, guidance, channels)

    def draw(g, index):
        """Global batch number `index` and its random numbers, drawn from g (common.Stream)."""
        rows = batch_rows(len(data.x), B, args.seed, index)
        batch = dict(x0=data.x[rows], y=data.y[rows], eps=g.normal(B, *shape))
        r = g.uniform(B, 1 if args.loss == "fm" else 2)                         # Eq. 1: one draw of the law
        batch["t"], batch["s"] = draw_times(r, args.time_law, args.mask_prob)
        batch["y_drop"] = torch.where(g.uniform(B) < args.label_drop, null, batch["y"])  # on data, never on samples
        if args.loss == "isg":                                                  # segment [s, t], r inside it
            batch["t"] = 1 - g.integers(args.M, B) / args.M
            batch["s"] = batch["t"] - 1 / args.M
            batch["r"] = batch["s"] + (0.1 + 0.8 * g.uniform(B)) / args.M       # at M = 2 SenseFlow's 0.05 at both ends
        batch["guidance"] = fixed.expand(B, 3)
        if args.cd_guidance == "drawn" or not teacher:          # without a teacher: the loss of iMF, which draws it
            drawn = draw_guidance(g.uniform(B, 3), args.omega_law, args.omega_max)
            batch["guidance"] = whole_interval(drawn, batch["t"], batch["s"])
        return batch

    with Run(args, state, ema, data) as run:
        begin(run, features)
        for step, batch in run.steps(draw):
            total = {}

            # -- update
            for b in micro_batches(batch, args, device):
                with autocast(args, device):
                    if args.loss == "fm":                                       # Eq. 1
                        loss = flow_matching_loss(u(b.y_drop), b.x0, b.eps, b.t, args.cosine)
                    elif args.loss == "imf":                                    # Eq. 6
                        loss = imf_loss(net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, guided, moving=b.moving,
                                        **options)
                    elif args.loss == "ct":                                     # Eq. 6 without guidance
                        x_t, v = interpolate(b.x0, b.eps, b.t), b.eps - b.x0
                        loss = consistency_loss(u(b.y_drop), x_t, b.t, b.s, v, v, **options)
                    elif args.loss == "cd":                                     # Eq. 16
                        loss = distillation_loss(net, teacher, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance,
                                                 channels, moving=b.moving, **options)
                    elif args.loss == "rcgm":                                   # Eq. 66-67
                        loss = guided_rcgm_loss(net, target_net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, guided,
                                                args.delta, args.order, args.clamp, **rho)
                    else:                                                       # Eq. 61-62
                        x_t = interpolate(b.x0, b.eps, b.t)
                        loss = isg_loss(u(b.y_drop, b.guidance), v_teacher(b.y_drop, b.guidance),
                                        x_t, b.t, b.s, b.r, args.huber_c)
                (loss.sum() / B).backward()
                accumulate(total, B, **{args.loss: loss})
            sync_gradients(net)
            grad_norm = gradient_norm(net)
            opt.step()
            opt.zero_grad()                                                     # frees the gradients' memory
            update_ema(ema, net, ema_decay(args, step))
            if target_net:
                update_ema(target_net, net, target_decay(args, step))

            # -- log, measure, look, save
            run.log(total, batch, grad_norm)
            watch(run, features, teacher)
        finish(run, features)


if __name__ == "__main__":
    main(train, parse_args)
