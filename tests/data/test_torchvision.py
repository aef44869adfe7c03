"""torchvision's data sets, from small files in the real formats."""

import pickle
import struct
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io

from tests.project import ROOT
from weighmatch.data.config import DataConfig
from weighmatch.data.grid import GridConfig
from weighmatch.data.ood import KIND_NAMES
from weighmatch.data.source import UnusableDataError, get_source
from weighmatch.data.sources.torchvision import DATA_SETS
from weighmatch.pipelines.data_preparation import nodes
from weighmatch.settings import ExperimentLoader

TRAIN, TEST = 200, 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All data sets in the files that torchvision reads; every image is of its class's level."""
    root = tmp_path_factory.mktemp("torchvision")
    rng = np.random.default_rng(0)

    def draw(count, classes, channels, side):
        labels = np.arange(count) % classes
        levels = 20 + 200 * labels[:, None] / classes + rng.integers(0, 4, (count, 1))
        pixels = np.repeat(levels.astype(np.uint8), channels * side * side, 1)
        pixels[:, 0] = 255  # the first pixel, so that a transposed image shows
        return pixels, labels

    def save(path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def cifar(base, names, key, classes):
        for name, count in names:
            pixels, labels = draw(count, classes, 3, 32)
            save(root / base / name, pickle.dumps({"data": pixels, key: labels.tolist()}))

    batches = [(f"data_batch_{k}", TRAIN // 5) for k in range(1, 6)]
    cifar("cifar-10-batches-py", [*batches, ("test_batch", TEST)], "labels", 10)
    meta = {"label_names": list(DATA_SETS["cifar10"].classes)}
    save(root / "cifar-10-batches-py" / "batches.meta", pickle.dumps(meta))
    cifar("cifar-100-python", [("train", TRAIN), ("test", TEST)], "fine_labels", 100)
    meta = {"fine_label_names": list(DATA_SETS["cifar100"].classes)}
    save(root / "cifar-100-python" / "meta", pickle.dumps(meta))
    for split, count in (("train", TRAIN), ("test", TEST)):
        pixels, labels = draw(count, 10, 3, 32)
        images = pixels.reshape(count, 3, 32, 32).transpose(2, 3, 1, 0)
        labels = np.where(labels == 0, 10, labels)[:, None]
        scipy.io.savemat(root / f"{split}_32x32.mat", {"X": images, "y": labels})
    for split, count in (("train", TRAIN), ("test", TEST), ("unlabeled", TRAIN)):
        pixels, labels = draw(count, 10, 3, 96)
        save(root / "stl10_binary" / f"{split}_X.bin", pixels.tobytes())
        if split != "unlabeled":
            labels = (labels + 1).astype(np.uint8)
            save(root / "stl10_binary" / f"{split}_y.bin", labels.tobytes())
    names = "\n".join(DATA_SETS["stl10"].classes)
    save(root / "stl10_binary" / "class_names.txt", names.encode())

    def idx(base, stem, count, classes):
        pixels, labels = draw(count, classes, 1, 28)
        head = struct.pack(">IIII", 0x803, count, 28, 28)
        save(root / base / "raw" / f"{stem}-images-idx3-ubyte", head + pixels.tobytes())
        head = struct.pack(">II", 0x801, count)
        content = head + labels.astype(np.uint8).tobytes()
        save(root / base / "raw" / f"{stem}-labels-idx1-ubyte", content)

    for base in ("MNIST", "FashionMNIST"):
        idx(base, "train", TRAIN, 10)
        idx(base, "t10k", TEST, 10)
    idx("EMNIST", "emnist-balanced-train", TRAIN, 47)
    idx("EMNIST", "emnist-balanced-test", TEST, 47)
    return root


@pytest.fixture
def trusted(monkeypatch):
    """Small files cannot have the published checksums."""
    for module in ("cifar", "svhn", "stl10"):
        check = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check, lambda path, md5=None: True)


SMALL = {
    "seeds": [0],
    "source": "torchvision",
    "labels_per_class": 1,
    "pool_size": 40,
    "id_size": 20,
    "heldout_size": 10,
    "test_size": 20,
    "ratio": 0.5,
}


def level(images, classes):
    """The class that an image's level tells."""
    return np.floor((images[:, 0, 5:, 5:].mean((1, 2)) - 20) * classes / 200 + 1e-6).astype(int)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("name", sorted(DATA_SETS))
def test_every_data_set_is_read_upright_with_its_labels(folder, name):
    known = DATA_SETS[name]
    config = DataConfig(
        **{**SMALL, "ood_source": "noise", "labels_per_class": 1},
        root=str(folder),
        torchvision={"dataset": name},
    )
    source = get_source("torchvision")
    raw = source.load(config)
    splits = source.draw(raw, config, 0)
    shape = (known.channels, known.side, known.side)
    assert splits.labelled_images.shape == (len(known.classes), *shape)
    assert splits.class_names == known.classes
    assert (splits.labelled_images[:, 0, 0, 0] == 255).all()
    if len(known.classes) <= 10:
        np.testing.assert_array_equal(level(splits.labelled_images, 10), splits.labels)
        np.testing.assert_array_equal(level(splits.test_images, 10), splits.test_labels)
    assert np.bincount(splits.pool.kinds).tolist() == [20, 0, 0, 20]


def test_files_without_the_published_checksum_are_not_unpickled(folder):
    config = DataConfig(**{**SMALL, "ood_source": "noise"}, root=str(folder))
    with pytest.raises(UnusableDataError, match=r"cannot read CIFAR10 .*; set data\.download=true"):
        get_source("torchvision").load(config)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("regime", ["fixed_total", "added"])
def test_the_pool_is_contaminated_by_any_pair(folder, regime):
    config = DataConfig(
        **{**SMALL, "ood_source": "unseen+patches+foreign", "regime": regime, "size": 16},
        root=str(folder),
        torchvision={"dataset": "cifar10", "seen": "bird+cat+deer+dog", "foreign": "mnist"},
    )
    raw = nodes.load_images(GridConfig(), config)
    training, evaluation, truth, _, manifest, *_ = nodes.draw_splits(raw, GridConfig(), config)
    (key,) = training
    pool = training[key]["unlabelled_images"]
    assert pool.shape == (40, 3, 16, 16)
    kinds = truth[key]["pool_sources"]
    count = manifest["cells"][0]["pool"]["by_source"]
    assert count == {"id": 20, "unseen": 7, "patches": 7, "noise": 0, "foreign": 6}
    assert training[key]["class_names"].tolist() == ["bird", "cat", "deer", "dog"]
    seen, unseen = kinds == 0, kinds == KIND_NAMES.index("unseen")
    np.testing.assert_array_equal(level(pool[seen], 10), truth[key]["pool_classes"][seen] + 2)
    assert not set(level(pool[unseen], 10)) & {2, 3, 4, 5}
    assert (pool[kinds == KIND_NAMES.index("foreign")].std(1) == 0).all()
    held = [image.tobytes() for image in evaluation[key]["heldout_images"]]
    assert len(held) == 20
    again = get_source("torchvision").draw(raw, config, 0)
    np.testing.assert_array_equal(again.pool.images, pool)


@pytest.mark.usefixtures("trusted")
def test_more_labels_keep_the_first_and_other_ratios_keep_the_test_images(folder):
    def draw(**changes):
        config = DataConfig(**{**SMALL, **changes}, root=str(folder), torchvision={"seen": 6})
        source = get_source("torchvision")
        return source.draw(source.load(config), config, 0)

    one, two, other = draw(), draw(labels_per_class=2), draw(ratio=0.25)
    first = {image.tobytes() for image in one.labelled_images}
    assert first <= {image.tobytes() for image in two.labelled_images}
    np.testing.assert_array_equal(one.test_images, other.test_images)
    np.testing.assert_array_equal(one.labelled_images, other.labelled_images)


@pytest.mark.usefixtures("trusted")
def test_stl_10_brings_its_own_pool(folder):
    config = DataConfig(seeds=[0, 1], source="stl10", labels_per_class=3, root=str(folder))
    raw = nodes.load_images(GridConfig(), config)
    training, _, truth, labels, *_ = nodes.draw_splits(raw, GridConfig(), config)
    assert list(training) == ["stl10-seed_0000", "stl10-seed_0001"]
    first, second = training.values()
    assert first["labelled_images"].shape == (30, 3, 32, 32)
    assert first["unlabelled_images"].shape == (TRAIN, 3, 32, 32)
    assert not np.array_equal(first["labelled_images"], second["labelled_images"])
    assert truth == {}
    assert len(labels["stl10-seed_0000"]["labels"]) == TEST


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torchvision": {"dataset": "moons"}}, r"data\.torchvision\.dataset 'moons' is unknown"),
        ({"torchvision": {"seen": "bird+cow"}}, "two or more different classes joined by"),
        ({"torchvision": {"seen": 1}}, "at least 2"),
        ({"ood_source": "foreign"}, r"another data set in data\.torchvision\.foreign"),
        ({"ood_source": "unseen"}, r"all of cifar10 are seen; set data\.torchvision\.seen"),
        ({"torchvision": {"foreign": "cifar10"}}, "choose another"),
    ],
)
def test_wrong_parameters_are_named_with_the_cure(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{**SMALL, "ood_source": "noise", **changes})


@pytest.mark.usefixtures("trusted")
def test_too_small_a_data_set_is_told_in_a_sentence(folder):
    config = DataConfig(
        **{**SMALL, "labels_per_class": 30, "ood_source": "noise"}, root=str(folder)
    )
    source = get_source("torchvision")
    with pytest.raises(UnusableDataError, match=r"left for data\.labels_per_class; lower it"):
        source.draw(source.load(config), config, 0)
    for root, message in (("", "is empty"), ("/nowhere", "does not exist")):
        config = DataConfig(**{**SMALL, "ood_source": "noise"}, root=root)
        with pytest.raises(UnusableDataError, match=message):
            source.check_found(config)


@pytest.mark.parametrize("name", ["cifar10_6_4", "cifar100_20_80", "cifar100_50_50"])
def test_the_standard_protocols_fit_their_data_sets(name):
    loader = ExperimentLoader(str(ROOT / "conf"), env=f"experiments/{name}", base_env="base")
    config = DataConfig(**loader["parameters"]["data"])
    per_class = {"cifar10": (5_000, 1_000), "cifar100": (500, 100)}
    asked = config.own.torchvision
    train, test = per_class[asked.dataset]
    unseen = len(DATA_SETS[asked.dataset].classes) - config.classes
    assert name == f"{asked.dataset}_{config.classes}_{unseen}"
    assert config.ratio == unseen / (unseen + config.classes)
    for labels in (4, 5, 10, 25):
        assert labels * config.classes + config.pool_id <= train * config.classes
    assert config.pool_ood <= train * unseen
    assert config.test_size + config.heldout_size == test * config.classes
    assert config.heldout_size <= test * unseen


@pytest.mark.parametrize(
    ("dataset", "folder", "address"),
    [
        ("cifar10", "", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
        ("stl10", "", "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"),
        ("svhn", "", "http://ufldl.stanford.edu/housenumbers/train_32x32.mat"),
        ("fashion_mnist", "FashionMNIST/raw", "train-labels-idx1-ubyte.gz"),
        ("emnist", "EMNIST/raw", "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip"),
    ],
)
def test_a_download_that_fails_says_what_to_put_where(
    tmp_path, monkeypatch, dataset, folder, address
):
    def fail(*_, **__):
        raise URLError("Name or service not known")

    for module in ("cifar", "stl10", "svhn", "mnist"):
        for name in ("download_url", "download_and_extract_archive"):
            monkeypatch.setattr(f"torchvision.datasets.{module}.{name}", fail, raising=False)
    config = DataConfig(
        seeds=[0],
        source="torchvision",
        root=str(tmp_path),
        download=True,
        torchvision={"dataset": dataset, "seen": 2},
    )
    with pytest.raises(UnusableDataError) as error:
        get_source("torchvision").load(config)
    text = str(error.value)
    assert text.startswith(
        f"torchvision could not download {DATA_SETS[dataset].kind} in {tmp_path}"
    )
    assert address in text
    assert f"into {tmp_path / folder} and run again with data.download=true" in text
    assert "\n" not in text
