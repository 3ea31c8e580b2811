"""Where the seconds of a training step go, and how far they are from the matrix products that cannot be saved.

    python benchmarks/step.py                       # the paper's network, batch 4: 6 minutes on 2 CPU cores
    python benchmarks/step.py --size tiny --batch_size 32

Three measurements in one process, so that a slow minute of the machine meets all of them alike:

    backbone     forward + backward of our network, eager and compiled, beside the same network with its blocks written
                 as the official code writes them (below), the same weights; the outputs are compared; and beside its
                 large products and attention alone (without adaLN's): no compiler can be faster
    products     FLOP/s of the matrix products of one block alone
    step         consistency distillation and FSF-DMD (M = 1 and 2) as the scripts run them; every part is timed where
                 it is called, without what it calls itself.  Beside it (forward passes x one measured forward pass) +
                 the optimizer, and the FLOP/s of the step without the optimizer as a share of `products`

Leaves README.md and runs.json in --out.
"""
import collections
import contextlib
import copy
import functools
import os
import shlex
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import common  # noqa: E402
import consistency  # noqa: E402
import cost  # noqa: E402
import fsf_dmd  # noqa: E402
from common import Stream, main, pick_device  # noqa: E402
from hooks import Done, after_each_step, replaced  # noqa: E402
from model import SIZES, LightningDiT, fixed_guidance  # noqa: E402
from normuon import NorMuon  # noqa: E402
from plumbing.files import json_text, write_atomic  # noqa: E402
from plumbing.flags import Parser, number, result_folder  # noqa: E402
from plumbing.passes import passes_a_step  # noqa: E402
from plumbing.report import markdown_lines  # noqa: E402
from plumbing.run_folder import Run  # noqa: E402

METHODS = {
    "CD": (consistency, "consistency.py", "--loss cd"),
    "FSF-DMD, M = 1": (fsf_dmd, "fsf_dmd.py", "--M 1 --health_every 0"),
    "FSF-DMD, M = 2": (fsf_dmd, "fsf_dmd.py", "--M 2 --health_every 0"),
}
STEPS = 3                                       # the first warms up


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--size", default="B/1", choices=list(SIZES))
    p.add_argument("--batch_size", type=number(int, 2), default=4)
    p.add_argument("--repeats", type=number(int, 1), default=5, help="of the backbone and the products; medians")
    p.add_argument("--compile", type=number(int, 0, 1), default=1, help="0: without the compiled backbone")
    p.add_argument("--device", default="auto")
    p.add_argument("--out", type=result_folder, default="runs/step", help="folder of the results")
    return p.parse_args(argv)


def run(args):
    args.device = pick_device(args.device)
    if args.device.type == "cpu":
        common.keep_freed_memory()                                              # as every script
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        cost.random_inputs(folder, args.size)
        found = dict(device=str(args.device), cores=os.cpu_count(), torch=torch.__version__, size=args.size,
                     batch=args.batch_size, backbone=backbone(args), products=products(args))
        forward = found["backbone"]["forward"]
        flops = cost.count_forward(folder / "imf.pt", 1)                        # of one image
        found["methods"] = {}
        for name in METHODS:
            found["methods"][name] = a_method(args, folder, name, forward, flops, found["products"])
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "runs.json", json_text(found, indent=1) + "\n")
    write_atomic(args.out / "README.md", page(found))
    print(page(found))


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(actions, args):
    """{name: median seconds} of several calls, in turns, so that a slow minute of the machine meets all of them.

    The order changes from turn to turn: what ran before leaves its memory to be taken up.
    """
    times, order = collections.defaultdict(list), list(actions.items())
    for repeat in range(args.repeats + 1):                                      # the first warms up
        order = order[1:] + order[:1]
        for name, action in order:
            begun = time.perf_counter()
            action()
            wait(args.device)
            if repeat:
                times[name].append(time.perf_counter() - begun)
    return {name: float(np.median(each)) for name, each in times.items()}


# ---- The backbone beside the official way to write its block ---------------------------------------------------------

def straightforward_norm(x, weight):
    """RMSNorm as LLaMA writes it: statistics in float32, cast back, then the gain."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight


def straightforward_rotation(q, cos, sin):
    """EVA-02's: neighbouring pairs (a, b) become (-b, a) by reshape, unbind and stack."""
    pairs = q.reshape(*q.shape[:-1], -1, 2)
    a, b = pairs.unbind(dim=-1)
    return q * cos + torch.stack((-b, a), dim=-1).reshape(q.shape) * sin


def straightforward_block(block, x, c, cos, sin):
    """A LightningDiT block with the weights of ours, one line for each operation of its description."""
    B, N, D = x.shape
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c).chunk(6, dim=1)
    h = straightforward_norm(x, block.norm1.weight)
    h = h * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1)
    attn = block.attn
    qkv = attn.qkv(h).reshape(B, N, 3, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = straightforward_norm(q, attn.q_norm.weight), straightforward_norm(k, attn.k_norm.weight)
    q, k = straightforward_rotation(q, cos, sin), straightforward_rotation(k, cos, sin)
    h = F.scaled_dot_product_attention(q, k, v)
    h = attn.proj(h.transpose(1, 2).reshape(B, N, D))
    x = x + gate1.unsqueeze(1) * h
    h = straightforward_norm(x, block.norm2.weight)
    h = h * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1)
    gate, value = block.mlp.w12(h).chunk(2, dim=-1)
    h = block.mlp.w3(F.silu(gate) * value)
    return x + gate2.unsqueeze(1) * h


def bare_block(block, x, c, cos, sin):
    """The large products and the attention of a block alone, and one sum, which keeps the numbers in range."""
    B, N, D = x.shape
    attn = block.attn
    q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
    h = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
    value = block.mlp.w12(h).chunk(2, dim=-1)[1]
    return x + block.mlp.w3(value)


def backbone(args):
    """Seconds of forward + backward in four ways, and of a forward pass of ours."""
    torch.manual_seed(0)
    ours = LightningDiT(args.size, "in_context").to(args.device)
    cost.draw_zeros(ours)                                                       # else no gate is open
    official, bare, compiled = copy.deepcopy(ours), copy.deepcopy(ours), copy.deepcopy(ours)
    for block in official.blocks:
        block.forward = functools.partial(straightforward_block, block)
    for block in bare.blocks:
        block.forward = functools.partial(bare_block, block)
    B, grid = args.batch_size, ours.config["input_size"]
    x, y = torch.randn(B, 32, grid, grid, device=args.device), torch.arange(B, device=args.device) % 1000
    t, s = torch.rand(B, device=args.device), torch.zeros(B, device=args.device)
    guidance = fixed_guidance(2.0, 0.0, 1.0, x)

    def train(net):
        return lambda: net(x, t, y, s, guidance).square().mean().backward()

    def forward():
        with torch.no_grad():
            ours(x, t, y, s, guidance)

    actions = {"ours": train(ours), "straightforward": train(official), "products and attention alone": train(bare)}
    nets = [official]
    if args.compile:
        for block in compiled.blocks:
            block.compile()
        actions["ours, compiled"] = train(compiled)
        nets.append(compiled)
    found = seconds_of(actions | {"forward": forward}, args)
    with torch.no_grad():
        expected = ours(x, t, y, s, guidance)
        differences = [(net(x, t, y, s, guidance) - expected).abs().max().item() for net in nets]
    return found | dict(largest_difference=max(differences), largest_output=expected.abs().max().item())


def products(args):
    """FLOP/s of the four products of a block, over all tokens of the batch."""
    net = SIZES[args.size]
    D, hidden = net["hidden_size"], int(2 / 3 * net["hidden_size"] * 4)
    tokens = args.batch_size * ((16 // net["patch_size"]) ** 2 + 6 * net.get("n_tokens", 16))
    actions, flops = {}, {}
    for name, (a, b) in dict(qkv=(D, 3 * D), proj=(D, D), w12=(D, 2 * hidden), w3=(hidden, D)).items():
        x, w = torch.randn(tokens, a, device=args.device), torch.randn(b, a, device=args.device)
        actions[name] = functools.partial(F.linear, x, w)
        flops[name] = 2 * tokens * a * b
    found = seconds_of(actions, args)
    return sum(flops.values()) / sum(found.values())


# ---- The parts of a step ---------------------------------------------------------------------------------------------

class Clock:
    """Seconds of parts that call each other; a part does not count what it calls."""

    def __init__(self, device):
        self.device, self.stack = device, ["losses and the rest"]
        self.restart()

    def restart(self):
        self.seconds, self.last = collections.Counter(), time.perf_counter()

    def charge(self):
        wait(self.device)
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def part(self, name):
        self.charge()
        self.stack.append(name)
        yield
        self.charge()
        self.stack.pop()

    def timed(self, name, action):
        """A function that counts as a part.  name: str, or callable () -> str."""
        @functools.wraps(action)
        def wrapped(*args, **kwargs):
            if threading.current_thread() is not threading.main_thread():       # the next step's numbers: nothing waits
                return action(*args, **kwargs)
            with self.part(name() if callable(name) else name):
                return action(*args, **kwargs)
        return wrapped


@contextlib.contextmanager
def watched(module, clock):
    """The functions that a script calls, as parts of `clock`; ends the loop after STEPS steps."""
    def pass_of():
        if "finite difference" in clock.stack:
            return "finite difference"
        return "forward passes with gradient" if torch.is_grad_enabled() else "forward passes without"

    def look(run):
        if run.step == STEPS:
            clock.charge()
            raise Done
        if run.step == 1:
            clock.charge()
            clock.restart()

    parts = [
        (LightningDiT, "forward", pass_of), (NorMuon, "step", "optimizer"), (torch.Tensor, "backward", "backward"),
        (consistency, "total_derivative", "finite difference"), (module, "update_ema", "EMA"),
        (module, "gradient_norm", "gradient norm"), (module, "batch_rows", "random numbers and data"),
        *((Stream, name, "random numbers and data") for name in ("normal", "uniform", "integers")),
        (Run, "log", "logging"),
    ]
    with replaced([(owner, name, functools.partial(clock.timed, part)) for owner, name, part in parts]):
        with after_each_step(look):
            yield


def a_method(args, folder, name, forward, flops, rate):
    """The parts of a step, and its ratios.  forward: seconds of a pass; flops: of a pass of one image."""
    module, script, flags = METHODS[name]
    out = folder / name.replace(" ", "")
    words = shlex.split(f"{flags} --device {args.device} --batch_size {args.batch_size} --precision fp32 "
                        f"--steps {STEPS + 1} --log_every 1")
    words += ["--init", f"{folder}/imf.pt", "--data", f"{folder}/latents", "--out", str(out)]
    parsed, clock = module.parse_args(words), Clock(args.device)
    with watched(module, clock):
        module.train(parsed)
    parts = {part: spent / (STEPS - 1) for part, spent in clock.seconds.most_common()}
    step, passes = sum(parts.values()), passes_a_step(script, vars(parsed))
    return dict(
        seconds=step,
        passes=passes,
        times_passes_and_optimizer=step / (passes * forward + parts["optimizer"]),
        share_of_products=(passes * args.batch_size * flops / rate) / (step - parts["optimizer"]),
        parts=parts,
    )


def page(found):
    """README.md of the folder."""
    b = found["backbone"]
    rows = []
    for name in ("ours", "straightforward", "ours, compiled", "products and attention alone"):
        if name in b:
            rows.append([name, f"{b[name]:.3f}", f"{b[name] / b['straightforward']:.3f}"])
    of_methods = []
    for name, m in found["methods"].items():
        of_methods.append([name, f"{m['passes']:.0f}", f"{m['seconds']:.2f}", f"{m['times_passes_and_optimizer']:.2f}",
                           f"{m['share_of_products']:.0%}"])
    names = list(dict.fromkeys(part for m in found["methods"].values() for part in m["parts"]))
    shares = []
    for part in names:
        each = [m["parts"].get(part, 0.0) / m["seconds"] for m in found["methods"].values()]
        shares.append([part, *(f"{share:.1%}" for share in each)])
    size, head = f"{found['size']}, batch {found['batch']}, fp32", list(found["methods"])
    return "\n".join([
        "# Where a step's time goes", "",
        f"Made by `python benchmarks/step.py` on {found['device']}, {found['cores']} cores, torch {found['torch']}; "
        f"{size}. [runs.json](runs.json) holds the numbers unrounded.", "",
        *markdown_lines(["forward + backward", "s", "times the straightforward form"], rows), "",
        f"Largest difference of the outputs {b['largest_difference']:.1e} (largest output "
        f"{b['largest_output']:.1f}); one forward pass {b['forward']:.3f} s; products of a block "
        f"{found['products'] / 1e9:.0f} GFLOP/s.", "",
        *markdown_lines(["step", "passes", "s", "times (passes x forward + optimizer)",
                         "products' rate, without the optimizer"], of_methods), "",
        *markdown_lines(["share of a step", *head], shares), ""])


if __name__ == "__main__":
    main(run, parse_args)
