"""Rankings on a cluster of two nodes on this machine; a worker and a node are killed."""

import numpy as np
import pytest
from PIL import Image

from tests.containers import picture, write_structs, write_tar
from tests.ranked import draw_folder, same_ranking, train_run
from tests.ray_nodes import Reaper, die_now_and_then, have_both, start_nodes
from weighmatch import shards, streaming
from weighmatch.engine_config import EngineConfig
from weighmatch.shards import score_shard
from weighmatch.streaming import rank_folder

pytestmark = pytest.mark.integration
run = pytest.fixture(train_run)
folder = pytest.fixture(draw_folder)
started = pytest.fixture(scope="module")(start_nodes)
nodes = pytest.fixture(have_both)

RAY = EngineConfig(engine="ray")


def score_and_die(folder, number, progress):
    if number >= 2:
        die_now_and_then(folder.parent / "marks")
    return score_shard(folder, number, progress)


@pytest.mark.slow
@pytest.mark.parametrize("count", [200, 20_000])
def test_a_ranking_is_that_of_one_machine_though_a_worker_and_a_node_die(
    count, nodes, run, tmp_path, monkeypatch
):
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for number in range(count):
        place = root / f"{number % 7}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(place)
    (root / "notes.txt").write_text("no image")
    monkeypatch.setattr(shards, "FILES_AT_ONCE", count // 20)
    reaper = Reaper(nodes, tmp_path / "marks")
    monkeypatch.setattr(streaming, "score_shard", score_and_die)
    assert rank_folder(run, root, tmp_path / "ray", engine=RAY) == count
    reaper.assert_both_died()
    monkeypatch.setattr(streaming, "score_shard", score_shard)
    assert rank_folder(run, root, tmp_path / "local", workers=1) == count
    assert same_ranking(tmp_path / "ray", tmp_path / "local")
    paths = [line.partition(",")[0] for line in (tmp_path / "ray/ranking.csv").open()][1:]
    assert sorted(paths) == sorted(f"{k % 7}/{k}.png" for k in range(count))
    assert not (tmp_path / "ray.shards").exists()


ADD = shards.Shards.add


def score_some(folder, number, progress):
    """Fail at the tenth shard."""
    if len(list(folder.glob("part-*.parquet"))) >= 10:
        raise RuntimeError("the tenth shard")
    return score_shard(folder, number, progress)


@pytest.mark.slow
def test_a_ranking_of_containers_goes_on_where_it_was(nodes, run, folder, tmp_path, monkeypatch):
    contents = [picture(seed)[1] for seed in range(60)]
    write_tar(folder / "x.tar", [(f"{k}.png", contents[k]) for k in range(30)])
    write_structs(folder / "y.parquet", contents[30:], [f"{k}.png" for k in range(30)])
    monkeypatch.setattr(shards, "FILES_AT_ONCE", 6)
    monkeypatch.setattr(streaming, "score_shard", score_some)
    with pytest.raises(RuntimeError, match="the tenth shard"):
        rank_folder(run, folder, tmp_path / "ray", engine=RAY)
    done = {path.name for path in (tmp_path / "ray.shards").glob("part-*.parquet")}
    assert len(done) >= 10
    scored = set()

    def add(found, shard):
        scored.add(shard.file)
        ADD(found, shard)

    monkeypatch.setattr(shards.Shards, "add", add)
    monkeypatch.setattr(streaming, "score_shard", score_shard)
    assert rank_folder(run, folder, tmp_path / "ray", engine=RAY) == 90
    # The shards that were in the manifest are kept; one that was being written is not in it.
    assert len(scored & done) <= 2
    monkeypatch.setattr(shards.Shards, "add", ADD)
    assert rank_folder(run, folder, tmp_path / "local", workers=1) == 90
    assert same_ranking(tmp_path / "ray", tmp_path / "local")
