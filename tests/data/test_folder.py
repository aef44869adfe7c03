"""The source `folder`: own images as they are found."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.data.folders import BAD, add_copies, add_traps, make_folder, picture, state
from tests.project import ROOT
from weighmatch.checks import ToldError
from weighmatch.data import cache, decoding, files
from weighmatch.data.config import DataConfig
from weighmatch.data.grid import GridConfig, make_cells, require_effect
from weighmatch.data.recipes import COLOUR_OPERATIONS
from weighmatch.data.source import UnusableDataError, get_source
from weighmatch.evaluation.pile import fold_overlap
from weighmatch.pipelines.data_preparation import nodes
from weighmatch.semisup.config import OPERATIONS, TrainingConfig
from weighmatch.settings import ExperimentLoader


@pytest.fixture
def prepare(tmp_path):
    """Draws all splits of a folder; returns them by name."""

    def draw(root, seeds=(0, 1), grid=None, **own):
        config = DataConfig(seeds=list(seeds), source="folder", root=str(root), **own)
        grid = GridConfig(**(grid or {}))
        raw = nodes.load_images(grid, config, str(tmp_path / "cache"))
        names = ("training", "evaluation", "truth", "labels", "manifest", "files", "rejected")
        return dict(zip(names, nodes.draw_splits(raw, grid, config), strict=True))

    return draw


def rows(made, key, split):
    table = made["files"]
    return table[(table["key"] == key) & (table["split"] == split)]


# --- what is found ---------------------------------------------------------------------------


def test_every_bad_file_is_named_once_and_no_good_one(tmp_path, prepare):
    root = make_folder(tmp_path / "own")
    good = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    add_traps(root, tmp_path / "outside.png")
    before = state(root)
    made = prepare(root)
    assert state(root) == before
    reasons = dict(made["rejected"][["path", "reason"]].to_numpy().tolist())
    assert len(reasons) == len(made["rejected"])
    assert set(reasons) == set(BAD)
    for path, word in BAD.items():
        assert word in reasons[path], path
    everything = (
        rows(made, "folder-all-seed_0000", "labelled"),
        rows(made, "folder-all-seed_0000", "pool"),
    )
    named = {path for part in everything for path in part["path"]}
    assert named == good | {"labelled/yak/only.png"}
    assert made["manifest"]["cells"][0]["rejected"] == len(BAD)
    assert made["manifest"]["cells"][0]["classes"] == ["cat", "dog", "größer", "yak"]


def test_images_lie_where_the_table_says(tmp_path, prepare):
    root = make_folder(tmp_path / "own")
    made = prepare(root, size=24, fit="pad", background="black")
    for key, training in made["training"].items():
        arrays = {"labelled": training["labelled_images"], "pool": training["unlabelled_images"]}
        if "test_images" in made["evaluation"][key]:
            arrays["test"] = made["evaluation"][key]["test_images"]
        for split, images in arrays.items():
            table = rows(made, key, split)
            assert sorted(table["index"]) == list(range(len(images)))
            for index, path in zip(table["index"], table["path"], strict=True):
                expected = files.decode(root / path, (3, 24, 24), "pad", "black")
                np.testing.assert_array_equal(images[index], expected)
            if split != "pool":
                codes = training["labels"] if split == "labelled" else made["labels"][key]["labels"]
                names = training["class_names"][codes[table["index"]]]
                assert names.tolist() == table["label"].tolist()
                assert names.tolist() == [path.split("/")[1] for path in table["path"]]


def test_without_a_test_folder_the_seeds_are_folds(tmp_path, prepare):
    root = make_folder(tmp_path / "own", labels=7)
    (root / "labelled" / "yak").mkdir()
    picture(np.random.default_rng(9)).save(root / "labelled" / "yak" / "only.png")
    made = prepare(root, seeds=(4, 5, 9))
    keys = ["folder-seed_0004", "folder-seed_0005", "folder-seed_0009"]
    assert list(made["training"]) == [*keys, "folder-all-seed_0004"]
    tested = [set(rows(made, key, "test")["path"]) for key in keys]
    assert len(set.union(*tested)) == sum(map(len, tested)) == 21
    assert max(map(len, tested)) - min(map(len, tested)) <= 1
    for key, test in zip(keys, tested, strict=True):
        trained = set(rows(made, key, "labelled")["path"])
        assert not trained & test
        assert len(trained | test) == 22
        # No class is without an image to train on, and each is tested as evenly as can be.
        assert np.bincount(made["training"][key]["labels"]).min() >= 1
        assert sorted(np.bincount(made["labels"][key]["labels"])) in (
            [2, 2, 3],
            [2, 3, 3],
            [2, 2, 2],
        )
        assert "labelled/yak/only.png" in trained
    # One object, which is stored and hashed once.
    assert len({id(arrays["unlabelled_images"]) for arrays in made["training"].values()}) == 1
    everything = "folder-all-seed_0004"
    assert len(made["training"][everything]["labels"]) == 22
    assert made["evaluation"][everything] == {}
    assert everything not in made["labels"]
    assert made["truth"] == {}
    settings = [cell["setting"] for cell in made["manifest"]["cells"]]
    assert settings == ["folder", "folder", "folder", "all"]
    again = prepare(root, seeds=(4, 5, 9))
    assert again["manifest"]["cells"] == made["manifest"]["cells"]


def test_a_single_seed_tests_on_a_fifth(tmp_path, prepare):
    made = prepare(make_folder(tmp_path / "own", labels=10), seeds=(3,))
    assert len(made["labels"]["folder-seed_0003"]["labels"]) == 6


def test_there_are_no_more_folds_than_images_to_test_on(tmp_path, prepare, caplog):
    root = make_folder(tmp_path / "few", labels=2)
    (root / "labelled" / "yak").mkdir()
    picture(np.random.default_rng(9)).save(root / "labelled" / "yak" / "only.png")
    made = prepare(root, seeds=range(10, 18))
    # Two images of each of three classes, and one that is always trained on.
    assert [len(labels["labels"]) for labels in made["labels"].values()] == [1] * 6
    assert [len(arrays["labels"]) for arrays in made["training"].values()] == [6] * 6 + [7]
    assert all(cell["test"] for cell in made["manifest"]["cells"][:-1])
    assert fold_overlap(made["manifest"]) == 1 / 6
    assert caplog.text.count("there are 6 folds and not 8") == 1
    one = prepare(make_folder(tmp_path / "one", labels=1), seeds=(3, 4))
    assert one["labels"] == {}
    assert list(one["training"]) == ["folder-seed_0003", "folder-all-seed_0003"]


def test_a_class_with_fewer_images_than_folds_is_tested_in_some(tmp_path, prepare):
    root = make_folder(tmp_path / "own", classes=("cat", "dog"), labels=9)
    for path in (root / "labelled" / "dog").rglob("[3-8].*"):
        path.unlink()
    made = prepare(root, seeds=range(6))
    counts = [np.bincount(part["labels"], minlength=2) for part in made["labels"].values()]
    assert np.sum(counts, axis=0).tolist() == [9, 3]
    assert {tuple(count) for count in counts} == {(2, 0), (1, 1)}
    assert all((np.bincount(part["labels"]) >= 2).all() for part in made["training"].values())


def test_there_are_six_folds_where_nothing_else_is_asked_for(tmp_path):
    given = {
        "data": {"source": "folder", "root": str(make_folder(tmp_path / "own"))},
        "training": {"network": "small_cnn"},
    }
    loader = ExperimentLoader(
        str(ROOT / "conf"), base_env="base", env="local", runtime_params=given
    )
    assert len(DataConfig(**loader["parameters"]["data"]).seeds) == 6


def test_a_test_folder_is_the_test_set_of_every_seed(tmp_path, prepare):
    root = make_folder(tmp_path / "own")
    rng = np.random.default_rng(7)
    for name in ("cat", "dog", "zebra"):
        (root / "test" / name).mkdir(parents=True)
        for k in range(3):
            picture(rng).save(root / "test" / name / f"{k}.png")
    shutil.copy(root / "test" / "cat" / "0.png", root / "unlabelled" / "leak.png")
    shutil.copy(root / "test" / "dog" / "1.png", root / "labelled" / "dog" / "leak.png")
    made = prepare(root)
    for key in ("folder-seed_0000", "folder-seed_0001"):
        assert made["labels"][key]["labels"].tolist() == [0, 0, 0, 1, 1, 1]
        assert len(made["training"][key]["labels"]) == 15
        assert len(made["training"][key]["unlabelled_images"]) == 20
        leak = rows(made, key, "pool").set_index("path").loc["unlabelled/leak.png"]
        assert (leak["index"], leak["duplicate_of"]) == (-1, "test/cat/0.png")
        leak = rows(made, key, "labelled").set_index("path").loc["labelled/dog/leak.png"]
        assert (leak["index"], leak["duplicate_of"]) == (-1, "test/dog/1.png")
        seen = {image.tobytes() for image in made["training"][key]["unlabelled_images"]}
        assert not seen & {image.tobytes() for image in made["evaluation"][key]["test_images"]}
    assert rows(made, "folder-all-seed_0000", "test").empty
    assert set(made["rejected"]["path"]) == {f"test/zebra/{k}.png" for k in range(3)}
    assert made["rejected"]["reason"].str.contains("no labelled image is of its class").all()


def test_copies_count_once_and_are_reported(tmp_path, prepare, caplog):
    root = make_folder(tmp_path / "own")
    add_copies(root)
    shutil.copy(root / "labelled" / "cat" / "2.jpg", root / "labelled" / "dog" / "other.jpg")
    caplog.set_level("INFO")
    made = prepare(root)
    key = "folder-all-seed_0000"
    assert len(made["training"][key]["unlabelled_images"]) == 20
    assert len(made["training"][key]["labels"]) == 15
    pool = rows(made, key, "pool").set_index("path")
    first = pool.loc["unlabelled/00.png"]
    assert (first["duplicate_of"], first["near_duplicate_of"]) == ("", "")
    for name in ("x_copy.png", "x_link.png"):
        row = pool.loc[f"unlabelled/{name}"]
        assert row["duplicate_of"] == "unlabelled/00.png"
        assert row["index"] == first["index"]
    for name in ("x_near.jpg", "x_near_large.png"):
        row = pool.loc[f"unlabelled/{name}"]
        assert row["near_duplicate_of"] == "unlabelled/00.png"
        assert (row["duplicate_of"], row["index"]) == ("", first["index"])
    row = pool.loc["unlabelled/x_cat.jpg"]
    assert (row["duplicate_of"], row["index"]) == ("labelled/cat/0.jpg", -1)
    assert (pool["duplicate_of"] + pool["near_duplicate_of"] != "").sum() == 5
    counted = made["manifest"]["cells"][0]["duplicates"]
    assert counted == {"exact in labelled": 1, "exact in pool": 3, "near in pool": 2}
    assert "labelled/cat/2.jpg and labelled/dog/other.jpg are the same image in two" in caplog.text
    assert (
        "4 exact copies and 2 near copies of other files count once; 1 of them is " in caplog.text
    )
    assert "not used" not in caplog.text
    # A copy of a labelled image goes with it into the test set of its fold.
    for key in ("folder-seed_0000", "folder-seed_0001"):
        table = made["files"][made["files"]["key"] == key].set_index("path")
        both = table.loc[["labelled/cat/2.jpg", "labelled/dog/other.jpg"]]
        assert both["split"].nunique() == both["index"].nunique() == 1


def test_one_file_and_one_copy_are_told_in_the_singular(tmp_path, prepare, caplog):
    root = make_folder(tmp_path / "own")
    shutil.copy(root / "unlabelled" / "00.png", root / "unlabelled" / "copy.png")
    (root / "unlabelled" / "empty.png").touch()
    prepare(root)
    assert "1 file is not used; rejected_files.csv says why" in caplog.text
    assert "1 exact copy and 0 near copies of other files count once\n" in caplog.text
    caplog.clear()
    caplog.set_level("INFO")
    (root / "unlabelled" / "text.png").write_text("no image")
    prepare(root)
    assert "2 files are not used; rejected_files.csv says why" in caplog.text
    assert "(1 file read now, the others known)" in caplog.text


def test_images_that_are_alike_in_coarse_parts_are_no_copies(tmp_path, prepare):
    """Characters of one kind: of 300 different ones nearly all are kept."""
    config = DataConfig(
        seeds=[0], source="glyphs", pool_size=300, ratio=0.0, heldout_size=1, test_size=6
    )
    splits = get_source("glyphs").draw(get_source("glyphs").load(config), config, 0)
    (tmp_path / "own" / "unlabelled").mkdir(parents=True)
    for k, image in enumerate(splits.pool.images):
        Image.fromarray(image[0]).save(tmp_path / "own" / "unlabelled" / f"{k:03d}.png")
    for k, image in enumerate(splits.labelled_images):
        place = tmp_path / "own" / "labelled" / splits.class_names[splits.labels[k]]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{k}.png")
    made = prepare(tmp_path / "own")
    images = made["training"]["folder-all-seed_0000"]["unlabelled_images"]
    assert images.shape[1:] == (1, 16, 16)
    assert len(images) >= 298


# --- tables ----------------------------------------------------------------------------------


def make_table(root, rows, name="metadata.csv"):
    rng = np.random.default_rng(3)
    (root / "images").mkdir(parents=True)
    for file, _ in rows:
        picture(rng).save(root / file)
    if name.endswith("csv"):
        lines = ["file_name,label", *(f"{file},{label}" for file, label in rows)]
    else:
        lines = [json.dumps({"file_name": file, "label": label or None}) for file, label in rows]
    (root / name).write_text("\n".join(lines) + "\n")
    return root


TABLE = [(f"images/{k:02d}.png", ["cat", "dog", ""][k % 3]) for k in range(18)]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_says_what_each_file_is(tmp_path, prepare, name):
    root = make_table(tmp_path / "own", TABLE, name)
    picture(np.random.default_rng(8)).save(root / "unnamed.png")
    with (root / name).open("a") as file:
        if name.endswith("csv"):
            file.write("images/gone.png,cat\n../outside.png,dog\n")
        else:
            file.write('{"file_name": "images/gone.png", "label": "cat"}\n')
            file.write('{"file_name": "../outside.png", "label": "dog"}\nrubbish\n')
    made = prepare(root)
    key = "folder-all-seed_0000"
    assert made["training"][key]["class_names"].tolist() == ["cat", "dog"]
    assert np.bincount(made["training"][key]["labels"]).tolist() == [6, 6]
    assert len(rows(made, key, "pool")) == 7
    reasons = dict(made["rejected"].to_numpy().tolist())
    assert reasons["images/gone.png"] == "it is not there"
    assert reasons["../outside.png"] == "it leads out of the folder"
    assert len(reasons) == (2 if name.endswith("csv") else 3)


def test_a_table_may_have_a_test_split_and_contradictions(tmp_path, prepare):
    root = make_table(tmp_path / "own", TABLE)
    lines = ["\ufefffile_name;label;split"]
    lines += [
        f"{file};{label};{'test' if k < 6 else 'train'}" for k, (file, label) in enumerate(TABLE)
    ]
    lines += ["images/06.png;dog;train", "images/07.png;dog;train"]
    (root / "metadata.csv").write_text("\n".join(lines))
    made = prepare(root)
    # Of the six test rows two have no label, and are of the pool.
    assert made["labels"]["folder-seed_0000"]["labels"].tolist() == [0, 1, 0, 1]
    (rejected,) = made["rejected"].to_numpy().tolist()
    assert rejected[0] == "images/06.png"
    assert "more than once" in rejected[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,label\na.png,cat\n", "has no column file_name"),
        ("file_name,label\na.png,größe\n".encode("latin-1"), "is not in UTF-8; save it"),
        (b"", "has no column file_name"),
    ],
)
def test_a_table_that_cannot_be_read_stops_the_run_with_a_sentence(tmp_path, content, message):
    (tmp_path / "metadata.csv").write_bytes(content)
    config = DataConfig(seeds=[0], source="folder", root=str(tmp_path))
    with pytest.raises(UnusableDataError, match=message):
        get_source("folder").check_found(config)


# --- runs that cannot go on ------------------------------------------------------------------


def spoil(root, case):
    if case == "no class":
        shutil.rmtree(root / "labelled")
        (root / "labelled").mkdir()
    elif case == "one class":
        shutil.rmtree(root / "labelled" / "dog")
    elif case == "no pool":
        shutil.rmtree(root / "unlabelled")
    elif case == "no layout":
        shutil.rmtree(root / "labelled")
    elif case in ("bad class", "bad pool"):
        place = root / ("unlabelled" if case == "bad pool" else "labelled/dog")
        for path in place.rglob("*.*"):
            path.write_text("no image")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no class", "has no class with a labelled image that can be used; put labelled"),
        ("one class", "of the class cat alone, and a classifier needs two classes or more; add"),
        ("no pool", "has no unlabelled image; put labelled images into labelled/<class>/ and"),
        ("no layout", r"has neither a folder labelled nor metadata\.csv"),
        ("bad class", "of the class cat alone"),
        ("bad pool", "has no unlabelled image that can be used"),
    ],
)
def test_a_run_that_cannot_go_on_says_why(tmp_path, prepare, case, message):
    root = make_folder(tmp_path / "own", classes=("cat", "dog"), labels=2, pool=3)
    spoil(root, case)
    before = state(root)
    with pytest.raises(UnusableDataError, match=message) as error:
        prepare(root)
    assert "\n" not in str(error.value)
    assert state(root) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"root": ""}, r"data\.root is empty; give the folder of your images"),
        ({"root": "/nowhere/at/all"}, r"data\.root /nowhere/at/all does not exist; give"),
        ({"size": 4}, r"data\.size must be an integer of at least 8"),
        ({"channels": 2}, r"data\.channels must be auto, 1 or 3"),
        ({"fit": "stretch"}, r"data\.fit 'stretch' is unknown; choose from crop, pad"),
        ({"background": ""}, r"data\.background '' is no colour; give a name"),
        ({"background": "whitish"}, r"data\.background 'whitish' is no colour"),
        ({"root": 3}, r"data\.root must be the path of a folder"),
    ],
)
def test_wrong_parameters_are_named_with_the_cure(given, message):
    with pytest.raises(ValueError, match=message):
        get_source("folder").check_found(DataConfig(seeds=[0], source="folder", **given))


def test_parameters_without_effect_are_refused():
    config = DataConfig(seeds=[0], source="folder", root="x")
    for name in ("ratio", "pool_size", "labels_per_class", "test_size", "heldout_size"):
        with pytest.raises(ValueError, match=rf"data\.{name} has no effect"):
            require_effect({name: 3}, GridConfig(), config)
    require_effect({"root": "x", "size": 32, "fit": "pad"}, GridConfig(), config)
    assert make_cells(GridConfig(), config)[0].key(7) == "folder-seed_0007"


# --- what is read again ----------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """A list that fills with the files that are decoded."""
    found = []
    read_file = decoding.read_file

    def read(path, *rest):
        found.append(os.path.basename(path))
        return read_file(path, *rest)

    monkeypatch.setattr(decoding, "read_file", read)
    return found


def test_a_second_run_reads_no_file_and_a_changed_folder_what_changed(tmp_path, prepare, reads):
    root = make_folder(tmp_path / "own")
    add_traps(root, tmp_path / "outside.png")
    first = prepare(root)
    assert len(reads) > 35
    reads.clear()
    second = prepare(root)
    assert reads == []
    for name in ("training", "evaluation", "labels"):
        assert second[name].keys() == first[name].keys()
        for key, arrays in first[name].items():
            for part, array in arrays.items():
                np.testing.assert_array_equal(second[name][key][part], array)
    assert second["files"].equals(first["files"])
    assert second["rejected"].equals(first["rejected"])
    rng = np.random.default_rng(77)
    pool = root / "unlabelled"
    picture(rng).save(pool / "new.png")
    picture(rng).save(pool / "00.png")
    (pool / "03.png").unlink()
    (pool / "06.png").rename(pool / "moved.png")
    changed = prepare(root)
    assert sorted(reads) == ["00.png", "new.png"]
    paths = set(rows(changed, "folder-all-seed_0000", "pool")["path"])
    assert {"unlabelled/new.png", "unlabelled/moved.png"} <= paths
    assert not {"unlabelled/03.png", "unlabelled/06.png"} & paths
    table = rows(changed, "folder-all-seed_0000", "pool")
    images = changed["training"]["folder-all-seed_0000"]["unlabelled_images"]
    for index, path in zip(table["index"], table["path"], strict=True):
        np.testing.assert_array_equal(images[index], files.decode(root / path, (3, 32, 32)))
    reads.clear()
    prepare(root, size=16)
    assert len(reads) > 35


@pytest.mark.parametrize("damage", ["images", "index", "gone", "row"])
def test_a_damaged_cache_is_made_again(tmp_path, prepare, reads, damage, caplog):
    root = make_folder(tmp_path / "own")
    first = prepare(root)
    reads.clear()
    (folder,) = (tmp_path / "cache").iterdir()
    (images,) = folder.glob("images-*.npy")
    content = bytearray(images.read_bytes())
    if damage == "images":
        images.write_bytes(content[:500])
    elif damage == "index":
        text = (folder / "index.json").read_text()
        (folder / "index.json").write_text(text.replace("content", "kontent"))
    elif damage == "gone":
        images.unlink()
    else:
        content[-10] ^= 1
        images.write_bytes(content)
    second = prepare(root)
    assert len(reads) == (1 if damage == "row" else 35)
    assert "damaged" in caplog.text
    for key, arrays in first["training"].items():
        for part, array in arrays.items():
            np.testing.assert_array_equal(second["training"][key][part], array)


def test_a_run_that_is_killed_goes_on_from_what_it_read(tmp_path, prepare, reads, monkeypatch):
    root = make_folder(tmp_path / "own")
    monkeypatch.setattr(cache, "FILES_BETWEEN_SAVES", 10)
    read_file = decoding.read_file

    def stop(path, *rest):
        if len(reads) == 25:
            raise KeyboardInterrupt
        return read_file(path, *rest)

    monkeypatch.setattr(decoding, "read_file", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(root)
    monkeypatch.setattr(decoding, "read_file", read_file)
    reads.clear()
    prepare(root)
    assert len(reads) == 15


def test_images_that_the_disk_has_no_room_for_are_refused_before_anything_is_written(
    tmp_path, prepare, monkeypatch
):
    root = make_folder(tmp_path / "own")
    message = (
        r"^35 decoded images of 2000 × 2000 pixels need 0.4 GB in .*, and its disk has "
        r"0.2 GB free; lower data.size, make room or"
    )
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=2e8))
    with pytest.raises(ToldError, match=message):
        prepare(root, size=2_000)
    assert not (tmp_path / "cache").exists()
    prepare(root, size=16)
    picture(np.random.default_rng(1)).save(root / "unlabelled" / "new.png")
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=0))
    with pytest.raises(ToldError, match=r"^36 decoded images of 16 × 16 pixels need 0.0 GB"):
        prepare(root, size=16)


def test_nothing_is_kept_within_the_folder(tmp_path):
    root = make_folder(tmp_path / "own", pool=2)
    config = DataConfig(seeds=[0], source="folder", root=str(root))
    with pytest.raises(ValueError, match="in which nothing is written; give another data_folder"):
        nodes.load_images(GridConfig(), config, str(root / "cache"))
    assert not (root / "cache").exists()


# --- grids and recipes -----------------------------------------------------------------------


def test_settings_of_a_grid_may_read_the_folder_in_two_ways(tmp_path, prepare):
    root = make_folder(tmp_path / "own")
    settings = {"small": {"size": 16}, "grey": {"channels": 1}}
    made = prepare(root, seeds=(0,), grid={"settings": settings})
    shapes = {key: a["unlabelled_images"].shape[1:] for key, a in made["training"].items()}
    assert shapes == {
        "small-seed_0000": (3, 16, 16),
        "small-all-seed_0000": (3, 16, 16),
        "grey-seed_0000": (1, 32, 32),
        "grey-all-seed_0000": (1, 32, 32),
    }


def test_the_recipe_fits_what_is_found(tmp_path, prepare):
    assert COLOUR_OPERATIONS == OPERATIONS
    root = make_folder(tmp_path / "own")
    config = DataConfig(seeds=[0], source="folder", root=str(root))
    recipe = get_source("folder").recipe(config)
    training = TrainingConfig(**recipe["training"])
    assert training.augmentation.flip
    assert training.steps == 1000
    assert training.threshold < 0.95
    assert recipe["runs"]["arms"] == ["supervised", "fixmatch", "learned"]
    assert prepare(root)["manifest"]["recipe"] == recipe
    grey = DataConfig(seeds=[0], source="folder", root=str(root), channels=1, size=8)
    grey = TrainingConfig(**get_source("folder").recipe(grey)["training"])
    assert not grey.augmentation.flip
    assert grey.threshold == 0.95


def test_what_is_asked_for_wins_over_the_recipe(tmp_path):
    root = make_folder(tmp_path / "own")
    given = {
        "data": {"source": "folder", "root": str(root)},
        "training": {"steps": 77, "augmentation": {"draws": 3}},
    }
    loader = ExperimentLoader(
        str(ROOT / "conf"), base_env="base", env="local", runtime_params=given
    )
    parameters = loader["parameters"]
    assert parameters["training"]["steps"] == 77
    assert parameters["training"]["augmentation"]["draws"] == 3
    assert parameters["training"]["augmentation"]["flip"]
    assert parameters["runs"]["arms"] == ["supervised", "fixmatch", "learned"]


# --- scale -----------------------------------------------------------------------------------

MEASURED = """
import os, re, sys, time
from pathlib import Path
from weighmatch import workers
from weighmatch.data.cache import read_images
from weighmatch.data.files import list_images

def peak(process):
    text = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", text)[1]) / 1024

if __name__ == "__main__":
    began = time.monotonic()
    found = read_images(list_images(sys.argv[1]), (3, 32, 32), cache=sys.argv[2])
    others = [peak(worker.process.pid) for worker in workers._idle]
    seconds = time.monotonic() - began
    print(len(found.paths), found.decoded, peak(os.getpid()), max(others, default=0), seconds)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells how much memory was taken")
@pytest.mark.slow
def test_20_000_files_are_read_once_in_bounded_memory(tmp_path):
    root = tmp_path / "own" / "unlabelled"
    rng = np.random.default_rng(0)
    for k in range(20_000):
        place = root / f"{k // 1000:02d}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BILINEAR).save(place / f"{k}.jpg", quality=60)
    (tmp_path / "measure.py").write_text(MEASURED)
    command = [sys.executable, str(tmp_path / "measure.py"), str(tmp_path / "own")]

    def measure():
        done = subprocess.run(
            [*command, str(tmp_path / "cache")],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=True,
        )
        return [float(value) for value in done.stdout.split()]

    count, decoded, peak, workers, seconds = measure()
    assert (count, decoded) == (20_000, 20_000)
    # MiB. The images have 59, which may be in memory as pages of their file.
    assert peak < 250
    assert workers < 600
    count, decoded, peak, _, again = measure()
    assert (count, decoded) == (20_000, 0)
    assert peak < 250
    assert again < seconds / 2
