"""The numbers in README, RESULTS and METHODS (see test_all.py), and the benchmarks that they come from.

What the texts say in numbers is traced to results/: each paragraph of RESULTS.md has a test, named after its table.
"""
import importlib
import json
import math
import re
import shlex
import statistics

import matplotlib.figure
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

import consistency
import cost
import dmd2
import fsf_dmd
import reproduce
import search
import sid
import twinflow
from data import data_kind
from plumbing import kept_runs, report
from test_all import HERE
from test_helpers import rand

PAPER = json.loads((HERE / "golden" / "paper_tables.json").read_text())
KEPT = HERE / "results"


def words_of_the_texts():
    """README, RESULTS and METHODS as one text, every run of white space as one blank: a line may break anywhere."""
    texts = [(HERE / name).read_text() for name in ("README.md", "RESULTS.md", "METHODS.md")]
    return " ".join(" ".join(texts).split())


# ---------------------------------------------------------------------------------------------------------------------
# The files in results/
# ---------------------------------------------------------------------------------------------------------------------


def test_every_table_in_results_follows_from_its_runs_and_stands_in_the_text():
    """Each README.md is what report.py makes of its runs.json; RESULTS.md has the first table word for word."""
    shown, text = [], (HERE / "RESULTS.md").read_text()
    for folder in sorted(KEPT.glob("table*")):
        stored = json.loads((folder / "runs.json").read_text())
        table = reproduce.TABLES[stored["table"]]
        rows = {row["number"]: table.rows[row["number"] - 1] for row in stored["rows"]}
        rows = report.summary(rows, {row["number"]: row["seeds"] for row in stored["rows"]})
        tables = report.markdown(data_kind(stored["data"]), table, rows)
        page = (folder / "README.md").read_text()
        [command] = re.findall(r"^Made by `(.*?)`", page, re.M)
        assert page == report.page(stored, command, tables, rows), folder
        args = reproduce.parse_args(shlex.split(command)[2:])
        assert (args.table, args.data, args.out.name) == (stored["table"], stored["data"], "results")
        assert stored["start"] in (args.start, "")
        chosen = [row for r, row in enumerate(table.rows, 1) if args.row is None or r in args.row]
        assert [row["label"] for row in rows.values()] == [row.label for row in chosen], folder
        assert all(row["n"] == args.seeds for row in rows.values()), folder
        if folder.name in text:
            assert tables.split("\n\n")[0] in text, folder
            assert f"results/{folder.name}/curves.png" in text, folder
            shown.append(folder.name)
    assert "table2-digits-weak" in shown


def test_the_index_of_results_names_every_folder_and_links_lead_somewhere():
    index = (KEPT / "README.md").read_text()
    folders = [path.name for path in KEPT.iterdir() if path.is_dir()]
    assert sorted(re.findall(r"^\| \[[\w-]+\]\(([\w-]+)\) \|", index, re.M)) == sorted(folders)
    pages = [HERE / "README.md", HERE / "RESULTS.md", HERE / "METHODS.md", *HERE.glob("golden/*.md"),
             *KEPT.rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page, target)


# ---------------------------------------------------------------------------------------------------------------------
# What the texts say of cost
# ---------------------------------------------------------------------------------------------------------------------


def kept_cost():
    """(runs.json of the kept cost table, its rows by label)."""
    found = json.loads((KEPT / "cost-cpu" / "runs.json").read_text())
    return found, {row["label"]: row for row in found["rows"]}


def test_the_cost_table_follows_from_its_runs_and_stands_in_the_text():
    found, rows = kept_cost()
    page = (KEPT / "cost-cpu" / "README.md").read_text()
    assert page == cost.page(found, "python cost.py --batch_size 4 --out results")
    assert cost.markdown(found) in page and cost.markdown(found) in (HERE / "RESULTS.md").read_text()
    assert list(rows) == [label for label, *_ in cost.COST]
    assert (found["size"], found["batch"]) == ("B/1", 4)
    for row, (_, start, command) in zip(found["rows"], cost.COST):
        assert row["command"].replace(f"{str(start).upper()}.pt", "{start}") == command


def test_what_is_said_of_cost_is_in_the_numbers():
    """Hours of the ImageNet tables and ratios from the counted FLOPs; the passes of DMD2's header."""
    _, rows = kept_cost()
    results = (HERE / "RESULTS.md").read_text()
    flops = {label: 128 * row["gflop_per_image"] + row["gflop_optimizer"] for label, row in rows.items()}
    hours = {label: row["hours_modelled"] for label, row in rows.items()}
    for label, row in rows.items():
        assert hours[label] == pytest.approx(row["preset_steps"] * flops[label] * 1e9 / cost.RATE / 3600)
    CD, M1, M2 = "imf: Consistency distillation", "imf: FSF-DMD M=1", "imf: FSF-DMD M=2"
    DMD2, IDA, BOTH, ONE = "imf: DMD2 1:5", "imf: DMD2 + IDA", "imf: DMD2 + L_CD", "imf: DMD2 1:1"

    def ttur(R, gan):                                                 # linear in R
        one, five = hours[f"imf: DMD2 1:1{gan}"], hours[f"imf: DMD2 1:5{gan}"]
        return one + (R - 1) / 4 * (five - one)

    of_fm = [hours[label] for label in rows if label.startswith("fm: ")]
    assert len(of_fm) == 4
    from_scratch = ("iMF", "iMF + DMD2", "iMF + TwinFlow", "RCGM", "RCGM + TwinFlow", "FSF-DMD from scratch")
    table_7 = [ttur(R, gan) for gan in (", no GAN", "") for R in (1, 2, 3, 4, 5, 5, 5, 5)]
    sums = {
        "2": sum(hours[label] for label in (CD, DMD2, IDA, BOTH, M2, M1)),
        "3": 2 * hours[CD] + 2 * hours[M1] + 4 * hours[M2] + hours[DMD2],             # DMD2 with M = 1 as with M = 2
        "4": sum(of_fm) + hours["fm: Consistency distillation"],      # FSF-DMD begins with as many steps of it
        "5": sum(hours[label] for label in from_scratch),
        "7": sum(table_7) + 4 * (hours[BOTH] - hours[DMD2]),          # four rows have L_CD
        "8": 5 * hours[M2],
        "9": 9 * hours[M2],
    }
    for table, total in sums.items():
        command = rf"`python reproduce.py {table} --data latents \.\.\.`"
        assert re.search(rf"^\| {table}, .*\| not run here \| {command} \| {total:.0f} \|$", results, re.M), table

    text = " ".join(results[results.index("The hours are modelled"):].split())
    share = {B: rows[CD]["gflop_optimizer"] / (B * rows[CD]["gflop_per_image"] + rows[CD]["gflop_optimizer"])
             for B in (4, 128)}
    paper = cost.paper_seconds()
    seconds, memory = (rows[DMD2][name] / rows[M2][name] for name in ("sec_per_step", "memory_gb"))
    of_m2, of_one = rows[M2]["memory_gb"], rows[ONE]["memory_gb"]
    scratch, imf = "FSF-DMD from scratch", "iMF"
    unmasked = flops[CD] + 128 * rows[CD]["gflop_per_image"] / rows[CD]["passes"]           # a pass more
    for words in (
        f"(iMF {hours['iMF']:.0f} hours, FM {hours['FM']:.0f})",
        f"NorMuon is {share[4]:.0%} of CD's FLOPs here and {share[128]:.0%} at",
        f"({seconds:.1f} times FSF-DMD, M = 2)",
        f"DMD2 takes {flops[DMD2] / flops[M2]:.1f} times FSF-DMD, M = 2, and CD {flops[CD] / flops[M2]:.2f} times "
        f"(without masking, as the paper's, {unmasked / flops[M2]:.2f}); in the paper's seconds 3.8 and "
        f"{paper[CD] / paper[M2]:.2f}",
        f"DMD2 + L_CD is {flops[BOTH] / flops[M2]:.1f} here and {paper[BOTH] / paper[M2]:.1f} there",
        f"FSF-DMD takes {flops[scratch] / flops[imf]:.1f} times iMF, in the paper {paper['FSF-DMD'] / paper[imf]:.1f}",
        f"RCGM {flops['RCGM'] / flops[imf]:.1f} times, in the paper {paper['RCGM'] / paper[imf]:.1f}",
        f"DMD2 needs {memory:.1f} times",
        f"{of_m2:.2f} of {of_one:.2f} ({of_m2 / of_one:.2f})",
    ):
        assert words in text, words
    for label, percent, peak in ((imf, 18, 312e3), (M2, 12, 2250e3)):   # GFLOP/s in bf16 of an A100 and a B200
        assert f"{flops[label] / paper[label] / peak:.0%}" == f"{percent}%"
        assert f"{percent}% of a" in text

    # What the GAN adds, in the header of dmd2.py: a + b R passes at TTUR 1:R.  Without it 1:5 takes 26.5 on average.
    added = {R: rows[f"imf: DMD2 1:{R}"]["passes"] - rows[f"imf: DMD2 1:{R}, no GAN"]["passes"] for R in (1, 5)}
    b = (added[5] - added[1]) / 4
    assert (f"{added[1] - b:.1f}", f"{b:.1f}", f"{26.5 + added[5]:.1f}") == ("1.1", "3.3", "44.1")


# ---------------------------------------------------------------------------------------------------------------------
# What the texts say of the tables
# ---------------------------------------------------------------------------------------------------------------------


class Told:
    """A table in results/, and what the texts say of it."""

    def __init__(self, name):
        self.text = words_of_the_texts()
        self.stored = json.loads((KEPT / name / "runs.json").read_text())
        self.last = {}                                                # {row: [last evaluation of each seed]}
        for row in self.stored["rows"]:
            self.last[row["number"]] = [run["evaluations"][-1] for run in row["seeds"].values()]

    def gain(self, a, b, metric, words="", all_five=True, p=None):
        """The paired differences of row b to row a [5].

        Their mean and deviation stand in the text as `words`, they have one sign (all_five), and a t-test is below p.
        """
        d = np.array([y[metric] - x[metric] for x, y in zip(self.last[a], self.last[b])])
        if words:
            digits = len(words.split(".")[-1])
            found = f"{d.mean():+.{digits}f} ± {d.std(ddof=1):.{digits}f}"
            assert found in (words, f"+{words}", f"-{words}"), (a, b, metric, found)
            assert words in self.text, words
        if all_five:
            assert (np.sign(d) == np.sign(d[0])).all()
        if p is not None:
            assert scipy.stats.ttest_1samp(d, 0).pvalue < p
        return d

    def p(self, a, b, metric):
        """Of the t-test of those differences."""
        return scipy.stats.ttest_1samp(self.gain(a, b, metric, all_five=False), 0).pvalue

    def mean(self, row, metric, digits):
        return f"{statistics.mean(e[metric] for e in self.last[row]):.{digits}f}"

    def mean_distance(self, row):
        return float(self.mean(row, "fd_2step", 4))

    def curves(self, row):
        """[[distance at 2 steps, evaluation by evaluation] of each seed]"""
        seeds = self.stored["rows"][row - 1]["seeds"].values()
        return [[e["fd_2step"] for e in run["evaluations"]] for run in seeds]

    def seconds(self, row):
        seeds = self.stored["rows"][row - 1]["seeds"].values()
        return statistics.median(run["sec_per_step"] for run in seeds)

    def differences(self, metric):
        table = reproduce.TABLES[self.stored["table"]]
        runs = {row["number"]: row["seeds"] for row in self.stored["rows"]}
        rows = report.summary(dict(enumerate(table.rows, 1)), runs)
        return report.compare(rows, table.reference, metric)


FASHION_2, FASHION_4 = "table2-fashion-mnist-weak-row1-2-3-4-7-8-9-10-11-12", "table4-fashion-mnist-row1-3-4-5-6-7-8"
FASHION_STRONG = "table2-fashion-mnist-strong-row1-2-3-4-7-9-10-11"


def test_the_distances_of_the_readme_are_in_the_numbers():
    """README, "In short": every cell of the first table, with its star, and the passes on digits."""
    rows = {                                                            # label: its row in Table 2
        "the start": 1,
        "the iMF trained on": 11,
        "CD": 3,
        "CD with random masking": 9,
        "**FSF-DMD, M = 2**": 7,
        "DMD2, 1:5 with GAN": 4,
        "DMD2 from CD's network": 12,
        "SiD": 10,
    }
    columns = [Told(name) for name in ("table2-digits-weak", "table2-digits-strong", FASHION_2, FASHION_STRONG)]
    section = (HERE / "README.md").read_text().split("## In short")[1].split("| the paper, on ImageNet")[0]
    shown = {}
    for line in section.splitlines():
        label, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        shown[label] = cells
    names = ("table7-digits-weak", "table7-digits-strong-row1", "table7-fashion-mnist-weak-row1-9")
    alone = [Told(name) for name in names]                              # their row 1: 1:1, no GAN
    assert shown["DMD2, 1:1 without"] == [*[told.mean(1, "fd_2step", 1) for told in alone], "not run",
                                          f"{alone[0].last[1][0]['passes']:.0f}"]
    digits, start = columns[0], columns[0].last[1][0]["passes"]
    for label, row in rows.items():
        expected = []
        for told in columns:
            cell = "not run"
            if row in told.last:
                _, p = told.differences("fd").get(row, (0, 1))
                star = "*" if p < 0.05 else ""
                cell = told.mean(row, "fd_2step", 1) + star
            expected.append(cell)
        assert shown[label][:4] == expected, label
        passes = digits.last[row][0]["passes"]
        found = "" if row == 1 else f"{passes - start if label == 'the iMF trained on' else passes:,.0f}"
        assert shown[label][4] == found, label


def test_the_claims_of_the_paper_are_held_against_the_numbers():
    """RESULTS, "The paper's claims, one by one"; README, "In short", has the same claims, in short."""
    readme, results = ((HERE / name).read_text() for name in ("README.md", "RESULTS.md"))
    claims = results.split("## The paper's claims, one by one")[1].split("## ")[0]
    in_short = re.findall(r"^\| (.*?) \|", readme.split("| the paper, on ImageNet")[1].split("## ")[0], re.M)
    words_of_claims = " ".join(claims.split())
    assert len(in_short) == 6
    for claim in in_short:
        assert f"* *{claim}:* " in words_of_claims, claim
    digits, strong, fm = Told("table2-digits-weak"), Told("table2-digits-strong"), Told("table4-digits")
    fashion, fashion_fm, fashion_strong = Told(FASHION_2), Told(FASHION_4), Told(FASHION_STRONG)
    CD, DMD2, BOTH, M2, MASKED, FROM_CD = 3, 4, 6, 7, 9, 12
    CD_4, FSF_4, FROM_CD_4, MASKED_4 = 3, 6, 7, 8                                       # the rows of Table 4

    recall = [digits.mean(row, "recall_2step", 3) for row in (CD, M2, MASKED)]
    IS = [digits.mean(row, "is_2step", 2) for row in (CD, M2, MASKED)]
    distances = [digits.mean(row, "fd_2step", 1) for row in (DMD2, BOTH)]
    with_both = Told("table7-digits-weak").mean(16, "fd_2step", 1)
    for words in (
        f"{IS[0]} to {IS[1]} and {recall[0]} to {recall[1]} (CD with masking {IS[2]} and {recall[2]})",
        f"DMD2 {distances[0]}, with L_CD {distances[1]}, with masking too {with_both}.",
        f"From the strong start L_CD alone has {strong.mean(BOTH, 'fd_2step', 1)}",
    ):
        assert words in words_of_claims, words
    for told, masked, ours in ((digits, MASKED, M2), (strong, MASKED, M2), (fashion, MASKED, M2),
                               (fashion_strong, MASKED, M2), (fm, MASKED_4, FSF_4), (fashion_fm, MASKED_4, FSF_4)):
        assert told.gain(masked, ours, "fd_2step", all_five=False).mean() > -0.01       # level, or behind
    assert max(fashion_fm.gain(CD_4, FSF_4, "fd_2step")) < 0                            # ahead in all three seeds
    assert max(fashion_fm.gain(FSF_4, MASKED_4, "fd_2step")) < 0                        # CD with masking further
    ahead = [told.gain(theirs, ours, "fd_2step", all_five=False).mean() < 0 for told, theirs, ours in (
        (digits, DMD2, M2), (strong, DMD2, M2), (fm, 4, FSF_4), (fashion, DMD2, M2), (fashion_strong, DMD2, M2),
        (fashion_fm, 4, FSF_4))]
    assert ahead == [True, True, True, False, True, True]                               # five starts of six
    assert max(strong.gain(DMD2, M2, "fd_2step", p=0.015)) < 0
    better = [min(DMD2, FROM_CD, key=digits.mean_distance), min(DMD2, FROM_CD, key=strong.mean_distance),
              min(4, FROM_CD_4, key=fm.mean_distance), min(DMD2, FROM_CD, key=fashion.mean_distance), DMD2,
              min(4, FROM_CD_4, key=fashion_fm.mean_distance)]                          # of DMD2's two starts
    below = [told.gain(theirs, ours, "fd_2step", all_five=False).mean() < 0 for told, theirs, ours in zip(
        (digits, strong, fm, fashion, fashion_strong, fashion_fm), better, (M2, M2, FSF_4, M2, M2, FSF_4))]
    assert below == [False, True, False, False, True, True]
    from_cd = [told.gain(theirs, ours, "fd_2step", all_five=False).mean() < 0 for told, theirs, ours in (
        (digits, FROM_CD, M2), (strong, FROM_CD, M2), (fm, FROM_CD_4, FSF_4), (fashion, FROM_CD, M2),
        (fashion_fm, FROM_CD_4, FSF_4))]
    assert sum(from_cd) == 2                                                            # README: in two of five
    assert min(digits.gain(FROM_CD, M2, "fd_2step", "+2.455 ± 1.392", p=0.0175)) > 0
    assert min(fm.gain(FROM_CD_4, FSF_4, "fd_2step", "+2.457 ± 1.000", p=0.0054)) > 0
    falls = [told.gain(cd, ours, "recall_2step", all_five=False).mean() < 0 for told, cd, ours in (
        (digits, CD, M2), (strong, CD, M2), (fm, CD_4, FSF_4), (fashion, CD, M2), (fashion_strong, CD, M2),
        (fashion_fm, CD_4, FSF_4))]
    assert all(falls) and max(told.p(CD, M2, "recall_2step") for told in (digits, strong)) < 0.01
    assert fm.p(CD_4, FSF_4, "recall_2step") < 0.01
    for told, theirs, ours in ((digits, DMD2, M2), (fm, 4, FSF_4), (fashion, DMD2, M2), (fashion_fm, 4, FSF_4)):
        assert told.last[ours][0]["passes"] < told.last[theirs][0]["passes"]
    masking = [told.gain(CD, masked, "fd_2step", all_five=False).mean() < 0 for told, masked in (
        (digits, MASKED), (strong, MASKED), (fm, MASKED_4), (fashion, MASKED), (fashion_strong, MASKED),
        (fashion_fm, MASKED_4))]
    assert sum(masking) == 3                                                            # three better, three worse
    for told in (digits, strong, fashion, fashion_strong):                              # masking: none after Holm
        assert told.differences("fd")[MASKED][1] > 0.05
    for told in (fm, fashion_fm):
        assert told.differences("fd")[MASKED_4][1] > 0.05
    shares = []
    for told, both in ((digits, (DMD2, FROM_CD)), (strong, (DMD2, FROM_CD)), (fashion, (DMD2, FROM_CD)),
                       (fashion_strong, (DMD2,)), (fm, (DMD2, FROM_CD_4)), (fashion_fm, (DMD2, FROM_CD_4))):
        best = min(both, key=told.mean_distance)
        shares.append(told.last[best][0]["passes"] / told.last[CD][0]["passes"])
    assert f"{min(shares):.1f} to {max(shares):.0f} times" == "1.2 to 6 times"
    assert "1.2 to 6 times the passes" in words_of_claims


def test_masking_trades_few_steps_for_many_in_every_table():
    """CD with masking against CD: worse at 1 step in every seed, a lower mean at 4 steps in all but one."""
    CD, seeds = 3, 0
    for name, masked, words in (
        ("table2-digits-weak", 9, "+2.957 ± 1.842"), ("table2-digits-strong", 9, "+2.564 ± 1.366"),
        ("table4-digits", 8, "+13.845 ± 5.998"), (FASHION_2, 9, "+2.073 ± 1.311"), (FASHION_4, 8, "+1.853 ± 1.193"),
        (FASHION_STRONG, 9, "+2.176 ± 0.855"),
    ):
        told = Told(name)
        at_one = told.gain(CD, masked, "fd_1step", words)
        at_four = told.gain(CD, masked, "fd_4step", all_five=False).mean()
        assert at_one.min() > 0 and (at_four < 0) == (name != FASHION_STRONG)
        seeds += len(at_one)
    assert seeds == 24
    Told(FASHION_STRONG).gain(CD, 9, "fd_4step", "+1.559 ± 0.933")
    Told("table2-digits-weak").gain(CD, 9, "fd_4step", "-5.850 ± 0.763")
    rest = Told("table3-digits-weak").gain(1, 6, "fd_2step", "-1.759 ± 1.393", p=0.048)
    assert rest.mean() < 0
    Told("table7-digits-weak").gain(13, 1, "fd_1step", "1.797 ± 0.946", p=0.0135)
    Told(FASHION_4).gain(8, 7, "fd_2step", "3.975 ± 0.736", p=0.0115)
    strong, CONTROL, MASKED = Told("table2-digits-strong"), 11, 9
    assert [strong.mean(row, "fd_4step", 1) for row in (CONTROL, MASKED)] == ["14.8", "9.5"]
    assert strong.p(CONTROL, MASKED, "fd_4step") < 0.005


def test_what_is_said_of_table_2_is_in_the_numbers():
    told = Told("table2-digits-weak")
    gain, mean = told.gain, told.mean
    START, TEACHER, CD, DMD2, IDA, BOTH, M2, M1, MASKED, SID, CONTROL, FROM_CD = range(1, 13)
    means = [mean(row, "fd_2step", 1) for row in (START, CD, DMD2, BOTH, M2, M1, MASKED, SID, CONTROL, FROM_CD)]
    assert means == ["29.2", "19.9", "18.9", "20.6", "18.2", "18.0", "18.0", "17.8", "26.6", "15.7"]
    assert mean(TEACHER, "fd_25step", 1) == "20.6"
    gain(MASKED, M2, "fd_2step", "+0.193 ± 0.092", p=0.01)
    gain(MASKED, M2, "is_2step", "+0.003 ± 0.001", p=0.01)
    assert (mean(CD, "is_2step", 2), mean(M2, "is_2step", 2)) == ("9.66", "9.73")
    assert (mean(CD, "recall_2step", 3), mean(M2, "recall_2step", 3)) == ("0.844", "0.809")
    gain(CD, M2, "is_2step")
    gain(CD, M2, "recall_2step")
    gain(MASKED, M2, "recall_2step", "-0.004 ± 0.002", p=0.01)
    gain(MASKED, M1, "fd_2step", "-0.008 ± 0.065", all_five=False)
    gain(CD, MASKED, "fd_2step", "-1.952 ± 1.339", p=0.05)
    gain(MASKED, DMD2, "fd_2step", "+0.957 ± 0.586", all_five=False, p=0.05)
    gain(MASKED, DMD2, "recall_2step", "+0.050 ± 0.030")
    gain(MASKED, DMD2, "acc_2step", "-0.016 ± 0.013")
    gain(DMD2, IDA, "fd_2step", "+0.039 ± 0.518", all_five=False)
    gain(DMD2, FROM_CD, "fd_2step", "3.2 ± 1.8")
    called = {metric: {row for row, (_, p) in told.differences(metric).items() if p < 0.05} for metric in ("fd", "is")}
    assert called["fd"] == {FROM_CD} and MASKED in called["is"]
    assert min(told.last, key=lambda row: float(mean(row, "fd_1step", 4)) if row != TEACHER else 99) == FROM_CD
    one_step = [mean(row, "fd_1step", 1) for row in (DMD2, BOTH, SID, MASKED, FROM_CD)]
    assert one_step == ["24.6", "20.0", "19.5", "27.0", "17.0"]
    assert (mean(SID, "recall_2step", 3), mean(SID, "precision_2step", 3)) == ("0.905", "0.669")
    few_steps = set(told.last) - {TEACHER}
    assert max(few_steps, key=lambda row: float(mean(row, "recall_2step", 4))) == SID
    for metric in ("is_2step", "precision_2step", "acc_2step"):
        assert max(few_steps, key=lambda row: float(mean(row, metric, 4))) == CONTROL
    assert (mean(CONTROL, "fd_4step", 1), mean(MASKED, "fd_4step", 1)) == ("15.9", "18.0")
    for row in few_steps - {START, CONTROL}:
        assert gain(row, CONTROL, "fd_4step").max() < 0


def test_the_table_of_the_main_command_is_that_of_a_run():
    """README's table, number by number, from the result.json that the command left."""
    result = json.loads((KEPT / "main-command" / "result.json").read_text())
    lines = (HERE / "README.md").read_text().splitlines()
    for name, evaluation in (("at step 0", result["evaluations"][0]), ("after 200 steps", result["last"])):
        for N in (1, 2, 4):
            [line] = [line for line in lines if line.startswith(name) and line.removeprefix(name).split()[0] == str(N)]
            found = [f"{evaluation[f'{metric}_{N}step']:.3f}" for metric in ("fd", "is", "precision", "recall", "acc")]
            assert line.removeprefix(name).split()[1:] == found, line


def test_what_is_said_of_fashion_mnist_is_in_the_numbers():
    told = Told("table2-fashion-mnist-weak-row1-2-3-4-7-8-9-10-11-12")
    gain, mean = told.gain, told.mean
    START, TEACHER, CD, DMD2, M2, M1, MASKED, SID, CONTROL, AFTER_CD = (1, 2, 3, 4, 7, 8, 9, 10, 11, 12)
    assert sorted(told.last) == [START, TEACHER, CD, DMD2, M2, M1, MASKED, SID, CONTROL, AFTER_CD]
    assert [mean(START, f"fd_{N}step", 1) for N in (1, 2, 4)] == ["86.6", "60.4", "54.8"]
    assert mean(TEACHER, "fd_25step", 1) == "38.6"
    trained = (CD, DMD2, M2, M1, MASKED, SID, AFTER_CD)
    assert [mean(row, "fd_2step", 1) for row in trained] == ["36.9", "35.9", "37.0", "36.9", "35.0", "37.1", "36.7"]
    assert [mean(row, "fd_1step", 1) for row in (DMD2, MASKED, SID)] == ["53.2", "40.9", "46.9"]
    assert [mean(row, "fd_4step", 1) for row in (DMD2, MASKED, SID)] == ["51.5", "36.3", "47.2"]
    gain(MASKED, M2, "fd_1step", "4.280 ± 1.608")
    gain(MASKED, M2, "fd_2step", "1.959 ± 0.586")
    gain(MASKED, M2, "fd_4step", "1.756 ± 0.703")
    gain(CD, MASKED, "fd_2step", "1.835 ± 0.581", p=0.032)
    gain(CD, MASKED, "is_2step", "0.146 ± 0.013", p=0.0027)
    assert told.differences("fd")[MASKED][1] > 0.05 > told.differences("is")[MASKED][1]
    passes_of = [round(told.last[row][0]["passes"]) for row in (MASKED, M1, SID, M2, CD, DMD2)]
    assert passes_of == [2250, 2250, 2256, 2262, 2700, 3181] and f"{3181 / 2250:.1f}" == "1.4"
    for row in (*trained, AFTER_CD):                                  # distilling beats training on, in every seed
        assert (gain(row, CONTROL, "fd_2step") > 0).all()
    gain(MASKED, CONTROL, "fd_2step", "9.229 ± 4.432", p=0.07)
    assert [mean(CONTROL, f"fd_{N}step", 1) for N in (1, 2)] == ["60.5", "44.2"]
    of_two_steps = {row: float(mean(row, "is_2step", 3)) for row in told.last if row != TEACHER}
    assert max(of_two_steps, key=of_two_steps.get) == CONTROL
    assert round(told.last[CONTROL][0]["passes"] - told.last[START][0]["passes"]) in (2257, 2258)
    of_one_step = {row: float(mean(row, "fd_1step", 1)) for row in told.last if row != TEACHER}
    assert min(of_one_step, key=of_one_step.get) == AFTER_CD and of_one_step[AFTER_CD] == 35.5
    assert mean(AFTER_CD, "fd_2step", 1) == "36.7" and round(told.last[AFTER_CD][0]["passes"]) == 5881
    runs = told.stored["rows"][-1]["seeds"].values()
    on_the_way = np.array([[e["fd_2step"] for e in run["evaluations"]] for run in runs])      # [seeds, evaluations]
    assert [f"{each:.1f}" for each in on_the_way.mean(0)] == ["38.9", "46.7", "36.7"]
    assert (on_the_way[:, 1] > on_the_way[:, 0]).all() and (on_the_way[:, 1] > on_the_way[:, 2]).all()
    told_of_search("weak", "fashion-mnist", seeds=1)
    rows = json.loads((KEPT / "search-fashion-mnist-weak" / "runs.json").read_text())["rows"]
    of_lambda = [f"{row['distance'][0]:.1f}" for row in rows if row["method"].startswith("FSF")]
    assert of_lambda == ["31.5", "31.7", "32.9", "36.4"]


def test_what_is_said_of_the_strong_start_of_fashion_mnist_is_in_the_numbers():
    told = Told(FASHION_STRONG)
    gain, mean = told.gain, told.mean
    START, TEACHER, CD, DMD2, M2, MASKED, SID, CONTROL = (1, 2, 3, 4, 7, 9, 10, 11)
    assert sorted(told.last) == [START, TEACHER, CD, DMD2, M2, MASKED, SID, CONTROL]
    assert reproduce.FLAGS["strong"][1] == " --steps 3000" and reproduce.CONTROL["images", "strong"] == 3000 + 525
    gain(START, CONTROL, "fd_2step", "-0.297 ± 0.747", all_five=False)
    assert [mean(START, f"fd_{N}step", 1) for N in (1, 2, 4)] == ["53.3", "39.7", "40.4"]
    assert mean(TEACHER, "fd_25step", 1) == "24.1" and mean(CD, "fd_2step", 1) == "20.7"
    weak = Told(FASHION_2)
    for row in (CD, DMD2, M2, MASKED, SID):
        assert told.last[row][0]["passes"] == weak.last[row][0]["passes"]
        assert gain(row, CONTROL, "fd_2step").min() > 0                                 # every distillation gains
        assert gain(CONTROL, row, "is_2step").max() < 0 and gain(CONTROL, row, "precision_2step").max() < 0
        assert gain(CONTROL, row, "recall_2step").min() > 0
    gain(CONTROL, M2, "fd_2step", "15.981 ± 2.930", p=0.012)
    gain(CONTROL, CD, "fd_2step", "18.694 ± 1.779")
    assert [mean(row, "is_2step", 2) for row in (CONTROL, CD)] == ["9.07", "8.53"]
    assert [mean(row, "precision_2step", 3) for row in (CONTROL, CD)] == ["0.907", "0.784"]
    assert [mean(row, "recall_2step", 3) for row in (CONTROL, CD)] == ["0.461", "0.683"]
    for N in (1, 2, 4):
        assert gain(CD, MASKED, f"fd_{N}step").min() > 0
        assert min(map(float, (mean(row, f"fd_{N}step", 3) for row in told.last if row != TEACHER))) == \
            float(mean(CD, f"fd_{N}step", 3))
    gain(CD, MASKED, "fd_2step", "+1.289 ± 0.495", p=0.046)
    gain(CD, MASKED, "is_2step", "+0.176 ± 0.010")
    gain(CD, MASKED, "precision_2step", "+0.027 ± 0.006")
    assert told.last[MASKED][0]["passes"] / told.last[CD][0]["passes"] == pytest.approx(5 / 6, abs=0.002)
    gain(MASKED, M2, "fd_1step", "3.468 ± 1.375", p=0.049)
    gain(MASKED, M2, "fd_2step", "1.424 ± 1.013")
    gain(MASKED, M2, "fd_4step", "1.803 ± 0.259", p=0.0069)
    gain(DMD2, M2, "fd_2step", "9.540 ± 4.993", p=0.081)
    assert [round(told.last[row][0]["passes"]) for row in (M2, DMD2)] == [2262, 3181]
    for row, which, expected in ((DMD2, (1, 2), ["36.9", "32.9"]), (SID, (1, 2), ["33.3", "33.4"])):
        [stored] = [each for each in told.stored["rows"] if each["number"] == row]
        on_the_way = [[run["evaluations"][i]["fd_2step"] for run in stored["seeds"].values()] for i in which]
        assert [f"{np.mean(each):.1f}" for each in on_the_way] == expected
    assert Told("sid-fashion-mnist-strong").mean(SID, "fd_2step", 1) == "31.2"


def test_what_is_said_of_one_fake_update_on_fashion_mnist_is_in_the_numbers():
    told, of_1_to_5 = Told("table7-fashion-mnist-weak-row1-9"), Told(FASHION_2)
    ALONE, GAN, DMD2 = 1, 9, 4
    section = told.text.split("## Table 7, DMD2 with one fake update")[1].split("## Where it would help")[0]

    def curve(of, number):
        [row] = [row for row in of.stored["rows"] if row["number"] == number]
        return np.array([[e["fd_2step"] for e in run["evaluations"]] for run in row["seeds"].values()])

    strong, of_strong = Told("table7-digits-strong-row1"), Told("table2-digits-strong")
    for row, words, p in ((DMD2, "19.654 ± 7.817", 0.005), (7, "22.158 ± 7.104", 0.0023)):
        d = curve(strong, ALONE)[:, -1] - curve(of_strong, row)[:, -1]
        assert f"{d.mean():.3f} ± {d.std(ddof=1):.3f}" == words and words in told.text and d.min() > 0
        assert scipy.stats.ttest_1samp(d, 0).pvalue < p
    assert (strong.mean(ALONE, "fd_2step", 1), of_strong.mean(1, "fd_2step", 1)) == ("32.9", "26.7")
    for of, number in ((of_strong, DMD2), (strong, ALONE)):
        [command] = [row["command"] for row in of.stored["rows"] if row["number"] == number]
        assert " --lr 0.001 --fake_lr 0.003 " in command

    ours, theirs = curve(told, ALONE), curve(of_1_to_5, DMD2)
    for values in (ours[:, 0], theirs[:, 0], ours[:, -1], theirs[:, -1]):
        first, second, third = (f"{value:.1f}" for value in values)
        assert f"{first}, {second} and {third}" in section
    assert (ours[:, 1] > ours[:, 0]).sum() == 2
    assert max(told.gain(ALONE, GAN, "fd_2step", "0.817 ± 0.316")) < 0
    assert [told.last[row][0]["passes"] for row in (ALONE, GAN)] == [425, 889]
    for row in told.stored["rows"]:
        assert " --lr " not in row["command"]                                           # the preset's: the best of 1:5

    name = "search-fashion-mnist-weak-DMD2_1_1_no_GAN"
    rows = json.loads((KEPT / name / "runs.json").read_text())["rows"]
    settings = ["0.0001 --fake_lr 0.001", "0.0003 --fake_lr 0.001", "0.0003 --fake_lr 0.003", "0.001 --fake_lr 0.003"]
    assert [row["setting"] for row in rows] == [f"--lr {setting}" for setting in settings]
    assert [f"{row['distance'][0]:.1f}" for row in rows] == ["33.7", "37.9", "36.2", "70.2"]
    assert {round(row["runs"][0]["evaluations"][-1]["passes"]) for row in rows} == {2252}
    best = {method: distance for method, (_, distance) in best_of_search("weak", "fashion-mnist", seeds=1).items()}
    found = [f"{best[method]:.1f}" for method in ("DMD2", "FSF-DMD, M = 2", "CD with masking")]
    assert f"has {found[0]} (3,181 passes), FSF-DMD {found[1]} and CD with masking {found[2]}" in section


def test_what_is_said_of_table_3_on_fashion_mnist_is_in_the_numbers():
    told = Told("table3-fashion-mnist-weak")
    gain, mean = told.gain, told.mean
    CD, EQ_14, DMD2_ROLLOUT, EQ_22, TUNED, MASKED, M1, DMD2, CD_MASKED = range(1, 10)
    for row in (EQ_14, DMD2_ROLLOUT, EQ_22, TUNED):
        assert (gain(CD, row, "fd_2step") > 0).all()
    gain(CD, EQ_14, "fd_2step", "0.919 ± 0.276")
    gain(CD, EQ_22, "fd_2step", "2.384 ± 0.187")
    gain(CD, TUNED, "fd_2step", "0.908 ± 0.320")
    of_holm = {row: p for row, (_, p) in told.differences("fd").items()}
    assert of_holm[EQ_22] < 0.05 < min(of_holm[EQ_14], of_holm[TUNED])
    gain(CD, EQ_14, "fd_1step", "19.503 ± 8.358")
    gain(CD, EQ_14, "precision_1step", "+0.068 ± 0.010")
    gain(CD, EQ_14, "recall_1step", "-0.131 ± 0.047")
    gain(EQ_14, EQ_22, "fd_1step", "-15.596 ± 7.151")
    gain(EQ_14, EQ_22, "fd_2step", "+1.465 ± 0.089")
    of_one_step = [float(mean(row, "fd_1step", 3)) for row in (EQ_22, DMD2_ROLLOUT, EQ_14)]
    assert of_one_step == sorted(of_one_step)
    gain(EQ_22, TUNED, "fd_2step", "-1.476 ± 0.233")
    gain(TUNED, MASKED, "is_2step", "+0.214 ± 0.038")
    gain(CD, CD_MASKED, "is_2step", "+0.146 ± 0.013")
    assert told.p(TUNED, MASKED, "fd_2step") > 0.05
    assert [mean(DMD2, f"fd_{N}step", 1) for N in (1, 2, 4)] == ["46.8", "54.4", "60.6"]
    of_passes = [round(told.last[row][0]["passes"]) for row in range(1, 10)]
    assert of_passes == [2700, 1914, 2001, 2436, 2436, 2262, 2250, 3056, 2250]


def test_what_is_said_of_table_5_on_fashion_mnist_is_in_the_numbers():
    told = Told("table5-fashion-mnist")
    gain, mean, IMF, DMD2, TWIN, RCGM, RCGM_TWIN, FSF = told.gain, told.mean, 1, 2, 3, 4, 5, 6
    IMF_ON, RCGM_ON = 7, 8                                                              # at TwinFlow's passes
    for N, words, p in ((1, "21.475 ± 3.977", 0.0113), (2, "22.498 ± 1.790", 0.0022), (4, "22.014 ± 4.455", 0.0135)):
        assert gain(TWIN, IMF_ON, f"fd_{N}step", words, p=p).max() < 0
        assert min(told.last, key=lambda row, N=N: float(mean(row, f"fd_{N}step", 4))) == IMF_ON
        for name in ("precision", "recall", "is", "acc"):
            assert gain(TWIN, IMF_ON, f"{name}_{N}step").min() > 0
    earlier = [next(e for e in run["evaluations"] if e["step"] == 2208)
               for run in told.stored["rows"][IMF_ON - 1]["seeds"].values()]
    assert {e["passes"] for e in earlier} == {12144}
    ahead = np.array([ours["fd_2step"] - e["fd_2step"] for e, ours in zip(earlier, told.last[FSF])])
    assert f"{ahead.mean():.3f} ± {ahead.std(ddof=1):.3f}" == "29.707 ± 6.689" and "29.707 ± 6.689" in told.text
    assert gain(RCGM_TWIN, RCGM_ON, "fd_2step", "15.381 ± 3.291", p=0.015).max() < 0
    assert gain(RCGM_TWIN, RCGM_ON, "fd_4step", "14.290 ± 2.368", p=0.01).max() < 0
    gain(RCGM_TWIN, RCGM_ON, "fd_1step", "+3.082 ± 6.874", all_five=False)
    gain(RCGM_TWIN, RCGM_ON, "recall_1step", "0.093 ± 0.021", p=0.017)
    gain(IMF_ON, RCGM_ON, "fd_2step", "+10.607 ± 2.123", p=0.0132)
    assert [mean(IMF_ON, f"fd_{N}step", 1) for N in (1, 2)] == ["33.4", "29.6"]
    assert ("on Fashion-MNIST, not searched, TwinFlow (54.8; iMF alone 73.5). "
            "iMF with TwinFlow's passes has 12.5 and 33.4") in told.text
    for N in (1, 2, 4):
        others = [float(mean(row, f"fd_{N}step", 4)) for row in (DMD2, RCGM, FSF)]
        assert float(mean(IMF, f"fd_{N}step", 4)) < min(others)
    for base, twin, at_one, p, recall, times in ((IMF, TWIN, "18.627 ± 3.610", 0.0124, "0.111 ± 0.042", "2.5"),
                                                 (RCGM, RCGM_TWIN, "38.541 ± 4.939", 0.0055, "0.173 ± 0.006", "2.1")):
        assert gain(base, twin, "fd_1step", at_one, p=p).max() < 0
        assert gain(base, twin, "recall_1step", recall).min() > 0 and gain(base, twin, "precision_1step").max() < 0
        assert f"{told.last[twin][0]['passes'] / told.last[base][0]['passes']:.1f}" == times
    assert gain(RCGM, RCGM_TWIN, "fd_2step", "11.439 ± 1.142").max() < 0
    assert (gain(IMF, TWIN, "fd_2step", "-4.327 ± 4.653", all_five=False) < 0).sum() == 2
    holm = {row: f"{p:.2g}" for row, (_, p) in told.differences("fd").items()}
    assert (holm[DMD2], holm[FSF]) == ("0.011", "0.076")
    gain(IMF, DMD2, "fd_2step", "27.646 ± 1.938", p=0.0017)
    gain(IMF, DMD2, "fd_1step", "+3.128 ± 3.493")
    gain(IMF, DMD2, "precision_1step", "0.138 ± 0.036", p=0.022)
    gain(IMF, DMD2, "recall_1step", "0.052 ± 0.029")
    assert gain(DMD2, FSF, "fd_2step", "12.865 ± 4.734", p=0.043).max() < 0
    assert gain(DMD2, FSF, "fd_4step", "19.629 ± 4.102").max() < 0
    gain(DMD2, FSF, "fd_1step", "48.991 ± 13.157")
    gain(IMF, FSF, "fd_1step", "52.118 ± 9.783", p=0.012)
    gain(IMF, FSF, "fd_2step", "14.781 ± 3.194", p=0.0153)
    gain(IMF, FSF, "fd_4step", "8.276 ± 1.407", p=0.01)
    gain(IMF, FSF, "precision_1step", "0.086 ± 0.014", p=0.0091)
    gain(IMF, FSF, "recall_1step", "0.206 ± 0.017", p=0.0023)
    gain(IMF, FSF, "is_2step", "-0.024 ± 0.028", all_five=False)
    gain(IMF, RCGM, "precision_2step", "0.057 ± 0.006", p=0.01)
    gain(IMF, RCGM, "recall_2step", "0.086 ± 0.008", p=0.01)
    gain(IMF, RCGM, "acc_2step", "0.042 ± 0.012", p=0.05)
    gain(IMF, RCGM, "fd_2step", "10.603 ± 5.409", p=0.078)
    gain(IMF, RCGM, "fd_1step")
    assert told.p(IMF, RCGM, "fd_4step") > 0.4
    assert [mean(row, "recall_1step", 3) for row in (IMF, FSF)] == ["0.456", "0.250"]
    assert [mean(row, "fd_2step", 1) for row in (IMF, FSF)] == ["56.4", "71.2"]
    assert [round(told.last[row][0]["passes"]) for row in sorted(told.last)] == [
        8250, 34170, 20250, 10500, 22500, 15750, 20240, 22470]
    assert [mean(TWIN, "fd_1step", 1), mean(IMF, "fd_1step", 1), mean(TWIN, "fd_2step", 1)] == ["54.8", "73.5", "52.1"]


def test_what_is_said_of_fsf_dmd_from_scratch_at_the_searched_rate_is_in_the_numbers():
    """Against iMF after as many steps (0), and after as many passes (1)."""
    folder = KEPT / "scratch-fashion-mnist"
    rows_of = {row["method"]: row for row in json.loads((folder / "runs.json").read_text())["rows"]}
    imf, rcgm, fsf, twin = (rows_of[name] for name in ("iMF", "RCGM", "FSF-DMD", "iMF + TwinFlow"))
    page, results, text = (folder / "README.md").read_text(), (HERE / "RESULTS.md").read_text(), words_of_the_texts()
    assert "\n".join(line for line in page.splitlines() if line.startswith("|")) in results
    rows = [line for line in page.splitlines() if line.startswith(("| iMF", "| RCGM", "| FSF"))]
    of_rcgm, ours, of_twin = ([run["evaluations"][0] for run in row["seeds"].values()] for row in (rcgm, fsf, twin))
    theirs = [[run["evaluations"][i] for run in imf["seeds"].values()] for i in (0, 1)]
    names = dict(fd_1step=1, fd_2step=1, fd_4step=1, is_2step=2, precision_2step=3, recall_2step=3)
    for line, found in zip(rows, (theirs[0], of_rcgm, ours, of_twin, theirs[1]), strict=True):
        cells = [f"{np.mean([e[k] for e in found]):.{n}f} ± {np.std([e[k] for e in found], ddof=1):.{n}f}"
                 for k, n in names.items()]
        assert f"| {found[0]['step']} | {found[0]['passes']:,.0f} | {' | '.join(cells)} |" in line
    assert ours[0]["step"] == theirs[0][0]["step"]
    assert ours[0]["passes"] == pytest.approx(theirs[1][0]["passes"], rel=1e-3)

    def difference(k, i, ours=ours):
        return np.array([e[k] - other[k] for e, other in zip(ours, theirs[i])])

    for k, i, words in (("fd_2step", 0, "+4.066 ± 5.509"), ("fd_1step", 0, "+0.160 ± 16.709"),
                        ("precision_2step", 0, "+0.014 ± 0.004"), ("fd_1step", 1, "+29.396 ± 11.890"),
                        ("fd_2step", 1, "+25.390 ± 5.430"), ("fd_4step", 1, "+23.159 ± 4.850")):
        d = difference(k, i)
        assert f"{d.mean():+.3f} ± {d.std(ddof=1):.3f}" == words and words.removeprefix("+") in text, (k, i)
        assert i == 0 or d.min() > 0
    assert scipy.stats.ttest_1samp(difference("fd_2step", 1), 0).pvalue < 0.0155
    for found, k, i, words, seeds_below in (
        (of_twin, "fd_1step", 0, "10.924 ± 5.110", 3), (of_twin, "fd_2step", 0, "6.373 ± 4.093", 3),
        (of_twin, "fd_4step", 0, "8.762 ± 3.713", 3), (of_twin, "fd_1step", 1, "18.312 ± 7.196", 0),
        (of_twin, "fd_2step", 1, "14.951 ± 6.470", 0), (of_twin, "fd_4step", 1, "11.948 ± 3.586", 0),
        (of_rcgm, "fd_2step", 0, "3.054 ± 1.431", 3), (of_rcgm, "fd_4step", 0, "12.925 ± 2.166", 3),
        (of_rcgm, "fd_1step", 0, None, 1), (of_rcgm, "fd_2step", 1, "18.270 ± 5.305", 0),
        (of_rcgm, "precision_2step", 0, "+0.095 ± 0.010", 0), (of_rcgm, "recall_2step", 0, "-0.090 ± 0.023", 3),
    ):
        d = difference(k, i, found)
        sign = f"{d.mean():+.3f}"[0] if words and words[0] in "+-" else ""
        assert words is None or f"{sign}{abs(d.mean()):.3f} ± {d.std(ddof=1):.3f}" == words and words in text, (k, i)
        assert (d < 0).sum() == seeds_below, (k, i)
    alone = [scipy.stats.ttest_1samp(difference(f"fd_{N}step", 0, of_twin), 0).pvalue for N in (1, 2, 4)]
    assert f"(p {min(alone):.3f} alone, or more)" in text
    assert scipy.stats.ttest_1samp(difference("fd_4step", 0, of_rcgm), 0).pvalue < 0.00925
    passes = [found[0]["passes"] for found in (theirs[0], of_rcgm, of_twin, theirs[1])]
    assert (passes[0], passes[2]) == (4125, 10125) and passes[3] == 7876
    assert [round(passes[i] / passes[j], 1) for i, j in ((2, 0), (1, 0), (3, 1))] == [2.5, 1.3, 1.5]
    means = [f"{np.mean([e['fd_2step'] for e in found]):.1f}" for found in (ours, *theirs)]
    assert f"{means[0]}, iMF {means[1]}, iMF with FSF-DMD's passes {means[2]}" in text


def test_a_network_from_scratch_that_was_measured_once_is_a_point_of_the_curves():
    stored = json.loads((KEPT / "table5-fashion-mnist" / "runs.json").read_text())
    table, runs = reproduce.TABLES["5"], {row["number"]: row["seeds"] for row in stored["rows"] if row["number"] <= 6}
    rows = report.summary({n: table.rows[n - 1] for n in runs}, runs)
    of_passes = [8250, 34170, 20250, 10500, 22500, 15750]
    for against_passes, expected in ((False, [1500] * 6), (True, of_passes)):
        axis = matplotlib.figure.Figure().subplots()
        lines = report.draw_curves(axis, "fd", table, rows, against_passes)
        assert [line.get_xdata()[0] for line in lines.values()] == expected


def test_what_is_said_of_the_papers_lambda_on_fashion_mnist_is_in_the_numbers():
    told = Told("lambda-fashion-mnist")
    last = {row: evaluations[0] for row, evaluations in told.last.items()}
    M2, M1, MASKED = 7, 8, 9
    two_steps = {row: f"{last[row]['fd_2step']:.1f}" for row in (M2, M1, MASKED)}
    assert two_steps == {M2: "44.9", M1: "38.3", MASKED: "39.7"}
    assert (f"{last[M1]['fd_1step']:.1f}", f"{last[M1]['recall_1step']:.3f}") == ("281.7", "0.016")


def test_what_is_said_of_the_strength_of_the_start_is_in_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    strength = importlib.import_module("strength")
    text = words_of_the_texts()
    rows = json.loads((KEPT / "strength-digits" / "runs.json").read_text())["rows"]
    found = {(row["start_steps"], row["lam"]): row for row in rows}
    assert sorted({steps for steps, _ in found}) == [100, 200, 400, 800]
    assert sorted({lam for _, lam in found}) == [0.01, 0.05, 0.2]
    above = {key: [statistics.mean(row["difference"][name]) > 0 for name in ("fd_1step", "fd_2step")]
             for key, row in found.items()}
    assert above.pop((800, 0.01)) == [True, False] and all(all(each) for each in above.values())
    for N in (1, 2):
        for steps in (100, 200, 400, 800):
            over_lam = [statistics.mean(found[steps, lam]["difference"][f"fd_{N}step"]) for lam in (0.01, 0.05, 0.2)]
            assert over_lam == sorted(over_lam)
    for steps, lam, name, digits in ((100, 0.2, "fd_2step", 1), (800, 0.2, "fd_2step", 1), (800, 0.01, "fd_2step", 1),
                                     (800, 0.2, "precision_2step", 3), (800, 0.2, "recall_2step", 3),
                                     (100, 0.2, "precision_2step", 3)):
        assert strength.signed(found[steps, lam]["difference"][name], digits) in text
    starts = [f"{statistics.mean(found[steps, 0.01]['start_distance']):.1f}" for steps in (100, 800)]
    assert f"From the start of distance {starts[0]} to that of {starts[1]}" in text
    assert "\n".join(strength.table(rows)) in (KEPT / "strength-digits" / "README.md").read_text()


def test_what_is_said_of_the_strength_of_the_start_on_fashion_mnist_is_in_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    strength = importlib.import_module("strength")
    text = words_of_the_texts()
    rows = json.loads((KEPT / "strength-fashion-mnist" / "runs.json").read_text())["rows"]
    assert "\n".join(strength.table(rows)) in (KEPT / "strength-fashion-mnist" / "README.md").read_text()
    found = {(row["start_steps"], row["lam"]): row for row in rows}
    for (steps, name), words, p in (
        ((1500, "fd_1step"), "+2.1 ± 0.5 at 1 step (p 0.020)", 0.0204),
        ((1500, "fd_2step"), "+3.3 ± 0.2 at 2", 0.0013),
        ((1500, "recall_2step"), "recall -0.025 ± 0.001", 0.001), ((300, "fd_1step"), "(-5.9 ± 3.8, p 0.12)", 0.116),
        ((300, "fd_2step"), "level at 2 (-1.2 ± 3.3)", 0.6),
        ((700, "fd_1step"), "lambda 0.03 at 1 step (+0.4 ± 2.1)", 1),
        ((700, "fd_2step"), "at 2 (+3.0 ± 0.2, p 0.002)", 0.0016),
    ):
        differences = found[steps, 0.03]["difference"][name]
        assert strength.signed(differences, 3 if name == "recall_2step" else 1) in words and words in text
        assert scipy.stats.ttest_1samp(differences, 0).pvalue < p
    assert max(found[300, 0.03]["difference"]["fd_1step"]) < 0
    assert f"{max(found[1500, 0.1]['difference']['fd_2step']):+.1f} at 2 steps" in text
    starts = [f"{statistics.mean(found[steps, 0.03]['start_distance']):.1f}" for steps in (1500, 300)]
    assert f"(distance {starts[0]};" in text and f"300 steps ({starts[1]})" in text
    for name, masked, ours in (("table2-digits-weak", 9, (7, 8)), ("table2-digits-strong", 9, (7, 8)),
                               (FASHION_2, 9, (7, 8)), (FASHION_STRONG, 9, (7,)),
                               ("table4-digits", 8, (6,)), ("table4-fashion-mnist-row1-3-4-5-6-7-8", 8, (6,))):
        told = Told(name)
        for row in ours:
            for N in (1, 2, 4):                                         # "nowhere ahead in every seed"
                assert told.gain(masked, row, f"fd_{N}step", all_five=False).max() > 0


def test_what_is_said_of_the_weakest_start_at_equal_steps_and_at_equal_passes():
    text, kept = words_of_the_texts(), {}
    for name in ("weak", "passes"):
        stored = json.loads((KEPT / f"strength-fashion-mnist-{name}" / "runs.json").read_text())
        [kept[name]] = stored["rows"]
        assert (stored["seeds"], stored["steps"], stored.get("cd_steps")) == (6, 174, 452 if name == "passes" else None)
    for name, metric, words, p in (
        ("weak", "fd_1step", "-5.904 ± 2.393 (p 0.0018", 0.00185), ("weak", "fd_2step", "(-0.817 ± 2.616)", 1),
        ("weak", "recall_2step", "(-0.009 ± 0.005)", 0.01),
        ("passes", "fd_1step", "+14.843 ± 8.475 at 1 step (p 0.0078", 0.0079),
        ("passes", "fd_2step", "+5.125 ± 4.567 at 2 (p 0.04)", 0.041),
        ("passes", "recall_2step", "recall -0.041 ± 0.016", 0.01),
    ):
        d = np.array(kept[name]["difference"][metric])
        assert f"{d.mean():+.3f} ± {d.std(ddof=1):.3f}" in words and words in text, words
        assert scipy.stats.ttest_1samp(d, 0).pvalue < p
    ahead = kept["weak"]["difference"]["fd_1step"]
    assert max(ahead) < 0 < min(kept["passes"]["difference"]["fd_1step"])
    assert f"{np.mean(ahead[3:]):.3f}, p {scipy.stats.ttest_1samp(ahead[3:], 0).pvalue:.2g}" == "-5.189, p 0.053"
    assert "Three new seeds agree" in text and "-5.189 (p 0.053)" in text
    assert [f"{np.mean(kept[name]['cd']):.1f}" for name in ("passes", "weak")] == ["154.8", "160.8"]


def test_what_is_said_of_more_guidance_is_in_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    strength, text = importlib.import_module("strength"), words_of_the_texts()
    stored = json.loads((KEPT / "strength-fashion-mnist-omega3" / "runs.json").read_text())
    assert (stored["omega"], stored["steps"], stored["cd_steps"], stored["seeds"]) == (3, 174, None, 3)
    [row] = stored["rows"]
    assert "\n".join(strength.table([row])) in (KEPT / "strength-fashion-mnist-omega3" / "README.md").read_text()
    for name, words, p in (
        ("fd_2step", "in all three (+9.1 ± 9.4, p 0.24)", 0.24), ("fd_1step", "in one (+4.4 ± 9.8)", 1),
        ("precision_2step", "(-0.061 ± 0.014, p 0.018 alone)", 0.0185), ("recall_2step", "(-0.026 ± 0.014)", 0.09),
    ):
        found = row["difference"][name]
        assert strength.signed(found, 1 if name.startswith("fd") else 3) in words and words in text, words
        assert scipy.stats.ttest_1samp(found, 0).pvalue < p
    assert min(row["difference"]["fd_2step"]) > 0 > min(row["difference"]["fd_1step"])
    assert sum(d < 0 for d in row["difference"]["fd_1step"]) == 1
    strong = json.loads((KEPT / "strength-fashion-mnist-strong-omega3" / "runs.json").read_text())
    [row] = strong["rows"]
    assert (strong["omega"], strong["steps"], strong["cd_steps"], strong["seeds"]) == (3, 174, None, 3)
    assert "\n".join(strength.table([row])) in (KEPT / "strength-fashion-mnist-strong-omega3" / "README.md").read_text()
    for name, words, p in (
        ("fd_2step", "+29.3 ± 2.3 at 2 steps (p 0.0021)", 0.00215),
        ("fd_1step", "+61.4 ± 6.1 at 1 (p 0.0033)", 0.00335),
        ("precision_2step", "precision -0.063 ± 0.015", 0.02), ("recall_2step", "recall -0.048 ± 0.007", 0.02),
    ):
        found = row["difference"][name]
        assert strength.signed(found, 1 if name.startswith("fd") else 3) in words and words in text, words
        assert scipy.stats.ttest_1samp(found, 0).pvalue < p and (np.sign(found) == np.sign(found[0])).all()
    assert [f"{np.mean(row[name]):.1f}" for name in ("start_distance", "cd")] == ["73.6", "73.9"]
    assert "(distance 73.6 at omega 3;" in text and "gains nothing in distance (73.9)" in text
    [weak] = json.loads((KEPT / "strength-fashion-mnist-weak" / "runs.json").read_text())["rows"]
    assert f"({strength.signed(weak['difference']['precision_2step'], 3)}, six seeds)" in text


def test_what_is_said_of_table_2_from_the_strong_start_is_in_the_numbers():
    told = Told("table2-digits-strong")
    told.gain(4, 7, "fd_2step", "2.504 ± 1.365", p=0.015)
    told.gain(4, 7, "fd_4step", "20.336 ± 5.241")
    assert not (told.gain(4, 7, "fd_1step", "2.432 ± 3.733", all_five=False) < 0).all()
    assert [f"{told.last[row][0]['passes']:,.0f}" for row in (7, 4)] == ["2,600", "5,978"]
    gain, mean = told.gain, told.mean
    START, TEACHER, CD, DMD2, IDA, BOTH, M2, M1, MASKED, SID, CONTROL, FROM_CD = range(1, 13)
    means = [mean(row, "fd_2step", 1) for row in (START, CD, DMD2, BOTH, M2, MASKED, SID, CONTROL, FROM_CD)]
    assert means == ["26.7", "9.9", "13.2", "10.1", "10.7", "10.7", "10.0", "26.3", "11.3"]
    assert mean(TEACHER, "fd_25step", 1) == "9.6" and mean(DMD2, "fd_4step", 1) == "29.8"
    assert [mean(row, "fd_1step", 1) for row in (FROM_CD, SID, CD)] == ["10.7", "11.4", "12.2"]
    gain(CD, MASKED, "fd_2step", "+0.857 ± 0.435", p=0.012)
    gain(CD, MASKED, "is_2step", "+0.029 ± 0.007", p=0.001)
    gain(CD, MASKED, "fd_4step", "-0.658 ± 0.873", all_five=False)
    gain(MASKED, M2, "fd_2step", "-0.002 ± 0.068", all_five=False)
    gain(MASKED, M2, "is_2step", "+0.003 ± 0.001")
    gain(MASKED, M2, "recall_2step", "-0.003 ± 0.001")
    gain(MASKED, M2, "fd_1step", "+0.384 ± 0.055")
    gain(MASKED, M1, "fd_1step", "+8.632 ± 4.450")
    gain(MASKED, M1, "recall_1step", "-0.117 ± 0.059")
    gain(MASKED, M1, "fd_2step", "+0.073 ± 0.273", all_five=False)
    gain(CD, DMD2, "fd_2step", "+3.359 ± 1.784", p=0.014, all_five=False)
    gain(DMD2, BOTH, "fd_2step", "3.1 ± 2.0", p=0.026, all_five=False)
    gain(DMD2, IDA, "fd_2step", "+0.262 ± 0.420", all_five=False)
    gain(CD, SID, "recall_2step", "+0.031 ± 0.010")
    gain(CD, SID, "precision_2step", "-0.038 ± 0.011")
    differences = told.differences("fd")
    assert {row for row, (_, p) in differences.items() if p < 0.05} == {START, CONTROL}


def test_what_is_said_of_table_3_is_in_the_numbers():
    told = Told("table3-digits-weak")
    gain, mean = told.gain, told.mean
    CD, EQ14, DMD2S, EQ22, TUNED, MASKED, M1, DMD2, CD_MASKED = range(1, 10)
    gain(TUNED, MASKED, "fd_2step", "-1.866 ± 1.369", p=0.039)
    gain(TUNED, MASKED, "is_2step", "+0.072 ± 0.014", p=0.0005)
    assert float(mean(CD_MASKED, "fd_2step", 4)) < float(mean(MASKED, "fd_2step", 4))
    gain(CD, EQ14, "fd_1step", "+2.835 ± 0.579", p=0.0005)
    gain(CD, EQ14, "recall_1step", "-0.044 ± 0.011", p=0.001)
    gain(CD, EQ14, "acc_1step", "+0.009 ± 0.002", p=0.001)
    gain(CD, EQ14, "fd_2step", "-0.092 ± 0.157", all_five=False)
    gain(EQ14, EQ22, "fd_1step", "-1.671 ± 0.365", p=0.001)
    gain(EQ14, EQ22, "fd_2step", "+0.651 ± 0.327", p=0.02)
    gain(EQ14, EQ22, "is_2step", "+0.015 ± 0.006", p=0.02)
    gain(EQ14, EQ22, "precision_2step", "+0.009 ± 0.004", p=0.02)
    gain(EQ14, EQ22, "recall_2step", "-0.010 ± 0.004", p=0.02)
    for metric in ("fd_1step", "recall_1step", "acc_1step", "fd_2step", "is_2step", "precision_2step", "recall_2step"):
        low, middle, high = (float(mean(row, metric, 4)) for row in (EQ14, DMD2S, EQ22))
        assert min(low, high) < middle < max(low, high), metric
    gain(EQ22, TUNED, "fd_2step", "-0.452 ± 0.172")
    gain(EQ22, TUNED, "is_2step", "-0.014 ± 0.003")
    assert (mean(CD, "fd_2step", 1), mean(TUNED, "fd_2step", 1)) == ("19.9", "20.0")
    assert [mean(DMD2, f"fd_{N}step", 1) for N in (1, 2, 4)] == ["21.4", "25.2", "32.5"]
    assert mean(CD, "fd_1step", 1) == "24.1"
    assert min(told.last, key=lambda row: float(mean(row, "fd_1step", 4))) == DMD2
    for N in (2, 4):
        assert max(told.last, key=lambda row: float(mean(row, f"fd_{N}step", 4))) == DMD2


def test_what_is_said_of_table_4_is_in_the_numbers():
    told = Told("table4-digits")
    told.gain(4, 6, "fd_2step", "3.503 ± 3.762", p=0.11)
    told.gain(4, 6, "fd_4step", "37.793 ± 18.055")
    told.gain(4, 6, "fd_1step", "10.671 ± 7.775", p=0.038)
    gain, mean = told.gain, told.mean
    TEACHER, ONE_CHANNEL, CD, DMD2, BOTH, FSF, FROM_CD, MASKED = range(1, 9)
    assert mean(TEACHER, "fd_25step", 4) == mean(ONE_CHANNEL, "fd_25step", 4)
    assert mean(TEACHER, "fd_25step", 1) == "14.8"
    starts = [run["evaluations"][0] for run in told.stored["rows"][FSF - 1]["seeds"].values()]
    assert [f"{statistics.mean(e[name] for e in starts):.1f}" for name in ("fd_1step", "fd_2step")] == ["393.9", "44.1"]
    assert [mean(CD, f"fd_{N}step", 1) for N in (1, 2)] == ["19.3", "13.9"]
    assert (mean(FROM_CD, "fd_2step", 1), mean(FROM_CD, "fd_1step", 1)) == ("12.4", "15.6")
    gain(CD, FROM_CD, "fd_2step", "-1.552 ± 0.750", p=0.0099)
    gain(CD, FSF, "fd_2step", "+0.905 ± 1.593", all_five=False)
    gain(CD, FSF, "is_2step", "+0.092 ± 0.014", p=0.0002)
    gain(CD, FSF, "precision_2step", "+0.048 ± 0.010")
    gain(CD, FSF, "recall_2step", "-0.035 ± 0.009")
    gain(CD, FSF, "fd_4step", "-7.455 ± 2.058")
    gain(CD, FSF, "fd_1step", "+13.915 ± 6.006")
    gain(MASKED, FSF, "fd_2step", "+0.012 ± 0.016", all_five=False)
    gain(MASKED, FSF, "fd_4step", "+0.006 ± 0.003")
    gain(MASKED, FSF, "fd_1step", "+0.070 ± 0.010")
    gain(CD, BOTH, "fd_2step", "+0.027 ± 0.356", all_five=False)
    assert (mean(DMD2, "fd_2step", 1), mean(DMD2, "fd_4step", 1), mean(BOTH, "fd_1step", 1)) == ("18.3", "50.6", "17.6")
    assert f"{told.differences('fd')[FROM_CD][1]:.2g}" == "0.059"
    assert {row for row, (_, p) in told.differences("fd").items() if p < 0.05} == set()


def test_what_is_said_of_table_7_is_in_the_numbers():
    told = Told("table7-digits-weak")
    gain, mean, RATIOS = told.gain, told.mean, (*range(1, 6), *range(9, 14))
    ONE, FIVE_ALONE, ONE_GAN, FIVE, IDA, BOTH, MASKED = 1, 5, 9, 13, 14, 15, 16
    means = sorted(told.mean_distance(row) for row in RATIOS)
    assert (f"{means[0]:.1f}", f"{means[-1]:.1f}") == ("18.5", "20.6")
    gain(ONE_GAN, FIVE, "fd_2step", "+0.153 ± 1.776", all_five=False)
    gain(FIVE_ALONE, FIVE, "fd_2step", "-0.058 ± 0.405", all_five=False)
    gain(ONE_GAN, FIVE, "fd_1step", "-1.985 ± 0.413", p=0.0005)
    rows = {row["number"]: row for row in told.stored["rows"]}
    passes_of = {n: next(iter(rows[n]["seeds"].values()))["passes"] for n in (ONE, FIVE)}
    assert {n: f"{value:.1f}" for n, value in passes_of.items()} == {ONE: "8.5", FIVE: "59.8"}
    gain(FIVE, IDA, "fd_2step", "+0.039 ± 0.518", all_five=False)
    gain(FIVE, IDA, "recall_1step", "0.015 ± 0.007", p=0.009)
    assert (mean(BOTH, "fd_2step", 1), mean(MASKED, "fd_2step", 1)) == ("20.6", "16.9")
    assert min(told.last, key=told.mean_distance) == MASKED
    gain(BOTH, MASKED, "fd_2step", "-3.727 ± 1.586", p=0.0064)
    gain(BOTH, MASKED, "fd_4step", "-10.642 ± 1.688")
    gain(BOTH, MASKED, "is_2step", "+0.104 ± 0.020")
    gain(BOTH, MASKED, "precision_2step", "+0.034 ± 0.011")
    gain(BOTH, MASKED, "recall_2step", "-0.030 ± 0.022")
    gain(FIVE, MASKED, "fd_2step", "-2.005 ± 0.950", all_five=True, p=0.0093)
    assert f"{told.differences('fd')[MASKED][1]:.2g}" == "0.13"
    ours = Told("table2-digits-weak")
    d = np.array([e["fd_2step"] - other["fd_2step"] for e, other in zip(ours.last[7], told.last[8], strict=True)])
    assert f"{d.mean():.3f} ± {d.std(ddof=1):.3f}" == "1.175 ± 0.428" and "1.175 ± 0.428" in told.text
    assert scipy.stats.ttest_1samp(d, 0).pvalue < 0.0037
    times = [told.last[row][0]["passes"] / ours.last[7][0]["passes"] for row in (8, ONE)]
    assert (f"{times[0]:.1f}", f"{times[1]:.2f}") == ("1.2", "0.33")
    assert (mean(ONE, "fd_2step", 1), ours.mean(7, "fd_2step", 1)) == ("18.5", "18.2")
    assert mean(FIVE, "fd_2step", 1) == "18.9" and all(p > 0.05 for _, p in told.differences("fd").values())


def test_what_is_said_of_table_5_is_in_the_numbers():
    told = Told("table5-digits")
    gain, mean, IMF, DMD2, TWIN, RCGM, RCGM_TWIN, FSF = told.gain, told.mean, 1, 2, 3, 4, 5, 6
    for row in reproduce.TABLES["5"].rows[:6]:
        assert row.paper["fid_1step"] is row.paper["fid_2step"] is None
    of_400 = [row for row in told.last if row <= 6]
    means = sorted(told.mean_distance(row) for row in of_400)
    assert (f"{means[0]:.1f}", f"{means[-1]:.1f}") == ("16.4", "18.2")
    assert all(p > 0.05 for row, (_, p) in told.differences("fd").items() if row <= 6)
    IMF_ON, RCGM_ON = 7, 8                                                              # at TwinFlow's passes
    for N, words, p in ((1, "9.704 ± 2.298", 0.00072), (2, "5.594 ± 2.344", 0.0061), (4, "5.883 ± 1.544", 0.05)):
        assert gain(TWIN, IMF_ON, f"fd_{N}step", words, all_five=True, p=p).mean() < 0
    for N, words, p in ((1, "5.103 ± 1.709", 0.0027), (2, "3.403 ± 1.068", 0.0021), (4, "2.237 ± 0.948", 0.05)):
        assert gain(RCGM_TWIN, RCGM_ON, f"fd_{N}step", words, all_five=True, p=p).mean() < 0
    for N in (1, 2, 4):
        assert min(told.last, key=lambda row, N=N: float(mean(row, f"fd_{N}step", 4))) in (IMF_ON, RCGM_ON)
    assert f"{told.last[DMD2][0]['passes'] / told.last[TWIN][0]['passes']:.1f} times TwinFlow's passes" in told.text
    gain(IMF, DMD2, "fd_1step", "-4.985 ± 1.819", p=0.0037)
    gain(IMF, RCGM, "fd_1step", "-5.468 ± 1.453", p=0.0012)
    gain(IMF, TWIN, "fd_1step", "-3.779 ± 3.251", all_five=False, p=0.061)
    gain(RCGM, RCGM_TWIN, "fd_1step", "2.705 ± 1.105", p=0.0055)
    assert min(of_400, key=lambda row: float(mean(row, "fd_1step", 4))) == RCGM_TWIN
    assert (mean(RCGM_TWIN, "fd_1step", 1), mean(IMF, "fd_1step", 1)) == ("17.8", "26.0")
    assert mean(IMF_ON, "fd_2step", 1) == "12.6" and "iMF with TwinFlow's passes 12.6" in told.text
    assert [mean(row, "fd_1step", 1) for row in (RCGM, DMD2, IMF, IMF_ON)] == ["20.5", "21.0", "26.0", "12.5"]
    gain(IMF, FSF, "fd_2step", "-0.028 ± 1.526", all_five=False)
    gain(IMF, FSF, "acc_1step", "+0.006 ± 0.002")
    gain(IMF, FSF, "recall_1step", "-0.032 ± 0.024", all_five=False)
    gain(IMF, FSF, "fd_1step", "+2.050 ± 1.974", all_five=False)
    passes_of = {row["number"]: next(iter(row["seeds"].values()))["passes"] for row in told.stored["rows"]}
    assert [passes_of[row] for row in (FSF, TWIN)] == [9.5, 12.5] and f"{passes_of[DMD2]:.1f}" == "20.8"


def test_what_is_said_of_table_8_is_in_the_numbers():
    told = Told("table8-digits-weak")
    paper = [row.paper["fid"] for row in reproduce.TABLES["8"].rows]
    distances = [told.mean_distance(row) for row in range(1, 6)]
    assert paper == sorted(paper, reverse=True) and distances == sorted(distances, reverse=True)
    assert (told.mean(1, "fd_2step", 1), told.mean(5, "fd_2step", 1)) == ("18.5", "18.3")
    told.gain(1, 5, "fd_2step", "-0.152 ± 0.064", p=0.0062)
    told.gain(1, 5, "fd_1step", "-0.388 ± 0.224")
    assert told.p(1, 5, "fd_4step") > 0.05
    told.gain(1, 5, "is_2step", "-0.006 ± 0.000")
    told.gain(1, 5, "precision_2step", "-0.004 ± 0.002")
    told.gain(1, 5, "recall_2step", "+0.004 ± 0.002")
    assert Told("table2-digits-weak").mean(9, "fd_2step", 1) == "18.0"


def test_what_is_said_of_table_9_is_in_the_numbers():
    told = Told("table9-digits-weak")
    gain, mean = told.gain, told.mean
    ONE, ADAPTIVE, CLIPPED = (1, 2, 3, 4), (5, 6, 7, 8), 9            # lambda 0.01, 0.05, 0.1, 0.5
    paper = [row.paper["fid"] for row in reproduce.TABLES["9"].rows]
    assert (min(paper), max(paper), paper[1], paper[8]) == (3.85, 4.03, 3.87, 3.98)
    for rows in (ONE, ADAPTIVE):
        for a, b in zip(rows, rows[1:]):
            assert gain(a, b, "fd_2step").min() > 0 and gain(a, b, "is_2step").min() > 0
            assert gain(a, b, "recall_2step").max() < 0
    gain(ONE[0], ONE[3], "fd_2step", "+4.349 ± 0.747")
    gain(ONE[0], ONE[3], "is_2step", "+0.053 ± 0.016")
    gain(ONE[0], ONE[3], "recall_2step", "-0.063 ± 0.009")
    gain(ADAPTIVE[0], ADAPTIVE[3], "fd_2step", "+15.301 ± 2.387")
    gain(ADAPTIVE[0], ADAPTIVE[3], "is_2step", "+0.140 ± 0.036")
    gain(ADAPTIVE[0], ADAPTIVE[3], "recall_2step", "-0.189 ± 0.025")
    assert [mean(row, "fd_2step", 1) for row in (*ONE, *ADAPTIVE)] == [
        "18.0", "18.4", "18.8", "22.4", "18.2", "19.1", "20.4", "33.5"]
    gain(ONE[1], CLIPPED, "fd_2step", "+0.032 ± 0.030", all_five=False)
    assert told.p(ONE[1], CLIPPED, "fd_2step") > 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The search for the digits presets
# ---------------------------------------------------------------------------------------------------------------------

def test_the_new_start_of_the_digits_and_its_first_search_are_in_the_text():
    """Both tables of RESULTS.md follow from their runs.json; presets of CD and FSF-DMD are the best of that search."""
    text = (HERE / "RESULTS.md").read_text()
    starts = json.loads((KEPT / "start-digits" / "runs.json").read_text())["rows"]
    means = {}
    for mask in (0.5, 0.75, 0.9):
        of_both = [row for row in starts if row["mask_prob"] == mask]
        assert [row["seed"] for row in of_both] == [100, 101] and all(row["steps"] == 400 for row in of_both)
        means[mask] = [statistics.mean(row[f"fd_{N}step"] for row in of_both) for N in (1, 2, 4, 25)]
        assert f"| {mask} | " + " | ".join(f"{mean:.1f}" for mean in means[mask]) + " |" in text
    chosen = consistency.PRESETS["pixels", "scratch"]
    assert (chosen["steps"], chosen["mask_prob"]) == (400, 0.9)

    rows = json.loads((KEPT / "search-digits-weak" / "runs.json").read_text())["rows"]
    lines = [report.markdown_line(cells) for cells in search.body(rows)]
    assert "\n".join(lines) in text and "\n".join(lines) in (KEPT / "search-digits-weak" / "README.md").read_text()
    assert all(len(row["distance"]) in (1, 2) for row in rows)
    distance = {(row["method"], row["setting"]): statistics.mean(row["distance"]) for row in rows}
    best = {}                                                         # of those that ran on both seeds
    for row in rows:
        if len(row["distance"]) == 2:
            value = distance[row["method"], row["setting"]]
            best[row["method"]] = min(value, best.get(row["method"], math.inf))
    assert len(rows) == 6 * len(best) == 36
    for method, script, names in (("DMD2", dmd2, ("lr", "fake_lr")), ("SiD", sid, ("lr", "fake_lr"))):
        setting = " ".join(f"--{name} {script.PRESETS['pixels', 'imf'][name]}" for name in names)
        assert distance[method, setting] == best[method]
    assert distance["DMD2 + L_CD", "--lam 1 --lr 0.003 --fake_lr 0.003"] == best["DMD2 + L_CD"]
    assert reproduce.FLAGS["cd1"][0] == " --lr 3e-3 --fake_lr 3e-3" and dmd2.PRESETS["pixels", "imf"]["lam"] == 1
    assert distance["FSF-DMD, M = 1", "--lam 0.01 --shift 10"] == best["FSF-DMD, M = 1"]
    lam, shift = (fsf_dmd.PRESETS["pixels", "imf"][name] for name in ("lam", "shift"))
    assert distance["FSF-DMD, M = 2", f"--lam {lam} --shift {shift:.0f}"] == best["FSF-DMD, M = 2"]
    assert distance["CD with masking", f"--lr {consistency.PRESETS['pixels', 'imf']['lr']}"] == best["CD with masking"]
    words = (f"CD with masking takes the distance from {means[0.9][1]:.1f} to {best['CD with masking']:.1f}, "
             f"and the best FSF-DMD with M = 2 to {best['FSF-DMD, M = 2']:.1f}")
    assert words in " ".join(text.split())
    fsf = {k: [distance["FSF-DMD, M = 2", f"--lam {lam} --shift {k}"] for lam in (0.01, 0.05, 0.2)] for k in (1, 10)}
    assert fsf[1] == sorted(fsf[1]) and fsf[10] == sorted(fsf[10])    # every larger lambda costs distance,
    assert all(one > ten for one, ten in zip(fsf[1][1:], fsf[10][1:], strict=True))                 # more at k = 1


def test_what_is_said_of_the_weight_of_the_gan_is_in_the_numbers():
    weak, of_gan = (json.loads((KEPT / f"search-digits-weak{name}" / "runs.json").read_text())["rows"]
                    for name in ("", "-DMD2_s_lambda_G"))
    assert dmd2.PRESETS["pixels", "imf"]["lr"] == 0.0003 and dmd2.PRESETS["pixels", "imf"]["fake_lr"] == 0.003
    [papers] = [row["distance"] for row in weak if row["setting"] == "--lr 0.0003 --fake_lr 0.003"
                and row["method"] == "DMD2"]
    found = {row["setting"].removeprefix("--lambda_g "): row["distance"] for row in of_gan}
    mean = {g: f"{statistics.mean(found[g]):.1f}" for g in ("0.012", "0.042", "0.15")}
    for words in (f"lambda_G of 0.003 has {statistics.mean(papers):.1f} (above), 0.012 {mean['0.012']} and 0.042,",
                  f"64 x 64 images, {mean['0.042']}; 0.15 has {mean['0.15']} on seed 100,",
                  f"where 0.003 has {found['0.003'][0]:.1f}."):
        assert words in words_of_the_texts(), words
    assert found["0.003"][0] == pytest.approx(papers[0], abs=0.1)       # the same run, on another day


def best_of_search(start, data="digits", seeds=2):
    """{method: (best setting of those on all seeds, its mean distance)}; the folder's table is that of its runs."""
    folder = KEPT / f"search-{data}-{start}"
    rows = json.loads((folder / "runs.json").read_text())["rows"]
    lines = [report.markdown_line(cells) for cells in search.body(rows, seeds)]
    assert "\n".join(lines) in (folder / "README.md").read_text()
    best = {}
    for row in rows:
        value = statistics.mean(row["distance"])
        if len(row["distance"]) == seeds and value < best.get(row["method"], (None, math.inf))[1]:
            best[row["method"]] = (row["setting"], value)
    assert len(rows) == 4 * len(best)                                 # as many settings for each
    return best


def test_settings_from_the_strong_start_are_the_best_of_their_search():
    best = {method: setting for method, (setting, _) in best_of_search("strong").items()}
    assert reproduce.FLAGS_STRONG == {
        "cd": f" {best['CD with masking']}",
        "fsf": f" {best['CD with masking']}",                                      # the rate of its own L_CD
        "m1": " " + best["FSF-DMD, M = 1"].removesuffix(" --shift 10"),
        "dmd2": f" {best['DMD2']}",
        "cd1": f" {best['DMD2 + L_CD']}",
    }
    assert best["FSF-DMD, M = 2"] == "--lam 0.01 --shift 10" and best["SiD"] == "--lr 0.0003 --fake_lr 0.003"
    for script, names in ((fsf_dmd, dict(lam=0.01, shift=10)), (sid, dict(lr=3e-4, fake_lr=3e-3))):
        preset = script.PRESETS["pixels", "imf"]
        assert {name: preset[name] for name in names} == names
    told_of_search("strong")


def told_of_search(start, data="digits", seeds=2):
    """RESULTS.md names the best settings of a search and their distances."""
    text = words_of_the_texts()
    for method, (setting, distance) in best_of_search(start, data, seeds).items():
        assert f"{method} `{setting}` {distance:.1f}" in text, method


def test_presets_from_a_velocity_network_are_the_best_of_their_search():
    best = {method: setting for method, (setting, _) in best_of_search("fm").items()}
    cd, fsf, both, of_sid = (script.PRESETS["pixels", "fm"] for script in (consistency, fsf_dmd, dmd2, sid))
    assert best["CD with masking"] == f"--lr {cd['lr']}" and fsf["lr"] == cd["lr"]
    assert best["FSF-DMD, M = 2"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    assert best["DMD2"] == f"--lr {both['lr']} --fake_lr {both['fake_lr']}"
    assert best["SiD"] == f"--lr {of_sid['lr']} --fake_lr {of_sid['fake_lr']}"
    assert best["DMD2 + L_CD"] == "--lam 1 --lr 0.003 --fake_lr 0.003" and both["lam"] == 1
    assert reproduce.FLAGS["cd1_fm"][0] == " --lr 3e-3 --fake_lr 3e-3"
    told_of_search("fm")


def test_what_is_said_of_table_4_of_fashion_mnist_is_in_the_numbers():
    told = Told("table4-fashion-mnist-row1-3-4-5-6-7-8")
    TEACHER, _, CD, DMD2, BOTH, FSF, FROM_CD, MASKED = range(1, 9)
    rows = {row["number"]: row for row in told.stored["rows"]}
    starts = [run["evaluations"][0] for run in rows[FSF]["seeds"].values()]
    for N, words in ((1, "617.8 at 1 step"), (2, "230.7 at 2"), (4, "92.1 at 4")):
        assert f"{statistics.mean(e[f'fd_{N}step'] for e in starts):.1f}" == words.split()[0] and words in told.text
    assert told.mean(TEACHER, "fd_25step", 1) == "25.6"
    for row, mean in ((CD, "31.6"), (DMD2, "34.8"), (BOTH, "41.3"), (FSF, "29.1"), (MASKED, "26.6")):
        assert told.mean(row, "fd_2step", 1) == mean
    assert told.mean(DMD2, "fd_1step", 1) == "103.9"
    told.gain(CD, FSF, "fd_2step", "2.458 ± 2.371")
    told.gain(CD, FSF, "fd_4step", "4.860 ± 1.370")
    told.gain(CD, FSF, "fd_1step", "6.839 ± 1.192")
    told.gain(CD, FSF, "is_2step", "0.165 ± 0.002", p=0.0001)
    told.gain(MASKED, FSF, "fd_2step", "2.536 ± 1.220")
    told.gain(MASKED, FSF, "fd_4step", "1.995 ± 0.553")
    told.gain(CD, MASKED, "fd_2step", "4.994 ± 1.163", p=0.0177)
    told.gain(CD, MASKED, "fd_4step", "6.855 ± 1.132")
    told.gain(CD, FROM_CD, "fd_2step", all_five=False)
    passes = {number: [round(run["evaluations"][-1]["passes"]) for run in row["seeds"].values()]
              for number, row in rows.items() if number != TEACHER}
    found = (passes[row][0] for row in (MASKED, FSF, CD, DMD2, BOTH, FROM_CD))
    assert [*found] == [2250, 2250, 2625, 3359, 3709, 5984]


def test_what_is_said_of_a_gpu_is_in_the_numbers():
    text = words_of_the_texts()
    cost, profile, difference, throughput, runs = (
        json.loads((KEPT / "gpu" / f"{block}.json").read_text())
        for block in ("cost", "profile", "difference", "throughput", "runs"))
    first, again = ({row["label"]: row for row in rows} for rows in (cost["rows"], cost["again"]))
    one, two, dmd2, cd = (first[f"imf: {name}"] for name in ("FSF-DMD M=1", "FSF-DMD M=2", "DMD2 1:5",
                                                             "Consistency distillation"))
    table = json.loads((KEPT / "cost-cuda" / "runs.json").read_text())["rows"]
    assert {row["label"]: row["sec_per_step"] for row in table} == {k: row["sec_per_step"] for k, row in first.items()}
    pair = ("imf: FSF-DMD M=2", "imf: DMD2 1:5")
    seconds = [[rows[label]["sec_per_step"] for label in pair] for rows in (first, again)]
    parts = {kind: spent / profile["step_seconds"] for kind, spent in profile["seconds_of"].items()}
    ways = {row["way"].split(", ")[-1].split(" ")[0]: row for row in difference["rows"][1:]}
    decoding = throughput["rows"][1]["images_per_second"]
    for words in (
        f"{seconds[0][0]:.3f} s for FSF-DMD with M = 2 and {seconds[0][1]:.3f} s for DMD2 1:5",
        f"{seconds[0][1] / seconds[0][0]:.1f} times as long",
        f"{seconds[1][0]:.3f} and {seconds[1][1]:.3f} s, {seconds[1][1] / seconds[1][0]:.1f} times",
        f"M = 1 takes {one['sec_per_step']:.3f} s (the paper 0.31), CD with masking {cd['sec_per_step']:.3f}",
        f"{two['memory_gb']:.1f} GB for M = 2, {one['memory_gb']:.1f} for M = 1 and {dmd2['memory_gb']:.1f} for DMD2",
        f"{len(cost['missing'])} of the {len(cost['missing']) + len(first)} rows were not run",
        f"takes {two['sec_per_step']:.2f} to {seconds[1][0]:.2f} s, one of DMD2 {seconds[1][1]:.2f} to "
        f"{seconds[0][1]:.2f} s",
        f"(M = 1: {one['memory_gb']:.1f} GB), not with two ({two['memory_gb']:.1f}; DMD2 {dmd2['memory_gb']:.1f})",
        f"The 4,000 steps of FSF-DMD take {4000 * two['sec_per_step'] / 60:.0f} minutes at an H200's "
        f"{two['sec_per_step']:.2f} s",
        f"{two['sec_per_step']:.2f} to {seconds[1][0]:.2f} s and {seconds[1][1]:.2f} to {seconds[0][1]:.2f} s; "
        f"{two['memory_gb']:.1f} and {dmd2['memory_gb']:.1f} GB (M = 1: {one['memory_gb']:.1f})",
        f"reaches {two['share_of_matrix_rate']:.0%} of the card's bf16 matrix rate ({cost['matrix_rate'] / 1e12:.0f}",
        f"{parts['matrix products']:.0%} are matrix products, "
        f"{parts['elementwise'] + parts['reductions']:.0%} elementwise",
        f"{parts['attention']:.0%} attention, and for {parts['idle']:.0%} the card waits",
        f"by {ways['float32']['relative_error']:.4f} in float32, by {ways['TF32']['relative_error']:.3f} in TF32",
        f"and by {ways['bf16']['relative_error']:.2f} in bf16",
        f"TF32 costs {ways['TF32']['seconds'] / ways['float32']['seconds']:.0%} of float32's time",
        f"need {throughput['minutes_of_fid']:.1f} minutes",
        f"({decoding:.0f} images a second, 8 at a time) is {50_000 / decoding / 60:.1f}",
    ):
        assert words in text, words
    less = json.loads((KEPT / "gpu-h100" / "runs.json").read_text())
    waiting, free = (row["sec_per_step"] for row in less["rows"])
    idle = less["profile"]["seconds_of"]["idle"] / less["profile"]["step_seconds"]
    for words in (f"a step takes {free} s instead of {waiting}", f"so {1 - free / waiting:.0%} is nothing",
                  f"still idles for {idle:.0%} of a step"):
        assert words in text, words
    for row in runs["rows"]:
        if row["setting"].startswith("fp32") and (row["script"], row["setting"]) != ("dmd2", "fp32 compiled"):
            assert row["first_step"] < 0.01 and row["all_steps"] < 0.11


def test_what_is_said_of_memory_and_of_sampling_noise_is_in_the_numbers():
    text = words_of_the_texts()
    rows = json.loads((KEPT / "memory-cpu" / "runs.json").read_text())["rows"]
    (two, two_compiled), (_, one_compiled), (dmd, dmd_compiled) = ((r["memory_gb_eager"], r["memory_gb_compiled"])
                                                                   for r in rows)
    assert f"M = 2 takes {two / dmd:.2f} ({two:.2f} of {dmd:.2f} GB)" in text
    assert f"{two_compiled / dmd_compiled:.2f} ({two_compiled:.2f} of {dmd_compiled:.2f} GB)" in text
    assert f"with M = 1 {one_compiled / dmd_compiled:.2f} ({one_compiled:.2f} GB)" in text
    assert f"the other way round M = 2 needs {rows[0]['memory_gb_before']:.2f} GB" in text
    for suffix, words in (("eager", "{:.2f} of {:.2f} GB ({:.2f})"), ("compiled", "{:.2f} of {:.2f} ({:.2f})")):
        two, dmd = rows[0][f"memory_gb_kept_{suffix}"], rows[2][f"memory_gb_kept_{suffix}"]
        assert words.format(two, dmd, two / dmd) in text
    runs = json.loads((KEPT / "noise-fashion-mnist" / "runs.json").read_text())["runs"]
    spread = {name: statistics.stdev(run[f"{name}_2step"] for run in runs) for name in ("fd", "is", "recall")}
    assert f"{spread['fd']:.1f} in distance, {spread['is']:.3f} in IS and {spread['recall']:.3f} in recall" in text


def test_presets_of_images_from_a_velocity_network_are_the_best_of_their_search():
    """CD and FSF-DMD with one number of forward passes, DMD2 with half as many again, from the same start."""
    best = {method: setting for method, (setting, _) in best_of_search("fm", "fashion-mnist", seeds=1).items()}
    cd, fsf, both = (script.PRESETS["images", "fm"] for script in (consistency, fsf_dmd, dmd2))
    assert best["CD with masking"] == f"--lr {cd['lr']}" and fsf["lr"] == cd["lr"]
    assert best["FSF-DMD, M = 2"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    assert best["DMD2"] == f"--lr {both['lr']} --fake_lr {both['fake_lr']}"
    rows = json.loads((KEPT / "search-fashion-mnist-fm" / "runs.json").read_text())["rows"]
    for row in rows:
        expected = 3359 if row["method"] == "DMD2" else 2250
        assert row["runs"][0]["evaluations"][-1]["passes"] == pytest.approx(expected, rel=0.001)
    told_of_search("fm", "fashion-mnist", seeds=1)


def test_presets_of_images_from_an_imf_are_the_best_of_their_search():
    best = {method: setting for method, (setting, _) in best_of_search("weak", "fashion-mnist", seeds=1).items()}
    cd, fsf, both = (script.PRESETS["images", "imf"] for script in (consistency, fsf_dmd, dmd2))
    assert best["CD with masking"] == f"--lr {cd['lr']}" and fsf["lr"] == cd["lr"]
    assert best["FSF-DMD, M = 2"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    assert best["DMD2"] == f"--lr {both['lr']} --fake_lr {both['fake_lr']}"
    told_of_search("weak", "fashion-mnist", seeds=1)
    of_sid = sid.PRESETS["images", "imf"]
    [(setting, lowest)] = best_of_search("weak-SiD", "fashion-mnist", seeds=1).values()
    assert setting == f"--lr {of_sid['lr']} --fake_lr {of_sid['fake_lr']}"
    told_of_search("weak-SiD", "fashion-mnist", seeds=1)
    assert lowest < min(value for _, value in best_of_search("weak", "fashion-mnist", seeds=1).values())
    rows = json.loads((KEPT / "search-fashion-mnist-weak-SiD" / "runs.json").read_text())["rows"]
    assert [f"{row['distance'][0]:.1f}" for row in rows] == ["28.7", "26.1", "30.2", "52.2"]
    [(setting, _)] = best_of_search("weak-FSF_DMD_M_1", "fashion-mnist", seeds=1).values()
    assert setting == best["FSF-DMD, M = 2"]
    rows = json.loads((KEPT / "search-fashion-mnist-weak-FSF_DMD_M_1" / "runs.json").read_text())["rows"]
    found = [f"{row['distance'][0]:.1f}" for row in rows]
    told = f"its best too ({found[0]}; 0.003 gives {found[1]}, 0.015 {found[2]}, 0.05 {found[3]};"
    assert told in words_of_the_texts()


def test_presets_of_images_from_scratch_are_the_best_of_their_search():
    """The additions to iMF and RCGM have the rate of these."""
    rows = json.loads((KEPT / "search-fashion-mnist-scratch" / "runs.json").read_text())["rows"]
    found = {(row["method"], row["setting"]): row["distance"][0] for row in rows}
    best = {method: min((distance, setting) for (of, setting), distance in found.items() if of == method)[1]
            for method in ("iMF", "RCGM", "FSF-DMD")}
    preset = fsf_dmd.PRESETS["images", "scratch"]
    assert best["FSF-DMD"] == f"--lr {preset['lr']} --lam {preset['lam']} --shift {preset['shift']:.0f}"
    assert reproduce.FLAGS["imf"][1].endswith(best["iMF"]) and best["iMF"] == best["RCGM"] == f"--lr {preset['lr']}"
    others = [dmd2.PRESETS, twinflow.PRESETS, twinflow.PRESETS_OF_RCGM, consistency.PRESETS_OF_LOSS["rcgm"]]
    assert all(presets["images", "scratch"]["lr"] == preset["lr"] for presets in others)
    of = {method: [f"{distance:.1f}" for (each, _), distance in found.items() if each == method] for method in best}
    text = words_of_the_texts()
    for words in ("iMF has {}, {}, {} and {}".format(*of["iMF"]), "RCGM {}, {}, {} and {}".format(*of["RCGM"]),
                  f"{of['FSF-DMD'][0]} with the paper's lambda of 0.01 and k = 1",
                  f"{of['FSF-DMD'][1]} with 0.001 and k = 10 (at 0.032 {of['FSF-DMD'][2]})"):
        assert words in text, words


def test_what_is_said_of_the_search_from_the_strong_start_of_fashion_mnist_is_in_the_numbers():
    text, preset = words_of_the_texts(), {}
    for script in (consistency, dmd2, sid):
        preset[script] = script.PRESETS["images", "imf"]
    rates = f"--lr {preset[dmd2]['lr']} --fake_lr {preset[dmd2]['fake_lr']}"
    found = {}                                                        # {method: {setting: distance}}
    for method in ("CD with masking", "DMD2", "SiD"):
        name = "strong-" + method.replace(" ", "_")
        told_of_search(name, "fashion-mnist", seeds=1)
        rows = json.loads((KEPT / f"search-fashion-mnist-{name}" / "runs.json").read_text())["rows"]
        found[method] = {row["setting"]: f"{row['distance'][0]:.1f}" for row in rows}
    cd, both, of_sid = found.values()
    [row] = json.loads((KEPT / "search-fashion-mnist-strong-DMD2" / "runs.json").read_text())["rows"][:1]
    words_of_start = f"({row['runs'][0]['evaluations'][0]['fd_2step']:.1f} at 2 steps, with the sampler of DMD2)"
    assert words_of_start in text
    assert min(both, key=lambda setting: float(both[setting])) == rates                # the table's
    words = [f"(the table's 0.004 {cd['--lr 0.004']}, 0.002 {cd['--lr 0.002']}, 0.001 {cd['--lr 0.001']};"]
    assert preset[consistency]["lr"] == 0.004
    pairs = [("0.0003", "0.003"), ("0.0003", "0.001"), ("0.0001", "0.001")]
    rest = [f"{lr} and {fake} {both[f'--lr {lr} --fake_lr {fake}']}" for lr, fake in pairs]
    words.append(f"the table's ({', '.join(rest)};")
    pairs = [("0.0003", "0.001"), ("0.0003", "0.003"), ("0.00003", "0.001")]
    rest = [f"{lr} and {fake} {of_sid[f'--lr {lr} --fake_lr {fake}']}" for lr, fake in pairs]
    assert (preset[sid]["lr"], preset[sid]["fake_lr"]) == (0.0003, 0.001)
    words.append(f"(the table's {rest[0]}, {rest[1]}, {rest[2]};")
    for each in words:
        assert each in text, each


def test_presets_from_scratch_are_the_best_of_their_search():
    """Every method at the learning rate of the loss on the data that it is added to."""
    best = {method: setting for method, (setting, _) in best_of_search("scratch").items()}
    rcgm = consistency.PRESETS_OF_LOSS["rcgm"]["pixels", "scratch"]
    fsf, both, twin = (script.PRESETS["pixels", "scratch"] for script in (fsf_dmd, dmd2, twinflow))
    on_rcgm = twinflow.PRESETS_OF_RCGM["pixels", "scratch"]
    assert best["iMF"] == f"--lr {fsf['lr']}" and fsf["lr"] == both["lr"] == twin["lr"]
    assert f" --mask_prob 0.5 --lr {fsf['lr']} " in reproduce.FLAGS["imf"][0]
    assert best["RCGM"] == " ".join(f"--{name} {rcgm[name]}" for name in ("target_ema", "delta", "lr"))
    assert {name: on_rcgm[name] for name in ("target_ema", "delta", "lr")}.items() <= rcgm.items()
    assert best["FSF-DMD"] == f"--lam {fsf['lam']} --shift {fsf['shift']:.0f}"
    for method, preset in (("iMF + DMD2", both), ("iMF + TwinFlow", twin), ("RCGM + TwinFlow", on_rcgm)):
        assert best[method] == f"--lam {preset['lam']}"
    told_of_search("scratch")


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks/surrogate.py
# ---------------------------------------------------------------------------------------------------------------------


def test_flow_maps_under_one_name_are_shown_as_mean_and_deviation(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    surrogate = importlib.import_module("surrogate")
    at = lambda value: {k: dict.fromkeys(surrogate.COSINES, value) for k in ("k1", "k10")}
    rows = [dict(start=start, omega=3.0, over_tau=at(value))
            for start, value in (("a", 0.25), ("b", -0.5), ("a", 0.75))]
    bodies = surrogate.table(rows)[2:]
    assert bodies == ["| a | 3 | " + " | ".join(["0.50 ± 0.35"] * 8) + " |",
                      "| b | 3 | " + " | ".join(["-0.50"] * 8) + " |"]


def test_what_is_said_of_the_surrogate_is_in_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    surrogate = importlib.import_module("surrogate")
    rows = json.loads((KEPT / "surrogate-digits" / "runs.json").read_text())["rows"]
    table, text = "\n".join(surrogate.table(rows)), (HERE / "RESULTS.md").read_text()
    assert table in text and table in (KEPT / "surrogate-digits" / "README.md").read_text()
    weak, strong = ([row for row in rows if row["start"] == start] for start in ("weak", "strong"))
    assert len(weak) == len(strong) == 5 and {row["step"] for row in weak} == {400}
    assert {row["step"] for row in strong} == {800}

    def at(of, k, name):
        return np.array([row["over_tau"][k][name] for row in of])

    agree, cosine = ([at(rows, k, name) for k in ("k1", "k10")] for name in ("two_explicit", "cosine"))
    assert f"({np.min(agree):.2f} to {np.max(agree):.2f} over all ten)" in text
    assert f"({np.min(cosine):.2f} to {np.max(cosine):.2f}, in the mean below zero" in text
    for of in (weak, strong):
        cleanest, *others = surrogate.bins_of(of, "cosine").mean(0)
        assert cleanest > 0 > max(others)
    nearer = surrogate.bins_of(rows, "surrogate_to_mean") - abs(surrogate.bins_of(rows, "explicit_to_mean"))
    assert nearer[:, :-1].min() > 0
    pulls = [f"{at(of, k, 'surrogate_to_mean').mean():.2f}" for k in ("k1", "k10") for of in (weak, strong)]
    assert pulls[0] == pulls[1] and f"({pulls[0]} to {pulls[2]} and {pulls[3]})" in text
    for k, words, p in (("k1", "0.149 ± 0.043", 0.0015), ("k10", "0.095 ± 0.017", 0.00024)):
        falls = at(weak, k, "cosine") - at(strong, k, "cosine")
        assert f"{falls.mean():.3f} ± {falls.std(ddof=1):.3f}" == words and words in text and falls.min() > 0
        assert scipy.stats.ttest_1samp(falls, 0).pvalue < p

    rows = json.loads((KEPT / "surrogate-fashion-mnist" / "runs.json").read_text())["rows"]
    table = "\n".join(surrogate.table(rows))
    assert table in text and table in (KEPT / "surrogate-fashion-mnist" / "README.md").read_text()
    plain, guided = rows
    assert (plain["omega"], guided["omega"]) == (1, 3)
    of = dict(pull=plain["over_tau"]["k1"]["surrogate_to_mean"], cosine=plain["over_tau"]["k1"]["cosine"],
              guided=guided["over_tau"]["k10"]["cosine"], guided_pull=guided["over_tau"]["k10"]["surrogate_to_mean"])
    assert {key: f"{value:.2f}" for key, value in of.items()} == dict(
        pull="0.38", cosine="-0.26", guided="0.57", guided_pull="-0.06")
    *others, noisiest = guided["bins"]
    assert (f"{noisiest['cosine']:.2f}", f"{noisiest['length_ratio']:.2f}") == ("0.73", "1.01")
    assert (f"{min(each['cosine'] for each in others):.2f}", f"{max(each['cosine'] for each in others):.2f}") == (
        "-0.17", "0.05")

    rows = json.loads((KEPT / "surrogate-fashion-mnist-strong" / "runs.json").read_text())["rows"]
    table = "\n".join(surrogate.table(rows))
    assert table in text and table in (KEPT / "surrogate-fashion-mnist-strong" / "README.md").read_text()
    _, ours, guided = rows
    assert (ours["omega"], ours["step"], guided["omega"]) == (1.5, 3680, 3)
    for k, cosine, pull in (("k1", "-0.09", "0.28"), ("k10", "-0.03", "0.17")):
        assert f"{ours['over_tau'][k]['cosine']:.2f}" == cosine
        assert f"{ours['over_tau'][k]['surrogate_to_mean']:.2f}" == pull
    assert (f"{guided['over_tau']['k10']['cosine']:.2f}", f"{guided['bins'][-1]['cosine']:.2f}") == ("0.52", "0.64")


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks/strength.py
# ---------------------------------------------------------------------------------------------------------------------


def test_the_two_methods_of_the_figure_over_starts_differ_in_the_dm_term_alone(monkeypatch):
    """What FSF-DMD and consistency distillation share there has the same flags; the table subtracts in that order."""
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    strength = importlib.import_module("strength")
    parsed = []
    for module, command in ((consistency, strength.CD_MASKED), (fsf_dmd, f"{strength.FSF} --M 2 --shift 10 --lam 0.2")):
        words = shlex.split(command.format(start="imf", cd="", fsf=""))[1:]
        parsed.append(vars(module.parse_args(words)))
    shared = set(parsed[0]) & set(parsed[1]) - {"out", "sources", "health_every", "sampler"}
    assert {"lr", "mask_prob", "batch_size", "omega", "huber_c", "ema", "steps"} <= shared
    assert {k: parsed[0][k] for k in shared} == {k: parsed[1][k] for k in shared}

    difference = dict(fd_1step=[-2.0, -4.0], fd_2step=[1.0, 3.0], precision_2step=[0.1, 0.2], recall_2step=[0.0, 0.1])
    row = dict(start_steps=100, start_distance=[50.0, 52.0], lam=0.2, difference=difference, cd=[20.0, 22.0])
    line = strength.table([row])[2]
    assert "| 100 | 51.0 ± 1.4 | 21.0 ± 1.4 | 0.2 | -3.0 ± 1.4 | +2.0 ± 1.4 | +0.150 ± 0.071 |" in line
    axis = strength.figure([row]).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [-3.0]


def test_the_figure_over_starts_subtracts_cd_from_fsf_dmd(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    strength = importlib.import_module("strength")
    jobs = {}
    for name, distances in (("CD", (50.0, 30.0)), (0.1, (50.0, 26.0))):
        evaluations = [dict.fromkeys(strength.SHOWN, distance) | dict(step=i) for i, distance in enumerate(distances)]
        (tmp_path / str(name)).mkdir()
        result = dict(evaluations=evaluations, other_sampler={})
        (tmp_path / str(name) / "result.json").write_text(json.dumps(result))
        jobs[100, name, 0] = kept_runs.Job(tmp_path / str(name), ("fsf_dmd.py",), (), None)
    args = strength.parse_args("--starts 100 --lam 0.1 --seeds 1".split())
    [row] = strength.differences(args, jobs)
    assert row["difference"]["fd_2step"] == [-4.0] and row["cd"] == [30.0] and row["start_distance"] == [50.0]


def test_the_figure_over_starts_gives_each_method_its_steps_and_both_one_omega(monkeypatch):
    """--steps is the length of both methods, --cd_steps of consistency distillation; the start has its own.

    --omega guides both; the start has learned all, and is trained once.
    """
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    strength = importlib.import_module("strength")

    def commands_of(flags):
        args = strength.parse_args(shlex.split(f"--starts 30 --lam 0.1 --seeds 1 {flags}"))
        planned = strength.planned(args)
        commands = {name: " ".join(planned[30, name, 0].command) for name in ("start", "CD", 0.1)}
        assert all("--lam 0.1" not in commands[name] for name in ("start", "CD"))
        return commands.values()

    def lengths(flags):
        return [re.findall(r"--steps (\d+)", command) for command in commands_of(flags)]

    def guided(flags):
        return [re.findall(r"--omega ([\d.]+)", command) for command in commands_of(flags)]

    assert guided("") == [[], [], []] and guided("--omega 3") == [[], ["3"], ["3"]]
    assert lengths("") == [["30"], [], []]
    assert lengths("--steps 5") == [["30"], ["5"], ["5"]]
    assert lengths("--steps 5 --cd_steps 13") == [["30"], ["13"], ["5"]]


def test_starts_measured_later_join_the_figure_over_starts_if_measured_alike(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    strength = importlib.import_module("strength")
    path = tmp_path / "runs.json"

    def call(start_steps, distance, steps=174, omega=None):
        rows = [dict(start_steps=start_steps, lam=0.1, start_distance=[distance])]
        command = f"--starts {start_steps} --steps {steps}"
        stored = dict(data="digits", seeds=1, steps=steps, omega=omega, torch="2", commands=[command], rows=rows)
        stored = strength.with_earlier(path, stored)
        path.write_text(json.dumps(stored))
        return [row["start_distance"][0] for row in stored["rows"]], stored["commands"]

    assert call(300, 9.0) == ([9.0], ["--starts 300 --steps 174"])
    assert call(100, 7.0) == ([7.0, 9.0], ["--starts 300 --steps 174", "--starts 100 --steps 174"])
    assert call(300, 8.0) == ([7.0, 8.0], ["--starts 300 --steps 174", "--starts 100 --steps 174"])
    assert call(300, 6.0, steps=100) == ([6.0], ["--starts 300 --steps 100"])       # other steps: nothing is kept
    assert call(100, 5.0, steps=100, omega=3.0)[0] == [5.0]                         # another omega: neither


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks/step.py
# ---------------------------------------------------------------------------------------------------------------------


def test_what_needs_a_gpu_is_listed_with_its_command_until_it_was_run(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    gpu, text = importlib.import_module("gpu"), (KEPT / "gpu.md").read_text()
    assert text == gpu.page(KEPT / "gpu")
    for block in gpu.BLOCKS:
        run = (KEPT / "gpu" / f"{block}.json").exists()
        assert run or f"Not run here: `python benchmarks/gpu.py --block {block}`" in text


def test_what_is_said_of_a_step_is_in_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    step, text = importlib.import_module("step"), words_of_the_texts()
    found = json.loads((KEPT / "step-cpu" / "runs.json").read_text())
    assert (KEPT / "step-cpu" / "README.md").read_text() == step.page(found)
    again = json.loads((KEPT / "step-cpu-again" / "runs.json").read_text())
    assert (KEPT / "step-cpu-again" / "README.md").read_text() == step.page(again)
    ours, compiled, bare = (again["backbone"][name] / again["backbone"]["straightforward"]
                            for name in ("ours", "ours, compiled", "products and attention alone"))
    assert f"{ours:.2f} and {compiled:.2f}, and its products and attention alone {bare:.2f}" in text
    b, M1, M2 = found["backbone"], found["methods"]["FSF-DMD, M = 1"], found["methods"]["FSF-DMD, M = 2"]
    shares = {part: spent / M2["seconds"] for part, spent in M2["parts"].items()}
    small = sum(shares[part] for part in ("EMA", "losses and the rest", "random numbers and data"))
    assert small < 0.01 and b["largest_difference"] < 1e-5
    for words in (
        f"takes {b['ours'] / b['straightforward']:.2f} times as long",
        f"and {b['ours, compiled'] / b['straightforward']:.2f} times when it is compiled",
        f"takes {M1['times_passes_and_optimizer']:.2f} (M = 1) and {M2['times_passes_and_optimizer']:.2f} (M = 2)",
        f"at {M1['share_of_products']:.0%} and {M2['share_of_products']:.0%} of the rate",
        f"NorMuon is {shares['optimizer']:.0%} of a step with M = 2, the finite difference "
        f"{shares['finite difference']:.0%}",
    ):
        assert words in text, words


# ---------------------------------------------------------------------------------------------------------------------
# benchmarks/finite_difference.py
# ---------------------------------------------------------------------------------------------------------------------


def test_tf32_is_emulated_as_a_tensor_core_reads_float32(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    finite = importlib.import_module("finite_difference")
    one = torch.tensor([1 + 2 ** -10, 1 + 2 ** -11, 1 + 2 ** -12, -1 - 2 ** -11, 3.0])
    assert finite.to_tf32(one).tolist() == [1 + 2 ** -10, 1 + 2 ** -10, 1.0, -1 - 2 ** -10, 3.0]
    x, w = rand(4, 8).float(), rand(6, 8, seed=1).float()
    image, kernel = rand(1, 2, 4, 4).float(), rand(3, 2, 2, 2).float()
    q, k, v = (rand(1, 2, 5, 8, seed=seed).float() for seed in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    with finite.tf32():
        product = torch.nn.Linear(8, 6)
        product.load_state_dict(dict(weight=w, bias=torch.zeros(6)))
        torch.testing.assert_close(product(x), finite.to_tf32(x) @ finite.to_tf32(w).T)
        convolved = F.conv2d(image, kernel)
        attended = F.scaled_dot_product_attention(q, k, v)
    rounded = F.conv2d(finite.to_tf32(image), finite.to_tf32(kernel))
    assert torch.equal(convolved, rounded) and not torch.equal(rounded, F.conv2d(image, kernel))
    assert 0 < (attended - exact).abs().max() < 4 * 2 ** -11 * v.abs().max()


def test_what_is_said_of_the_finite_difference_is_in_the_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "benchmarks"))
    finite, text = importlib.import_module("finite_difference"), words_of_the_texts()
    found = json.loads((KEPT / "finite-difference" / "runs.json").read_text())
    assert finite.page(found) in (KEPT / "finite-difference" / "README.md").read_text()
    new, trained = ({row["h"]: row for row in rows} for rows in found["error"].values())
    on_h200 = json.loads((KEPT / "gpu" / "difference.json").read_text())["rows"]
    on_h200 = {row["way"].split(", ")[1].split(" ")[0]: row["relative_error"] for row in on_h200}
    assert new[0.005]["TF32"] == pytest.approx(on_h200["TF32"], rel=0.1)
    rows = {(row["method"], row["way"]): row for row in found["training"]}

    def differences(method, way, N):
        return np.array(rows[method, way][f"fd_{N}step"]) - np.array(rows[method, "exact"][f"fd_{N}step"])

    largest = {way: max(abs(differences(method, way, N)).max() for method in finite.METHODS for N in (1, 2))
               for way in finite.WAYS}
    DISTILLED = ("CD with masking", "FSF-DMD, M = 2")
    of_distilled = {}
    for way in finite.WAYS:
        of_distilled[way] = {N: np.concatenate([differences(method, way, N) for method in DISTILLED]) for N in (1, 2)}
    assert f"to {largest['float32, h = 0.005']:.2f}. In TF32" in text
    one, two = of_distilled["TF32, h = 0.005"].values()
    assert f"by {one.min():.2f} to {one.max():.2f}, in all three seeds, and within {abs(two).max():.2f} at 2" in text
    one, imf = of_distilled["bf16, h = 0.005"][1], differences("iMF", "bf16, h = 0.005", 1)
    assert f"by {one.min():.1f} to {one.max():.1f} at 1 step, an iMF by {imf.min():.1f} to {imf.max():.1f}" in text
    one, two = of_distilled["TF32, h = 0.02"].values()
    assert f"within {max(abs(one).max(), abs(two).max()):.2f} of the exact derivative" in text
    errors = [f"{new[h]['TF32']:.3f} and {trained[h]['TF32']:.3f}" for h in (0.02, 0.005)]
    assert f"errs by {errors[0]} (new network, trained one) instead of {errors[1]}" in text
    assert f"the network of the line above errs by {new[0.005]['TF32']:.3f}" in text
    assert trained[0.02]["TF32"] < min(trained[h]["TF32"] for h in trained if h != 0.02)
