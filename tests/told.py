"""What the tests of the texts share: the kept tables and searches, and the words of README, RESULTS and METHODS."""
import json
import math
import statistics

import numpy as np
import scipy.stats

import reproduce
import search
from plumbing import report
from test_helpers import HERE

KEPT = HERE / "results"
FASHION_2, FASHION_4 = "table2-fashion-mnist-weak-row1-2-3-4-7-8-9-10-11-12", "table4-fashion-mnist-row1-3-4-5-6-7-8-9"
FASHION_STRONG = "table2-fashion-mnist-strong-row1-2-3-4-7-9-10-11"


def words_of_the_texts():
    """README, RESULTS and METHODS as one text, every run of white space as one blank: a line may break anywhere."""
    texts = [(HERE / name).read_text() for name in ("README.md", "RESULTS.md", "METHODS.md")]
    return " ".join(" ".join(texts).split())


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

        Their mean and deviation are `words`, which stand in the text, there perhaps without the sign ("ahead by ...").
        They have one sign (all_five).  p: of their t-test, as the text says it ("0.017"), or a number: below it.
        """
        d = np.array([y[metric] - x[metric] for x, y in zip(self.last[a], self.last[b])])
        if words:
            assert report.spread(list(d), len(words.split(".")[-1]), "+") == words, (a, b, metric)
            assert words[1:] in self.text, words
        if all_five:
            assert (np.sign(d) == np.sign(d[0])).all()
        pvalue = scipy.stats.ttest_1samp(d, 0).pvalue if p else None
        if isinstance(p, str):
            assert f"{pvalue:.{len(p.lstrip('0.'))}g}" == p and f"p {p}" in self.text, (a, b, metric, pvalue)
        elif p:
            assert pvalue < p
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


def told_of_search(start, data="digits", seeds=2):
    """RESULTS.md names the best settings of a search and their distances."""
    text = words_of_the_texts()
    for method, (setting, distance) in best_of_search(start, data, seeds).items():
        assert f"{method} `{setting}` {distance:.1f}" in text, method


def lines_of_searches(data="fashion-mnist"):
    """The table of all searches on a data set: a line a method and start, its settings in the order of their runs."""
    lines = ["| start | method | flags | distance at 2 steps of each setting |", "|---|---|---|---|"]
    for start, (_, methods) in search.SEARCHES_OF_IMAGES.items():
        methods = methods | search.BEYOND_OF_IMAGES.get(start, {})
        found = {}                                                    # {method: (its folder, its rows)}
        for path in KEPT.glob(f"search-{data}-{start}*/runs.json"):
            for row in json.loads(path.read_text())["rows"]:
                found.setdefault(row["method"], (path.parent.name, []))[1].append(row)
        assert found.keys() == methods.keys(), start
        for method, (_, settings) in methods.items():
            folder, rows = found[method]
            assert [row["setting"] for row in rows] == settings
            least, cells = min(row["distance"][0] for row in rows), []
            for row in rows:
                words = row["setting"].split()
                distance = f"{row['distance'][0]:.1f}" if row["distance"][0] < 1e4 else "diverged"
                cell = f"{' / '.join(words[1::2])}: {distance}"
                cells.append(f"**{cell}**" if row["distance"][0] == least else cell)
            flags = " ".join(words[::2])
            lines.append(report.markdown_line([start, f"[{method}](results/{folder}/README.md)", f"`{flags}`",
                                               ", ".join(cells)]))
    return lines
