"""The schedule rounds: rank the pool, train on its best, and rank it again.

What tells near OOD from useful images are the classifier's features, and OOD images spoil these.
So ranking and training alternate. Every round

1. goes on with the averaged classifier of the round before (the first one starts anew, with the
   whole pool) and trains it by FixMatch on what is kept, the learning rate from the start. As
   long as no round has dropped anything, it goes on with FixMatch's own run, so that a pool that
   never looks contaminated costs nothing but its rankings;
2. ranks the whole pool at the classifier so found (`ranking.rank_pool`);
3. keeps the best of each pseudo-class, as many as the arm's judge says (`judges`): for the arm
   `learned` by hypergradients that are measured there. An image left out may come back.

All rounds together take `RunConfig.steps` steps. An arm that weighs nothing keeps the whole pool in
all rounds, and starts each of them with the learning rate from the start.
"""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from weighmatch.semisup.checkpoint import PoolState, Ranker, TrainedRun
from weighmatch.semisup.parts.state_file import read_if_whole, write_state
from weighmatch.semisup.parts.streams import derive_seed
from weighmatch.semisup.training.config import RunConfig, TrainingSet, fingerprint
from weighmatch.semisup.training.judges import Known
from weighmatch.semisup.training.numerics import algorithms
from weighmatch.semisup.training.online import Progress, train_online
from weighmatch.semisup.training.ranking import Ranking, rank_pool, record_kept
from weighmatch.semisup.weightings.meter import Measured
from weighmatch.semisup.weightings.share import Slope


@dataclass
class _Progress:
    """What the rounds so far have come to.

    Attributes:
        kept: the images that the next round trains on, (N,) bool.
        whole: whether no round has dropped anything, so that FixMatch's own run goes on.
        measured: influences so far, or none.
        slopes: what they said of the useful share.
        trained: the last round's run.
        ranking: the last round's ranking.
        stages: for each round its last step, its run and what it was trained on.
        log: lines of metrics of all rounds.
        seconds: time spent, rankings included.
        ranking_seconds: time spent ranking.
    """

    kept: Tensor
    whole: bool
    measured: Measured | None = None
    slopes: list[Slope] = field(default_factory=list)
    trained: TrainedRun | None = None
    ranking: Ranking | None = None
    stages: list[tuple[int, TrainedRun, Tensor]] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    ranking_seconds: float = 0.0


def train_in_rounds(
    config: RunConfig, data: TrainingSet, folder: Path, progress: Progress
) -> TrainedRun:
    """Train all rounds, or go on where they were interrupted.

    Args:
        config: what defines the run, `config.rounds` among it.
        data: what to train on.
        folder: gets a folder a round with its `ranking.pt`.
        progress: called with the number of steps done since the last call.

    Returns:
        The last round's classifier and ranking. Its history has a snapshot a round: what it
        trained on, and confidences at its end. Times and the log are those of all rounds.
    """
    ranks = config.row.weighs
    so_far = _Progress(torch.ones(data.pool_size, dtype=torch.bool), whole=ranks)
    done = 0
    for number in range(config.rounds):
        end = (number + 1) * config.steps // config.rounds
        _train_round(config, data, folder, progress, so_far, number, done, end)
        done = end
    trained, ranking = so_far.trained, so_far.ranking
    assert trained is not None
    history, labels = record_kept(so_far.stages, data)
    pool = PoolState(labels)
    ranker = None
    if ranking is not None:
        pool = PoolState(
            labels,
            ranking.scores,
            ranking.cut,
            ranking.kept,
            ranking.evidence,
            so_far.measured,
        )
        ranker = Ranker(config.row.weighting, {}, head=ranking.head)
    return replace(
        trained,
        config=config,
        pool_fingerprint=data.pool_fingerprint,
        history=history,
        pool=pool,
        ranker=ranker,
        log=so_far.log,
        seconds=so_far.seconds,
        update_seconds=so_far.ranking_seconds / config.rounds if ranks else None,
    )


def _train_round(
    config: RunConfig,
    data: TrainingSet,
    folder: Path,
    progress: Progress,
    so_far: _Progress,
    number: int,
    done: int,
    end: int,
) -> None:
    """One round, from step `done` to `end`; adds to `so_far`."""
    before = so_far.trained
    # The history of rounds is recorded apart: a snapshot at the end of a round is one too many.
    training = replace(config.training, snapshots=1)
    fixmatch = replace(config, arm="fixmatch", schedule="online", rounds=1, training=training)
    place = folder / f"round_{number}"
    if so_far.whole:
        spent, offset = before.seconds if before is not None else 0.0, 0
        earlier = folder / f"round_{number - 1}"
        trained = train_online(
            fixmatch, data, place, beyond(done, progress), until=end, earlier=earlier
        )
    else:
        spent, offset = 0.0, done
        chosen = data.select(so_far.kept.numpy())
        start = None if before is None else before.classifier.state_dict()
        own = replace(fixmatch, seed=_seed(config, number), steps=end - done)
        trained = train_online(own, chosen, place, progress, start)
    seconds = 0.0
    if config.row.weighs:
        so_far.ranking, known, seconds = _rank(
            trained, data, so_far, config, place, _seed(config, number)
        )
        so_far.measured, so_far.slopes = known.measured, known.slopes
    so_far.log += [
        {
            **line,
            "step": line["step"] + offset,
            "seconds": line["seconds"] - spent + so_far.seconds,
        }
        for line in trained.log
        if line["step"] + offset > done
    ]
    so_far.stages.append((end, trained, so_far.kept))
    so_far.trained = trained
    so_far.seconds += trained.seconds - spent + seconds
    so_far.ranking_seconds += seconds
    if so_far.ranking is not None:
        so_far.kept = so_far.ranking.kept
        so_far.whole = so_far.whole and bool(so_far.kept.all())


def _seed(config: RunConfig, number: int) -> int:
    """The seed of a round's random streams."""
    return derive_seed(config.seed, f"round {number}") if number else config.seed


def _rank(
    trained: TrainedRun,
    data: TrainingSet,
    so_far: _Progress,
    config: RunConfig,
    folder: Path,
    seed: int,
) -> tuple[Ranking, Known, float]:
    """The ranking of an earlier call for the same run or a new one, what is known, and seconds."""
    path = folder / "ranking.pt"
    run = fingerprint(config, data, trained.classifier.state_dict())
    state = config.group.from_first(lambda: read_if_whole(path, "the pool is ranked again"))
    if state is not None and state["fingerprint"] == run:
        measured = state["measured"]
        known = Known(
            so_far.kept,
            None if measured is None else Measured(**measured),
            [Slope(**slope) for slope in state["slopes"]],
        )
        return Ranking.from_state(state["ranking"]), known, state["seconds"]
    started = time.perf_counter()
    with algorithms(config.training.deterministic, config.group):
        known = Known(so_far.kept, so_far.measured, so_far.slopes)
        # FixMatch trained it; the arm's own weighting, as it starts, says what ranks its outputs.
        ranked = replace(trained, config=replace(trained.config, arm=config.arm), weighting={})
        ranking, known = rank_pool(ranked, known, data, config, seed)
    seconds = time.perf_counter() - started
    state = {
        "fingerprint": run,
        "ranking": ranking.to_state(),
        "measured": None if known.measured is None else vars(known.measured),
        "slopes": [vars(slope) for slope in known.slopes],
        "seconds": seconds,
    }
    if config.group.first:
        write_state(path, state)
    return ranking, known, seconds


def beyond(done: int, progress: Progress) -> Progress:
    """`progress` without the first `done` steps, which it was told of before."""
    known = done

    def report(steps: int) -> None:
        nonlocal known
        told = min(known, steps)
        known -= told
        progress(steps - told)

    return report
