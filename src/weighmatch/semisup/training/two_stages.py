"""The schedule two_stages: learn what the pool's images are worth, freeze it, train on the best.

1. The arm trains online, for `first_share` times the steps of the second stage.
2. The pool is ranked (`ranking`).
3. FixMatch trains from the start on what was kept: batches are drawn by weight, 1 or 0, instead of
   weighing losses of images that hardly count.
"""

from dataclasses import replace
from pathlib import Path

import torch

from weighmatch.semisup.checkpoint import PoolState, Ranker, TrainedRun
from weighmatch.semisup.parts.state_file import read_if_whole, write_state
from weighmatch.semisup.training.config import RunConfig, TrainingSet, fingerprint
from weighmatch.semisup.training.judges import Known
from weighmatch.semisup.training.numerics import algorithms
from weighmatch.semisup.training.online import Progress, train_online
from weighmatch.semisup.training.ranking import Ranking, rank_pool, record_kept


def train_in_two_stages(
    config: RunConfig, data: TrainingSet, folder: Path, progress: Progress
) -> TrainedRun:
    """Train both stages, or go on where they were interrupted.

    Args:
        config: of the run; the second stage has `config.steps` steps.
        data: what to train on.
        folder: gets a folder a stage and `ranking.pt`.
        progress: called with the number of steps done since the last call, of both stages.

    Returns:
        The second stage's classifier; the first stage's ranks. Times and the log are those of
        both stages.
    """
    online = replace(config, schedule="online")
    first = train_online(
        replace(online, steps=config.first_steps), data, folder / "first_stage", progress
    )
    ranking = _rank(first, data, config, folder)
    kept = data.select(ranking.kept.numpy())
    second = train_online(replace(online, arm="fixmatch"), kept, folder / "second_stage", progress)
    history, labels = record_kept([(config.steps, second, ranking.kept)], data)
    later = [{**line, "step": line["step"] + config.first_steps} for line in second.log]
    return replace(
        second,
        config=config,
        pool_fingerprint=data.pool_fingerprint,
        history=history,
        pool=PoolState(
            labels,
            ranking.scores,
            ranking.cut,
            ranking.kept,
            ranking.evidence,
            first.pool.measured,
        ),
        ranker=Ranker(
            config.row.weighting, first.weighting, first.classifier.state_dict(), ranking.head
        ),
        log=[*first.log, *later],
        seconds=first.seconds + second.seconds,
        update_seconds=first.update_seconds,
    )


def _rank(first: TrainedRun, data: TrainingSet, config: RunConfig, folder: Path) -> Ranking:
    """The ranking of an earlier call for the same run, or a new one."""
    path, run = folder / "ranking.pt", fingerprint(config, data)
    state = config.group.from_first(lambda: read_if_whole(path, "the pool is ranked again"))
    if state is not None and state["fingerprint"] == run:
        return Ranking.from_state(state["ranking"])
    with algorithms(config.training.deterministic, config.group):
        known = Known(torch.ones(data.pool_size, dtype=torch.bool), first.pool.measured)
        ranking, _ = rank_pool(first, known, data, config, config.seed)
    if config.group.first:
        write_state(path, {"fingerprint": run, "ranking": ranking.to_state()})
    return ranking
