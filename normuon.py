"""NorMuon (Li et al., arXiv 2510.05491; official code zichongli5/NorMuon, MIT): Muon with a per-neuron second moment.

Per matrix W [m, n] (m output neurons), gradient G, momentum M, second moment v [m, 1], both starting at zero, without
bias correction:

    M <- mu M + (1 - mu) G                       U <- mu M + (1 - mu) G               Nesterov look-ahead
    O <- NewtonSchulz5(U)                        about the orthogonal factor of U
    v <- b2 v + (1 - b2) mean_columns(O^2)       one number per output neuron
    O <- O / (sqrt(v) + 1e-10), rescaled to the Frobenius norm it had
    W <- W (1 - lr wd) - lr scale O              scale = sqrt(max(1, m / n))

Everything that is not a hidden matrix (biases, norm gains, embeddings, the first and the last layer) goes to AdamW in
the same optimizer.

WHICH LR?  Two conventions are in use; at width 768 they differ sixfold, the commonest reason for a "wrong" rate:
    scale="aspect"  official code: the line above.  One step moves W by about lr / sqrt(width) (RMS): at width 768 by
                    0.02..0.036 lr, so 6e-4 is AdamW's 1e-4 (which moves by about 0.2 lr); at width 48 by 0.13 lr
    scale="rms"     the update has RMS 0.2 lr whatever the shape: lr 1e-4 means about what it means to AdamW
Each group has its own `lr`, so a scheduler of torch moves both (OneCycleLR and CyclicLR: pass a list of two rates).
The AdamW group starts at adam_lr; left out, that is lr / 6 under "aspect" and lr under "rms", so that both groups move
alike.
FSF-DMD's Table 6 gives momentum 0.95, b2 0.95, weight decay 0, a constant schedule; its learning rate did not survive
in our copy.

Differs from the official code: equal shapes are stacked and orthogonalised together (19x fewer kernel launches on a
B/1), the states are float32 whatever the parameters are, .grad is left as it was, and convolution kernels, which that
code flattens to matrices, go to AdamW.  Needs torch only; paste it.
"""
import math

import torch


def newton_schulz(G, steps=5):
    """`steps` Newton-Schulz steps toward the orthogonal factor U V^T of each G [K, m, n] -> the same shape.

    With 5 steps singular values above 0.0015 of the Frobenius norm land in about [0.7, 1.2]; smaller ones stay smaller.
    """
    a, b, c = 3.4445, -4.7750, 2.0315                      # Keller Jordan's quintic (Muon)
    X = G.mT if G.shape[1] > G.shape[2] else G             # the short side first: X X^T is small
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT                                       # [K, r, r]
        # baddbmm adds inside the product's kernel: one pass over memory less, and in bf16 one rounding less than the
        # official code.  In bf16 our weights then differ from its by 3% of the way moved (separate products: 0.3%).
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)        # b A + c A A
        X = torch.baddbmm(X, B, X, beta=a)                 # a X + B X
    return X.mT if G.shape[1] > G.shape[2] else X


def in_blocks(name: str, p: torch.Tensor) -> bool:
    """The hidden matrices of a transformer whose layers lie in `blocks`: 60 of a B/1."""
    return p.ndim == 2 and "blocks." in name


def param_groups(*models: torch.nn.Module, hidden=in_blocks) -> list[dict]:
    """The two groups of one or more networks: hidden matrices -> NorMuon, the rest -> AdamW.

    hidden: callable (name, parameter) -> bool; yours, where your layers do not lie in `blocks`.  Every trainable
    parameter lands in exactly one group.  Fused qkv and the adaLN matrices are orthogonalised whole.  Raises ValueError
    where no matrix is found: the optimizer would silently be AdamW.
    """
    named = [(n, p) for model in models for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in named if hidden(n, p)]
    adam = [p for n, p in named if not hidden(n, p)]
    if not muon:
        raise ValueError(f"param_groups: hidden() finds no matrix among {', '.join(n for n, _ in named[:3])} ...; "
                         "pass one that knows the names of your layers; a network without any takes torch.optim.AdamW")
    if len({id(p) for p in muon + adam}) < len(named):
        raise ValueError("param_groups: a parameter is in two of these networks")
    return [dict(params=muon, muon=True), dict(params=adam, muon=False)]


def is_pair(value):
    return isinstance(value, (tuple, list)) and len(value) == 2


class NorMuon(torch.optim.Optimizer):
    """NorMuon(param_groups(net), lr=6e-4).

    params: groups with a boolean "muon" (see param_groups).  Of a plain list of tensors, as net.parameters(), EVERY 2-D
    one gets NorMuon, embeddings and the output layer among them.
    lr, momentum, beta2, weight_decay, scale: see the file header.  adam_lr, adam_betas, adam_eps: the AdamW part;
    adam_lr becomes the `lr` of its groups.
    ns_dtype: of the Newton-Schulz products; None = bfloat16 on CUDA, float32 elsewhere.
    As in the official code a parameter without gradient counts as gradient zero: its momentum still moves it, at full
    speed, weight decay does not.  So to freeze a layer that was trained, make a new optimizer without it.
    Raises ValueError for values out of range, named or complex parameters, a "muon" parameter that is not a matrix, or
    no matrix; `step` for sparse gradients.
    """

    def __init__(self, params, lr: float = 6e-4, momentum: float = 0.95, beta2: float = 0.95, weight_decay: float = 0.0,
                 scale: str = "aspect", ns_steps: int = 5, ns_dtype: torch.dtype | None = None,
                 adam_lr: float | None = None, adam_betas: tuple[float, float] = (0.9, 0.95), adam_eps: float = 1e-10):
        params = list(params)
        if params and isinstance(params[0], tuple):
            raise ValueError("NorMuon: takes no (name, parameter) pairs; pass param_groups(net)")
        if params and not isinstance(params[0], dict):
            params = [dict(params=[p for p in params if p.ndim == 2], muon=True),
                      dict(params=[p for p in params if p.ndim != 2], muon=False)]
            if not params[0]["params"]:
                raise ValueError("NorMuon: none of these parameters is a matrix; take torch.optim.AdamW")
        if adam_lr is None:
            adam_lr = lr / 6 if scale == "aspect" else lr
        defaults = dict(lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay, scale=scale,
                        ns_steps=ns_steps, ns_dtype=ns_dtype, adam_lr=adam_lr, adam_betas=adam_betas,
                        adam_eps=adam_eps, muon=True)
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        """As torch's, which calls it for the groups of the constructor too.  Raises ValueError as that does."""
        if not param_group.get("muon", True):
            param_group = dict(lr=self.defaults["adam_lr"]) | param_group
        super().add_param_group(param_group)
        g = self.param_groups[-1]
        in_range = dict(lr=g["lr"] > 0 and math.isfinite(g["lr"]), momentum=0 <= g["momentum"] < 1,
                        beta2=0 <= g["beta2"] < 1, weight_decay=g["weight_decay"] >= 0, adam_eps=g["adam_eps"] >= 0,
                        adam_betas=is_pair(g["adam_betas"]) and all(0 <= b < 1 for b in g["adam_betas"]),
                        ns_steps=isinstance(g["ns_steps"], int) and g["ns_steps"] >= 1)
        wrong = [f"{name} {g[name]} is out of range" for name, right in in_range.items() if not right]
        if g["scale"] not in ("aspect", "rms"):
            wrong.append(f"scale {g['scale']!r}, expected 'aspect' or 'rms'")
        if not all(p.is_floating_point() for p in g["params"]):
            wrong.append("it takes real numbers, pass a complex parameter as torch.view_as_real gives it")
        if g["muon"] and any(p.ndim != 2 for p in g["params"]):
            wrong.append("it orthogonalises matrices only, put other parameters into a group with muon=False")
        if wrong:
            self.param_groups.pop()
            raise ValueError("NorMuon: " + "; ".join(wrong))

    def load_state_dict(self, state_dict):
        """torch casts optimizer states to the parameter's dtype on loading; ours stay float32.

        ValueError if a state has other names or shapes than this optimizer gives it.
        """
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        for group in self.param_groups:
            for p in group["params"]:
                expected = dict(step=(), mean=p.shape, second=p.shape)
                if group["muon"]:
                    expected = dict(momentum=p.shape, second=(len(p), 1))
                found = {name: getattr(value, "shape", None) for name, value in self.state.get(p, {}).items()}
                if found and found != expected:
                    raise ValueError(f"the state of a parameter of shape {list(p.shape)} is not NorMuon's")
        for i, p in enumerate(p for group in self.param_groups for p in group["params"]):
            for name, value in saved.get(i, {}).items():
                if torch.is_tensor(value):
                    device = "cpu" if name == "step" else p.device                      # a count, read at every step
                    self.state[p][name] = value.to(device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
                raise ValueError("NorMuon: takes no sparse gradients, as of nn.Embedding(sparse=True)")
            (self._normuon if group["muon"] else self._adamw)(group)
        return loss

    def _normuon(self, group):
        by_shape = {}
        for p in group["params"]:
            by_shape.setdefault((p.shape, p.dtype, p.device), []).append(p)
        for ps in by_shape.values():                                                    # K matrices of one shape
            m, n = ps[0].shape
            for p in ps:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["second"] = torch.zeros(m, 1, device=p.device)
            momentum = [self.state[p]["momentum"] for p in ps]
            grads = [torch.zeros_like(M) if p.grad is None else p.grad.float() for p, M in zip(ps, momentum)]
            torch._foreach_lerp_(momentum, grads, 1 - group["momentum"])
            U = torch.stack(torch._foreach_lerp(grads, momentum, group["momentum"]))    # [K, m, n] Nesterov

            dtype = group["ns_dtype"] or (torch.bfloat16 if U.is_cuda else torch.float32)
            O = newton_schulz(U.to(dtype), group["ns_steps"]).float()                   # [K, m, n]
            power = O.pow(2).mean(-1, keepdim=True)                                     # [K, m, 1]
            second = [self.state[p]["second"] for p in ps]
            torch._foreach_lerp_(second, power.unbind(0), 1 - group["beta2"])
            r = 1 / (torch.stack(second).sqrt() + 1e-10)
            # ||O r||_F needs only the row powers: sum_ij (O_ij r_i)^2 = n sum_i power_i r_i^2
            before = power.sum(1, keepdim=True).sqrt()                                  # ||O||_F / sqrt(n)
            after = (power * r * r).sum(1, keepdim=True).sqrt()
            if group["scale"] == "aspect":
                size = before / (after + 1e-10) * max(1, m / n) ** 0.5
            else:
                size = 0.2 * m ** 0.5 / (after + 1e-10)                                 # RMS of the update = 0.2
            updates = (O * (r * size)).to(ps[0].dtype).unbind(0)

            decayed = [p for p in ps if p.grad is not None]
            if group["weight_decay"] and decayed:
                torch._foreach_mul_(decayed, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(ps, updates, alpha=-group["lr"])

    def _adamw(self, group):
        ps = group["params"]
        if not ps:
            return
        for p in ps:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros(())
                self.state[p]["mean"] = torch.zeros_like(p, dtype=torch.float32)
                self.state[p]["second"] = torch.zeros_like(p, dtype=torch.float32)
        lr, (b1, b2), eps = group["lr"], group["adam_betas"], group["adam_eps"]
        steps = [self.state[p]["step"] for p in ps]
        mean, second = [self.state[p]["mean"] for p in ps], [self.state[p]["second"] for p in ps]
        grads = [torch.zeros_like(m) if p.grad is None else p.grad.float() for p, m in zip(ps, mean)]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(mean, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        k = steps[0].item()                                                             # on the CPU: no device sync
        denom = torch._foreach_sqrt(second)
        torch._foreach_div_(denom, (1 - b2 ** k) ** 0.5)
        torch._foreach_add_(denom, eps)                                                 # eps outside the corrected root
        updates = torch._foreach_div(mean, denom)
        decayed = [p for p in ps if p.grad is not None]
        if group["weight_decay"] and decayed:
            torch._foreach_mul_(decayed, 1 - lr * group["weight_decay"])
        torch._foreach_add_(ps, [u.to(p.dtype) for p, u in zip(ps, updates)], alpha=-lr / (1 - b1 ** k))
