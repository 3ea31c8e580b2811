"""FSF-DMD with a fake network in the place of its own velocity u(x_tau, tau, 0), for as many steps.

    python benchmarks/explicit.py                                   # digits, weak start: 5 runs a seed
    python benchmarks/explicit.py --data /usr/share/datasets/fashion-mnist --seeds 3

From one start a seed: L_CD with random masking alone (lambda 0), then fsf_dmd.py with each lambda, once as it is and
once with v_fake of Eq. 12 replaced by an explicit fake network, as DMD2 has one: a copy of the start, trained by flow
matching (Eq. 52) on the generator's samples, --ttur updates a step at --fake_lr (DMD2's, not searched beside this rate
of the generator), each on samples of its own.  Both see the same data, noise and tau at the same rate, and no GAN, so
they differ in what v_fake is (of an EMA's map, or of a network that is trained on the samples) and in its passes.
(Table 7's 1:5 + L_CD + random masking, no GAN, comes close to it, but has DMD2's rollout, tau and rates.)
Shown are the paired differences to lambda 0, at 1, 2 and 4 sampling steps.
A run that was stopped goes on, as fsf_dmd.py's.  Leaves README.md, runs.json and explicit.png in --out.
"""
import argparse
import contextlib
import json
import shlex
import sys
import zlib
from pathlib import Path

import matplotlib.figure
import matplotlib.ticker
import numpy as np
import torch
from scipy.stats import ttest_1samp

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import dmd2  # noqa: E402
import fsf_dmd  # noqa: E402
from common import BadInput, Stream, batch_rows, frozen_copy, main, trainable  # noqa: E402
from data import data_kind, data_name, load_data, preset_kind  # noqa: E402
from hooks import replaced  # noqa: E402
from model import guided_map  # noqa: E402
from normuon import NorMuon, param_groups  # noqa: E402
from plumbing import report  # noqa: E402
from plumbing.files import json_text, write_atomic  # noqa: E402
from plumbing.flags import Parser, data_source, folder_path, number, result_folder  # noqa: E402
from plumbing.kept_runs import refuse_torchrun, run_all  # noqa: E402
from plumbing.passes import passes_a_step  # noqa: E402
from plumbing.run_folder import Run  # noqa: E402
from reproduce import STARTS, job, usable_data  # noqa: E402
from strength import frame, line_of_means  # noqa: E402

SHOWN = ("fd_1step", "fd_2step", "fd_4step", "precision_2step", "recall_2step")
TITLES = ("distance, 1 step", "2 steps", "4 steps", "precision, 2 steps", "recall, 2 steps")
PLACES = (1, 1, 1, 3, 3)
OWN, EXPLICIT = "u(x, tau, 0)", "a fake network"


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("--data", type=data_source, default="digits", help="as in reproduce.py, of pixels")
    p.add_argument("--start_steps", type=number(int, 1), help="steps of the start, an iMF (default: the preset's)")
    p.add_argument("--lam", type=number(float, 0, open_low=True), nargs="+", default=[0.1, 1.0],
                   help="lambdas of Eq. 15")
    p.add_argument("--lam_explicit", type=number(float, 0, open_low=True), nargs="+",
                   help="those beside the fake network (default: the same)")
    p.add_argument("--ttur", type=number(int, 1), default=5, help="updates of the fake network a step")
    p.add_argument("--fake_lr", type=number(float, 0, open_low=True), help="its learning rate (default: DMD2's preset)")
    p.add_argument("--steps", type=number(int, 1), help="steps of all runs (default: FSF-DMD's preset)")
    p.add_argument("--seeds", type=number(int, 1), default=5, help="seeds 0, 1, ...")
    p.add_argument("--runs", type=folder_path, default="runs/reproduce", help="folder of the starts, which are kept")
    p.add_argument("--out", type=result_folder, default="runs/explicit", help="folder of the results and of the runs")
    args = p.parse_args(argv)
    args.lam = sorted(set(args.lam))
    args.lam_explicit = sorted(set(args.lam_explicit or args.lam))
    return args


def run(args):
    refuse_torchrun()
    usable_data(args.data)
    if data_kind(args.data) == "latents":
        raise BadInput(f"--data {args.data}: holds latents, expected pixels")
    args.fake_lr = args.fake_lr or dmd2.PRESETS[preset_kind(args.data), "imf"]["fake_lr"]
    arms = [(OWN, 0.0)] + [(OWN, lam) for lam in args.lam] + [(EXPLICIT, lam) for lam in args.lam_explicit]
    length = f" --steps {args.start_steps}" if args.start_steps else ""
    found = argparse.Namespace(data=args.data, init=None, size=None, precision=None, runs=args.runs, start="weak",
                               jobs=1)
    rows = {arm: [] for arm in arms}
    for seed in range(args.seeds):
        start = job(found, STARTS["imf"] + length, seed)
        if run_all(found, [start]):
            raise BadInput(f"{start.folder}: the start failed")
        for arm in arms:
            rows[arm].append(one_run(args, start, arm, seed))
    write(args, rows)


def one_run(args, start, arm, seed):
    """Train one arm, or go on with it -> dict(passes a step, step, metrics of its last evaluation)."""
    fake, lam = arm
    network = start.folder / "model.pt"
    begun_from = f"{zlib.crc32(network.read_bytes()):08x}"              # of a start that was made anew: other runs
    name = "own" if fake == OWN else f"ttur{args.ttur}-fake_lr{args.fake_lr:g}"
    folder = args.out / "runs" / f"{name}-lam{lam:g}-seed{seed}-{begun_from}"
    words = ["--init", str(network), "--data", args.data, "--lam", str(lam), "--seed", str(seed), "--out", str(folder)]
    parsed = fsf_dmd.parse_args(words + (["--steps", str(args.steps)] if args.steps else []))
    passes = passes_a_step("fsf_dmd.py", vars(parsed))
    if fake == EXPLICIT:
        passes += args.ttur * (parsed.M + 3)                            # its rollout, forward and backward
    with explicit_fake(args, parsed) if fake == EXPLICIT else contextlib.nullcontext():
        fsf_dmd.train(parsed)
    last = json.loads((folder / "result.json").read_text())["evaluations"][-1]
    return dict(seed=seed, passes=passes, step=last["step"], **logged(folder), **{name: last[name] for name in SHOWN})


def logged(folder):
    """Means over the log of L_CD and of the gap, which moves the samples; their standard deviation at the end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {}
    for name in ("cd", "gap", "x_hat_std"):
        found[name] = [line[name] for line in lines if name in line]
    return dict(cd=float(np.mean(found["cd"])), gap=float(np.mean(found["gap"])) if found["gap"] else None,
                x_hat_std=found["x_hat_std"][-1])


@contextlib.contextmanager
def explicit_fake(args, parsed):
    """fsf_dmd.train with a trained network as v_fake.  Saved and resumed with the run's state."""
    side, data = {}, load_data(parsed.data)

    def with_fake(starting_networks):
        def wrapped(*rest):
            net, teacher = starting_networks(*rest)
            side["fake"] = frozen_copy(teacher)                         # the start; a run that goes on loads its own
            trainable(True, side["fake"])
            side["opt_fake"] = NorMuon(param_groups(side["fake"]), lr=args.fake_lr)
            return net, teacher
        return wrapped

    def with_state(make_run):
        def wrapped(parsed, state, ema, data):
            side["ema"] = ema
            return make_run(parsed, state | dict(fake=side["fake"], opt_fake=side["opt_fake"]), ema, data)
        return wrapped

    def of_fake(before):
        def wrapped(net, x, t, s, y, guidance):                         # Eq. 12 asks the EMA, the rollout the network
            return side["fake"](x, t, y) if net is side["ema"] else before(net, x, t, s, y, guidance)
        return wrapped

    def with_turns(log):
        def wrapped(run, losses, batch, grad_norm):
            net = run.state["net"]
            device = next(net.parameters()).device
            fixed = torch.tensor([[parsed.omega, 0.0, parsed.guide_to]], device=device)
            for turn in range(args.ttur):
                g = Stream("explicit fake", parsed.seed, run.step, turn)
                y = data.y[batch_rows(len(data.x), parsed.batch_size, parsed.seed, run.step * args.ttur + turn)]
                shape = (len(y), *data.x.shape[1:])
                y, z, eps, t = (value.to(device) for value in (y, g.normal(*shape), g.normal(*shape),
                                                               g.uniform(len(y))))
                with torch.no_grad():
                    z, U = fsf_dmd.rollout(lambda x, t, s, y=y: guided_map(net, x, t, s, y, fixed), z, parsed.M)
                loss = dmd2.fake_loss(lambda x, t, y=y: side["fake"](x, t, y), z - U, t, eps)        # Eq. 52
                loss.mean().backward()
                side["opt_fake"].step()
                side["opt_fake"].zero_grad()
            log(run, losses, batch, grad_norm)                          # counts the step
        return wrapped

    with replaced([(fsf_dmd, "starting_networks", with_fake), (fsf_dmd, "Run", with_state),
                   (fsf_dmd, "guided_map", of_fake), (Run, "log", with_turns)]):
        yield


# ---- the folder ------------------------------------------------------------------------------------------------------

def write(args, rows):
    args.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "benchmarks/explicit.py", *sys.argv[1:]])
    of_rows = [dict(fake=fake, lam=lam, runs=each) for (fake, lam), each in rows.items()]
    stored = dict(data=args.data, start_steps=args.start_steps, ttur=args.ttur, fake_lr=args.fake_lr,
                  torch=torch.__version__, rows=of_rows)
    write_atomic(args.out / "runs.json", json_text(stored, indent=1) + "\n")
    write_atomic(args.out / "explicit.png", lambda path: figure(rows).savefig(path, format="png", dpi=100))
    text = "\n".join(table(rows))
    write_atomic(args.out / "README.md", f"""# Its own velocity, or a fake network: {data_name(args.data)}

Made by `{command}`, torch {torch.__version__};
{args.seeds} seeds; the first row as it is, the others as paired differences to it, mean ± standard deviation (p of a
paired t-test, uncorrected).  Updates of the fake network a step: {args.ttur}, at rate {args.fake_lr:g}.
[runs.json](runs.json): of every seed; cd and gap: means over the log of L_CD and of |v_fake - v_teacher|; x_hat_std:
standard deviation of the samples at the end.

{text}

![Distance minus that of L_CD alone, over lambda](explicit.png)
""")
    print(f"{text}\n\nwrote README.md, runs.json and explicit.png into {args.out}")


def differences(rows, arm, name):
    """Paired, to L_CD alone."""
    return [each[name] - base[name] for each, base in zip(rows[arm], rows[OWN, 0.0], strict=True)]


def table(rows):
    """Markdown lines."""
    body = []
    for (fake, lam), each in rows.items():
        cells = [fake if lam else "none: L_CD alone", f"{lam:g}", f"{each[0]['passes']:g}"]
        for name, places in zip(SHOWN, PLACES, strict=True):
            if lam:
                values = differences(rows, (fake, lam), name)
                tested = f" (p {ttest_1samp(values, 0).pvalue:.2g})" if len(values) > 2 and np.std(values) else ""
                cells.append(report.spread(values, places, "+") + tested)
            else:
                cells.append(report.spread([one[name] for one in each], places))
        body.append(cells)
    return report.markdown_lines(["v_fake", "lambda", "passes a step", *TITLES], body)


def figure(rows):
    """A panel for each number of sampling steps: the mean difference over lambda, a line for each v_fake."""
    drawing = matplotlib.figure.Figure(figsize=(10, 3.2), layout="constrained")
    for axis, name in zip(drawing.subplots(1, 3), SHOWN[:3], strict=True):
        for i, fake in enumerate((OWN, EXPLICIT)):
            lams = [lam for kind, lam in rows if kind == fake and lam]
            line_of_means(axis, lams, [differences(rows, (fake, lam), name) for lam in lams], i, f"v_fake: {fake}")
        frame(axis, f"distance minus that of L_CD alone, {name[3]} step{'s' if name[3] != '1' else ''}", "lambda")
        axis.set_yscale("symlog", linthresh=2)                          # linear within -2 .. 2
        axis.yaxis.set_major_locator(matplotlib.ticker.FixedLocator([-10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100]))
        axis.yaxis.set_major_formatter("{x:g}")
    axis.legend(fontsize=7)
    return drawing


if __name__ == "__main__":
    main(run, parse_args)
