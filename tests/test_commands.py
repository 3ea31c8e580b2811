"""The scripts as a user runs them (see test_all.py): flags, run folders, resume, torchrun, signals, bad input.

The first half trains in this process, through the scripts' own parse_args and train; the second in a subprocess.
"""
import argparse
import importlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import consistency
import data
import dmd2
import evaluate
import fsf_dmd
import metrics
import model
import normuon
import sid
import twinflow  # noqa: F401  (looked up by its name)
from plumbing import checkpoints, flags, run_folder
from plumbing.files import read_lines
from test_helpers import (
    HERE,
    METHODS,
    Evil,
    assert_same,
    environment,
    read_metrics,
    refusal,
    run,
    start,
    state,
    train,
)

# One command of each script on the small images of `home`, with as much of its method switched on as there is.
TOY = {
    "consistency.py": "consistency.py --loss cd --init imf/model.pt --data toy.npz",
    "fsf_dmd.py": "fsf_dmd.py --init imf/model.pt --data toy.npz --M 2 --health_every 0",
    "dmd2.py": "dmd2.py --init imf/model.pt --data toy.npz --M 2 --ttur 2 --ida 0.97 --cd 1 --health_every 0",
    "sid.py": "sid.py --init imf/model.pt --data toy.npz --lambda_g 0.1 --health_every 0",
    "twinflow.py": "twinflow.py --base rcgm --init imf/model.pt --data toy.npz --health_every 0",
}
assert set(TOY) == set(METHODS)


def trained_weights(out):
    """All weights of a run's model.pt (in the working folder), in one vector."""
    return torch.cat([p.flatten() for p in checkpoints.load_checkpoint(f"{out}/model.pt")["weights"].values()])


def differ(a, b):
    """Whether any tensor of two state dicts does."""
    return any(not torch.equal(v, b[k]) for k, v in a.items())


# ---- parsing ---------------------------------------------------------------------------------------------------------

def test_the_run_folder_is_named_after_what_differs_from_the_preset():
    def name(module, command):
        return module.parse_args(shlex.split(command)).out

    assert name(fsf_dmd, "") == "runs/fsf_dmd-digits-imf"
    assert name(fsf_dmd, "--init imf --M 2") == "runs/fsf_dmd-digits-imf"
    assert name(fsf_dmd, "--M 1") == "runs/fsf_dmd-digits-imf-M1"
    assert name(fsf_dmd, "--seed 3") == "runs/fsf_dmd-digits-imf-seed3"
    assert name(fsf_dmd, "--lam 0.1 --M 1 --steps 9 --device cpu") == "runs/fsf_dmd-digits-imf-M1-lam0.1"
    assert name(consistency, "--loss imf --seed 3") == "runs/consistency_imf-digits-scratch-seed3"
    assert name(consistency, "--loss cd --mask_prob 0") == "runs/consistency_cd-digits-imf-mask_prob0.0"
    assert name(dmd2, "--no_gan") == "runs/dmd2-digits-imf-lambda_g0.0"
    assert dmd2.parse_args(["--no_gan"]).lambda_g == 0 and dmd2.parse_args([]).lambda_g == 3e-3


def test_a_run_that_ends_in_its_warmup_says_so(in_home, capsys):
    fsf_dmd.parse_args("--data toy.npz --init fm --steps 5 --warmup 5".split())
    assert capsys.readouterr().out == "fsf_dmd.py: all 5 steps are L_CD alone, --warmup is 5\n"
    fsf_dmd.parse_args("--data toy.npz --init fm --steps 6 --warmup 5".split())
    assert not capsys.readouterr().out


@pytest.mark.parametrize("init, lam, shift, M, steps, warmup, cfg_channels", [
    ("imf", 0.05, 10, 2, 4_000, 0, 0),
    ("fm", 0.001, 10, 2, 26_000, 20_000, 3),
    ("scratch", 0.01, 1, 1, 400_000, 0, 0),
])
def test_latents_have_the_columns_of_table_6(init, lam, shift, M, steps, warmup, cfg_channels):
    args = fsf_dmd.parse_args(["--data", "shards", "--init", init])
    assert (args.lam, args.shift, args.M, args.steps) == (lam, shift, M, steps)
    assert (args.warmup, args.cfg_channels) == (warmup, cfg_channels)
    assert (args.batch_size, args.ema, args.omega, args.guide_to, args.label_drop) == (128, 0.99995, 6, 0.9, 0.1)


def test_it_is_known_who_set_a_flag():
    args = fsf_dmd.parse_args(["--data", "shards", "--M", "1"])
    assert (args.size, args.lam, args.shift, args.steps, args.batch_size) == ("B/1", 0.05, 10, 4000, 128)
    assert (args.ema, args.omega, args.guide_to, args.M, args.precision) == (0.99995, 6, 0.9, 1, "bf16")
    assert args.sources["init"] == "default" and args.sources["fd_h"] == "default"
    assert args.sources["lam"] == "preset" and args.sources["M"] == "given"


@pytest.mark.parametrize("script", METHODS)
def test_help_shows_the_flags_in_groups(script, capsys):
    module = sys.modules[script.removesuffix(".py")]
    with pytest.raises(SystemExit) as stop:
        module.parse_args(["--help"])
    assert stop.value.code == 0
    flags = capsys.readouterr().out.split("\noptions:\n")[1]
    found, group = {}, "options"
    for line in flags.splitlines():
        title, flag = re.match(r"(\w+):$", line), re.match(r"  (?:-h, )?--(\w+)", line)
        if title:
            group = title[1]
        if flag:
            found.setdefault(group, []).append(flag[1])
    assert list(found) == ["options", "data", "network", "optimisation", "method", "run"]
    assert found["options"] == ["help"]                         # every flag of ours is in a group
    for group, flag in (("data", "data"), ("network", "init"), ("optimisation", "lr"), ("run", "out")):
        assert flag in found[group]
    assert ("loss" if script == "consistency.py" else "base" if script == "twinflow.py" else "M") in found["method"]


def test_a_dry_run_prints_who_set_what_and_writes_nothing(in_home, capsys):
    command = "--loss imf --size B/1 --batch_size 2 --micro_batch 1 --dry_run --data toy.npz --steps 3 --out dry"
    with pytest.raises(SystemExit) as stop:
        consistency.parse_args(command.split())
    assert stop.value.code == 0 and re.search(r"--size +B/1 +given", capsys.readouterr().out)
    assert not (in_home / "dry").exists()

    with pytest.raises(SystemExit):
        consistency.parse_args("--loss imf --data far/away --dry_run".split())
    assert "--data far/away: is not there; by its name, below is what latents get" in capsys.readouterr().out


def test_a_checkpoint_whose_data_are_elsewhere(in_home, tmp_path, monkeypatch, capsys):
    model = (in_home / "imf" / "model.pt").resolve()
    monkeypatch.chdir(tmp_path)
    said = refusal(f"evaluate.py {model}", capsys, monkeypatch)
    assert "was trained on toy.npz, which is not there (seen from here); pass --data" in said
    (tmp_path / "linked").symlink_to(model)                             # as in a hub's cache: not beside its target
    assert evaluate.output_folder(argparse.Namespace(out=None, what="linked")) == tmp_path


# ---- every flag changes what is trained ------------------------------------------------------------------------------

FM = "--init fm/model.pt --data toy.npz --health_every 0"
SCRATCH = "--init scratch --data toy.npz --health_every 0"
FLAGS = {                       # base command: each of these flips one flag of it, and the trained weights must answer
    TOY["consistency.py"]: [
        "--mask_prob 0", "--time_law logitnormal", "--jvp exact", "--fd_h 0.1", "--huber_c 1", "--label_drop 0.9",
        "--cd_guidance drawn --omega_max 3", "--cd_guidance drawn --omega_max 3 --omega_law truncexp",
        "--lr 1e-2", "--ema 0.05", "--ema_warmup 0", "--seed 1", "--precision bf16", "--batch_size 64",
        "--tangent_norm 0.1", "--tangent_norm 1",
        "--init fm/model.pt", "--init fm/model.pt --omega 3", "--init fm/model.pt --omega 3 --guide_to 0.5"],
    "consistency.py --loss rcgm --data toy.npz": [
        "--delta 0.1", "--order 1", "--clamp 0.2", "--clamp 0", "--omega_max 5", "--mask_prob 0", "--huber_c 1"],
    "consistency.py --loss isg --init imf/model.pt --data toy.npz": [
        "--M 1", "--huber_c 1", "--omega 3", "--cd_guidance drawn --omega_max 3", "--init fm/model.pt"],
    TOY["dmd2.py"]: [
        "--M 1", "--ttur 3", "--fake_lr 1e-2", "--lambda_g 0", "--lambda_g 1", "--lambda_d 1", "--disc_trunk generator",
        "--ida 1", "--ida 0.5", "--cd 0", "--lam 0.3", "--cd 1 --mask_prob 0"],
    f"dmd2.py {FM} --ttur 1": ["--cd 1", "--omega 3"],
    f"dmd2.py {SCRATCH}": ["--lam 1", "--ttur 2", "--omega_max 3"],
    TOY["fsf_dmd.py"]: [
        "--M 1", "--M 3", "--lam 3", "--shift 9", "--weight one", "--weight one --clip 0.01", "--cosine_factor 1",
        "--rollout dmd2", "--rollout_grad last", "--omega 3", "--omega 3 --guide_to 0.5",
        "--cd_guidance drawn --omega_max 3", "--warmup 1"],
    f"fsf_dmd.py {FM} --warmup 0": ["--lam 3", "--omega 3", "--warmup 2"],
    f"fsf_dmd.py {SCRATCH}": ["--lam 3", "--omega 3", "--omega_max 3", "--n_tokens 2"],
    TOY["sid.py"]: [
        "--M 4", "--M 1", "--noise ddim", "--M 4 --noise ddim", "--M 4 --noise fixed", "--alpha 0.5", "--weight sid",
        *(f"--weight '{w}'" for w in sid.WEIGHTS if w != "1-t"),
        "--fake_lr 1e-2", "--lambda_g 0", "--lambda_d 1", "--omega 3", "--omega 3 --guide_to 0.5"],
    f"sid.py {FM}": ["--omega 3"],
    TOY["twinflow.py"]: [
        "--base imf", "--base imf --jvp exact", "--lam 3", "--lam_adv 3", "--clip 1e-4", "--clip 2e-4", "--delta 0.1",
        "--order 1", "--clamp 0.2", "--omega 3", "--init scratch"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", FLAGS, ids=range(len(FLAGS)))
def test_every_flag_changes_what_is_trained(in_home, few_samples, command):
    name = f"flag-{list(FLAGS).index(command)}"

    def weights(extra, out):
        train(f"{command} --batch_size 32 --steps 3 {extra} --out {out}")
        return trained_weights(out)

    found = {"": weights("", name)}
    if command not in TOY.values():                         # those: test_killed_and_resumed_is_never_interrupted
        assert torch.equal(weights("", f"{name}-again"), found[""])                     # the same command: the same
    for i, extra in enumerate(FLAGS[command]):
        found[extra] = weights(extra, f"{name}-{i}")
    names = list(found)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert not torch.equal(found[a], found[b]), f"{a!r} and {b!r} train the same network"


@pytest.mark.slow
def test_pretraining_flags_and_the_other_losses(in_home, few_samples, monkeypatch):
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", (None, 60, 0))        # the losses' own samplers
    nets = {}
    for extra in ("--loss imf", "--loss imf --omega_max 5", "--loss imf --n_tokens 3", "--loss imf --token_block 0",
                  "--loss fm", "--loss ct"):
        out = f"pre{len(nets)}"
        train(f"consistency.py {extra} --data toy.npz --steps 3 --out {out}")
        nets[extra] = checkpoints.load_checkpoint(f"{out}/model.pt")
    config = {extra: net["config"] for extra, net in nets.items()}
    assert config["--loss fm"]["conditioning"] == "plain" and config["--loss ct"]["conditioning"] == "decoupled"
    assert config["--loss imf --n_tokens 3"]["n_tokens"] == 3
    assert config["--loss imf --token_block 0"]["token_block"] == 0
    assert all(c["num_classes"] == 3 for c in config.values())
    assert differ(nets["--loss imf"]["weights"], nets["--loss imf --omega_max 5"]["weights"])
    lines = read_metrics(in_home, "pre4")                                               # fm: Euler
    assert any(line["step"] == 3 and "fd_25step" in line for line in lines)


@pytest.mark.slow
def test_cosine_and_guided_channels_reach_multi_channel_data(tmp_path, few_samples, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 3)).astype(np.uint8)
    np.savez("rgb.npz", images=images, labels=np.arange(60) % 2)

    def bias(out):
        return checkpoints.load_checkpoint(f"{out}/model.pt")["weights"]["final_layer.linear.bias"]

    for cosine in (0, 1):
        train(f"consistency.py --loss imf --data rgb.npz --steps 3 --cosine {cosine} --out cosine{cosine}")
    assert not torch.equal(bias("cosine0"), bias("cosine1"))
    train("consistency.py --loss fm --data rgb.npz --steps 3 --out fm")
    for channels in (0, 1):                                     # CFG on the first channel only: another teacher
        train(f"consistency.py --loss cd --init fm/model.pt --data rgb.npz --steps 3 --omega 3 "
              f"--cfg_channels {channels} --out cfg{channels}")
    assert not torch.equal(bias("cfg0"), bias("cfg1"))
    velocity, _ = checkpoints.load_network("fm/model.pt")            # and other samples, where the channel is guided
    samples = lambda omega, channels: evaluate.generate(velocity, 6, (3, 4, 4), 2, omega, 1.0, channels)[0]
    whole, first, none = samples(3.0, None), samples(3.0, 1), samples(1.0, None)
    assert not torch.equal(whole, first) and not torch.equal(first, none)
    evaluate.run(evaluate.parse_args("fm/model.pt --omega 3 --cfg_channels 1 --n 40 --out measured".split()))


# ---- who trains whom -------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script, order", [
    ("dmd2.py --ttur 3", [0, 1, 1, 1, 0, 1, 1, 1]),             # TTUR 1:3 as DMD2 counts
    ("sid.py --lambda_g 0.1", [1, 0, 1, 0]),                    # 1:1, fake first
])
def test_every_turn_leaves_the_other_networks_alone(in_home, few_samples, monkeypatch, script, order):
    """Around each optimizer step all parameters and states of the other side stay bit-identical, without gradient."""
    sides, turns = [], []

    def parameters(opt):
        return [p for group in opt.param_groups for p in group["params"]]

    def photo(opt):
        states = [v.clone() for s in opt.state.values() for v in s.values() if torch.is_tensor(v)]
        return [p.detach().clone() for p in parameters(opt)] + states

    def same(one, other):
        return all(torch.equal(a, b) for a, b in zip(one, other))

    class Spy(normuon.NorMuon):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            sides.append(self)

        def step(self):
            other = sides[1 - sides.index(self)]
            assert all(p.grad is None for p in parameters(other))
            assert any(p.grad is not None for p in parameters(self))
            before, other_before = photo(self), photo(other)
            if turns and turns[-1][0] is not self:              # what the other did since its own last turn: nothing
                assert same(turns[-1][1], other_before)
            super().step()
            assert same(other_before, photo(other)) and not same(before, photo(self))
            turns.append((self, photo(self)))

    name = script.split(".")[0]
    out = f"isolated-{name}"
    for module in (sys.modules[name], dmd2):                                            # the fake side's is dmd2's
        monkeypatch.setattr(module, "NorMuon", Spy)
    train(f"{script} --init imf/model.pt --data toy.npz --steps 2 --batch_size 32 --health_every 1 --out {out}")
    assert [sides.index(opt) for opt, _ in turns] == order
    first, last = checkpoints.load_checkpoint("imf/model.pt")["weights"], state(in_home, out)
    assert not differ(first, last["teacher"])                                           # nothing trains the teacher
    assert differ(first, last["net"]) and differ(first, last["fake"])
    health = [line for line in read_metrics(in_home, out) if "gap_0.2" in line]
    assert [line["step"] for line in health] == [1, 2] and all(line["gan_dm_ratio"] > 0 for line in health)
    assert (in_home / out / "health_000002.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["dmd2", "sid"])
def test_without_gan_the_real_images_are_never_seen(in_home, few_samples, script):
    """The rollout and the fake loss need noise and labels only: other images, the same weights."""
    with np.load("toy.npz") as toy:
        np.savez("negative_toy.npz", images=255 - toy["images"], labels=toy["labels"])
    found = {}
    for data_ in ("toy", "negative_toy"):
        for gan in (0, 1):
            out = f"unseen-{script}-{data_}-{gan}"
            train(f"{script}.py --init imf/model.pt --data {data_}.npz --steps 2 --batch_size 32 --health_every 0 "
                  f"{'--ttur 2 ' if script == 'dmd2' else ''}--lambda_g {gan} --out {out}")
            found[data_, gan] = state(in_home, out)
    for part in ("net", "fake"):
        assert_same(found["toy", 0][part], found["negative_toy", 0][part])
    a, b = (found[data_, 1]["fake"]["blocks.0.mlp.w3.weight"] for data_ in ("toy", "negative_toy"))
    assert not torch.equal(a, b)
    assert "head" in found["toy", 1] and "head" not in found["toy", 0]                  # switched off: not built


@pytest.mark.parametrize("init, ours, baseline", [
    ("imf", "--init imf/model.pt --warmup 3", "--loss cd --init imf/model.pt"),
    ("fm", "--init fm/model.pt --warmup 3 --omega 2", "--loss cd --init fm/model.pt --omega 2"),
    ("scratch", "--init scratch --lam 0", "--loss imf --mask_prob 0.5"),
])
def test_without_its_own_term_fsf_dmd_is_its_baseline(in_home, few_samples, capsys, init, ours, baseline):
    """During --warmup FSF-DMD is consistency distillation; from scratch, with lambda 0, it is iMF."""
    term, base = f"term-{init}", f"base-{init}"
    train(f"fsf_dmd.py {ours} --data toy.npz --steps 3 --lr 3e-3 --health_every 0 --out {term}")
    train(f"consistency.py {baseline} --data toy.npz --steps 3 --lr 3e-3 --out {base}")
    assert_same(state(in_home, term)["net"], state(in_home, base)["net"])
    capsys.readouterr()
    if init == "scratch":
        assert "teacher" not in state(in_home, term)
        return
    first = checkpoints.load_checkpoint(f"{init}/model.pt")["weights"]
    for out in (term, base):
        assert not differ(first, state(in_home, out)["teacher"])                        # nothing trains the teacher
    if init == "fm":                                                                    # decoupled: no new parameters
        assert state(in_home, term)["teacher"].keys() == state(in_home, term)["net"].keys()
        assert checkpoints.load_checkpoint(f"{term}/model.pt")["config"]["conditioning"] == "decoupled"


def test_a_velocity_network_becomes_a_flow_map_and_stays_the_teacher(in_home):
    toy = data.load_data("toy.npz")
    net, teacher = checkpoints.load_start("fm/model.pt", toy)
    x, t, y = torch.randn(3, 1, 4, 4), torch.rand(3), torch.tensor([0, 1, 2])
    assert net.conditioning == "decoupled" and teacher.conditioning == "plain"
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(net(x, t, y, t), teacher(x, t, y))
    assert (net(x, t, y, t / 2) - teacher(x, t, y)).abs().max() > 1e-5
    trainable = lambda net: sum(p.requires_grad for p in net.parameters())
    assert trainable(net) == trainable(model.LightningDiT(**net.config))
    net, teacher = checkpoints.load_start("imf/model.pt", toy)
    torch.testing.assert_close(net(x, t, y, t / 2), teacher(x, t, y, t / 2))
    assert next(net.blocks.parameters()).requires_grad


def test_an_omega_that_was_not_learned_is_said(in_home, capsys):
    """A network with omega as an input knows the range that it was trained on; a velocity network's CFG has none."""
    toy, imf = data.load_data("toy.npz"), checkpoints.load_checkpoint("imf/model.pt")
    assert imf["args"]["omega_max"] == 1
    torch.save(imf | dict(args=dict(loss="imf", omega_max=2, omega=3)), "wide.pt")      # of it omega is the sampler's
    torch.save(imf | dict(args=dict(omega_max=1, omega=3)), "asked.pt")                 # distilled with a fixed omega

    def said(command):
        name, _, flags = command.partition(" ")
        script = importlib.import_module(name)
        args = script.parse_args(f"{flags} --data toy.npz --out guess".split())
        checkpoints.starting_networks(args, toy, torch.device("cpu"), None)
        return [line for line in capsys.readouterr().out.splitlines() if "has to guess" in line]

    for command, words in (
        ("fsf_dmd --init imf/model.pt", None),
        ("fsf_dmd --init fm/model.pt --omega 3", None),
        ("fsf_dmd --init imf/model.pt --omega 3", "imf/model.pt: was trained with omega up to 1; at omega 3 the"),
        ("fsf_dmd --init wide.pt --omega 2", None),
        ("fsf_dmd --init wide.pt --omega 3", "wide.pt: was trained with omega up to 2; at omega 3"),
        ("fsf_dmd --init imf/model.pt --omega 3 --teacher asked.pt", None),
        ("fsf_dmd --init asked.pt --omega 3 --teacher imf/model.pt", "imf/model.pt: was trained with omega up to 1"),
        ("fsf_dmd --init wide.pt --omega 2 --cd_guidance drawn --omega_max 5", "omega up to 2; at omega 5"),
        ("consistency --loss imf --omega 3 --omega_max 2", "this run: was trained with omega up to 2; at omega 3"),
    ):
        lines = said(command)
        assert len(lines) == (words is not None) and (words or "") in "".join(lines), (command, lines)
    both, alone = (presets["latents", "imf"] for presets in (dmd2.PRESETS_OF_CD, dmd2.PRESETS))
    assert both["cd_guidance"] == "drawn" and "cd_guidance" not in alone                # nothing is drawn without L_CD
    checkpoint, flags = checkpoints.load_checkpoint("asked.pt"), dict(guide_to=None, cfg_channels=None, sampler=None)
    for omega, words in ((None, ""), (3.0, ""), (4.0, "asked.pt: was trained with omega up to 3; at omega 4")):
        evaluate.sampling(argparse.Namespace(what="asked.pt", omega=omega, **flags), checkpoint)
        assert capsys.readouterr().out.partition(" the network")[0] == words


def test_a_loss_of_some_steps_alone_is_logged_as_their_mean(in_home, few_samples):
    """FSF-DMD with 3 of 4 steps of warm-up: L_FSF and its gap are of the last one, also in a line of four."""
    lines = []
    for every in (1, 4):
        train("fsf_dmd.py --init imf/model.pt --data toy.npz --steps 4 --warmup 3 --health_every 0 --eval_every 0 "
              f"--save_every 4 --log_every {every} --out logged{every}")
        lines.append([line for line in read_metrics(Path("."), f"logged{every}") if "fsf" in line])
    assert [len(of_run) for of_run in lines] == [1, 1]
    for name in ("fsf", "gap"):
        assert lines[0][0][name] == lines[1][0][name] > 0


def test_a_run_that_was_stopped_ends_where_it_is_if_no_more_steps_are_asked(in_home, few_samples, capsys):
    command = "consistency.py --loss imf --data toy.npz --out early"
    train(f"{command} --steps 3")
    result = json.loads(Path("early/result.json").read_text())
    stopped = torch.load("early/state.pt", weights_only=True)
    torch.save(dict(stopped, evaluations=[]), "early/state.pt")       # as Ctrl-C leaves it: saved, and not evaluated
    for steps in (3, 2):
        Path("early/result.json").unlink()
        train(f"{command} --steps {steps}")
        words = "early: is done (3 steps)" if steps == 3 else "early: is past --steps 2 (at 3)"
        assert words in capsys.readouterr().out
        assert json.loads(Path("early/result.json").read_text())["last"] == result["last"]
    assert torch.load("early/state.pt", weights_only=True)["evaluations"] == [result["last"]]


# ---- real command lines ----------------------------------------------------------------------------------------------

TIMING = ("sec_per_step", "images_per_sec", "memory_gb")


def python(command):
    """The words of a command of ours, for `start`."""
    script, *flags = shlex.split(command)
    return [sys.executable, str(HERE / script), *flags]


@pytest.mark.slow
@pytest.mark.parametrize("script", TOY)
def test_killed_and_resumed_is_never_interrupted(in_home, script, capsys):
    """3 + kill -9 + 3 steps = 6 steps, every tensor of networks, EMA and optimizer equal."""
    command, out, home = f"{TOY[script]} --batch_size 32", f"killed-{script[:-3]}", in_home
    process = start(home, python(f"{command} --save_every 3 --out {out} --steps 5000 --log_every 1"))
    while not (home / out / "state.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    stopped = state(home, out)["step"]
    assert stopped % 3 == 0 and stopped >= 3
    train(f"{command} --save_every 3 --out {out} --steps {stopped + 3} --log_every 1")
    assert f"resuming at step {stopped}" in capsys.readouterr().out
    train(f"{command} --out whole-{out} --steps {stopped + 3} --log_every 1")
    assert_same(state(home, out), state(home, f"whole-{out}"))
    resumed, whole = ([{k: v for k, v in line.items() if k not in TIMING} for line in read_metrics(home, o)]
                      for o in (out, f"whole-{out}"))
    assert resumed == whole                                                             # one history, no step twice


@pytest.mark.parametrize("rollout", ["flow_map", "dmd2"])
def test_the_health_panel_shows_the_rollout_that_is_trained(in_home, few_samples, rollout):
    train(f"fsf_dmd.py --init imf/model.pt --data toy.npz --steps 1 --rollout {rollout} --health_every 1 --lr 1e-3 "
          f"--out panel-{rollout}")
    net, _ = checkpoints.load_network("imf/model.pt")
    net.load_state_dict(state(in_home, f"panel-{rollout}")["net"])
    z = common.noise_by_index("health", metrics.EVAL_SEED, range(100), (3, 1, 4, 4))[:, :2]
    y = torch.arange(100) % 3
    u = lambda x, t, s: net(x, t, y, s)                                     # --omega 1, the preset
    with torch.no_grad():
        x, U = fsf_dmd.rollout(u, z[:, 0], 2)
        expected = x - U if rollout == "flow_map" else model.backward_simulation(u, z, 1, 2)
    panel, = (line for line in read_metrics(in_home, f"panel-{rollout}") if "x_hat_std" in line)
    assert panel["x_hat_mean"] == pytest.approx(expected.mean().item(), abs=1e-5)
    assert panel["x_hat_std"] == pytest.approx(expected.std().item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("script", TOY)
def test_processes_and_micro_batches_change_nothing(in_home, few_samples, script):
    """Two gloo processes in micro-batches of 8 = one in batches of 32: 1e-5 in float32 after 4 steps."""
    command, name, home = f"{TOY[script]} --steps 4 --log_every 2 --batch_size 32", script[:-3], in_home
    train(f"{command} --out one-{name}")
    run(home, f"{command} --out two-{name} --micro_batch 8", processes=2)
    for part in ("net", "ema"):
        assert_same(state(home, f"one-{name}")[part], state(home, f"two-{name}")[part], atol=1e-5)
    one, two = (read_metrics(home, f"{o}-{name}")[-2] for o in ("one", "two"))
    for k in set(one) - set(TIMING):
        assert two[k] == pytest.approx(one[k], rel=1e-3, abs=1e-4), k                   # logs are of the global batch


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(in_home, few_samples, capsys):
    home = in_home
    seen = home / "stopped" / "metrics.jsonl"

    def lines():
        return len(seen.read_text().splitlines()) if seen.exists() else 0

    for sig, code, resume, words in ((signal.SIGINT, 130, "no", "again without --resume no to resume"),
                                     (signal.SIGTERM, 143, "auto", "again to resume")):
        before = lines()
        process = start(home, python(f"{TOY['fsf_dmd.py']} --out stopped --steps 5000 --log_every 1 --resume {resume}"))
        while lines() <= before + 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(sig)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert f"and saved; run the same command {words}\n" in err and "Traceback" not in err
        assert err.count("stopping after this step, or after the evaluation that is under way\n") == 1
    steps = state(home, "stopped")["step"] + 1
    train(f"{TOY['fsf_dmd.py']} --out stopped --steps {steps}")
    assert "resuming at step" in capsys.readouterr().out

    # Where nobody hears it, too: Ctrl-C also ends the reader in `2>&1 | tee log`; and with the log on a full disk.
    sinks = [("unread", subprocess.PIPE)]
    if Path("/dev/full").exists():                                  # not on macOS
        sinks.append(("unwritten", open("/dev/full", "w")))
    for out, sink in sinks:
        command = python(f"{TOY['fsf_dmd.py']} --out {out} --steps 5000 --log_every 1 --save_every 0")
        process = subprocess.Popen(command, cwd=home, env=environment(), stdout=sink, stderr=subprocess.STDOUT)
        seen = home / out / "metrics.jsonl"
        if process.stdout:
            process.stdout.close()
        while lines() <= 3 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130 and state(home, out)["step"] > 0


@pytest.mark.slow
def test_a_compiler_that_does_not_work_is_one_line(home):
    """As where /tmp is full, or nothing in it may be run."""
    command = python("consistency.py --loss imf --data toy.npz --steps 2 --eval_every 0 --compile 1 --out compiled")
    process = subprocess.run(command, cwd=home, env=environment() | dict(CXX="/bin/false", TMPDIR=str(home)),
                             capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "torch.compile does not work here (" in process.stderr and "--compile 0 does without" in process.stderr


@pytest.mark.slow
def test_the_main_command_leaves_a_picture_a_table_and_a_checkpoint(tmp_path, monkeypatch, capsys):
    """`python fsf_dmd.py --init imf --M 2` on the digits, shortened.

    Pretrains once, distils, evaluates; then resumes from there.
    """
    command = "fsf_dmd.py --init imf --M 2 --steps 3"
    printed = run(tmp_path, command)
    for words in ("consistency.py --loss imf", "real images, half against half", "after 3 steps"):
        assert words in printed
    out, started = tmp_path / "runs" / "fsf_dmd-digits-imf", tmp_path / "runs" / "consistency_imf-digits-scratch"
    result, of_the_start = (json.loads((folder / "result.json").read_text()) for folder in (out, started))
    made_with = dict(torch=torch.__version__, device="cpu", processes=1, commit=result["made_with"]["commit"])
    assert result["made_with"] == made_with
    assert json.loads((out / "args.json").read_text())["made_with"] == made_with
    last, first = result["last"], result["evaluations"][0]
    assert {"fd_1step", "fd_2step", "is_2step", "precision_2step", "recall_2step", "acc_2step"} <= set(last)
    assert last["step"] == 3
    assert first == of_the_start["last"] | dict(step=0)                                 # it starts where the iMF ended
    assert of_the_start["evaluations"][0]["step"] > 0                                   # random weights: not evaluated
    assert result["best"]["fd_2step"]["value"] <= last["fd_2step"] and "64 features" in result["definition"]
    # what a student does with the checkpoint
    checkpoint = torch.load(out / "model.pt", weights_only=True)
    net = model.LightningDiT(**checkpoint["config"])
    net.load_state_dict(checkpoint["weights"])
    x, y = evaluate.generate(net, 200, (1, 8, 8), 2, omega=1.0)
    features = metrics.Features(data.load_data("digits"), tmp_path / "runs" / "cache")
    assert features.metrics(x, y)["acc"] > 0.8                                          # digits, of the right class
    with Image.open(out / "samples_000003.png") as picture:
        assert picture.size[0] > 300 and len(picture.convert("L").getcolors()) > 50
    monkeypatch.chdir(tmp_path)
    train(command)
    assert "is done (3 steps)" in capsys.readouterr().out
    words = f"{out / 'model.pt'} --steps 2 --n 300 --omega 1 --guide_to 1 --seed 5 --out o".split()
    evaluate.run(evaluate.parse_args(words))
    assert "weights" in capsys.readouterr().out and (tmp_path / "o" / "samples.png").exists()
    assert json.loads((tmp_path / "o" / "evaluation.json").read_text())["fd_2step"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not flags.resolve_compile(argparse.Namespace(jvp="fd", steps=50), "images"),
                    reason="needs a C++ compiler and Python.h, as --compile 1 does")
@pytest.mark.parametrize("script", ["fsf_dmd.py", "dmd2.py"])
def test_compile_trains_the_same_network(script, in_home, few_samples):
    """With torch 2.11 the compiled discriminator of DMD2 was wrong from the first step on."""
    name = script.removesuffix(".py")
    outs = [f"compile-{name}-{i}" for i in (0, 1)]
    command = f"{TOY[script]} --steps 3 --batch_size 32 --log_every 1"
    train(f"{command} --compile 0 --out {outs[0]}")
    run(in_home, f"{command} --compile 1 --out {outs[1]}")
    a, b = (state(in_home, out)["net"] for out in outs)
    assert a.keys() == b.keys()                                                         # no _orig_mod in the names
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4
    for one, other in zip(*(losses_of(in_home / out) for out in outs), strict=True):
        assert one and one == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("version, device, whole", [
    ("2.11.0+cu130", "cpu", False), ("2.13.0", "cpu", True), ("2.14.0a0", "cpu", True), ("2.13.0", "meta", False)])
def test_the_discriminator_is_compiled_where_that_was_seen_to_be_right(version, device, whole, in_home, monkeypatch):
    """2.11 compiled it wrong; the blocks of the networks it compiled right.  meta: any device but a CPU."""
    args = dmd2.parse_args(shlex.split("--data toy.npz --init imf/model.pt --compile 1"))
    net, _ = checkpoints.load_network("imf/model.pt")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    fake, head, _, _ = dmd2.new_fake_side(args, net, torch.device(device))
    compiled = [bool(part.blocks[0]._compiled_call_impl) for part in (fake, head)]
    assert compiled == [True, whole]


def losses_of(folder):
    """[{name: loss} of each step]"""
    names, lines = {"cd", "fsf", "fake", "gan_d", "gan_g"}, read_lines(folder / "metrics.jsonl")
    return [{name: line[name] for name in names & line.keys()} for line in lines if "grad_norm" in line]


COMPILED = "--data toy.npz --steps 4 --batch_size 16 --compile 1"
DISTILLED = f"{COMPILED} --init imf/model.pt --health_every 0"


@pytest.mark.slow
@pytest.mark.parametrize("command", [f"fsf_dmd.py {DISTILLED}", f"fsf_dmd.py {DISTILLED} --precision bf16",
                                     f"dmd2.py {DISTILLED} --cd 1", f"sid.py {DISTILLED}",
                                     f"twinflow.py {DISTILLED} --base imf", f"twinflow.py {DISTILLED} --base rcgm",
                                     f"consistency.py {COMPILED} --loss imf --omega_max 4 --mask_prob 0.5"])
def test_compiled_blocks_break_no_graph_and_are_compiled_in_the_first_step_only(in_home, few_samples, monkeypatch,
                                                                                command):
    """Counted with a compiler that keeps the graphs as they are."""
    steps, compiled = [0], []

    def keep(graph, inputs):
        compiled.append(steps[0])
        return graph.forward

    def log(self, *args):
        steps[0] += 1
        return original(self, *args)

    original = run_folder.Run.log
    monkeypatch.setattr(run_folder.Run, "log", log)
    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_with(self, backend=keep))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(f"{command} --out compiled-{abs(hash(command))}")
    assert steps[0] == 4 and 0 in compiled and not {1, 2, 3} & set(compiled)              # 4: the picture at the end
    assert not torch._dynamo.utils.counters["graph_break"] and not torch._dynamo.utils.counters["unimplemented"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_intervals_and_starting_over(in_home, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.evaluate, "__defaults__", ((2,), 60, 0))
    command, folder = TOY["fsf_dmd.py"], in_home / "often"
    train(f"{command} --steps 4 --log_every 1 --eval_every 2 --preview_every 2 --save_every 1 --device cpu --out often")
    lines = read_metrics(in_home, "often")
    assert [line["step"] for line in lines if "fsf" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "fd_2step" in line] == [0, 2, 4]
    assert sorted(p.name for p in folder.glob("*.png")) == ["samples_000002.png", "samples_000004.png"]
    assert {"cd", "fsf", "gap", "grad_norm", *TIMING} <= set(lines[1])
    refused = refusal(f"{command} --steps 4 --lam 9 --out often", capsys, monkeypatch)
    assert "--lam" in refused and "(there) 9.0 (here)" in refused
    train(f"{command} --steps 2 --lam 9 --out often --resume no")
    assert state(in_home, "often")["step"] == 2 and not list(folder.glob("samples_000004.png"))


# ---- bad input: one line, exit code 2, nothing written ---------------------------------------------------------------

def write_bad_inputs(folder):
    labels = np.arange(9) % 3
    images = np.zeros((9, 4, 4), np.uint8)
    images[0] = 9
    some = lambda size: np.random.default_rng(0).integers(0, 255, (9, size, size)).astype(np.uint8)
    for name, arrays in dict(
        noimages=dict(labels=labels),
        floats=dict(images=images.astype(np.float32), labels=labels),
        oblong=dict(images=np.zeros((9, 4, 6), np.uint8), labels=labels),
        odd=dict(images=some(5), labels=labels),
        rgb=dict(images=np.stack([some(4)] * 3, axis=-1), labels=labels),
        few=dict(images=images, labels=labels[:4]),
        negative=dict(images=images, labels=labels - 1),
        alike=dict(images=np.zeros((9, 4, 4), np.uint8), labels=labels),
        four=dict(images=some(4), labels=np.arange(9) % 4),
        gaps=dict(images=some(4), labels=labels * 2),
        three=dict(images=images[:3], labels=labels[:3]),
        pickled=dict(images=np.array([Evil()], dtype=object), labels=np.zeros(1, int)),
    ).items():
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "truncated.npz").write_bytes((folder / "toy.npz").read_bytes()[:300])
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("precious")
    (folder / "theirs").mkdir()                                         # of another project: names as ours
    (folder / "theirs" / "args.json").write_text('{"learning_rate": 1}')
    (folder / "theirs" / "model.pt").write_text("precious")
    (folder / "theirs" / "README.md").write_text("precious")
    (folder / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": Evil()}, folder / "evil.pt")
    torch.save({"a": 1}, folder / "other.pt")
    plain = torch.load(folder / "fm" / "model.pt", weights_only=True)
    torch.save(plain | dict(sampler="renoised"), folder / "jumps.pt")   # as dmd2.py --init fm leaves it
    flow_map = torch.load(folder / "imf" / "model.pt", weights_only=True)
    torch.save(flow_map | dict(sampler="renoised"), folder / "steps.pt")    # as dmd2.py --init imf leaves it
    others = dict(flow_map["data"], mean=[m + 0.1 for m in flow_map["data"]["mean"]])
    torch.save(flow_map | dict(data=others), folder / "others.pt")
    (folder / "dangling").symlink_to("nothing")
    (folder / ("long" * 60)).mkdir()
    torch.save(flow_map, folder / ("long" * 60) / "model.pt")
    (folder / "cut.pt").write_bytes((folder / "imf" / "model.pt").read_bytes()[:2000])
    broken = torch.load(folder / "imf" / "model.pt", weights_only=True)
    broken["weights"].pop("pos_embed")
    torch.save(broken, folder / "incomplete.pt")
    net = model.LightningDiT("tiny", "decoupled", input_size=4, in_channels=1, num_classes=3)
    decoupled = dict(config=net.config, weights=net.state_dict(), data=broken["data"], args={})
    torch.save(decoupled, folder / "decoupled.pt")
    net = model.IMFDiT(input_size=4, in_channels=1, patch_size=2, hidden_size=32, num_heads=2, depth=2, mlp_hidden=64,
                       num_classes=3)
    torch.save(decoupled | dict(config=net.config, weights=net.state_dict()), folder / "official.pt")


BAD = [  # command, words of the one line
    ("fsf_dmd.py --data nowhere.npz", "nowhere.npz: no such file"),
    ("fsf_dmd.py --data nowhere",
     "expected `digits`, an .npz file with `images` and `labels`, a folder of latent shards"),
    ("fsf_dmd.py --data noimages.npz --init imf/model.pt", "has no array images"),
    ("fsf_dmd.py --data floats.npz --init imf/model.pt", "images are float32 [9, 4, 4, 1], expected uint8"),
    ("fsf_dmd.py --data oblong.npz --init imf/model.pt", "images are uint8 [9, 4, 6, 1], expected uint8"),
    ("consistency.py --loss imf --data odd.npz", "odd.npz: has 5 x 5 pixels, expected a multiple of 2"),
    ("reproduce.py 3 --data odd.npz --row 1", "odd.npz: has 5 x 5 pixels, expected a multiple of 2"),
    ("reproduce.py 2 --data three.npz", "three.npz: 3 images are too few to evaluate against"),
    ("search.py weak --data three.npz", "three.npz: 3 images are too few to evaluate against"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --device cpu:7", "--device cpu:7: not usable here"),
    ("fsf_dmd.py --data few.npz --init imf/model.pt", "labels are int64 [4], expected 9 integers"),
    ("fsf_dmd.py --data negative.npz --init imf/model.pt", "labels start at -1"),
    ("fsf_dmd.py --data alike.npz --init imf/model.pt", "not all alike"),
    ("fsf_dmd.py --data pickled.npz --init imf/model.pt", "without pickled objects"),
    ("fsf_dmd.py --data truncated.npz --init imf/model.pt", "truncated.npz"),
    ("fsf_dmd.py --data four.npz --init imf/model.pt", "was made for num_classes 3, but --data four.npz has 4"),
    ("fsf_dmd.py --data rgb.npz --init imf/model.pt", "was made for shape [1, 4, 4], but --data rgb.npz has [3, 4, 4]"),
    ("fsf_dmd.py --init imf/model.pt", "was made for shape [1, 4, 4], but --data digits has [1, 8, 8]"),
    ("fsf_dmd.py --data toy.npz --init missing.pt", "--init missing.pt: no such file"),
    ("fsf_dmd.py --data toy.npz --init mif", "--init mif: expected fm or imf or scratch, or the path of a model.pt"),
    ("fsf_dmd.py --data toy.npz --init jumps.pt", "jumps.pt: is a few-step generator"),
    ("fsf_dmd.py --data toy.npz --init fm/model.pt --teacher jumps.pt", "jumps.pt: is a few-step generator"),
    ("fsf_dmd.py --data toy.npz --init steps.pt", "steps.pt: is a few-step generator"),
    ("sid.py --data toy.npz --init imf/model.pt --teacher steps.pt", "steps.pt: is a few-step generator"),
    ("reproduce.py 4 --data toy.npz --init jumps.pt --seeds 1", "jumps.pt: is a few-step generator"),
    ("reproduce.py 2 --data toy.npz --init imf/model.pt --row 11", "--row 11: a control, which --init leaves out"),
    (f"fsf_dmd.py --data toy.npz --init {'long' * 60}/model.pt --lr 0.1", "too long a name for a folder; pass --out"),
    ("fsf_dmd.py --data toy.npz --init fm/model.pt --omega 2 --cfg_channels 2", "--data toy.npz has 1 channels"),
    ("evaluate.py fm/model.pt --cfg_channels 2", "--cfg_channels 2: expected 0 to 1 for fm/model.pt"),
    ("fsf_dmd.py --data toy.npz --init text.pt", "text.pt: not a model.pt"),
    ("fsf_dmd.py --data toy.npz --init evil.pt", "evil.pt: not a model.pt"),
    ("fsf_dmd.py --data toy.npz --init other.pt", "other.pt: not a model.pt of this project"),
    ("fsf_dmd.py --data toy.npz --init cut.pt", "cut.pt: not a model.pt"),
    ("fsf_dmd.py --data toy.npz --init incomplete.pt", "weights do not fit its configuration"),
    ("twinflow.py --data toy.npz --init decoupled.pt",
     "holds a decoupled network, expected one for --init imf or scratch"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --size B/1 --n_tokens 7",
     "not --size B/1 (it has tiny), --n_tokens 7 (it has 1)"),
    ("fsf_dmd.py --data toy.npz --init official.pt --size B/1", "as the file has it, not --size B/1 (it has none)"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --out mine", "exists and is no run folder"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --out mine --resume no", "exists and is no run folder"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --out theirs", "exists and is no run folder"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --out theirs --resume no", "exists and is no run folder"),
    ("consistency.py --loss imf --data three.npz", "too few to evaluate against"),
    ("consistency.py --loss imf --data gaps.npz", "no image has label 1, 3, expected all of 0 .. 4"),
    ("consistency.py --loss imf --data toy.npz --out mine/thesis.txt", "exists and is no run folder"),
    ("consistency.py --loss imf --data toy.npz --out mine/thesis.txt/run", "thesis.txt/run: Not a directory"),
    ("fsf_dmd.py --M 0", "--M: 0 is out of range, expected an integer of at least 1"),
    ("fsf_dmd.py --mask_prob 1.5", "--mask_prob: 1.5 is out of range"),
    ("fsf_dmd.py --lam nan", "--lam: nan is out of range"),
    ("fsf_dmd.py --lr 0", "--lr: 0 is out of range, expected a number above 0"),
    ("fsf_dmd.py --shift -1", "--shift: -1 is out of range"),
    ("fsf_dmd.py --weight cosine", "--weight: invalid choice: 'cosine'"),
    ("fsf_dmd.py --momentum 0.9", "unrecognized arguments: --momentum 0.9"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --device tpu", "--device tpu: not usable here"),
    ("fsf_dmd.py --rollout dmd2 --rollout_grad all", "Eq. 17 has gradient in its last call only"),
    ("fsf_dmd.py --M 1 --rollout_grad last", "--rollout_grad: --M 1 has one call, with gradient"),
    ("fsf_dmd.py --lam 0 --M 4 --shift 3", "--M, --shift: --lam 0 has no L_FSF"),
    ("fsf_dmd.py --data toy.npz --init decoupled.pt --omega 3 --cfg_channels 1",
     "--cfg_channels, --omega: the flow map in decoupled.pt takes no guidance, and it is the teacher"),
    ("sid.py --data toy.npz --init fm/model.pt --teacher decoupled.pt --omega 2", "--omega: the flow map in"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --teacher imf/model.pt --cfg_channels 1", "belongs to a velocity"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --vae vae.pt", "--vae: decodes latents, and --data toy.npz has"),
    ("consistency.py --loss fm --guide_to 0.3", "--guide_to: --omega 1 is no guidance"),
    ("fsf_dmd.py --init fm --cfg_channels 1", "--cfg_channels: --omega 1 is no guidance"),
    ("sid.py --data toy.npz --init decoupled.pt --guide_to 0.5", "--guide_to: the flow map in decoupled.pt takes no"),
    ("dmd2.py --init fm --cd_guidance drawn --dry_run", "--cd_guidance: belongs to L_CD, which needs --cd 1"),
    ("dmd2.py --lambda_g 0 --disc_trunk generator", "builds no discriminator"),
    ("dmd2.py --mask_prob 0.1 --lam 1", "--lam, --mask_prob: belongs to L_CD, which needs --cd 1"),
    ("dmd2.py --cd 1 --omega_max 3", "--omega_max: omega is drawn with --cd_guidance drawn only"),
    ("fsf_dmd.py --omega_law truncexp", "--omega_law: omega is drawn with --cd_guidance drawn only"),
    ("fsf_dmd.py --jvp exact --fd_h 0.1", "--fd_h: --jvp exact takes no difference"),
    ("fsf_dmd.py --mask_prob 1 --fd_h 0.1", "--fd_h: --mask_prob 1 leaves no row with s < t"),
    ("consistency.py --loss rcgm --mask_prob 1 --order 3", "--order: --mask_prob 1 leaves no row with s < t"),
    ("sid.py --data toy.npz --init imf/model.pt --teacher decoupled.pt --omega 3",
     "--omega: the flow map in decoupled.pt takes no guidance"),
    ("fsf_dmd.py --data toy.npz --init imf/model.pt --out dangling", "no run folder but a link that leads nowhere"),
    ("evaluate.py imf/model.pt --data rgb.npz", "imf/model.pt: was made for shape [1, 4, 4]"),
    ("reproduce.py 5 --data nowhere --fid_every 9", "--fid_every: no row of table 5 distils"),
    ("consistency.py --loss imf --omega_law truncexp", "--omega_law: --omega_max 1 draws no omega"),
    ("twinflow.py --omega_max 1 --omega_law truncexp", "--omega_law: --omega_max 1 draws no omega"),
    ("dmd2.py --cd 1 --cd_guidance drawn --omega_law truncexp", "--omega_law: --omega_max 1 draws no omega"),
    ("consistency.py --loss fm --jvp exact", "--jvp: belongs to --loss ct or imf or cd"),
    ("consistency.py --loss ct --omega 2", "--omega: belongs to --loss fm or imf"),
    ("consistency.py --loss imf --cd_guidance drawn", "belongs to --loss cd"),
    ("consistency.py --loss cd --omega_max 4", "drawn with --cd_guidance drawn only"),
    ("fsf_dmd.py --init fm --n_tokens 3", "--n_tokens: the network of --init fm has no guidance input"),
    ("fsf_dmd.py --init fm/model.pt --data toy.npz --cd_guidance drawn",
     "--cd_guidance: the network of --init fm has no guidance input"),
    ("fsf_dmd.py --cfg_channels 3", "--cfg_channels: belongs to a velocity network (fm) as the teacher"),
    ("fsf_dmd.py --init scratch --cd_guidance drawn", "L_CT of --init scratch draws omega"),
    ("dmd2.py --init scratch --cd 0", "without a teacher nothing would tell the network of the data"),
    ("sid.py --init scratch", "--init scratch: expected fm or imf, or the path of a model.pt"),
    ("sid.py --lambda_d 1", "--lambda_g 0 builds no discriminator"),
    ("sid.py --M 1 --noise ddim", "--noise: --M 1 never renoises"),
    ("sid.py --weight t", "--weight: invalid choice: 't'"),
    ("sid.py --cfg_channels 3", "--cfg_channels: belongs to a velocity network"),
    ("sid.py --mask_prob 0", "unrecognized arguments: --mask_prob 0"),
    ("twinflow.py --base imf --delta 0.1", "--delta: belongs to --base rcgm"),
    ("twinflow.py --base rcgm --jvp exact", "--jvp: belongs to --base imf"),
    ("twinflow.py --base rcgm --delta 0.7", "--delta: 0.7 is out of range"),
    ("twinflow.py --init fm/model.pt --data toy.npz", "holds a plain network, expected one for --init imf or scratch"),
    ("consistency.py --loss rcgm --jvp exact", "--jvp: belongs to --loss ct or imf or cd"),
    ("consistency.py --loss cd --order 3", "--order: belongs to --loss rcgm"),
    ("consistency.py --loss isg --mask_prob 0", "--mask_prob: belongs to --loss ct or imf or cd or rcgm"),
    ("consistency.py --loss isg --init scratch", "distillation needs a teacher"),
    ("consistency.py --loss cd --tangent_norm 0.1 --huber_c 1", "--huber_c: --tangent_norm takes the squared distance"),
    ("dmd2.py --no_gan --lambda_d 1", "--lambda_g 0 builds no discriminator"),
    ("dmd2.py --no_gan --lambda_g 0.1", "--lambda_g: not allowed with argument --no_gan"),
    ("dmd2.py --ida 1.2", "--ida: 1.2 is out of range"),
    ("consistency.py", "the following arguments are required: --loss"),
    ("fsf_dmd.py --compile foo", "--compile: foo is none of auto, 0 and 1"),
    ("fsf_dmd.py --cosine yes", "--cosine: yes is not an integer, expected one of at least 0 and at most 1"),
    ("fsf_dmd.py --eval_every 3 extra", "unrecognized arguments: extra; --help lists the flags"),
    ("consistency.py --loss cd --init scratch", "distillation needs a teacher"),
    ("consistency.py --loss fm --init imf/model.pt --data toy.npz", "trains from scratch"),
    ("evaluate.py missing.pt", "missing.pt: no such file"),
    ("evaluate.py evil.pt", "evil.pt: not a model.pt"),
    ("evaluate.py imf/model.pt --data digits", "was made for shape [1, 4, 4], but --data digits has [1, 8, 8]"),
    ("evaluate.py others.pt", "others.pt: was trained on a toy.npz of other mean and deviation than the one"),
    ("evaluate.py imf/model.pt --device tpu", "--device tpu: not usable here"),
    ("evaluate.py imf/model.pt --n 3", "--n: 3 is out of range"),
    ("evaluate.py --steps 1 2 imf/model.pt", "--steps: imf/model.pt is not an integer, expected one of at least 1"),
    ("evaluate.py decoupled.pt --omega 2", "--omega: decoupled.pt, sampled so, takes no guidance"),
    ("evaluate.py fm/model.pt --sampler renoised --omega 2", "--omega: fm/model.pt, sampled so, takes no guidance"),
    ("evaluate.py imf/model.pt --pipeline pytorch_fid --batch_size 9", "--pipeline, --batch_size: need --inception"),
    ("evaluate.py imf/model.pt --inception a --ref b --steps 1 2", "--steps 1 2: with --inception one number of steps"),
    ("evaluate.py imf/model.pt --cfg_channels 1", "--cfg_channels: belongs to a velocity network, which imf"),
    ("evaluate.py grid imf/model.pt --n 50", "--n: grid makes the picture alone; leave that out"),
    ("evaluate.py grid --from_images x --inception w --ref r", "grid: is a picture of a network's samples"),
    ("evaluate.py grid ref --data x --inception w", "grid: is a picture of a network's samples"),
    ("evaluate.py ref --data x --inception y --steps 2 --vae z", "--steps, --vae: ref is of real images"),
    ("evaluate.py --from_images x --inception y --ref z --data w", "--data: --from_images samples no network"),
]


def test_a_network_of_latents_is_compiled_on_a_gpu_only_where_a_c_compiler_is(tmp_path, monkeypatch):
    args = argparse.Namespace(jvp="fd", steps=1000)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    monkeypatch.setattr(flags.sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert flags.resolve_compile(args, "latents") == 0
    (tmp_path / "gcc").write_text("#!/bin/sh")
    (tmp_path / "gcc").chmod(0o755)
    assert flags.resolve_compile(args, "latents") == "auto"
    # what torch.compile makes includes Python.h, which python3-venv does not bring
    (tmp_path / "include" / "Python.h").unlink()
    assert flags.resolve_compile(args, "latents") == 0


@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_code_2(in_home, monkeypatch, capsys):
    write_bad_inputs(in_home)
    before = sorted(in_home.rglob("*"))
    for command, words in BAD:
        said = refusal(command, capsys, monkeypatch)
        assert words in said, (command, said)
        assert sorted(in_home.rglob("*")) == before, f"{command} wrote something"
    assert not (in_home / "executed").exists()
    # and as a user sees it
    printed = run(in_home, "fsf_dmd.py --data toy.npz --init evil.pt", code=2)
    assert len(printed.strip().splitlines()) == 1 and not (in_home / "executed").exists()


def test_samples_that_are_not_finite_stop_the_run_before_a_loss_shows_it(in_home, few_samples, monkeypatch, capsys):
    command = f"{TOY['fsf_dmd.py']} --steps 5 --out wild --lr 1000 --log_every 1 --eval_every 1"
    said = refusal(command, capsys, monkeypatch)
    assert "the run has diverged: its samples hold NaN or infinity after step 1; the last state.pt is untouched" in said


# ---- what a GPU needs ------------------------------------------------------------------------------------------------

def test_attention_is_asked_in_the_way_that_the_flash_kernel_takes(monkeypatch):
    """bfloat16 under autocast, no mask, head size 64, no second layout: what torch's flash attention requires."""
    asked, attention = [], torch.nn.functional.scaled_dot_product_attention

    def seen(q, k, v, **flags):
        asked.append((flags, {z.dtype for z in (q, k, v)}, {z.shape[-1] for z in (q, k, v)}, v.stride(-1)))
        return attention(q, k, v, **flags)

    monkeypatch.setattr(model.F, "scaled_dot_product_attention", seen)
    net = model.LightningDiT("B/1", "in_context", depth=5, input_size=4)
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(1, 32, 4, 4), 0.5, torch.tensor([3]), 0.0)
    assert asked == [({}, {torch.bfloat16}, {64}, 1)] * 5
