"""Watching a run: its first evaluation, what is due after a step (metrics, samples, health, state), its last table."""
import functools

import numpy as np
import torch

from common import noise_by_index, world
from data import to_images
from evaluate import decoder_for, default_sampler, evaluate, show, table
from metrics import EVAL_SEED, Diverged, spread
from model import fixed_guidance, interpolate, v_to_x0
from plumbing.files import BadInput, read_lines, write_atomic
from plumbing.run_folder import UNTOUCHED


def begin(run, features):
    """The evaluation of a run's start, before its first step.  A network with random weights is not worth one."""
    if features:
        run.measured_by(features.hash)
    if run.step == 0 and run.main and run.args.start != "scratch":
        run.evaluated(evaluate(run.ema, features, run.args))


def watch(run, features, teacher=None, panel=None):
    """Do what is due at the end of a step: evaluate, draw samples and the health panel, save.

    teacher: the start, or the network of --teacher; its samples stand above the EMA's.
    panel: callable (run) that draws `health`.
    """
    args = run.args
    try:
        measure(run, features, teacher)
    except Diverged:                                                # before a loss or a weight has shown it
        raise BadInput(f"the run has diverged: its samples hold NaN or infinity after step {run.step}; "
                       f"{UNTOUCHED}") from None
    if run.main and panel and args.health_every and run.due(args.health_every):
        panel(run)
    if run.due(args.save_every):
        run.save()
    if run.due(args.eval_every, args.preview_every, getattr(args, "health_every", 0)):
        run.restart_clock()


def measure(run, features, teacher):
    """What `watch` has due of samples: the evaluation, a picture."""
    args = run.args
    if run.main and run.due(args.eval_every):
        run.evaluated(evaluate(run.ema, features, args))
        if run.ema.conditioning == "in_context" and getattr(args, "omega_max", 1) > 1:
            run.write(dict(omega_response=omega_response(run.ema, run.data)))
    if run.main and run.due(args.preview_every):
        name = "teacher" if getattr(args, "teacher", None) else "start"
        nets = [(name, teacher, default_sampler(teacher))] if teacher else []
        nets.append((f"after {run.step} training steps", run.ema, args.sampler))
        show(run.folder / f"samples_{run.step:06d}.png", nets, run.data, args)


def finish(run, features):
    """The end of a run: result.json, and the table of its first and last evaluation."""
    measured_at = run.evaluations[-1]["step"] if run.evaluations else None
    measured = run.from_first_process(int(measured_at == run.step))
    if run.began == run.step and run.data.kind == "pixels" and not measured:
        if run.main:                                  # stopped at this step before, and --steps asks for no more now
            run.evaluated(evaluate(run.ema, features, run.args))
        run.save()
    if not run.main:
        return
    picture = f"samples_{run.step:06d}.png"
    pictures = [picture] if (run.folder / picture).exists() else []             # none where a stop cut a run short
    if features is None:
        run.result("no metric of latents while training")
        print(f"{run.folder}: {', '.join(['model.pt', 'metrics.jsonl', *pictures])}; "
              "no metric of latents is computed while training")
        return
    first, last = run.evaluations[0], run.evaluations[-1]
    result = run.result(f"{features.definition()}; sampler {run.args.sampler}")
    rows = [("at step 0", first)] if first["step"] == 0 else []
    print(table([*rows, (f"after {last['step']} steps", last)], features))
    files = ["model.pt", "result.json", "metrics.jsonl", *pictures]
    print(f"{result['definition']}\n{run.folder}: {', '.join(files)}")


@torch.no_grad()
def omega_response(net, data, n=100):
    """How much of omega a network has learned: v(omega = 2) - v(omega = 1) projected on v_cond - v_uncond.

    1: it guides as classifier-free guidance does.  0: it ignores its input omega, and what it was trained with, on
    average, is baked in.  On n rows of the data, noised to times in (0, 1].
    """
    device = next(net.parameters()).device
    rows = spread(torch.arange(len(data.x)), n)                     # of a folder: not the first class alone
    x0, y = data.x[rows].to(device), data.y[rows].to(device)
    index = torch.arange(len(rows))
    t = (index.to(device) + 1) / len(rows)
    x_t = interpolate(x0, noise_by_index("health", EVAL_SEED, index, x0.shape[1:]).to(device), t)
    at_1, at_2 = fixed_guidance(1.0, 0.0, 1.0, x_t), fixed_guidance(2.0, 0.0, 1.0, x_t)
    v_uncond = net(x_t, t, torch.full_like(y, net.num_classes), None, at_1)
    v_cond = net(x_t, t, y, None, at_1)
    wanted, found = v_cond - v_uncond, net(x_t, t, y, None, at_2) - v_cond
    return ((found * wanted).sum() / (wanted * wanted).sum()).item()


# ---- The health panel of a distribution matching run -----------------------------------------------------------------

BINS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)                               # of tau


def health(run, generator, v_fake, v_teacher, dm=None, gan=None, n=100):
    """Numbers into metrics.jsonl, a picture beside the samples; the same noise each time.

    generator: callable (z [n, M, C, H, W], y [n]) -> x_hat, M of the run's rollout.
    v_fake, v_teacher: callables y [n] -> callable (x_tau, tau) -> velocity, as in the scripts.
    dm, gan: callables (x_hat, tau, eps, y) -> the generator's two weighted losses [n], whose gradients are compared.

    x_hat_mean, x_hat_std    of all elements of x_hat; those of the data are 0 and 1
    gap_0.2 ... gap_1.0      mean |v_fake - v_teacher| at x_hat noised to tau in (0, 0.2], ..., (0.8, 1]
    gan_dm_ratio             median over samples of |d gan / d x_hat| / |d dm / d x_hat|
    """
    device, shape = next(run.ema.parameters()).device, run.data.x.shape[1:]
    M = getattr(run.args, "M", 1)                                       # TwinFlow has one step
    noise = noise_by_index("health", EVAL_SEED, range(n), (M + 1, *shape)).to(device)
    z, eps = noise[:, :M], noise[:, M]
    y = torch.arange(n, device=device) % run.data.num_classes
    with torch.no_grad():
        x_hat = generator(z, y)
        numbers = dict(x_hat_mean=x_hat.mean().item(), x_hat_std=x_hat.std().item())
        for low, high in zip(BINS, BINS[1:]):
            tau = high - (high - low) * torch.arange(n, device=device) / n                        # the whole bin
            x_tau = interpolate(x_hat, eps, tau)
            gap = v_fake(y)(x_tau, tau) - v_teacher(y)(x_tau, tau)
            numbers[f"gap_{high}"] = gap.abs().mean().item()
        pictures = [("x_hat", x_hat[:10])]
        for level in BINS[2:]:
            x_tau = interpolate(x_hat, eps, level)[:10]
            tau = torch.full((len(x_tau),), level, device=device)
            for name, v in (("teacher's x0", v_teacher), ("fake's x0", v_fake)):
                pictures.append((f"tau = {level:.1f}: {name}", v_to_x0(x_tau, v(y[:10])(x_tau, tau), tau)))
    if gan:
        tau = torch.linspace(0.02, 0.98, n, device=device)                                        # DMD2's range
        rows = run.args.micro_batch or max(1, run.args.batch_size // world())     # no more memory than a step's
        dm_norm, gan_norm = (gradient_norms(loss, x_hat, tau, eps, y, rows) for loss in (dm, gan))
        numbers["gan_dm_ratio"] = (gan_norm / dm_norm).median().item()
    run.write(numbers)
    draw_panel(run, pictures, [line for line in read_lines(run.folder / "metrics.jsonl") if "x_hat_std" in line])


def gradient_norms(loss, x_hat, tau, eps, y, rows):
    """|d loss / d x_hat| of each sample [n], `rows` of them at a time."""
    norms = []
    for x, *others in zip(*(v.split(rows) for v in (x_hat.detach(), tau, eps, y))):
        x.requires_grad_()
        gradient, = torch.autograd.grad(loss(x, *others).sum(), x)
        norms.append(gradient.flatten(1).norm(dim=1))
    return torch.cat(norms)


def draw_panel(run, pictures, lines):
    """health_NNNNNN.png: rows of images on the left, the curves of the panels so far on the right.

    pictures: [(caption, x [n, C, H, W])]; lines: the panels' lines of metrics.jsonl.
    """
    import matplotlib.figure  # half a second: only where it is used
    vae = decoder_for(run.data, run.args, next(run.ema.parameters()).device)
    figure = matplotlib.figure.Figure(figsize=(11, 6.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    for axis, (caption, x) in zip(left.subplots(len(pictures), 1), pictures):
        axis.imshow(np.hstack(list(to_images(x, run.data.meta, vae))), cmap="gray", vmin=0, vmax=255)
        axis.set_title(caption, fontsize=8, loc="left", pad=2)
        axis.set_axis_off()

    steps = [line["step"] for line in lines]
    with_gan = "gan_dm_ratio" in lines[-1]
    curves = right.subplots(3 if with_gan else 2, 1, sharex=True)
    for high in BINS[1:]:
        curves[0].plot(steps, [line[f"gap_{high}"] for line in lines], ".-", label=f"tau to {high}")
    for name, wanted in (("x_hat_mean", 0), ("x_hat_std", 1)):
        curves[1].plot(steps, [line[name] for line in lines], ".-", label=name)
        curves[1].axhline(wanted, color="gray", linewidth=0.7)
    if with_gan:
        ratios = [line["gan_dm_ratio"] for line in lines]
        curves[2].semilogy(steps, ratios, ".-", label="GAN / DM gradient at x_hat")
    for axis, title in zip(curves, ("mean |v_fake - v_teacher|", "x_hat (grey: the data)", "gradient ratio")):
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    curves[-1].set_xlabel("step")
    save = functools.partial(figure.savefig, format="png", dpi=90)
    write_atomic(run.folder / f"health_{run.step:06d}.png", save)
