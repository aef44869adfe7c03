"""The example of README.md, on tiny folders."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

README = Path(__file__).parents[1] / "README.md"


def test_the_example_trains_on_folders_of_images(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    for whole, short in (("wrn_28_2", "small_cnn"), ("steps=6000", "steps=12"), ("[:100]", "[:3]")):
        assert whole in code
        code = code.replace(whole, short)
    rng = np.random.default_rng(0)
    for folder, count in (("labelled/cat", 2), ("labelled/dog", 2), ("messy", 12)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["data"].labelled_images.shape == (4, 3, 32, 32)
    assert names["data"].labels.tolist() == [0, 0, 1, 1]
    assert set(names["trusted"]) <= set(names["messy"])
    assert names["found"].probabilities.shape == (3, 2)
    assert names["found"].scores.shape == (3,)
