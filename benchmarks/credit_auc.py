"""Does a network with BatchNorm predict credit as well as logistic regression does?

    quantity    mean AUC over 5 stratified folds of the German credit table (1,000 rows, 700 good and 300 bad)
    bar         TabularNet with the defaults of `evalmode train` is not below logistic regression by more than 0.01
    limit       on 200 test rows the AUC of one fold has a standard error near 0.035: only the paired difference over
                all folds says something, and that to about 0.01. Models of every kind reach 0.76 to 0.80 here.

Logistic regression learns from all four training folds; the network from the part of them that is not needed to stop
by, so it never sees the test fold and has fewer rows to learn from. The defaults were chosen on folds with the seeds
101 to 106. What was chosen first (one layer of 64, learning rate 0.002, embeddings drawn with std 1) was judged on the
seeds 0, 1 and 2 and missed the bar on 0 by 0.005; what came of a second round on 101 to 106 is judged on them again,
and on 3 and 4, which nobody had looked at.

    python -m benchmarks.credit_auc             prints, and compares with the bar (exit code 1 when it is missed)
    python -m benchmarks.credit_auc --write     writes benchmarks/results/credit_auc.json and .md too
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.model_selection import StratifiedKFold

from benchmarks.environment import environment
from export import table, training
from export.options import TableOptions, TrainingOptions

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data/german_credit/german_credit.csv"
RESULTS = ROOT / "benchmarks/results"
PROTECTED = ("personal_status_and_sex", "foreign_worker")
FOLDS = 5
FOLD_SEEDS = (0, 1, 2, 3, 4)
BAR = 0.01
LINEAR = "logistic regression"


def compared(credit: table.Table, fold_seed: int) -> dict[str, list[float]]:
    """The AUC of both models on each test fold."""
    options = TrainingOptions()
    share = table.VALIDATION_SHARE / (1 - table.TEST_SHARE)  # as `evalmode train` divides what is not held out
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=fold_seed)
    found: dict[str, list[float]] = {"network": [], LINEAR: []}
    for known, held_out in folds.split(credit.answers, credit.answers):
        split = table.split_rows(credit.answers, known, seed=options.seed, validation=share, test=0.0)
        plan = table.plan(credit, split.training)
        encoded = plan.encode(credit.columns)
        to_learn, to_stop, all_known, test = (
            training.examples(encoded, credit.answers, rows)
            for rows in (split.training, split.validation, known, held_out)
        )
        config = training.configure(plan.features, credit.target, to_learn, options)
        network = training.train(config, to_learn, to_stop, options).network
        answered = training.predictions(network, test.inputs)
        found["network"].append(training.measured(credit.answers[held_out], answered)["AUC"])
        found[LINEAR].append(training.baselines(all_known, test, config)[LINEAR]["AUC"])
    return found


def measured(leave_out: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each fold seed the folds, their means and the difference."""
    options = TableOptions(leave_out=leave_out)
    credit = table.understand(table.read(DATA), target="creditability", options=options)
    rows = []
    for seed in FOLD_SEEDS:
        folds = compared(credit, seed)
        means = {model: float(np.mean(values)) for model, values in folds.items()}
        difference = means["network"] - means[LINEAR]
        rows.append({"fold_seed": seed, "folds": folds, "mean": means, "difference": difference})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        "# AUC on the German credit table",
        "",
        f"`python -m benchmarks.credit_auc --write`, {result['seconds']:.0f} s on one thread. Mean AUC of {FOLDS} "
        "stratified folds; the folds in brackets.",
    ]
    for columns, rows in result["columns"].items():
        lines += ["", f"## {columns}", "", "| seed of the folds | network | logistic regression | difference |"]
        lines += ["|---|---|---|---|"]
        for row in rows:
            cells = [
                f"{row['mean'][model]:.4f} ({', '.join(f'{auc:.3f}' for auc in row['folds'][model])})"
                for model in ("network", LINEAR)
            ]
            lines.append(f"| {row['fold_seed']} | {' | '.join(cells)} | {row['difference']:+.4f} |")
    verdict = "met" if result["met"] else "MISSED"
    lines += ["", f"The bar, a difference of at least {-BAR} for every seed with the columns left out, is {verdict}."]
    known = ", ".join(f"{name} {result[name]}" for name in ("python", "torch", "scikit-learn"))
    return "\n".join([*lines, f"{known}; {result['cpu']}; commit {result['commit']}.", ""])


def main() -> int:
    """Measure, print, and say with the exit code whether the bar is met."""
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    columns = {
        "without personal_status_and_sex and foreign_worker": measured(PROTECTED),
        "with all columns": measured(()),
    }
    result: dict[str, Any] = {
        "benchmark": "credit_auc",
        "bar": -BAR,
        "met": all(row["difference"] >= -BAR for row in next(iter(columns.values()))),
        "columns": columns,
        "seconds": round(time.perf_counter() - start_s, 1),
        "threads": 1,
        **environment(),
    }
    page = markdown(result)
    Console(highlight=False, soft_wrap=True).print(page, markup=False)
    if "--write" in sys.argv[1:]:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "credit_auc.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (RESULTS / "credit_auc.md").write_text(page, encoding="utf-8")
    print(json.dumps(result))
    return 0 if result["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
