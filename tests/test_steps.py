"""The training steps, written out: what each update's gradient is made of, on random networks.

The losses are checked in test_methods.py; here, that `train` gives them the networks, times, noises and labels it says.
"""
import copy
import importlib
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import consistency
import dmd2
import fsf_dmd
import model
import sid
import twinflow
from data import load_data
from hooks import replaced
from plumbing.run_folder import Run
from test_helpers import randomize, read_metrics

B = 20
RUN = ("--data toy.npz --steps 2 --batch_size 20 --micro_batch 12 --health_every 0 --ema 0.5 --omega 3 "
       "--guide_to 0.6")


class Steps:
    """A script's train for two steps; before each update its gradients are compared with those of `wanted`.

    wanted: {"net" or "fake": callable (self, b, x_hat) -> objective [b]}.  Kept: turns, the batch of each update.
    logged: {the same: its objective as a formula of the names in metrics.jsonl}.
    """

    def __init__(self, monkeypatch, name, flags, logged=None, **wanted):
        self.wanted, self.turns, self.parts, self.rollouts, self.copies, self.updates = wanted, [], [], [], [], []
        self.decays, self.values = [], dict(net=[], fake=[])
        self.module = module = importlib.import_module(name)
        monkeypatch.setattr(module, "starting_networks", self.starting(module.starting_networks))
        monkeypatch.setattr(module, "frozen_copy", self.copied(module.frozen_copy))
        monkeypatch.setattr(module, "micro_batches", self.parted(module.micro_batches))
        monkeypatch.setattr(module, "update_ema", self.averaged(module.update_ema))
        if hasattr(module, "backward_simulation"):
            monkeypatch.setattr(module, "backward_simulation", self.simulated(module.backward_simulation))
        if hasattr(module, "new_fake_side"):
            monkeypatch.setattr(module, "new_fake_side", self.with_fake(module.new_fake_side))
        for of in {module, dmd2}:
            monkeypatch.setattr(of, "NorMuon", self.watched(of.NorMuon))
        self.args = module.parse_args(flags.split())
        module.train(self.args)
        assert self.decays == [1 / 10, 2 / 11]                                          # of the EMA: its warm-up
        [line] = [line for line in read_metrics(Path("."), self.args.out) if "grad_norm" in line]
        for side, of_names in (logged or {}).items():                                   # means over the updates
            assert eval(of_names, {}, line) == pytest.approx(np.mean(self.values[side]), rel=1e-4), (side, line)

    def starting(self, real):
        def wrapped(*args, **kwargs):
            self.net, self.teacher = real(*args, **kwargs)
            if self.teacher is None:                                                    # its first output would be 0
                randomize(self.net, dtype=torch.float32)
            return self.net, self.teacher
        return wrapped

    def copied(self, real):
        def wrapped(net):
            self.copies.append(real(net))
            self.ema, self.target = self.copies[0], self.copies[-1]
            return self.copies[-1]
        return wrapped

    def averaged(self, real):
        def wrapped(ema, net, decay):
            if ema is self.ema:
                self.decays.append(decay)
            real(ema, net, decay)
        return wrapped

    def with_fake(self, real):
        def wrapped(*args):
            self.fake, self.head, *rest = real(*args)
            student = self.net.state_dict()                                             # not --teacher (METHODS)
            assert all(torch.equal(v, student[k]) for k, v in self.fake.state_dict().items())
            return self.fake, self.head, *rest
        return wrapped

    def parted(self, real):
        def wrapped(batch, *rest):
            self.turns.append(batch)
            self.parts = []
            for b in real(batch, *rest):
                self.parts.append(b)
                yield b
        return wrapped

    def simulated(self, real):
        def wrapped(u, eps, k, *rest):
            self.k = k
            self.rollouts.append(real(u, eps, k, *rest))
            return self.rollouts[-1]
        return wrapped

    def watched(self, real):
        steps = self

        class Watched(real):
            def step(self):
                params = [p for group in self.param_groups for p in group["params"]]
                side = "net" if params[0] in set(steps.net.parameters()) else "fake"
                lr = steps.args.lr if side == "net" else steps.args.fake_lr or steps.args.lr
                assert [group["lr"] for group in self.param_groups] == pytest.approx([lr, lr / 6]), side
                steps.check(side, params)
                super().step()
        return Watched

    def check(self, side, params):
        x_hats = [x.detach() for x in self.rollouts[-len(self.parts):]] or [None] * len(self.parts)
        loss = sum(self.wanted[side](self, b, x).sum() for b, x in zip(self.parts, x_hats)) / B
        self.values[side].append(loss.item())
        expected = torch.autograd.grad(loss, params, materialize_grads=True)
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        expected, found = (torch.cat([g.flatten() for g in gs]) for gs in (expected, found))
        assert expected.norm() > 1e-3
        off = ((found - expected).norm() / expected.norm()).item()
        assert off < 1e-4, f"{side}, update {len(self.updates)}: off by {off:.3g}"
        self.updates.append(side)
        self.after_check(side)

    def after_check(self, side):
        """Eq. 60: before its turns the fake network has moved a tenth of the way to the updated generator."""
        if not hasattr(self, "fake"):
            return
        if side == "net":
            self.before = [p.detach().clone() for p in self.fake.parameters()]
        elif self.updates[-2:] == ["net", "fake"] and getattr(self, "ida", None):
            for p, old, new in zip(self.fake.parameters(), self.before, self.net.parameters()):
                torch.testing.assert_close(p.detach(), old.lerp(new.detach(), 1 - self.ida), rtol=0, atol=1e-6)

    # -- the networks, asked by their plain call
    def guidance(self, b):
        return torch.tensor([[3.0, 0.0, 0.6]]).expand(len(b.y), 3)

    def u(self, b):
        return lambda x, t, s: self.net(x, t, b.y, s, self.guidance(b))

    def v(self, net, b):
        """omega 3 up to t = 0.6, then 1; on [0, 1], as iMF trains s = t."""
        def velocity(x, t):
            omega = torch.where(t <= 0.6, 3.0, 1.0)
            return net(x, t, b.y, t, torch.stack([omega, torch.zeros_like(t), torch.ones_like(t)], 1))
        return velocity

    def D(self, b, x, t, eps, trunk="fake"):
        weights = getattr(self, "net" if trunk == "generator" else trunk)
        if trunk == "generator":                                                        # its weights of now, fixed
            weights = copy.deepcopy(weights).requires_grad_(False)
        return self.head(weights, model.interpolate(x, eps, t), t, b.y)[:, 0]

    def cd(self, b):
        return consistency.distillation_loss(self.net, self.teacher, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance)

    def imf(self, b):
        return consistency.imf_loss(self.net, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance)


def check_independence(turn):
    """Of the noises, and of the times, of an update no two are the same draw; y is of the image beside it."""
    if "x0" in turn:
        toy = load_data("toy.npz")
        rows = (turn["x0"].flatten(1)[:, None] == toy.x.flatten(1)).all(2).int().argmax(1)
        assert torch.equal(turn["y"], toy.y[rows])
    noises = [v for name, v in turn.items() if name.startswith("eps")]
    if "z" in turn:                                                     # [B, M, C, H, W]; TwinFlow's [B, C, H, W]
        noises += [turn["z"]] if turn["z"].ndim == 4 else list(turn["z"].unbind(1))
    times = [v for name, v in turn.items() if name.startswith("t") and name != "t"]     # of isg the s of t is no draw
    for draws in (noises, [turn["t"], *times] if "t" in turn else times):
        for i, draw in enumerate(draws):
            assert not any(torch.equal(draw, other) for other in draws[:i])


def check_draws(turns):
    """No row comes twice in an epoch; fewer than half of the labels are dropped, the others are the images'."""
    for turn in turns:
        check_independence(turn)
    x0 = torch.cat([turn["x0"] for turn in turns]).flatten(1)
    assert len(x0.unique(dim=0)) == len(x0) <= 90
    for turn in turns:
        dropped = turn["y_drop"] == 3                                                   # the null class
        assert torch.equal(turn["y_drop"][~dropped], turn["y"][~dropped]) and dropped.sum() < B / 2


# ---- FSF-DMD ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rollout", ["flow_map", "dmd2"])
def test_a_step_of_fsf_dmd(random_starts, monkeypatch, rollout):
    """L_CD + lambda L_FSF; fake: the EMA's u(x, tau, 0) [12], teacher: --teacher's guided v [14]."""
    def objective(n, b, _):
        if rollout == "flow_map":
            x, U = fsf_dmd.rollout(n.u(b), b.z[:, 0], 2)
        else:
            x = b.z[:, 0]
            U = x - model.backward_simulation(n.u(b), b.z, n.k, 2)
        fake = lambda x, tau: n.ema(x, tau, b.y, 0.0, n.guidance(b))
        loss, _ = fsf_dmd.fsf_dmd_loss(x, U, fake, n.v(n.teacher, b), b.tau, b.eps_tau)
        return n.cd(b) + 0.5 * loss

    n = Steps(monkeypatch, "fsf_dmd", f"--init a.pt --teacher b.pt --lam 0.5 --M 2 --shift 9 --rollout {rollout} {RUN} "
              f"--out step-fsf-{rollout}", dict(net="cd + 0.5 * fsf"), net=objective)
    assert n.updates == ["net"] * 2
    check_draws(n.turns)
    assert torch.cat([turn["tau"] for turn in n.turns]).median() > 0.7                  # k = 9: of 1/2 it makes 0.9


def test_a_step_of_fsf_dmd_from_scratch_has_itself_as_the_teacher(random_starts, monkeypatch):
    def objective(n, b, _):
        x, U = fsf_dmd.rollout(n.u(b), b.z[:, 0], 1)
        fake = lambda x, tau: n.ema(x, tau, b.y, 0.0, n.guidance(b))
        loss, _ = fsf_dmd.fsf_dmd_loss(x, U, fake, n.v(n.net, b), b.tau, b.eps_tau)
        return n.imf(b) + 0.5 * loss                                                    # L_CT [23-25]

    n = Steps(monkeypatch, "fsf_dmd", f"--init scratch --lam 0.5 --M 1 --omega_max 4 {RUN} --out step-fsf-scratch",
              net=objective)
    assert n.teacher is None and n.updates == ["net"] * 2


def test_a_step_of_fsf_dmd_from_a_velocity_network(random_starts, monkeypatch):
    """The student knows no omega; the teacher is the start with real CFG up to t = 0.6."""
    def objective(n, b, _):
        def teacher(x, tau):
            v, v_uncond = n.teacher(x, tau, b.y), n.teacher(x, tau, torch.full_like(b.y, 3))
            return torch.where(model.expand(tau <= 0.6, v), v_uncond + 3 * (v - v_uncond), v)

        x, U = fsf_dmd.rollout(lambda x, t, s: n.net(x, t, b.y, s), b.z[:, 0], 2)
        fake = lambda x, tau: n.ema(x, tau, b.y, 0.0)
        loss, _ = fsf_dmd.fsf_dmd_loss(x, U, fake, teacher, b.tau, b.eps_tau)
        return n.cd(b) + 0.5 * loss

    n = Steps(monkeypatch, "fsf_dmd", f"--init v.pt --warmup 0 --lam 0.5 --M 2 {RUN} --out step-fsf-fm", net=objective)
    assert (n.net.conditioning, n.teacher.conditioning, n.updates) == ("decoupled", "plain", ["net"] * 2)


# ---- DMD2 ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("trunk", ["fake", pytest.param("generator", marks=pytest.mark.slow)])
def test_a_step_of_dmd2(random_starts, monkeypatch, trunk):
    """Generator [50-51, 53-54, 59], fake side [52-54], IDA [60]; the first fake update has the generator's samples."""
    def generator(n, b, _):
        x_hat = model.backward_simulation(n.u(b), b.z, n.k, 2)
        fake = lambda x, tau: n.fake(x, tau, b.y)
        loss, _ = dmd2.dmd_loss(x_hat, fake, n.v(n.teacher, b), b.tau, b.eps_tau)
        return n.cd(b) + 0.3 * (loss + 0.5 * F.softplus(-n.D(b, x_hat, b.t_gen, b.eps_gen, trunk)))

    def fake_side(n, b, x_hat):
        error = n.fake(model.interpolate(x_hat, b.eps_fake, b.t_fake), b.t_fake, b.y) - (b.eps_fake - x_hat)
        of_fake, of_real = n.D(b, x_hat, b.t_gen, b.eps_gen, trunk), n.D(b, b.x0, b.t_real, b.eps_real, trunk)
        gan = F.softplus(of_fake) + F.softplus(-of_real)
        return error.pow(2).mean((1, 2, 3)) + 0.7 * gan

    monkeypatch.setattr(Steps, "ida", 0.9, raising=False)
    n = Steps(monkeypatch, "dmd2", "--init a.pt --teacher b.pt --M 2 --cd 1 --lam 0.3 --lambda_g 0.5 --lambda_d 0.7 "
              f"--lr 2e-3 --ttur 2 --ida 0.9 --disc_trunk {trunk} {RUN} --out step-dmd2-{trunk}",
              dict(net="cd + 0.3 * (dm + 0.5 * gan_g)", fake="fake + 0.7 * gan_d"), net=generator, fake=fake_side)
    assert n.updates == ["net", "fake", "fake"] * 2
    generator_turns, first, second = n.turns[::3], n.turns[1::3], n.turns[2::3]
    assert all(a is b for a, b in zip(generator_turns, first)) and len(n.rollouts) == 2 * 2 * 2
    check_draws(first + second)
    tau = torch.cat([turn["tau"] for turn in first + second])
    assert 0.02 <= tau.min() and 0.9 < tau.max() <= 0.98 and abs(tau.median() - 0.5) < 0.2


# ---- SiD -------------------------------------------------------------------------------------------------------------

def test_a_step_of_sid(random_starts, monkeypatch):
    """The fake side first; the generator's loss is a mean over the 16 elements, so that lambda_G weighs as in DMD2."""
    def generator(n, b, _):
        x_hat = model.backward_simulation(n.u(b), b.z, n.k, 2)
        fake = lambda x, tau: n.fake(x, tau, b.y)
        loss, _ = sid.sid_loss(x_hat, fake, n.v(n.teacher, b), b.tau, b.eps_tau, 1.2)
        return loss / 16 + 0.5 * F.softplus(-n.D(b, x_hat, b.tau, b.eps_tau))

    def fake_side(n, b, x_hat):
        error = n.fake(model.interpolate(x_hat, b.eps_tau, b.tau), b.tau, b.y) - (b.eps_tau - x_hat)
        gan = F.softplus(n.D(b, x_hat, b.tau, b.eps_tau)) + F.softplus(-n.D(b, b.x0, b.tau, b.eps_tau))
        return error.pow(2).mean((1, 2, 3)) + 0.7 * gan

    n = Steps(monkeypatch, "sid", f"--init a.pt --teacher b.pt --alpha 1.2 --lambda_g 0.5 --lambda_d 0.7 {RUN} "
              "--out step-sid", dict(net="sid + 0.5 * gan_g", fake="fake + 0.7 * gan_d"), net=generator, fake=fake_side)
    assert n.updates == ["fake", "net"] * 2
    x0 = torch.cat([turn["x0"] for turn in n.turns]).flatten(1)
    assert len(x0.unique(dim=0)) == 4 * B                                               # no row twice in an epoch
    for turn in n.turns:
        check_independence(turn)


@pytest.mark.parametrize("command", ["consistency --loss cd", "fsf_dmd", "dmd2 --cd 1 --ttur 1 --lambda_g 0"])
def test_rows_that_learn_the_velocity_have_the_whole_interval_where_guidance_is_drawn(random_starts, monkeypatch,
                                                                                      command):
    """iMF's rule, in L_CD too: a jump is asked with its drawn interval, the velocity at s = t with [0, 1]."""
    name, _, flags = command.partition(" ")
    turns, module = [], importlib.import_module(name)
    real = module.micro_batches
    monkeypatch.setattr(module, "micro_batches", lambda batch, *rest: turns.append(batch) or real(batch, *rest))
    run = RUN if name != "consistency" else RUN.replace("--health_every 0 ", "")
    module.train(module.parse_args(f"{flags} --init a.pt --cd_guidance drawn --omega_max 4 {run} --out "
                                   f"interval-{name}".split()))
    for turn in turns:
        omega, t_min, t_max = turn["guidance"].unbind(1)
        velocity = turn["s"] == turn["t"]
        assert velocity.sum() == B / 2 and omega.unique().numel() == B
        assert (t_min[velocity] == 0).all() and (t_max[velocity] == 1).all()
        assert (t_min[~velocity] > 0).all() and (t_max[~velocity] < 1).all()


def test_the_last_jump_of_a_rollout_is_drawn(random_starts, monkeypatch):
    """k of Eq. 17 takes each of 0 .. M - 1.

    Of DMD2 and SiD: test_the_fake_side_learns_on_the_rollout_of_the_generator.
    """
    real, found = fsf_dmd.backward_simulation, set()

    def seen(u, eps, k, *rest):
        found.add(k)
        return real(u, eps, k, *rest)

    monkeypatch.setattr(fsf_dmd, "backward_simulation", seen)
    run = RUN.replace("--steps 2 --batch_size 20 --micro_batch 12", "--steps 12 --batch_size 4")
    fsf_dmd.train(fsf_dmd.parse_args(f"--rollout dmd2 --init a.pt --M 4 {run} --preview_every 0 --out k".split()))
    assert found == {0, 1, 2, 3}


# ---- TwinFlow --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", ["imf", "rcgm"])
def test_a_step_of_twinflow(random_starts, monkeypatch, base):
    """The fake side is the network at (-t, -t) without guidance, the teacher it is at (tau, tau) with it [63-65]."""
    def objective(n, b, _):
        fake = lambda x, t: n.net(x, -t, b.y, -t)
        adv, rectify, _ = twinflow.twinflow_losses(n.u(b), fake, n.v(n.net, b), b.z, b.t_fake, b.eps_fake, b.tau,
                                                   b.eps_tau, 0.1)
        loss = n.imf(b)
        if base == "rcgm":
            loss = consistency.guided_rcgm_loss(n.net, n.target, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, True,
                                                0.03, 3, 0.2)
        return loss + 0.7 * adv + 0.3 * rectify

    more = "--delta 0.03 --order 3 --clamp 0.2" if base == "rcgm" else ""
    n = Steps(monkeypatch, "twinflow", f"--base {base} --init a.pt --lam 0.3 --lam_adv 0.7 --clip 0.1 --omega_max 4 "
              f"{more} {RUN} --out step-twinflow-{base}", dict(net=f"{base} + 0.7 * adv + 0.3 * rectify"),
              net=objective)
    assert n.updates == ["net"] * 2
    check_draws(n.turns)


def test_twinflow_keeps_no_copy_of_its_start(random_starts):
    """Its header: nothing is frozen, and no second network is kept."""
    starts, gone = [], []

    def starting(real):
        def wrapped(*args):
            net, teacher = real(*args)
            starts.append(weakref.ref(teacher))
            return net, teacher
        return wrapped

    def logged(real):
        def wrapped(*args):
            gone.append(starts[0]() is None)
            real(*args)
        return wrapped

    with replaced([(twinflow, "starting_networks", starting), (Run, "log", logged)]):
        twinflow.train(twinflow.parse_args(f"--base imf --init a.pt {RUN} --out step-twinflow-alone".split()))
    assert gone == [True, True]


# ---- consistency.py --------------------------------------------------------------------------------------------------

def of_fm(n, b, _):
    return consistency.flow_matching_loss(lambda x, t, s: n.net(x, t, b.y_drop), b.x0, b.eps, b.t)


def of_ct(n, b, _):
    v = b.eps - b.x0
    return consistency.consistency_loss(lambda x, t, s: n.net(x, t, b.y_drop, s), model.interpolate(b.x0, b.eps, b.t),
                                        b.t, b.s, v, v)


def of_isg(n, b, _):
    u = lambda x, t, s: n.net(x, t, b.y_drop, s, b.guidance)
    dropped = SimpleNamespace(y=b.y_drop)
    return consistency.isg_loss(u, n.v(n.teacher, dropped), model.interpolate(b.x0, b.eps, b.t), b.t, b.s, b.r)


def of_rcgm(n, b, _):
    return consistency.guided_rcgm_loss(n.net, n.target, b.x0, b.eps, b.t, b.s, b.y_drop, b.guidance, True, 0.03, 3,
                                        0.2)


@pytest.mark.parametrize("loss, objective, flags", [
    ("rcgm", of_rcgm, "--omega_max 4 --delta 0.03 --order 3 --clamp 0.2"),
    ("fm", of_fm, ""),
    ("ct", of_ct, ""),
    ("imf", lambda n, b, _: n.imf(b), "--omega_max 4"),
    ("cd", lambda n, b, _: n.cd(b), "--init a.pt --teacher b.pt"),
    ("isg", of_isg, "--init a.pt --teacher b.pt --M 4"),
])
def test_a_step_of_consistency(random_starts, monkeypatch, loss, objective, flags):
    run = RUN.replace("--health_every 0 ", "")
    if loss == "ct":
        run = run.replace(" --omega 3 --guide_to 0.6", "")
    n = Steps(monkeypatch, "consistency", f"--loss {loss} {flags} --lr 0.05 --label_drop 0.2 {run} --out step-{loss}",
              dict(net=loss), net=objective)
    assert n.updates == ["net"] * 2
    check_draws(n.turns)
    assert any((turn["y_drop"] == 3).any() for turn in n.turns)
    if loss == "isg":
        for turn in n.turns:
            t, s, r = (turn[name].double() for name in "tsr")
            torch.testing.assert_close(4 * (t - s), torch.ones(B).double())             # a segment of M = 4
            assert s.min() == 0 and t.max() == 1 and ((4 * (r - s) > 0.09) & (4 * (r - s) < 0.91)).all()
        places = 4 * torch.cat([turn["r"] - turn["s"] for turn in n.turns])             # uniform in between
        assert places.min() < 0.2 and places.max() > 0.8
