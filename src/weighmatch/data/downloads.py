"""Where the files of torchvision's data sets come from, for those who fetch them by hand."""

from pathlib import Path
from typing import Any


def how_to_fetch(kind: Any, split: str, root: str) -> str:
    """What to do by hand: the addresses of the files, and the folder to put them in.

    Args:
        kind: a class of `torchvision.datasets`.
        split: the split that is read, as torchvision names it.
        root: the folder that torchvision is given.
    """
    folder = Path(root)
    if hasattr(kind, "url"):
        addresses = [kind.url]
    elif hasattr(kind, "split_list"):
        addresses = [kind.split_list[split][0]]
    else:
        addresses = [kind.mirrors[0] + name for name, _ in kind.resources]
    if hasattr(kind, "resources"):
        folder = folder / kind.__name__ / "raw"
    return (
        f"download {', '.join(addresses)} on a computer with a network, copy "
        f"{'it' if len(addresses) == 1 else 'them'} into {folder} and run again with "
        "data.download=true, which checks and unpacks what lies there"
    )
