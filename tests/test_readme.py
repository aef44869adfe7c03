"""The example of README.md, on a tiny folder."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from weighmatch.semisup import TrainedRun

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.integration
def test_the_example_trains_on_a_folder_of_images(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    whole = 'fit(Folder("photos"))'
    assert whole in code
    code = code.replace(whole, 'fit(Folder("photos"), training={"steps": 12}, folder="runs")')
    rng = np.random.default_rng(0)
    for folder, count in (("labelled/cat", 2), ("labelled/dog", 2), ("unlabelled", 12)):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names = {}
    exec(code, names)
    assert set(names["run"].ranking["path"]) == {f"unlabelled/{k}.png" for k in range(12)}
    assert TrainedRun.load("photos.run.pt").class_names == ("cat", "dog")
