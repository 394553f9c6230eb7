"""L-BFGS logistic regression on frozen features with the papers' search for lambda (esvit.md section 3; CLIP's).

lambda lies on a grid of 97 points, 10^-6 to 10^6, eight a decade. Seven points first (every 16th), then the step is
halved around the best one, 8, 4, 2, 1, two new points each: 15 fits at most. Equal scores go to the larger lambda. The
search sees a training and a validation part; the winner is fitted again on both, and the test set is scored once.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_cl.arguments import real, whole
from moe_cl.config import ConfigError
from moe_cl.evals.metrics import metric
from moe_cl.evals.sweep import split

if TYPE_CHECKING:
    from moe_cl.evals.context import Context

Scores = Callable[[np.ndarray], np.ndarray]  # features (n, D) -> class scores (n, K)

GRID = 10.0 ** (np.arange(97) / 8 - 6)
STEP = 16
ITERATIONS = 1000


def search(score: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The best lambda of ``GRID`` and every score that was computed, by lambda."""
    known: dict[int, float] = {}

    def look(index: int) -> None:
        index = min(max(index, 0), len(GRID) - 1)
        if index not in known:
            known[index] = score(float(GRID[index]))

    for index in range(0, len(GRID), STEP):
        look(index)
    step = STEP
    while step > 1:
        step //= 2
        best = _best(known)
        look(best - step)
        look(best + step)
    return float(GRID[_best(known)]), {float(GRID[i]): known[i] for i in sorted(known)}


def _best(known: dict[int, float]) -> int:
    return max(known, key=lambda i: (known[i], i))  # ties: the larger lambda


def fit(
    x: np.ndarray, y: np.ndarray, penalty: float, iterations: int = ITERATIONS
) -> Callable[[np.ndarray], np.ndarray]:
    """Scores (n, K) of a multinomial model with C = 1/lambda; of one model a class where y is (n, K) marks.

    A class that all images have, or none, scores 0. Raises ConfigError for images of one class only.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def one(features: np.ndarray, labels: np.ndarray) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol stops at ITERATIONS
            return LogisticRegression(C=1.0 / penalty, solver="lbfgs", max_iter=iterations).fit(features, labels)

    if y.ndim == 2:
        told = [(x[marks >= 0], marks[marks >= 0]) for marks in y.T]
        models = [one(*pair) if len(np.unique(pair[1])) > 1 else None for pair in told]
        answers = [m.decision_function if m is not None else lambda rows: np.zeros(len(rows)) for m in models]
        return lambda rows: np.stack([answer(rows) for answer in answers], 1)
    if len(np.unique(y)) < 2:
        raise ConfigError("logistic regression needs training images of two classes at least; this set has one")
    model = one(x, y)
    classes = model.classes_
    width = int(y.max()) + 1

    def scores(rows: np.ndarray) -> np.ndarray:
        out = np.full((len(rows), width), -np.inf)
        out[:, classes] = model.predict_log_proba(rows)
        return out

    return scores


def logistic(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    name: str = "accuracy",
    held_out: float = 0.2,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    iterations: int = ITERATIONS,
) -> dict[str, Any]:
    """Test score of the protocol. ``validation`` = (features, labels), or ``held_out`` of the training set.

    Returns:
        the metric under its ``name``, ``validation`` (best score of the search), ``lambda``, ``fits`` (lambda: score).
    """
    x, y, tx, ty = (t.cpu().numpy() for t in (train_x.double(), train_y, test_x.double(), test_y))
    if validation is None:
        first = train_y if train_y.ndim == 1 else torch.zeros(len(train_y), dtype=torch.long)
        fit_index, held = (i.numpy() for i in split(first, held_out, seed))
        if not len(held):
            raise ConfigError(
                "one training image a class: none can be held out to choose lambda; name a validation set (--val)"
            )
        vx, vy, sx, sy = x[held], y[held], x[fit_index], y[fit_index]
    else:
        vx, vy = (t.cpu().numpy() for t in (validation[0].double(), validation[1]))
        sx, sy = x, y
        x, y = np.concatenate([x, vx]), np.concatenate([y, vy])
    penalty, fits = search(lambda p: metric(name, fit(sx, sy, p, iterations)(vx), vy))
    score = metric(name, fit(x, y, penalty, iterations)(tx), ty)
    return {name: score, "validation": max(fits.values()), "lambda": penalty, "fits": fits}


HELP = "L-BFGS logistic regression on frozen features, lambda searched on a validation split"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``eval logistic``."""
    parser.add_argument("--metric", choices=("accuracy", "per_class", "map11"), help="default: the set's own")
    parser.add_argument("--blocks", type=whole(1), default=1, help="features of the last blocks (EsViT: 4)")
    parser.add_argument(
        "--held-out", type=real(low=0, below=1), default=0.2, help="part of the training set that chooses lambda"
    )
    parser.add_argument("--val", help="labelled set that chooses lambda (default: the set's own, where it has one)")
    parser.add_argument("--iterations", type=whole(1), default=ITERATIONS, help="of L-BFGS, a fit")


def run(ctx: Context) -> dict[str, Any]:
    """Table and JSON of ``eval logistic``."""
    from moe_cl.evals.record import record
    from moe_cl.evals.sets import halves, metric_of

    args = ctx.args
    name = args.metric or metric_of(ctx.source(False))
    own = halves(ctx.source(True)) if args.val is None else None
    if own is not None:  # its official parts; together they are the training set
        args.train, args.val = own
    with ctx.untouched():
        encode = ctx.encode(blocks=args.blocks)
        train = ctx.features(True, encode)
        val = ctx.features(False, encode, source=args.val, what="validation features") if args.val else None
        test = ctx.features(False, encode)
    if ctx.comm.rank:
        return {}  # one fit, on rank 0: scikit-learn is not distributed
    out = logistic(
        *train, *test, name=name, validation=val, held_out=args.held_out, seed=args.seed, iterations=args.iterations
    )  # fmt: skip
    values = {name: out[name], "validation": out["validation"], "lambda": out["lambda"]}
    rows = [[name, out[name], out["validation"], f"{out['lambda']:.3g}", len(out["fits"])]]
    columns = ("metric", "test", "validation", "lambda", "fits")
    setting = ctx.setting("train", "test", metric=name)
    record(ctx.out, ctx.name, ctx.step, values, setting, columns=columns, rows=rows, more={"fits": out["fits"]})
    return out
