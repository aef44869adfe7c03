"""The figures of docs/results: drawn from its tables, small, and each on its page."""

import re

import pytest

from benchmarks import figures


def test_a_cell_is_read_as_it_is_written():
    interval = figures.read_interval("−0.3 (−1.1 to +0.4)".replace("−", "-"))
    assert interval == figures.Interval(-0.3, -1.1, 0.4)
    assert figures.read_interval("8.4 (8.2–8.7)") == figures.Interval(8.4, 8.2, 8.7)
    assert figures.read_numbers("15,529") == [15529]
    assert figures.read_interval("–") is None


def test_a_table_is_found_by_its_columns():
    rows = figures.read_table("cifar10", "images of the pile", "kept")
    assert [row["images of the pile"] for row in rows] == ["animals", "vehicles"]
    with pytest.raises(ValueError, match=r"cifar10\.md has no table with the columns moon"):
        figures.read_table("cifar10", "moon")


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_every_figure_shows_what_its_table_says(name):
    drawn = figures.FIGURES[name]()
    assert all(axes.lines or axes.patches for axes in drawn.axes)
    page = (figures.PAGES / f"{name}.md").read_text()
    assert f"]({name}.png)" in page
    assert (figures.PAGES / f"{name}.png").stat().st_size < 150_000


def test_few_tries_leave_room_for_loss():
    """Where none of n tries is lost, (rate of survival) ** n = .05 at the bound."""
    assert figures.least_share(3, 3) == pytest.approx(0.05 ** (1 / 3))
    assert figures.least_share(1, 1) == pytest.approx(0.05)
    # At most one of three is lost with probability p³ + 3 p² (1 - p); at the bound it is .95.
    least = figures.least_share(2, 3)
    assert 3 * least**2 - 2 * least**3 == pytest.approx(0.05)
    assert figures.least_share(0, 3) == 0
    axes = figures.draw_reliability().axes[0]
    lowest = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
    assert lowest == sorted(lowest, reverse=True)
    assert len(lowest) == len(figures.read_table("reliability", "fault", "tries"))


def test_no_other_figure_lies_beside_the_pages():
    linked = {
        link
        for page in figures.PAGES.glob("*.md")
        for link in re.findall(r"\(([^)]*\.png)\)", page.read_text())
    }
    assert {path.name for path in figures.PAGES.glob("*.png")} == linked


def test_the_marks_of_a_figure_are_the_numbers_of_its_page():
    axes = figures.draw_digits().axes[0]
    rows = figures.read_table("digits", "arm", "difference to FixMatch, points")
    known = [figures.read_interval(row["difference to FixMatch, points"]) for row in rows]
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert marks == [interval.mean for interval in known if interval]
