"""LightningDiT as a velocity field and as a flow map, and the calculus of flow maps.

Convention of every file here (the opposite of LightningDiT's own code):

    t = 0 data, t = 1 noise         x_t = (1 - t) x0 + t eps          v = dx_t/dt = eps - x0
    x0 = x_t - t v                  eps = x_t + (1 - t) v             score = -(x_t + (1 - t) v) / t
    flow map                        f(x_t, t, s) = x_t - (t - s) u(x_t, t, s),   0 <= s <= t <= 1
    u(x, t, s)                      average velocity from t down to s; u(x, t, t) is the instantaneous velocity v(x, t)

The network.  LightningDiT (Yao et al., arXiv 2501.01423; code hustvl/LightningDiT, MIT): a DiT with RMSNorm, QK-norm,
2-D RoPE, SwiGLU, adaLN-zero and sin-cos positions.  Its plain state dict has the official key names.  Three
conditionings:

    plain        v(x, t | y)                       130,557,728 parameters at B/1
    decoupled    u(x, t, s | y): the first 2/3 of the blocks (rounded down) see t, the others and the final layer see s
                 (Decoupled MeanFlow, DMF, Lee et al.).  No new parameters; at s = t it is the plain network, so a
                 flow-matching checkpoint becomes a flow map.
    in_context   u(x, t, s | y, omega, t_min, t_max): the augmented backbone of FSF-DMD (arXiv 2605.19256, App. B.1),
                 133,783,328 at B/1: each of the six inputs becomes n tokens, prepended after block k.  omega is the CFG
                 scale and [t_min, t_max] the times where it acts (improved MeanFlow), so guidance costs no second pass.

Shapes: B batch, C channels, H x W pixels, P patch size, N = (H/P)(W/P) tokens, D width, n tokens per condition.
t, s: [B] tensors or plain floats.  Eq. n and Table n: of arXiv 2605.19256.  This file needs only torch; paste it alone.
"""
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# B/1, L/1 and XL/1 are LightningDiT's; ours: `tiny` for 8 x 8 digits, `small` for 24 to 64 pixels, `medium` on a GPU.
SIZES = {
    "tiny": dict(depth=4, hidden_size=48, num_heads=3, patch_size=2, n_tokens=1, token_block=2),
    "small": dict(depth=4, hidden_size=96, num_heads=3, patch_size=4, n_tokens=1, token_block=2),
    "medium": dict(depth=6, hidden_size=192, num_heads=3, patch_size=2, n_tokens=1, token_block=2),
    "B/1": dict(depth=12, hidden_size=768, num_heads=12, patch_size=1),
    "L/1": dict(depth=24, hidden_size=1024, num_heads=16, patch_size=1),
    "XL/1": dict(depth=28, hidden_size=1152, num_heads=16, patch_size=1),
}
CONDITIONINGS = ("plain", "decoupled", "in_context")


# ---- The calculus: small pure functions on tensors and callables -----------------------------------------------------

def expand(t: Tensor | float, x: Tensor) -> Tensor | float:
    """Time t ([B] or float) shaped to broadcast against x [B, ...]."""
    return t.view(-1, *[1] * (x.ndim - 1)) if torch.is_tensor(t) and t.ndim else t


def interpolate(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x0 + t eps.  x0, eps [B, ...], t [B] or float in [0, 1]."""
    t = expand(t, x0)
    return (1 - t) * x0 + t * eps


def v_to_x0(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Denoised sample x0 = x_t - t v."""
    return x - expand(t, x) * v


def x0_to_v(x: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
    """Velocity v = (x_t - x0) / t, the inverse of v_to_x0.  t > 0."""
    return (x - x0) / expand(t, x)


def v_to_score(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """Score of p_t from its velocity, Eq. 26-32: s(x, t) = -(x + (1 - t) v(x, t)) / t.  t > 0."""
    t = expand(t, x)
    return -(x + (1 - t) * v) / t


def cfg(v_cond: Tensor, v_uncond: Tensor, w: Tensor | float, channels: int | None = None) -> Tensor:
    """Classifier-free guidance v_uncond + w (v_cond - v_uncond): w = 1 is conditional, w = 0 unconditional.

    w: float or [B].  channels: guide only the first `channels` channels, the others stay conditional (LightningDiT's 3
    of 32, inherited from DiT; in the paper that takes the plain teacher's FID from 12.44 to 3.79); None or 0: all.
    """
    guided = v_uncond + expand(w, v_cond) * (v_cond - v_uncond)
    if not channels:
        return guided
    return torch.cat([guided[:, :channels], v_cond[:, channels:]], dim=1)


def shift_time(r: Tensor, k: float) -> Tensor:
    """tau = k r / (1 + (k - 1) r) maps [0, 1] onto itself; k > 1 moves it toward noise (Table 8)."""
    return k * r / (1 + (k - 1) * r)


def flow_map(u: Callable, x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
    """f(x_t, t, s) = x_t - (t - s) u(x_t, t, s), Eq. 5: jump along the trajectory from time t to time s.

    u: callable (x, t, s).
    """
    return x - expand(t - s, x) * u(x, t, s)


@torch.no_grad()
def total_derivative(u: Callable, x: Tensor, t: Tensor, s: Tensor, tangent: Tensor, h: float = 0.005,
                     exact: bool = False) -> Tensor:
    """d/dt u(x_t, t, s) along a = dx/dt (tangent), ds/dt = 0: a . grad_x u + d_t u.  -> shape of x, without gradient.

    u: callable (x [B, ...], t [B], s [B]).  h: step of the central difference [u(x+ha, t+h, s) - u(x-ha, t-h, s)] / 2h.
    Its error is O(h^2); rounding adds O(1/h): at B/1 and h = 0.005 it is 0.98 of the derivative in bf16 (so autocast
    is off here) and 0.09 in TF32 (results/gpu.md).  t +- h may leave [0, 1]: the network is smooth in time.
    exact: torch.func.jvp (flash attention has no forward derivative).
    """
    with torch.autocast(x.device.type, enabled=False):
        if exact:
            with sdpa_kernel(SDPBackend.MATH):
                directions = (tangent.to(x.dtype), torch.ones_like(t), torch.zeros_like(s))
                return torch.func.jvp(u, (x, t, s), directions)[1]
        return (u(x + h * tangent, t + h, s) - u(x - h * tangent, t - h, s)) / (2 * h)


@torch.no_grad()
def sample(u: Callable, eps: Tensor, y: Tensor, steps: int) -> Tensor:
    """Few-step sampler: x <- f(x, t_i, t_{i+1}) on the uniform grid t_i = 1 - i / steps, deterministic.

    u: callable (x, t, y, s), y before s as in a network's forward: a decoupled or in_context LightningDiT.
    eps [B, C, H, W] noise, y [B] labels -> samples at t = 0, unguided unless u is guided (`guided_map`).
    """
    x, grid = eps, torch.linspace(1, 0, steps + 1, device=eps.device)
    for t, s in zip(grid[:-1], grid[1:]):
        t, s = t.expand(len(x)), s.expand(len(x))
        x = x - expand(t - s, x) * u(x, t, y, s)
    return x


@torch.no_grad()
def euler_sample(v: Callable, eps: Tensor, y: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Euler sampler of an instantaneous velocity, Eq. 2: x_{i+1} = x_i - (t_i - t_{i+1}) v(x_i, t_i, y).

    v: callable (x, t, y).  shift > 1 spends more of the steps near noise (LightningDiT: 1 / 0.3).
    """
    x, grid = eps, shift_time(torch.linspace(1, 0, steps + 1, device=eps.device), shift)
    for t, s in zip(grid[:-1], grid[1:]):
        t, s = t.expand(len(x)), s.expand(len(x))
        x = x - expand(t - s, x) * v(x, t, y)
    return x


def backward_simulation(u: Callable, z: Tensor, k: int, M: int, noise: str = "fresh") -> Tensor:
    """DMD2's rollout, Eq. 17 -> x_hat [B, ...]: k jumps to 0 without gradient, each renoised, then one with gradient.

    u: callable (x, t, s), times as floats.  z [B, M, ...]: fresh noise for every step; real data never enter.
    k: one number for the batch, 0 .. M-1 (else ValueError); with M - 1 it is the M-step sampler of DMD2 and SiD.
    noise: what a jump's x0 is noised with: fresh noise, the noise that the jump implies (ddim), or the first (fixed).
    """
    if not 0 <= k < M or z.shape[1] != M or noise not in ("fresh", "ddim", "fixed"):
        raise ValueError(f"{k=}, {noise=}, z {list(z.shape)}: expected k < {M}, fresh, ddim or fixed, [B, {M}, ..]")
    x = z[:, 0]
    for i in range(k):
        t, s = 1 - i / M, 1 - (i + 1) / M
        with torch.no_grad():
            x0 = x - t * u(x, t, 0.0)
            back = dict(fresh=z[:, i + 1], ddim=(x - (1 - t) * x0) / t, fixed=z[:, 0])
            x = (1 - s) * x0 + s * back[noise]
    t = 1 - k / M
    return x - t * u(x, t, 0.0)


def gate_guidance(guidance: Tensor, t: Tensor) -> Tensor:
    """Guidance (omega, t_min, t_max) [B, 3] or [1, 3] at one instant t [B]: omega inside the interval, 1 outside.

    The returned interval is [0, 1]: iMF trains its rows with s = t on no other, so its velocity must be asked with it.
    """
    omega, t_min, t_max = guidance.unbind(1)
    omega = torch.where((t >= t_min) & (t <= t_max), omega, 1.0)
    return torch.stack([omega, torch.zeros_like(omega), torch.ones_like(omega)], dim=1)


def guided_velocity(net: nn.Module, x: Tensor, t: Tensor, y: Tensor, guidance: Tensor,
                    channels: int | None = None) -> Tensor:
    """Guided instantaneous velocity v(x_t, t | y) of a LightningDiT -> [B, C, H, W].

    t [B], guidance [B, 3] or [1, 3], channels: see `cfg`.  in_context: omega is an input, one forward pass.  plain:
    CFG, two passes.  decoupled: one pass; guidance, if any, was distilled into its weights.
    """
    if net.conditioning == "in_context":
        return net(x, t, y, None, gate_guidance(guidance, t))
    v = net(x, t, y)
    if net.conditioning == "decoupled":
        return v
    v_uncond = net(x, t, torch.full_like(y, net.num_classes))
    return cfg(v, v_uncond, gate_guidance(guidance, t)[:, 0], channels)


def guided_map(net: nn.Module, x: Tensor, t: Tensor | float, s: Tensor | float, y: Tensor,
               guidance: Tensor | None) -> Tensor:
    """Average velocity u(x_t, t, s | y) of a flow map.

    guidance [B, 3] or [1, 3], None: no guidance.  in_context: it is an input.  decoupled: not used, guidance is in the
    weights.  plain: s is not used; in flow matching s = t, and the student of DMD2 and SiD only ever jumps to 0.
    """
    if net.conditioning == "plain":
        return net(x, t, y)
    return net(x, t, y, s, guidance if net.conditioning == "in_context" else None)


def fixed_guidance(omega, t_min, t_max, like):
    """The same (omega, t_min, t_max) for every row -> [B, 3] for a batch like `like`.  omega >= 1."""
    return torch.stack([torch.full((len(like),), float(v), device=like.device) for v in (omega, t_min, t_max)], dim=1)


# ---- The network -----------------------------------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, statistics in at least float32."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def normalize(self, x):
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    def forward(self, x):
        return self.normalize(x) * self.weight.to(x.dtype)


class TimestepEmbedder(nn.Module):
    """A time -> [B, D].  Not times 1000: the fastest feature is cos(t), so d/dt stays O(1)."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def features(self, t):                                                              # [B] -> [B, 256], as DiT's
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=t.dtype) / 128)
        angle = t[:, None] * freqs
        return torch.cat([angle.cos(), angle.sin()], dim=-1)                            # cos first

    def forward(self, t):
        return self.mlp(self.features(t))


class LabelEmbedder(nn.Module):
    """Class label -> [B, D]; row num_classes is the null class.  Labels are dropped by the caller, never in here."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y):
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    """[B, C, H, W] -> [B, N, D], tokens in row-major order."""

    def __init__(self, patch_size, in_channels, dim):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()                     # one layout for all blocks


class RotaryEmbedding(nn.Module):
    """2-D RoPE of EVA-02: half of a head's dims turns with the row, half with the column; pairs are neighbours."""

    def __init__(self, head_dim, grid):
        super().__init__()
        half = head_dim // 2
        freqs = 10000 ** (-torch.arange(0, half, 2).float() / half)                     # [half / 2]
        angle = (torch.arange(grid).float()[:, None] * freqs).repeat_interleave(2, dim=-1)  # [grid, half]
        rows = angle[:, None].expand(grid, grid, half)
        cols = angle[None, :].expand(grid, grid, half)
        angle = torch.cat([rows, cols], dim=-1).reshape(grid * grid, head_dim)          # [N, head_dim]
        self.register_buffer("freqs_cos", angle.cos())
        self.register_buffer("freqs_sin", angle.sin())


def rotate(q, cos, sin):
    """Turn each neighbouring pair (a, b) of q [B, heads, N, head_dim] by its angle: (a cos - b sin, b cos + a sin)."""
    a, b = q.unflatten(-1, (-1, 2)).unbind(-1)
    swapped = torch.stack([-b, a], dim=-1).flatten(-2)
    return q * cos.to(q.dtype) + swapped * sin.to(q.dtype)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_norm, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(dim // num_heads) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin):                                                     # [B, N, D]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))                        # [B, N, 3, heads, head_dim]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # each [B, heads, N, head_dim]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden, bias=True):
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def modulate(norm, x, shift, scale):
    """norm(x) * (1 + scale) + shift, where the norm's gain goes into the scale [B, D]: one pass over x [B, N, D]."""
    gain = norm.weight * (1 + scale)
    return torch.addcmul(shift[:, None], norm.normalize(x), gain[:, None])              # addcmul(a, b, c) = a + b c


class Block(nn.Module):
    """adaLN-zero transformer block: shift, scale and gate of both branches come from the condition c [B, D]."""

    def __init__(self, dim, num_heads, mlp_ratio, qk_norm):
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm)
        self.norm2 = RMSNorm(dim)
        self.mlp = SwiGLU(dim, int(2 / 3 * int(dim * mlp_ratio)))                       # 2048 for D = 768
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, cos, sin):                                                  # [B, N, D], [B, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = torch.addcmul(x, gate1[:, None], self.attn(modulate(self.norm1, x, shift1, scale1), cos, sin))
        return torch.addcmul(x, gate2[:, None], self.mlp(modulate(self.norm2, x, shift2, scale2)))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = RMSNorm(dim)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final, x, shift, scale))


def sincos_positions(dim, grid):
    """DiT's fixed 2-D positions [1, N, D]: half of the dims encodes the COLUMN (MAE's meshgrid order), half the row."""
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * omega                    # [grid, D / 4]
    table = torch.cat([angle.sin(), angle.cos()], dim=-1)                               # [grid, D / 2]
    rows = table[:, None].expand(grid, grid, -1)
    cols = table[None, :].expand(grid, grid, -1)
    return torch.cat([cols, rows], dim=-1).reshape(1, grid * grid, dim).float()


class LightningDiT(nn.Module):
    """LightningDiT(size="B/1", conditioning="plain"), or explicit dims as keywords, which override the preset's.

    forward(x, t, y, s=None, guidance=None) -> velocity [B, C, H, W]; y before s, as a plain network takes (x, t, y)
        x [B, C, H, W]; t, s times in [0, 1] (TwinFlow's fake side: negative), [B] or float; y [B] int64 labels,
        num_classes = null; s=None means s = t, the instantaneous velocity; guidance [B, 3] or [1, 3] = (omega >= 1,
        t_min, t_max), in_context only, None = (1, 0, 1), no guidance.
    Raises ValueError on an unknown size, conditioning or dim, dims that are 0 or do not divide, images of another size,
    s with a plain network, guidance without in_context.
    n_tokens, token_block: n and k of in_context (the paper's are lost; 16 and 4 give its parameter count).
    `net.config` rebuilds it: LightningDiT(**net.config).  Weights in float32 or float64; bf16 comes by autocast.
    """

    def __init__(self, size: str = "B/1", conditioning: str = "plain", *, input_size: int = 16, in_channels: int = 32,
                 num_classes: int = 1000, qk_norm: bool = True, mlp_ratio: float = 4.0, **dims: int):
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size {size!r}: expected one of {', '.join(SIZES)}")
        if conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning {conditioning!r}: expected one of {', '.join(CONDITIONINGS)}")
        dims = {"n_tokens": 16, "token_block": 4} | SIZES[size] | dims
        unknown = set(dims) - {"depth", "hidden_size", "num_heads", "patch_size", "n_tokens", "token_block"}
        if unknown:
            raise ValueError(f"unknown dims {sorted(unknown)}")
        self.config = dict(size=size, conditioning=conditioning, input_size=input_size, in_channels=in_channels,
                           num_classes=num_classes, qk_norm=qk_norm, mlp_ratio=mlp_ratio, **dims)
        depth, D, heads, patch = dims["depth"], dims["hidden_size"], dims["num_heads"], dims["patch_size"]
        sizes = (input_size, in_channels, num_classes, mlp_ratio, depth, D, heads, patch)
        if min(sizes) <= 0 or input_size % patch or D % (4 * heads):
            raise ValueError(f"dims must be positive, input_size {input_size} a multiple of patch_size {patch}, "
                             f"and hidden_size {D} of 4 x num_heads {heads}")
        self.conditioning, self.num_classes = conditioning, num_classes
        self.patch_size, self.in_channels, self.grid = patch, in_channels, input_size // patch
        self.switch = 2 * depth // 3            # decoupled: blocks before it see t, the others s (DMF's two thirds)

        self.x_embedder = PatchEmbed(patch, in_channels, D)
        self.t_embedder = TimestepEmbedder(D)
        self.y_embedder = LabelEmbedder(num_classes, D)
        self.pos_embed = nn.Parameter(sincos_positions(D, self.grid), requires_grad=False)
        self.feat_rope = RotaryEmbedding(D // heads, self.grid)
        self.blocks = nn.ModuleList(Block(D, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(D, patch * patch * in_channels)
        if conditioning == "in_context":
            self.n_tokens, self.token_block = dims["n_tokens"], dims["token_block"]
            if not 0 <= self.token_block < depth or self.n_tokens < 1:
                raise ValueError(f"token_block {self.token_block} must lie in 0..{depth - 1} and n_tokens be positive")
            self.s_embedder, self.omega_embedder = TimestepEmbedder(D), TimestepEmbedder(D)
            self.t_min_embedder, self.t_max_embedder = TimestepEmbedder(D), TimestepEmbedder(D)
            self.token_embed = nn.Parameter(torch.empty(6 * self.n_tokens, D))
        self.initialize()

    def initialize(self):
        """LightningDiT's: Xavier linears, N(0, 0.02) embeddings, adaLN and output zero, so the first velocity is 0."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for m in self.modules():
            if isinstance(m, TimestepEmbedder):
                nn.init.normal_(m.mlp[0].weight, std=0.02)
                nn.init.normal_(m.mlp[2].weight, std=0.02)
            if isinstance(m, (Block, FinalLayer)):
                nn.init.zeros_(m.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.conditioning == "in_context":
            nn.init.normal_(self.token_embed, std=0.02)

    def condition_tokens(self, c_t, c_y, s, guidance):
        """Six conditions, each repeated n times and told apart by a learned vector -> [B, 6n, D]."""
        omega, t_min, t_max = guidance.unbind(1)
        c_omega = self.omega_embedder(1 - 1 / omega)                                    # in [0, 1), as iMF
        c_min, c_max = self.t_min_embedder(t_min), self.t_max_embedder(t_max)
        conditions = torch.stack([c_t, self.s_embedder(s), c_y, c_omega, c_min, c_max], dim=1)  # [B, 6, D]
        return conditions.repeat_interleave(self.n_tokens, dim=1) + self.token_embed

    def forward(self, x: Tensor, t: Tensor | float, y: Tensor, s: Tensor | float | None = None,
                guidance: Tensor | None = None, until: int | None = None) -> Tensor:
        """-> velocity [B, C, H, W]; with until=k the image tokens [B, N, D] after the first k blocks instead."""
        if s is not None and self.conditioning == "plain":
            raise ValueError("a plain LightningDiT has no target time s; a flow map is decoupled or in_context")
        if guidance is not None and self.conditioning != "in_context":
            raise ValueError(f"a {self.conditioning} LightningDiT takes no guidance input; guide it with model.cfg")
        if x.shape[2] != x.shape[3] or x.shape[2] != self.grid * self.patch_size:
            raise ValueError(f"x {list(x.shape)}: expected {self.grid * self.patch_size} pixels a side")
        B, dtype = len(x), torch.promote_types(x.dtype, torch.float32)
        zeros = torch.zeros(B, dtype=dtype, device=x.device)                            # float -> [B] on the device
        t = (zeros + t).to(dtype)
        s = t if s is None else (zeros + s).to(dtype)

        cos, sin = self.feat_rope.freqs_cos, self.feat_rope.freqs_sin                   # [N, head_dim]
        with torch.autocast(x.device.type, enabled=False):                              # times stay in fp32
            c_t, c_y = self.t_embedder(t), self.y_embedder(y)                           # [B, D]
            c_early = c_late = c_t + c_y
            if self.conditioning == "decoupled":
                c_late = self.t_embedder(s) + c_y
            if self.conditioning == "in_context":
                if guidance is None:
                    guidance = fixed_guidance(1.0, 0.0, 1.0, x)
                tokens = self.condition_tokens(c_t, c_y, s, guidance.to(dtype).expand(B, 3))        # [B, 6n, D]

        h = self.x_embedder(x) + self.pos_embed                                         # [B, N, D]
        for i, block in enumerate(self.blocks):
            if self.conditioning == "in_context" and i == self.token_block:
                h = torch.cat([tokens.to(h.dtype), h], dim=1)                           # [B, 6n + N, D]
                cos = F.pad(cos, (0, 0, tokens.shape[1], 0), value=1.0)                 # identity rotation on them
                sin = F.pad(sin, (0, 0, tokens.shape[1], 0), value=0.0)
            h = block(h, c_early if i < self.switch else c_late, cos, sin)
            if i + 1 == until:
                return h[:, -self.grid ** 2:]
        h = self.final_layer(h[:, -self.grid ** 2:], c_late)                            # [B, N, P P C]
        return self.unpatchify(h).to(x.dtype)                                           # of bf16 autocast

    def unpatchify(self, h):                                                            # [B, N, P P C] -> [B, C, H, W]
        g, p = self.grid, self.patch_size
        h = h.unflatten(2, (p, p, self.in_channels)).unflatten(1, (g, g))               # [B, g, g, p, p, C]
        return h.permute(0, 5, 1, 3, 2, 4).reshape(len(h), self.in_channels, g * p, g * p)


class DDTBlock(nn.Module):
    """Block of DDT (Wang et al., arXiv 2504.05741): adaLN from a condition per token, no biases in qkv and MLP."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qk_norm=True, qkv_bias=False)
        self.mlp = SwiGLU(dim, int(2 / 3 * (4 * dim)), bias=False)
        self.adaLN_modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c, cos, sin):                                                  # both [B, N, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiscriminatorHead(nn.Module):
    """DMD2's discriminator in the FSF-DMD paper (App. B.1): two DDT blocks and a class token over a trunk's features.

    21.28M parameters at B/1.  forward(trunk, x, t, y) -> logits [B, 1].  trunk: a LightningDiT, read after its first
    `until` blocks (5 of 12 at B/1).  As in DDT the decoder starts from its own embedding of x; the trunk's tokens are
    only its condition.  Nothing is zero-initialised: with zero gates the class token could not see x, and the generator
    would get no gradient at step 0.
    """

    def __init__(self, trunk):
        super().__init__()
        config, D = trunk.config, trunk.config["hidden_size"]
        self.until = max(1, round(5 / 12 * config["depth"]))
        self.x_embedder = PatchEmbed(config["patch_size"], config["in_channels"], D)
        self.class_token = nn.Parameter(torch.randn(1, 1, D) * 0.02)
        self.blocks = nn.ModuleList(DDTBlock(D, config["num_heads"]) for _ in range(2))
        self.norm, self.linear = RMSNorm(D), nn.Linear(D, 1)

    def forward(self, trunk, x, t, y):
        features = trunk(x, t, y, until=self.until)                                     # [B, N, D]
        with torch.autocast(x.device.type, enabled=False):                              # times stay in fp32
            c_t, c_y = trunk.t_embedder(t), trunk.y_embedder(y)                         # [B, D]
        of_class, of_image = F.silu(c_t + c_y)[:, None], F.silu(c_t[:, None] + features)
        condition = torch.cat([of_class, of_image], dim=1)                              # [B, 1 + N, D]
        h = torch.cat([self.class_token + c_y[:, None], self.x_embedder(x)], dim=1)
        cos = F.pad(trunk.feat_rope.freqs_cos, (0, 0, 1, 0), value=1.0)                 # the class token is not rotated
        sin = F.pad(trunk.feat_rope.freqs_sin, (0, 0, 1, 0), value=0.0)
        for block in self.blocks:
            h = block(h, condition, cos, sin)
        return self.linear(self.norm(h[:, 0])).to(x.dtype)


# ---- Improved MeanFlow's own network (Geng et al.; code Lyy-iiis/imeanflow, MIT), to start from its published weights

class IMFBlock(nn.Module):
    """No adaLN, no biases; QK-norm, 1-D rotary positions over the whole sequence; *_scale are learned gates."""

    def __init__(self, dim, num_heads, hidden):
        super().__init__()
        self.num_heads = num_heads
        self.attn_scale = nn.Parameter(torch.zeros(dim))
        self.mlp_scale = nn.Parameter(torch.zeros(dim))
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.q_norm, self.k_norm = RMSNorm(dim // num_heads), RMSNorm(dim // num_heads)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, cos, sin):                                                     # [B, L, D]
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(2, (self.num_heads, -1)).transpose(1, 2)              # [B, heads, L, head_dim]
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attn_scale * self.out_proj(h)
        h = self.norm2(x)
        return x + self.mlp_scale * self.w2(F.silu(self.w1(h)) * self.w3(h))


class IMFDiT(nn.Module):
    """u(x, t, s | y, omega, t_min, t_max) of the official iMF weights.

    The call is LightningDiT's; the network sees t - s, not t.  Its auxiliary v-head is left out: u(x, t, t) serves.
    """
    conditioning = "in_context"

    def __init__(self, *, input_size, in_channels, patch_size, hidden_size, num_heads, depth, mlp_hidden, num_classes,
                 tokens=(8, 4, 2, 2, 4)):
        super().__init__()
        D = hidden_size
        self.config = dict(architecture="imf", conditioning="in_context", input_size=input_size,
                           in_channels=in_channels, patch_size=patch_size, hidden_size=D, num_heads=num_heads,
                           depth=depth, mlp_hidden=mlp_hidden, num_classes=num_classes, tokens=list(tokens))
        self.num_classes, self.patch_size = num_classes, patch_size
        self.in_channels, self.grid = in_channels, input_size // patch_size
        self.x_embedder, self.y_embedder = PatchEmbed(patch_size, in_channels, D), LabelEmbedder(num_classes, D)
        self.h_embedder, self.omega_embedder = TimestepEmbedder(D), TimestepEmbedder(D)
        self.t_min_embedder, self.t_max_embedder = TimestepEmbedder(D), TimestepEmbedder(D)
        # of the class, omega, t_min, t_max and the time
        self.tokens = nn.ParameterList(nn.Parameter(torch.randn(n, D) / D ** 0.5) for n in tokens)
        self.blocks = nn.ModuleList(IMFBlock(D, num_heads, mlp_hidden) for _ in range(depth))
        self.norm, self.linear = RMSNorm(D), nn.Linear(D, patch_size ** 2 * in_channels)
        head_dim = D // num_heads
        freqs = 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)
        angle = torch.arange(sum(tokens) + self.grid ** 2)[:, None] * freqs             # [L, head_dim / 2]
        self.register_buffer("cos", angle.cos().repeat_interleave(2, 1), persistent=False)  # [L, head_dim]
        self.register_buffer("sin", angle.sin().repeat_interleave(2, 1), persistent=False)

    def forward(self, x, t, y, s=None, guidance=None):
        B, dtype = len(x), torch.promote_types(x.dtype, torch.float32)
        t = (torch.zeros(B, dtype=dtype, device=x.device) + t).to(dtype)
        h = torch.zeros_like(t) if s is None else t - s
        with torch.autocast(x.device.type, enabled=False):                              # times stay in fp32
            if guidance is None:
                guidance = fixed_guidance(1.0, 0.0, 1.0, x)
            omega, t_min, t_max = guidance.to(dtype).expand(B, 3).unbind(1)
            conditions = (self.y_embedder(y), self.omega_embedder(1 - 1 / omega), self.t_min_embedder(t_min),
                          self.t_max_embedder(t_max), self.h_embedder(h))
            prefix = torch.cat([c[:, None] + token for c, token in zip(conditions, self.tokens)], dim=1)  # [B, 20, D]
        z = torch.cat([prefix, self.x_embedder(x)], dim=1)                              # [B, 20 + N, D]
        for block in self.blocks:
            z = block(z, self.cos.to(dtype), self.sin.to(dtype))
        return self.unpatchify(self.linear(self.norm(z[:, -self.grid ** 2:]))).to(x.dtype)

    unpatchify = LightningDiT.unpatchify


def build(config: dict) -> nn.Module:
    """The network that a `net.config` describes."""
    if config.get("architecture") == "imf":
        return IMFDiT(**{k: v for k, v in config.items() if k not in ("architecture", "conditioning")})
    return LightningDiT(**config)


# ---- Official weights ------------------------------------------------------------------------------------------------

def load_official(source: str | dict, input_size: int = 32) -> nn.Module:
    """An official LightningDiT checkpoint as our plain network, v(x, t) = -official(x, tau = 1 - t); or iMF's.

    source: path of a `.pt` file (weights only; "ema" inside is preferred, then "model") or a state dict.  Any depth,
    width, patch and class count.  Reversed time and sign are folded into the weights, so the result is an ordinary
    network of this file, on the CPU: cos((1 - t) f) = cos f cos tf + sin f sin tf turns the first time layer, the last
    changes sign.  An iMF checkpoint gives an IMFDiT (input_size: of its latents; 32 for 256-pixel images).
    Raises ValueError naming the first differences when keys or shapes are neither's.
    """
    state = torch.load(source, map_location="cpu", weights_only=True) if not isinstance(source, dict) else source
    state = next((state[k] for k in ("ema", "model", "state_dict") if isinstance(state.get(k), dict)), state)
    state = {k.removeprefix("module.").removeprefix("net."): v for k, v in state.items()}  # of DDP; of iMF's file
    if any(k.startswith("shared_blocks.") for k in state):
        return load_imf(state, input_size)
    D, channels, patch, _ = shape_of(state, "x_embedder.proj.weight", 4)
    tokens = shape_of(state, "pos_embed", 3)[1]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    names = {(d["depth"], d["hidden_size"], d["patch_size"]): name for name, d in SIZES.items()}     # for people only
    net = LightningDiT(names.get((depth, D, patch), "B/1"), "plain", depth=depth, hidden_size=D, patch_size=patch,
                       num_heads=max(1, D // shape_of(state, "feat_rope.freqs_cos", 2)[1]), in_channels=channels,
                       num_classes=shape_of(state, "y_embedder.embedding_table.weight", 2)[0] - 1,
                       input_size=patch * math.isqrt(tokens), qk_norm="blocks.0.attn.q_norm.weight" in state)
    own = net.state_dict()
    refuse_differences(net, state, "LightningDiT")
    state = {k: v.clone().to(own[k].dtype) for k, v in state.items()}
    w = state["t_embedder.mlp.0.weight"].double()
    angle = net.t_embedder.features(torch.ones(1, dtype=torch.float64))[0]              # (cos f, sin f)
    (cos, sin), (w_cos, w_sin) = angle.chunk(2), w.chunk(2, dim=1)
    state["t_embedder.mlp.0.weight"] = torch.cat([w_cos * cos + w_sin * sin, w_cos * sin - w_sin * cos], dim=1).float()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = -state[key]
    net.load_state_dict(state)
    return net


def load_imf(state, input_size):
    """IMFDiT from an official iMF state dict: shared blocks, then the u-head's; the v-head is dropped."""
    names = {"cfg_t_start_embedder": "t_min_embedder", "cfg_t_end_embedder": "t_max_embedder", "u_final_layer.": "",
             "mlp.w": "w", ".attn.": ".", "class_tokens": "tokens.0", "omega_tokens": "tokens.1",
             "t_min_tokens": "tokens.2", "t_max_tokens": "tokens.3", "time_tokens": "tokens.4"}

    def count(prefix):
        return len({k.split(".")[1] for k in state if k.startswith(prefix)})

    shared, own = count("shared_blocks."), {}
    for key, value in state.items():
        if key.startswith(("v_heads.", "v_final_layer.")):
            continue
        key = key.replace("._flax_linear", "").replace("._flax_embedding", "").replace("shared_blocks.", "blocks.")
        if key.startswith("u_heads."):
            _, i, rest = key.split(".", 2)
            key = f"blocks.{shared + int(i)}.{rest}"
        for old, new in names.items():
            key = key.replace(old, new)
        own[key] = value
    D, channels, patch, _ = shape_of(own, "x_embedder.proj.weight", 4)
    if input_size % patch:
        raise ValueError(f"input_size {input_size} must be a multiple of patch_size {patch}")
    net = IMFDiT(input_size=input_size, in_channels=channels, patch_size=patch, hidden_size=D,
                 num_heads=max(1, D // shape_of(own, "blocks.0.q_norm.weight", 1)[0]), depth=shared + count("u_heads."),
                 mlp_hidden=shape_of(own, "blocks.0.w1.weight", 2)[0],
                 num_classes=shape_of(own, "y_embedder.embedding_table.weight", 2)[0] - 1,
                 tokens=[shape_of(own, f"tokens.{i}", 2)[0] for i in range(5)])
    refuse_differences(net, own, "iMF network")
    net.load_state_dict(own)
    return net


def shape_of(state, key, rank):
    """Shape of a tensor of official weights; ValueError if it is missing, of another type or rank, or empty."""
    if key not in state:
        raise ValueError(f"{key} is missing (found {', '.join(list(map(str, state))[:3]) or 'nothing'} ...)")
    value = state[key]
    if not torch.is_tensor(value) or not value.is_floating_point() or value.ndim != rank or 0 in value.shape:
        found = f"{value.dtype} {list(value.shape)}" if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"{key} is {found}, expected floating point in {rank} dimensions, none of them 0")
    return value.shape


def refuse_differences(net: nn.Module, state: dict, what: str) -> None:
    """ValueError with the first differences of keys and shapes between a network and a state dict."""
    own = net.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unexpected {k}" for k in state if k not in own]
    for k in (k for k in own if k in state):
        if not torch.is_tensor(state[k]) or state[k].is_complex() or state[k].shape != own[k].shape:
            found = list(state[k].shape) if torch.is_tensor(state[k]) else type(state[k]).__name__
            wrong.append(f"{k} is {found}, expected {list(own[k].shape)}, real")
    if wrong:
        raise ValueError(f"not this {what}, {len(wrong)} differences: " + "; ".join(wrong[:3]))
