"""Files of tensors: what is read is what was written, or an error that names the file."""

import pickle
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch

from weighmatch.semisup.parts.state_file import (
    DamagedFileError,
    content_digest,
    read_state,
    write_state,
)


def draw_state():
    """A state of every kind of content."""
    generator = torch.Generator().manual_seed(0)
    return {
        "network": {"weight": torch.randn(3, 4, generator=generator), "bias": torch.zeros(4)},
        "kept": torch.tensor([True, False, True]),
        "labels": torch.arange(5),
        "none": torch.zeros(0, 3),
        "log": [{"step": 16, "loss": 0.25}, {"step": 32, "loss": float("inf")}],
        "names": ["nought", "one"],
        "shape": (1, 8, 8),
        "cut": None,
        "by number": {0: 1.5, 1: True},
    }


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "made" / "on the way" / "state.pt"
    write_state(path, draw_state())
    found = read_state(path)
    assert content_digest(found) == content_digest(draw_state())
    assert found["shape"] == (1, 8, 8)
    assert found["log"] == draw_state()["log"]
    assert found["kept"].dtype == torch.bool
    assert torch.equal(found["network"]["weight"], draw_state()["network"]["weight"])
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]  # nothing is left over
    assert read_state(tmp_path / "nothing.pt") is None


def test_equal_content_gives_equal_bytes(tmp_path):
    state = draw_state()
    write_state(tmp_path / "a.pt", state)
    write_state(tmp_path / "elsewhere" / "another name.pt", draw_state())
    expected = (tmp_path / "a.pt").read_bytes()
    assert (tmp_path / "elsewhere" / "another name.pt").read_bytes() == expected
    # What was read, too, although its strings and tensors are other objects.
    write_state(tmp_path / "again.pt", read_state(tmp_path / "a.pt"))
    assert (tmp_path / "again.pt").read_bytes() == expected
    # Whatever shares memory or is another mapping.
    weight = torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(0))
    first = {"a": weight[0].clone(), "b": weight[0].clone(), "name": "".join(["n", "o"]), "o": "no"}
    second = OrderedDict({"a": weight[0], "b": weight[0].requires_grad_(), "name": "no", "o": "no"})
    write_state(tmp_path / "c.pt", first)
    write_state(tmp_path / "d.pt", second)
    assert (tmp_path / "c.pt").read_bytes() == (tmp_path / "d.pt").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["network"]["weight"][0, 0].mul_(1.5),
        lambda s: s.update(labels=s["labels"].int()),
        lambda s: s.update(none=torch.zeros(3, 0)),
        lambda s: s["log"][0].update(step=16.0),
        lambda s: s["names"].reverse(),
        lambda s: s.update(cut=0.0),
        lambda s: s["by number"].update({1: 1}),
        lambda s: s.pop("cut"),
    ],
)
def test_the_digest_sees_every_change(change):
    state = draw_state()
    change(state)
    assert content_digest(state) != content_digest(draw_state())


def test_the_digest_sees_content_and_not_how_it_lies_in_memory():
    rows = torch.arange(12.0).view(4, 3)
    assert content_digest(rows.T[:, :1]) == content_digest(torch.tensor([[0.0], [1.0], [2.0]]))
    assert content_digest(rows[:1].T[0]) == content_digest(torch.zeros(1))  # its stride is 3
    assert content_digest(torch.zeros(0, 3)) != content_digest(torch.zeros(3, 0))


def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "state.pt"
    write_state(path, draw_state())
    whole, expected = path.read_bytes(), content_digest(draw_state())
    random.seed(0)
    messages = []
    for position in random.sample(range(len(whole)), 200):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_state(path)
        except DamagedFileError as error:
            messages.append(str(error))
        else:
            assert content_digest(found) == expected, position
    assert len(messages) > 20
    assert all(message.startswith(f"{path} is damaged") for message in messages)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path):
    path, values = tmp_path / "state.pt", torch.arange(64).float() + 0.125
    write_state(path, {"values": values})
    whole = path.read_bytes()
    start = whole.index(values.numpy().tobytes())
    for position in range(start, start + values.nbytes, 17):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DamagedFileError, match=r"state\.pt is damaged or was not written by"):
            read_state(path)


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_files_of_something_else_are_named_and_run_no_code(tmp_path):
    path, planted = tmp_path / "state.pt", tmp_path / "planted"
    write_state(path, draw_state())
    whole = path.read_bytes()
    torch.save({"content": draw_state()}, tmp_path / "foreign.pt")
    torch.save({"content": 1, "checksum": Planted(planted)}, tmp_path / "code.pt")
    np.savez(tmp_path / "arrays.npz", a=np.arange(3))
    foreign = [(tmp_path / name).read_bytes() for name in ("foreign.pt", "code.pt", "arrays.npz")]
    cut = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for damaged in (*cut, *foreign, b"no archive at all", pickle.dumps(Planted(planted), 2)):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"state\.pt is damaged .*; delete it"):
            read_state(path)
        assert path.read_bytes() == damaged
    assert not planted.exists()


def test_a_killed_writer_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    write_state(path, {"step": 1})

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        write_state(path, {"step": 2})
    assert read_state(path) == {"step": 1}
