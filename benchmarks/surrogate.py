"""Is u(x_tau, tau, 0) the velocity of the generator's own samples?  The surrogate against an explicit fake network.

    python benchmarks/surrogate.py weak=runs/consistency_imf-digits-scratch/model.pt strong=MODEL --out surrogate

For each frozen flow map: the generator is its 2-step rollout.  An explicit fake network, a copy of it, is trained by
flow matching (Eq. 1) on fresh samples of the generator, for --steps; runs.json has its loss on held-out ones, to see
whether it is flat.  Then, on other samples noised to tau, three readings of v_fake - v_teacher, along which DMD moves a
sample (Eq. 13), and a direction to compare with:

    explicit     v of the trained fake network
    second       v of another one, trained on other samples: how far two explicit ones agree is what cosine can be had
    surrogate    u(x_tau, tau, 0) of the flow map (Eq. 12)
    class mean   m_y - x_hat, from the sample to the mean of the real images of its class: contraction, and nothing else

Shown per bin of tau: cosine of surrogate and explicit, of the two explicit ones, ratio of lengths, and the cosine of
each with the class mean; and cosines over tau = k r / (1 + (k-1) r) for k = 1 and 10.  Of flow maps under one NAME
(other seeds) the mean +- standard deviation is shown.
Leaves README.md, runs.json and surrogate.png in --out.
"""
import shlex
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
from common import BadInput, Stream, frozen_copy, main, pick_device, trainable, update_ema  # noqa: E402
from consistency import flow_matching_loss  # noqa: E402
from data import load_data  # noqa: E402
from fsf_dmd import rollout  # noqa: E402
from model import fixed_guidance, guided_map, guided_velocity, interpolate, shift_time  # noqa: E402
from normuon import NorMuon, param_groups  # noqa: E402
from plumbing.checkpoints import load_network  # noqa: E402
from plumbing.files import json_text, write_atomic  # noqa: E402
from plumbing.flags import Parser, number, result_folder  # noqa: E402
from plumbing.report import markdown_lines, spread  # noqa: E402

BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SHIFTS = (1, 10)
COSINES = ("cosine", "two_explicit", "surrogate_to_mean", "explicit_to_mean")
M = 2
BATCH = 128
LR, EMA = 2e-3, 0.99            # of the fake network


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("starts", nargs="+",
                   help="NAME=MODEL, flow maps that take guidance as an input; a NAME may stand for several")
    p.add_argument("--omega", type=number(float, 1), nargs="+", default=[1.0], help="guidance scales to look at")
    p.add_argument("--guide_to", type=number(float, 0, 1), default=1.0,
                   help="guidance acts at times up to this one (the paper: 0.9)")
    p.add_argument("--steps", type=number(int, 1), default=1000, help="training steps of the explicit fake network")
    p.add_argument("--n", type=number(int, 10), default=2000, help="samples of a measurement")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--out", type=result_folder, default="runs/surrogate", help="folder of the results")
    return p.parse_args(argv)


def run(args):
    device, starts, data = pick_device(args.device), [], None
    for start in args.starts:
        name, _, path = start.partition("=")
        if not path:
            raise BadInput(f"{start}: expected NAME=MODEL")
        net, checkpoint = load_network(path)
        if net.conditioning != "in_context":
            raise BadInput(f"{path}: is a {net.conditioning} network, expected in_context")
        if not checkpoint["data"]:
            raise BadInput(f"{path}: official weights do not say on which data they were trained; expected a model.pt")
        source = checkpoint["data"]["source"]
        if data and data.source != source:
            raise BadInput(f"{path}: was trained on {source}, the others on {data.source}; expected one data set")
        data = data or load_data(source)
        starts.append((name, net.to(device).requires_grad_(False).eval(), checkpoint["step"]))
    found = []
    for name, net, step in starts:
        for omega in args.omega:
            found.append(dict(start=name, omega=omega, step=step) | look(net, data, omega, args, device))
    write(args, found, data.source)


class Generator:
    """The frozen flow map's M-step samples; noise and labels by (purpose, step)."""

    def __init__(self, net, omega, guide_to, shape, device):
        self.net, self.omega, self.guide_to, self.shape, self.device = net, omega, guide_to, shape, device

    def guidance(self, x):
        return fixed_guidance(self.omega, 0.0, self.guide_to, x)

    @torch.no_grad()
    def sample(self, purpose, step, n, seed=0):
        """-> (x_hat [n, C, H, W], y [n], its Stream, to draw on from)"""
        g = Stream(purpose, seed, step)
        eps, y = g.normal(n, *self.shape).to(self.device), torch.arange(n, device=self.device) % self.net.num_classes
        x, U = rollout(lambda x, t, s: guided_map(self.net, x, t, s, y, self.guidance(x)), eps, M)
        return x - U, y, g


def look(net, data, omega, args, device):
    """One flow map at one guidance scale -> dict of numbers."""
    generator = Generator(net, omega, args.guide_to, data.x.shape[1:], device)
    (fake, losses), (second, _) = (train_fake(generator, args.steps, seed) for seed in (0, 1))
    means = torch.stack([data.x[(data.y == c).nonzero()[:, 0]].mean(0) for c in range(data.num_classes)]).to(device)
    x_hat, y, g = generator.sample("surrogate", 0, args.n)
    eps, r = g.normal(*x_hat.shape).to(device), g.uniform(args.n).to(device)

    @torch.no_grad()
    def compared(tau):
        """The directions at tau [n] beside each other."""
        x_tau, guidance = interpolate(x_hat, eps, tau), generator.guidance(x_hat)
        teacher = guided_velocity(net, x_tau, tau, y, guidance)
        surrogate = (guided_map(net, x_tau, tau, torch.zeros_like(tau), y, guidance) - teacher).flatten(1)
        explicit, another = ((v(x_tau, tau, y) - teacher).flatten(1) for v in (fake, second))
        mean = (means[y] - x_hat).flatten(1)
        return dict(
            cosine=cosine(surrogate, explicit),
            two_explicit=cosine(explicit, another),
            length_ratio=(surrogate.norm(dim=1).mean() / explicit.norm(dim=1).mean()).item(),
            surrogate_to_mean=cosine(surrogate, mean),
            explicit_to_mean=cosine(explicit, mean),
        )

    bins = [dict(tau=[low, high]) | compared(high - (high - low) * r) for low, high in zip(BINS, BINS[1:])]
    over_tau = {f"k{k}": compared(shift_time(1 - r, k)) for k in SHIFTS}
    return dict(bins=bins, over_tau=over_tau, held_out_loss=losses, x_hat_std=x_hat.std().item())


def cosine(a, b):
    """Mean over samples."""
    return F.cosine_similarity(a, b, dim=1).mean().item()


def train_fake(generator, steps, seed):
    """(EMA of the explicit fake network, [[step, its loss on held-out samples]]): flow matching on the samples."""
    net = generator.net
    fake = frozen_copy(net)
    trainable(True, fake)
    ema, opt = frozen_copy(net), NorMuon(param_groups(fake), lr=LR)
    held_out, losses = generator.sample("held out", 0, 1000), []
    noise = held_out[2].normal(*held_out[0].shape).to(generator.device)
    times = held_out[2].uniform(1000).to(generator.device)

    def loss_of(network, x, y, eps, t):
        return flow_matching_loss(lambda x, t, s: network(x, t, y), x, eps, t).mean()

    for step in tqdm(range(steps + 1), desc=f"fake network, omega {generator.omega}", mininterval=0.5):
        if step % max(1, steps // 10) == 0:
            with torch.no_grad():
                losses.append([step, loss_of(ema, *held_out[:2], noise, times).item()])
        x, y, g = generator.sample("fake", step, BATCH, seed)
        loss_of(fake, x, y, g.normal(*x.shape).to(x.device), g.uniform(BATCH).to(x.device)).backward()
        opt.step()
        opt.zero_grad()
        update_ema(ema, fake, min(EMA, (1 + step) / (10 + step)))
    return ema, losses


# ---- The folder ------------------------------------------------------------------------------------------------------

def write(args, found, source):
    args.out.mkdir(parents=True, exist_ok=True)
    head = dict(data=source, M=M, steps=args.steps, n=args.n, lr=LR, guide_to=args.guide_to, torch=torch.__version__)
    write_atomic(args.out / "runs.json", json_text(dict(head, rows=found), indent=1) + "\n")
    write_atomic(args.out / "surrogate.png", lambda path: figure(found).savefig(path, format="png", dpi=100))
    text = "\n".join(table(found))
    command = shlex.join(["python", "benchmarks/surrogate.py", *sys.argv[1:]])
    write_atomic(args.out / "README.md", f"""# The surrogate fake velocity against an explicit one: {source}

Made by `{command}`, torch {torch.__version__};
{args.n} samples, explicit fake networks of {args.steps} steps.  [runs.json](runs.json): every bin of tau, and the
fake network's loss on held-out samples.

{text}

![Cosines and lengths against tau](surrogate.png)
""")
    print(f"{text}\n\nwrote README.md, runs.json and surrogate.png into {args.out}")


def groups(found):
    """{(start, omega): its flow maps}, in the order of `found`."""
    together = {}
    for row in found:
        together.setdefault((row["start"], row["omega"]), []).append(row)
    return together


def table(found):
    """Markdown lines: cosines over tau at k = 1 and 10, mean over the flow maps of a name."""
    header = ["start", "omega"]
    for k in SHIFTS:
        header += [f"k = {k}: surrogate, explicit", "two explicit", "surrogate, class mean", "explicit, class mean"]
    body = []
    for (start, omega), rows in groups(found).items():
        cells = [start, f"{omega:g}"]
        for k in SHIFTS:
            for name in COSINES:
                cells.append(spread([row["over_tau"][f"k{k}"][name] for row in rows], 2))
        body.append(cells)
    return markdown_lines(header, body)


def bins_of(rows, name):
    """A number of every bin of tau, [number of flow maps, number of bins]."""
    found = []
    for row in rows:
        found.append([each[name] for each in row["bins"]])
    return np.array(found)


def figure(found):
    """Three panels against tau: cosine, ratio of lengths, cosines with the direction to the class mean.

    A line is the mean over the flow maps of a name; of the lengths, the geometric mean.
    """
    drawing = matplotlib.figure.Figure(figsize=(11, 3.8), layout="constrained")
    cosines, lengths, means = drawing.subplots(1, 3, sharex=True)
    for i, ((start, omega), rows) in enumerate(groups(found).items()):
        label, color = f"{start}, omega {omega:g}", f"C{i}"
        tau = [np.mean(each["tau"]) for each in rows[0]["bins"]]
        cosines.plot(tau, bins_of(rows, "cosine").mean(0), ".-", color=color, label=label)
        cosines.plot(tau, bins_of(rows, "two_explicit").mean(0), ".:", color=color)
        ratio = np.exp(np.log(bins_of(rows, "length_ratio")).mean(0))
        lengths.semilogy(tau, ratio, ".-", color=color, label=label)
        for name, style in (("surrogate", ".-"), ("explicit", ".:")):
            means.plot(tau, bins_of(rows, f"{name}_to_mean").mean(0), style, color=color, label=f"{label}, {name}")
    cosines.set_ylim(-0.5, 1)
    titles = {
        cosines: "cosine with the explicit gap: surrogate;\ndotted: of a second explicit network",
        lengths: "length: surrogate / explicit",
        means: "cosine with the pull to the class mean",
    }
    for axis, title in titles.items():
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("tau")
        axis.axhline(1 if axis is lengths else 0, color="gray", linewidth=0.7)
        axis.legend(fontsize=7)
    return drawing


if __name__ == "__main__":
    main(run, parse_args)
