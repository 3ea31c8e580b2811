"""What the flags say reaches the training step, the networks, the logs and the samples.

Each test here fails for a line of the scripts that all other tests let pass when it was broken on purpose.
"""
import argparse
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import consistency
import dmd2
import fsf_dmd
import model
import sid
from common import BadInput
from data import load_data
from plumbing import checkpoints, passes
from test_commands import TOY
from test_helpers import HERE, METHODS, assert_same, read_metrics, small_images, small_net, state, train
from test_metrics import evaluate_here
from test_steps import RUN, Steps

# ---- the times, labels, guidance and networks of a step --------------------------------------------------------------

def turns_of(monkeypatch, command, out):
    """The batches that `train` of a command makes."""
    name, _, flags = command.partition(" ")
    module, turns = importlib.import_module(name), []
    real = module.micro_batches
    monkeypatch.setattr(module, "micro_batches", lambda batch, *rest: turns.append(batch) or real(batch, *rest))
    module.train(module.parse_args(f"{flags} --data toy.npz --steps 1 --batch_size 400 --out {out}".split()))
    return turns


@pytest.mark.parametrize("command, quantiles", [
    ("consistency --loss fm", dict(t=(0.05, 0.5, 0.95), s=(0.05, 0.5, 0.95))),          # one draw of the law, Eq. 1
    ("sid --init a.pt --health_every 0", dict(tau=(0.126, 0.667, 0.965))),
    ("twinflow --init a.pt --health_every 0", dict(tau=(0.05, 0.5, 0.95), t_fake=(0.05, 0.5, 0.95))),
    ("dmd2 --init a.pt --ttur 1 --health_every 0", {f"t_{k}": (0.05, 0.5, 0.95) for k in ("fake", "gen", "real")}),
])
def test_the_times_of_a_step_have_their_law(random_starts, monkeypatch, command, quantiles):
    for turn in turns_of(monkeypatch, command, f"law-{command.split()[0]}"):
        for name, expected in quantiles.items():
            found = turn[name].quantile(torch.tensor([0.05, 0.5, 0.95]))
            torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.08)


@pytest.mark.parametrize("command", ["twinflow --health_every 0", "consistency --loss cd --cd_guidance drawn",
                                     "fsf_dmd --health_every 0 --cd_guidance drawn",
                                     "dmd2 --cd 1 --ttur 1 --lambda_g 0 --health_every 0 --cd_guidance drawn"])
def test_the_loss_on_data_draws_labels_times_and_guidance_by_the_flags(random_starts, monkeypatch, command):
    flags = "--init a.pt --label_drop 0.5 --mask_prob 0.25 --time_law logitnormal:2,0.5 --omega_max 4"
    for turn in turns_of(monkeypatch, f"{command} {flags}", f"drawn-{command.split()[0]}"):
        moving = turn["s"] < turn["t"]
        assert moving.sum() == 300
        logits = torch.logit(torch.stack([turn["t"], turn["s"]])[:, moving])
        assert logits.mean() == pytest.approx(2, abs=0.1) and logits.std() == pytest.approx(0.5, abs=0.1)
        assert (turn["y_drop"] == 3).double().mean() == pytest.approx(0.5, abs=0.1)
        r = turn["guidance"][:, 0].log() / np.log(4)                                    # uniform on [0, 1]
        assert r.mean() == pytest.approx(0.5, abs=0.05) and r.std() == pytest.approx(12 ** -0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("command, noise", [("dmd2 --ttur 2 --lambda_g 0", "fresh"), ("sid --noise ddim", "ddim")])
def test_the_fake_side_learns_on_the_rollout_of_the_generator(random_starts, monkeypatch, command, noise):
    """Every last jump and the renoising of --noise, in the turns without gradient as in those with it."""
    name, _, flags = command.partition(" ")
    module, found = importlib.import_module(name), set()
    real = module.backward_simulation

    def seen(u, eps, k, M, noise="fresh"):
        found.add((torch.is_grad_enabled(), k, M, noise))
        return real(u, eps, k, M, noise)

    monkeypatch.setattr(module, "backward_simulation", seen)
    run = RUN.replace("--steps 2 --batch_size 20 --micro_batch 12", "--steps 12 --batch_size 4")
    module.train(module.parse_args(f"{flags} --init a.pt --M 3 {run} --out rollout-{name}".split()))
    assert found == {(grad, k, 3, noise) for grad in (False, True) for k in range(3)}


def velocity_network_of_colours(**args):
    """rgb.npz, small images of 3 channels, and rgb.pt, a velocity network of random weights for them."""
    small_images(Path("rgb.npz"), 90)
    with np.load("rgb.npz") as file:
        np.savez("rgb.npz", images=np.stack([file["images"]] * 3, axis=3), labels=file["labels"])
    net = small_net("plain", torch.float32, in_channels=3)
    torch.save(dict(config=net.config, weights=net.state_dict(), data=load_data("rgb.npz").meta, args=args), "rgb.pt")


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [("fsf_dmd", "--warmup 0 --lam 0.5"), ("sid", ""),
                                         ("dmd2", "--ttur 1 --lambda_g 0 --cd 1 --lam 0.5")])
def test_cfg_of_the_first_channels_is_the_teachers_in_every_loss(random_starts, monkeypatch, name, flags):
    velocity_network_of_colours()

    def objective(n, b, _):
        def teacher(x, tau):
            v, v_uncond = n.teacher(x, tau, b.y), n.teacher(x, tau, torch.full_like(b.y, 3))
            guided = torch.where(model.expand(tau <= 0.6, v), v_uncond + 3 * (v - v_uncond), v)
            return torch.cat([guided[:, :1], v[:, 1:]], 1)

        if name == "fsf_dmd":
            x, U = fsf_dmd.rollout(lambda x, t, s: n.net(x, t, b.y, s), b.z[:, 0], 2)
            loss, _ = fsf_dmd.fsf_dmd_loss(x, U, lambda x, tau: n.ema(x, tau, b.y, 0.0), teacher, b.tau, b.eps_tau)
        else:
            u = lambda x, t, s: n.net(x, t, b.y, None if name == "sid" else s)          # plain: knows no s
            x_hat = model.backward_simulation(u, b.z, n.k, 2)
            of_method = sid.sid_loss if name == "sid" else dmd2.dmd_loss
            loss, _ = of_method(x_hat, lambda x, tau: n.fake(x, tau, b.y), teacher, b.tau, b.eps_tau)
        if name == "sid":
            return loss / 48
        return 0.5 * loss + consistency.distillation_loss(n.net, n.teacher, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance,
                                                          channels=1)

    def fake_side(n, b, x_hat):
        t, eps = (b.tau, b.eps_tau) if name == "sid" else (b.t_fake, b.eps_fake)
        return dmd2.fake_loss(lambda x, t: n.fake(x, t, b.y), x_hat, t, eps)

    run = RUN.replace("toy.npz", "rgb.npz")
    n = Steps(monkeypatch, name, f"--init rgb.pt --M 2 --cfg_channels 1 {flags} {run} --out channels-{name}",
              net=objective, fake=fake_side)
    assert n.updates.count("net") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name, flags, loss", [
    ("fsf_dmd", "--init a.pt --teacher b.pt --warmup 9", "cd"), ("fsf_dmd", "--init scratch --lam 0", "imf"),
    ("dmd2", "--init a.pt --teacher b.pt --cd 1 --lam 1e-9 --ttur 1 --lambda_g 0", "cd"),
    ("twinflow", "--init a.pt --lam 1e-9 --lam_adv 1e-9", "imf"),
])
@pytest.mark.parametrize("jvp", ["--fd_h 0.1", "--jvp exact"])
def test_the_derivative_and_the_distance_are_those_of_the_flags(random_starts, monkeypatch, name, flags, loss, jvp):
    def objective(n, b, _):
        inputs = b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance
        options = dict(h=0.1, exact="exact" in jvp, c=0.5)
        if loss == "cd":
            return consistency.distillation_loss(n.net, n.teacher, *inputs, **options)
        return consistency.imf_loss(n.net, *inputs, **options)

    fake = lambda n, b, x_hat: dmd2.fake_loss(lambda x, t: n.fake(x, t, b.y), x_hat, b.t_fake, b.eps_fake)
    more = "--omega_max 4" if loss == "imf" else ""
    out = f"options-{name}-{loss}-{jvp[2:4]}"
    Steps(monkeypatch, name, f"{flags} {jvp} --huber_c 0.5 {more} {RUN} --out {out}", net=objective, fake=fake)


@pytest.mark.parametrize("command", [
    "fsf_dmd --mask_prob 1", "dmd2 --cd 1 --mask_prob 1 --ttur 2", "sid --lambda_g 0.1", "twinflow --base rcgm",
    "consistency --loss cd --mask_prob 1"])
def test_every_pass_of_a_step_is_in_bf16_where_that_is_asked_for(random_starts, monkeypatch, command):
    """Without rows of s < t, whose finite difference is in float32."""
    name, _, flags = command.partition(" ")
    module, within, seen = importlib.import_module(name), [], []
    parts, forward = module.micro_batches, model.LightningDiT.forward

    def step(*args):
        for b in parts(*args):
            within.append(b)
            yield b
            within.clear()

    def asked(*args, **kwargs):
        seen.extend([torch.is_autocast_enabled("cpu")] * len(within))
        return forward(*args, **kwargs)

    monkeypatch.setattr(module, "micro_batches", step)
    monkeypatch.setattr(model.LightningDiT, "forward", asked)
    health = "" if name == "consistency" else "--health_every 0"
    train(f"{name}.py {flags} --init a.pt --data toy.npz --steps 1 --batch_size 8 --precision bf16 {health} "
          f"--out bf16-{name}")
    assert len(seen) >= 2 and all(seen)


@pytest.mark.parametrize("command", [
    "consistency.py --loss imf", "consistency.py --loss rcgm", "twinflow.py --health_every 0",
    "fsf_dmd.py --init scratch --health_every 0", "dmd2.py --init scratch --lambda_g 0 --health_every 0"])
def test_without_guidance_no_velocity_without_a_class_is_asked(in_home, few_samples, monkeypatch, command):
    """README: without it iMF takes a pass less, RCGM two."""
    asked, real = [], consistency.guided_target
    monkeypatch.setattr(consistency, "guided_target", lambda *args: asked.append(1) or real(*args))
    for omega_max in (1, 4):
        train(f"{command} --data toy.npz --steps 1 --batch_size 8 --omega_max {omega_max} "
              f"--out guided-{omega_max}-{command.split()[0]}-{'rcgm' in command}")
        assert bool(asked) == (omega_max > 1)


# ---- what is trained, kept, logged and measured ----------------------------------------------------------------------

def test_the_optimizer_of_the_fake_side_has_all_of_network_and_head():
    args = argparse.Namespace(lambda_g=1.0, compile=0, fake_lr=0.02, lr=0.1)
    fake, head, _, opt = dmd2.new_fake_side(args, small_net("in_context"), torch.device("cpu"))
    found = [id(p) for group in opt.param_groups for p in group["params"]]
    every = [*fake.named_parameters(), *head.named_parameters()]
    assert sorted(found) == sorted(id(p) for name, p in every if name != "pos_embed")   # a fixed table
    assert [group["lr"] for group in opt.param_groups] == pytest.approx([0.02, 0.02 / 6])


@pytest.mark.parametrize("command", ["consistency.py --loss rcgm", "twinflow.py --base rcgm --health_every 0"])
def test_rcgms_target_warms_up_in_the_training_loop(home, monkeypatch, few_samples, command):
    monkeypatch.chdir(home)
    out = f"warm-{command.split('.')[0]}"
    saved = []
    for steps in (1, 2):
        train(f"{command} --data toy.npz --batch_size 8 --target_ema 0.99 --steps {steps} --out {out}")
        saved.append(state(home, out))
    for k, v in saved[1]["target"].items():                                             # (2 + n) / (4 + n) at n = 1
        torch.testing.assert_close(v, saved[1]["net"][k].lerp(saved[0]["target"][k], 3 / 5), rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_script_has_folders_of_its_own(tmp_path):
    """So an edited copy does not go on with the runs of the original, nor show its numbers."""
    shutil.copy(HERE / "fsf_dmd.py", tmp_path / "my_dmd.py")
    spec = importlib.util.spec_from_file_location("my_dmd", tmp_path / "my_dmd.py")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    args = copy.parse_args(["--M", "3"])
    assert (args.script, args.out) == ("my_dmd", "runs/my_dmd-digits-imf-M3")


def test_an_edited_script_is_said_where_its_run_goes_on(in_home, capsys):
    command = "consistency.py --loss imf --data toy.npz --out edited"
    train(f"{command} --steps 1")
    train(f"{command} --steps 1")
    assert "was begun with another" not in capsys.readouterr().out
    begun = json.loads(Path("edited/args.json").read_text())
    begun["code"]["model.py"] = "of another"
    Path("edited/args.json").write_text(json.dumps(begun))
    for steps in (1, 2):                                            # a run that is done, one that goes on
        train(f"{command} --steps {steps}")
        assert "edited: was begun with another model.py; --resume no starts over" in capsys.readouterr().out


@pytest.mark.parametrize("script", METHODS)
def test_model_pt_is_of_the_ema(in_home, few_samples, script):
    out = f"ema-of-{script[:-3]}"
    train(f"{TOY[script]} --steps 1 --batch_size 8 --ema 0.5 --out {out}")
    found, saved = checkpoints.load_checkpoint(f"{out}/model.pt")["weights"], state(in_home, out)
    assert_same(found, saved["ema"])
    assert not torch.equal(found["blocks.0.mlp.w3.weight"], saved["net"]["blocks.0.mlp.w3.weight"])


def test_an_ema_that_never_moves_is_refused():
    """model.pt would be the network of step 0, however long the run."""
    with pytest.raises(BadInput, match="--ema 1 --ema_warmup 0: the result would be the network of step 0"):
        consistency.parse_args("--loss imf --ema 1 --ema_warmup 0 --dry_run".split())


def test_a_seed_decides_weights_rows_noise_and_the_start(tmp_path, few_samples, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(consistency.PRESETS["pixels", "scratch"], "steps", 1)
    small_images("set.npz", 200)
    batches, real = [], consistency.micro_batches
    monkeypatch.setattr(consistency, "micro_batches", lambda batch, *rest: batches.append(batch) or real(batch, *rest))
    for seed in (0, 1):
        train(f"consistency.py --loss imf --data set.npz --steps 1 --batch_size 8 --lr 1e-30 --seed {seed} "
              f"--out new{seed}")
    zero, one = batches
    assert not torch.equal(zero["x0"], one["x0"]) and not torch.isin(zero["eps"], one["eps"]).any()
    a, b = (state(tmp_path, f"new{seed}")["net"]["blocks.0.attn.qkv.weight"] for seed in (0, 1))
    assert (a - b).norm() > 0.5 * a.norm()
    train("fsf_dmd.py --init imf --data set.npz --seed 1 --steps 1 --batch_size 8 --health_every 0 --out distilled")
    assert checkpoints.load_checkpoint("runs/consistency_imf-set-scratch-seed1/model.pt")["args"]["seed"] == 1


def test_what_is_logged_is_the_mean_loss_of_a_row(random_starts, monkeypatch):
    """Means over the turns of DMD2: test_a_step_of_dmd2."""
    seen = []
    real = fsf_dmd.fsf_dmd_loss
    monkeypatch.setattr(fsf_dmd, "fsf_dmd_loss", lambda *a: seen.append(real(*a)) or seen[-1])
    train("fsf_dmd.py --init a.pt --data toy.npz --steps 1 --batch_size 8 --health_every 0 --out log-fsf")
    [line] = [line for line in read_metrics(Path("."), "log-fsf") if "fsf" in line]
    for name, value in zip(("fsf", "gap"), seen[0]):
        assert line[name] == pytest.approx(value.mean().item(), rel=1e-5)


@pytest.mark.parametrize("script, flags, expected", [
    ("dmd2", "--no_gan", 26.5), ("dmd2", "--no_gan --ttur 1", 8.5), ("sid", "", 12), ("consistency", "--loss isg", 5),
    ("consistency", "--loss ct", 5)])
def test_passes_are_those_of_the_headers(script, flags, expected):
    args = importlib.import_module(script).parse_args(flags.split())
    assert passes.passes_a_step(f"{script}.py", vars(args)) == expected


def test_the_numbers_and_the_picture_follow_the_flags(in_home):
    """--omega, --guide_to, --cfg_channels, --seed and --shift reach what is measured, not only what is said of it."""
    velocity_network_of_colours(omega=3.0)
    numbers, pictures = [], []
    for flags in ("", "--seed 5", "--shift 3", "--omega 1", "--guide_to 0.5", "--cfg_channels 1"):
        evaluate_here(f"rgb.pt --steps 3 --n 40 --out flags {flags}")
        numbers.append(json.loads(Path("flags/evaluation.json").read_text())["fd_3step"])
        pictures.append(Path("flags/samples.png").read_bytes())
    assert len(set(numbers)) == len(set(pictures)) == 6
