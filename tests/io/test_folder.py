"""A folder that one node writes."""

import json

import pytest

from weighmatch.io import FolderDataset


def write(name):
    return lambda folder: (folder / name).write_text("content")


def test_a_folder_holds_what_was_saved_last(tmp_path):
    dataset = FolderDataset(path=str(tmp_path / "a" / "export"))
    assert not dataset.exists()
    dataset.save(write("one.txt"))
    dataset.save(write("two.txt"))
    assert [path.name for path in dataset.load().iterdir()] == ["two.txt"]
    assert json.loads(dataset.preview()) == {"two.txt": 7}
    assert dataset._describe() == {"path": str(tmp_path / "a" / "export")}


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path):
    dataset = FolderDataset(path=str(tmp_path / "export"))
    dataset.save(write("one.txt"))

    def fail(folder):
        write("half.txt")(folder)
        raise ValueError("no more")

    with pytest.raises(Exception, match="no more"):
        dataset.save(fail)
    assert [path.name for path in dataset.load().iterdir()] == ["one.txt"]


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(Exception, match="run the pipeline that makes it"):
        FolderDataset(path=str(tmp_path / "none")).load()


def test_what_the_function_returns_is_called_when_the_folder_is_in_its_place(tmp_path):
    path, found = tmp_path / "export", []

    def fill(folder):
        (folder / "a").touch()
        return lambda: found.append(sorted(path.iterdir()))

    FolderDataset(path=str(path)).save(fill)
    assert found == [[path / "a"]]
