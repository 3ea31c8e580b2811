"""Forward passes of one network in a training step of each method, from its flags (backward = 2).

The formulas are those of the file headers.  A test compares them with FLOPs counted while the scripts run.
"""

from plumbing.files import BadInput

# Cost of one pass of DMD2's discriminator (the trunk's first blocks, and two of its own), counted in passes of the
# whole network: (of an in-context one, of a plain one).  Small networks have few blocks, so there it costs more than
# the network.  The trunk is the fake network, which learns; with another --disc_trunk no gradient goes to the trunk's
# weights, which saves 7 passes a step at B/1 and 1:5.
DISCRIMINATOR = {
    "tiny": (1.04, 1.26),
    "small": (1.16, 1.24),
    "medium": (0.79, 0.81),
    "B/1": (0.55, 0.66),
    "L/1": (0.48, 0.54),
    "XL/1": (0.48, 0.53),
}


def consistency_passes(args: dict, teacher: bool) -> float:
    """L_CD from a teacher (Eq. 16), or the iMF loss on the data (Eq. 6).  Rows with s = t need no difference."""
    moving = 1 - args["mask_prob"]
    if teacher:
        return 3 + velocity_passes(args) + 2 * moving
    guided = args["omega_max"] > 1
    return 3 + moving + guided + 2 * moving                      # v_cond of the moving rows, v_uncond, the difference


def velocity_passes(args: dict) -> int:
    """The frozen teacher's guided velocity: CFG of a plain network takes two passes.

    Only --init counts: not a --teacher of another kind, nor that a file counted as "fm" may hold a flow map (one pass).
    """
    return 2 if args["start"] == "fm" else 1


SCRIPTS = ("consistency.py", "dmd2.py", "fsf_dmd.py", "sid.py", "twinflow.py")


def refuse_uncounted(script: str) -> None:
    """BadInput for a training script without a formula here: asked before its runs, not after."""
    if script not in (*SCRIPTS, "evaluate.py"):
        raise BadInput(f"{script}: plumbing/passes.py does not know its forward passes a step; add it there")


def passes_a_step(script: str, args: dict) -> float:
    """Forward passes of a step after any --warmup.  args: the flags of a run, as its args.json has them."""
    refuse_uncounted(script)
    scratch, velocity = args["start"] == "scratch", velocity_passes(args)
    if script == "consistency.py":
        return of_consistency(args)
    if script == "fsf_dmd.py" and args["lam"] == 0:              # L_CD, or L_CT, alone
        return consistency_passes(args, not scratch)
    if script == "fsf_dmd.py":
        rollout = 3 * args["M"]
        if args["rollout"] == "dmd2":
            rollout = 3 + (args["M"] - 1) / 2                    # k jumps without gradient, k drawn from 0 .. M - 1
        elif args["rollout_grad"] == "last":
            rollout = 3 + (args["M"] - 1)
        return consistency_passes(args, not scratch) + rollout + velocity + 1
    if script == "twinflow.py":
        base = consistency_passes(args, teacher=False) if args["base"] == "imf" else rcgm_passes(args)
        return base + 3 + 3 + 2                                  # the generator, L_adv, and the gap

    simulated = 1 + (args["M"] - 1) / 2                          # Eq. 17 without gradient
    if script == "sid.py":                                       # without its GAN
        return simulated + 3 + simulated + 2 + 2 * (velocity + 1)  # backward to the input alone: 1
    gan = 0.0
    if args["lambda_g"]:                                         # forward, backward to x_hat; 3 each of real and fake
        gan = DISCRIMINATOR[args["size"]][args["start"] == "fm"] * (2 + 6 * args["ttur"])
    generator = simulated + 2 + velocity + 1
    fake = 3 + (args["ttur"] - 1) * (simulated + 3)              # the first turn takes the generator's x_hat
    both = consistency_passes(args, not scratch) if args["cd"] else 0
    return generator + fake + gan + both


def passes_until(script: str, args: dict, step: int) -> float:
    """Forward passes of the first `step` steps; FSF-DMD's --warmup is L_CD alone."""
    warm = min(step, args.get("warmup", 0))
    cheap = consistency_passes(args, teacher=args["start"] != "scratch") if warm else 0
    return round(warm * cheap + (step - warm) * passes_a_step(script, args), 1)


def of_consistency(args: dict) -> float:
    """The losses of consistency.py."""
    loss = args["loss"]
    if loss == "fm":
        return 3
    if loss == "ct":
        return 3 + 2
    if loss == "isg":
        return 3 + velocity_passes(args) + 1                     # the teacher's step, the student's jump
    if loss == "rcgm":
        return rcgm_passes(args)
    return consistency_passes(args, teacher=loss == "cd")


def rcgm_passes(args: dict) -> float:
    """Two velocities of the target network where guidance is learned, and its N jumps (Eq. 66)."""
    return 3 + 2 * (args["omega_max"] > 1) + args["order"]
