"""Kill -9 at random moments, over all scripts, against a run that nobody interrupted: equal bit for bit.

    python benchmarks/soak.py --rounds 20               # about a minute a round on 2 CPU cores
    python benchmarks/soak.py --seconds 28800           # as many rounds as fit into a night

A round takes one script, kills it with SIGKILL after a random time, starts the same command again, and so on until it
ends by itself.  Then every tensor of state.pt and model.pt and every logged loss must be those of the uninterrupted
run.  Where they are not, the folder stays and is named.  Not part of the tests.
"""
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(HERE), str(HERE / "tests")]
from common import BadInput, main  # noqa: E402
from plumbing.checkpoints import load_checkpoint  # noqa: E402
from plumbing.files import read_lines  # noqa: E402
from plumbing.flags import Parser, number  # noqa: E402
from test_helpers import assert_same, environment, run, small_images, state  # noqa: E402

STEPS = 12
SHARED = f"--data toy.npz --steps {STEPS} --save_every 1 --log_every 1"
COMMANDS = [
    "consistency.py --loss fm",
    "consistency.py --loss imf",
    "consistency.py --loss rcgm",
    "consistency.py --loss cd --init imf/model.pt",
    "fsf_dmd.py --init imf/model.pt --M 2",
    "fsf_dmd.py --init fm/model.pt --M 2",
    "dmd2.py --init imf/model.pt --M 2 --ttur 2 --ida 0.97 --cd 1",
    "sid.py --init imf/model.pt --lambda_g 0.1",
    "twinflow.py --base rcgm --init imf/model.pt",
]
TIMING = ("sec_per_step", "images_per_sec", "memory_gb")


def history(folder):
    """The lines of metrics.jsonl without what differs from day to day."""
    lines = read_lines(folder / "metrics.jsonl")
    for line in lines:
        for name in TIMING:
            line.pop(name, None)
    return lines


def killed_until_done(home, command, longest, rng):
    """Run a command to its end, killed after random times up to `longest` seconds.  -> number of kills"""
    script, *argv = shlex.split(command)
    kills = 0
    while True:
        child = subprocess.Popen([sys.executable, str(HERE / script), *argv], cwd=home, env=environment(),
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            # A third of the kills comes anywhere; the others later and later, so that the run comes to its end.
            patience = longest * (0.6 + kills / 4)
            said, _ = child.communicate(timeout=rng.uniform(0.3 if kills % 3 == 0 else patience / 2, patience))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            kills += 1
            continue
        if child.returncode:
            raise BadInput(f"after {kills} kills `{command}` ended with exit code {child.returncode}:\n{said[-2000:]}")
        return kills


def soak(args):
    rng, began = random.Random(args.seed), time.time()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    small_images(home / "toy.npz", 90)
    for loss in ("imf", "fm"):
        run(home, f"consistency.py --loss {loss} --data toy.npz --steps 8 --out {loss}")
    whole = {}                                              # {command: (folder's name, seconds)}
    kills = rounds = 0
    while rounds < args.rounds if args.seconds is None else time.time() - began < args.seconds:
        command = COMMANDS[rounds % len(COMMANDS)]
        if command not in whole:
            start = time.time()
            run(home, f"{command} {SHARED} --out whole-{len(whole)}")
            whole[command] = f"whole-{len(whole)}", time.time() - start
        expected, seconds = whole[command]
        shutil.rmtree(home / "killed", ignore_errors=True)
        found = killed_until_done(home, f"{command} {SHARED} --out killed", seconds, rng)
        try:
            assert_same(state(home, expected), state(home, "killed"))
            assert history(home / expected) == history(home / "killed"), "metrics.jsonl differs"
            models = [load_checkpoint(home / folder / "model.pt") for folder in (expected, "killed")]
            assert_same(*(dict(weights=model["weights"]) for model in models))
        except AssertionError as error:
            raise BadInput(f"round {rounds + 1}, {command}: {error}; see {home / 'killed'}") from None
        kills, rounds = kills + found, rounds + 1
        print(f"round {rounds}: {command}: {found} kills, equal", flush=True)
    shutil.rmtree(home)
    print(f"{rounds} of {rounds} rounds equal bit for bit, {kills} kills, {time.time() - began:.0f} s")


def parse_args():
    p = Parser(description=__doc__)
    p.add_argument("--rounds", type=number(int, 1), default=20)
    p.add_argument("--seconds", type=number(float, 0), help="go on for so long, instead of --rounds")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the moments")
    return p.parse_args()


if __name__ == "__main__":
    main(soak, parse_args)
