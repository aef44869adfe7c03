"""README.md and docs: commands run, links lead somewhere, and numbers stand in a table."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from PIL import Image

from tests.project import ROOT
from weighmatch.data.files import decode
from weighmatch.semisup import TrainedRun

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "data" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def rows_of(text, heading):
    """The cells of the first table below a heading, without marks; the header first."""
    table = re.search(r"((?:^\|.*\n)+)", text.partition(f"## {heading}")[2], re.MULTILINE)
    lines = [line for line in table[1].splitlines() if not line.startswith("|---")]
    return [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines]


def sentences_of(text):
    """The sentences of prose: no code, table, picture or heading."""
    prose = re.sub(r"```.*?```|<!--.*?-->|!\[.*?\]\(.*?\)|<img.*?>", "", text, flags=re.DOTALL)
    kept = [line for line in prose.splitlines() if not line.startswith(("|", "#"))]
    prose = re.sub(r"\]\([^)]*\)", "]", "\n".join(kept))
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*\d])", prose):
        yield from re.split(r"(?<=[.:?!])\s+", " ".join(paragraph.split()))


def test_the_first_page_is_short_and_its_sentences_are_too():
    assert len(README.split()) < 650
    long = [sentence for sentence in sentences_of(README) if len(sentence.split()) > 30]
    assert not long


def test_the_table_of_results_is_small():
    rows = rows_of(README, "What it finds")
    assert len(rows) - 1 <= 5
    assert all(len(row) <= 4 for row in rows)
    assert max(len(cell) for row in rows for cell in row) <= 40


def test_every_number_of_digits_on_the_first_page_is_in_the_table_of_its_results():
    page = (ROOT / "docs" / "results" / "digits.md").read_text()
    known = {row[1]: row[2] for row in rows_of(page, "2 labels a class, 75 % OOD")[1:]}
    (commit,) = re.findall(r"of commit ([0-9a-f]{7})", README)
    assert f"of commit {commit}" in page
    compared = rows_of(README, "What it finds")[1:]
    cifar10 = (ROOT / "docs" / "results" / "cifar10.md").read_text()
    (gain,) = re.findall(r"photographs\].* the gain is (\S+) points \((\S+) to (\S+)\)", README)
    assert "+{} (+{} to +{})".format(*gain) in cifar10
    for _, accuracy, difference, interval in compared:
        found = known[accuracy.removesuffix(" %")]
        if difference:
            assert found == f"{difference.removesuffix(' points')} ({interval})"
    assert len(compared) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_commands_to_what_is_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        assert "://" in link or (page.parent / link).exists(), link
    for name in re.findall(r"--env (\w[\w/]*)", text):
        assert (ROOT / "conf" / name).is_dir(), name
    for module in re.findall(r"python -m (benchmarks[.\w]*)", text):
        assert importlib.util.find_spec(module), module
    extras = PROJECT["project"]["optional-dependencies"] | PROJECT["dependency-groups"]
    for name in re.findall(r"--(?:extra|group) (\w+)", text):
        assert name in extras, name
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).is_file(), script


@pytest.mark.integration
def test_the_site_is_built_strictly_and_reads_without_a_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text()
        )
        assert loaded
        assert not [source for source in loaded if "//" in source], page
    reference = (tmp_path / "reference" / "implicit.html").read_text()
    assert "weighmatch.implicit.conjugate_gradient.ConjugateGradient" in reference


@pytest.mark.integration
def test_the_example_in_python_trains_on_a_folder_of_images(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "outputs.md").read_text().partition("## From Python")[2]
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
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


@pytest.mark.integration
def test_the_script_of_the_idea_trains_and_tells_known_images_from_others(capsys):
    names = runpy.run_path(str(ROOT / "examples" / "fixmatch_with_weights.py"))
    accuracies = names["main"](steps=120)
    assert set(accuracies) == {"supervised", "fixmatch", "learned"}
    assert min(accuracies.values()) > 1 / 3
    said = capsys.readouterr().out
    known, others = re.findall(r"mean weight of the digits \d to \d: (\S+)", said)
    assert float(known) > float(others)


def test_an_image_is_prepared_elsewhere_as_by_training(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "outputs.md").read_text().partition("## The model elsewhere")[2]
    code = re.findall(r"```python\n(.*?)\nmodel = ", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classes.json").write_text('{"width": 20, "height": 24}')
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save("photo.png", exif=exif)
    names = {}
    exec(code, names)
    assert names["images"].numpy().tolist() == [decode("photo.png", (3, 24, 20)).tolist()]


def test_the_examples_of_the_library_run_and_agree(capsys):
    text = (ROOT / "docs" / "implicit.md").read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(first, names)
    assert capsys.readouterr().out.splitlines()[-1].startswith("converged")
    by_hessian = names["hypergradient"]
    exec(second, names)
    by_gauss_newton = names["hypergradient"]
    assert names["solution"].residual < 1e-4
    # On a linear model the Gauss-Newton matrix and the damping make up the Hessian.
    assert np.allclose(by_hessian, by_gauss_newton, rtol=1e-2, atol=1e-6)
