"""The arms: ways to train, each of them one row. What names an arm elsewhere reads it from here.

An arm is a weighting of the unlabelled images plus the schedules that it can be trained in. This
module imports no torch, so that parameters, tables and figures can read it at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from weighmatch.checks import require_choice

Schedule = Literal["online", "two_stages", "rounds"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
# What says how much of a ranked pool is kept.
Judge = Literal["otsu", "test", "prior", "hypergradient", "truth"]


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: what parameters and tables call it.
        label: what figures and the report call it.
        colour: of its marks in figures, such as "#0072B2".
        weighting: name of its class in `weighmatch.semisup.weightings`.
        compute: the steps of a run. "equal": `training.steps`; "matched": as many as cost what
            the arm `learned` costs; "doubled": twice these.
        pool: the unlabelled images that it trains on: "none", the "whole" pool, the "clean" one,
            from which OOD images were removed with the help of the truth, or "told": the whole
            pool and, of the truth, how much of it is useful.
        schedules: those that it can be trained in. "online": weights are learned while training;
            "two_stages": they are learned, frozen, and a classifier is trained anew; "rounds":
            the pool is ranked and a classifier trained on its best, in turn.
        judge: what says how much of a ranking is kept between stages and rounds: "otsu" cuts it
            where it falls apart; the others rank by the head on features. "test" is a test of a
            clean pool and the head's own odds, "hypergradient" the posterior of
            `weightings.share`, "prior" the same without a hypergradient, "truth" the true share.
        alignment: whether distribution alignment is "as_set" by the parameters or the "opposite".
        reads: groups of the parameters `training` that it reads, where its schedule does.
        inductive: whether it scores images that it never saw.
        rival: whether every arm that comes after it is compared with it.
        control: what the report calls it where learned weights are held against it; "": they
            are not.
    """

    name: str
    label: str
    colour: str
    weighting: str = "uniform"
    compute: Literal["equal", "matched", "doubled"] = "equal"
    pool: Literal["none", "whole", "clean", "told"] = "whole"
    schedules: tuple[Schedule, ...] = ("online",)
    judge: Judge = "otsu"
    alignment: Literal["as_set", "opposite"] = "as_set"
    reads: tuple[str, ...] = ("weighting",)
    inductive: bool = True
    rival: bool = False
    control: str = ""

    @property
    def weighs(self) -> bool:
        """Whether it gives different images different weights."""
        return self.weighting != "uniform"

    @property
    def averages(self) -> bool:
        """Whether its ranking is averaged over neighbours; that of the control `pu` is not."""
        return self.judge not in ("otsu", "test")

    @property
    def knows_truth(self) -> bool:
        """Whether it is told something of which images are OOD."""
        return self.pool in ("clean", "told")

    def schedules_among(self, wanted: Sequence[Schedule]) -> tuple[Schedule, ...]:
        """The wanted schedules that it can be trained in, or else "online" if it can."""
        able = tuple(schedule for schedule in wanted if schedule in self.schedules)
        return able or tuple(s for s in self.schedules if s == "online")


_ARMS: dict[str, Arm] = {}


def register(arm: Arm) -> Arm:
    """Add an arm, after those that there are; figures and tables show arms in this order.

    Raises:
        ValueError: if there is another arm of that name.
    """
    if _ARMS.setdefault(arm.name, arm) != arm:
        raise ValueError(f"there is an arm {arm.name!r} already; choose another name")
    return arm


def unregister(name: str) -> None:
    """Take an arm out again, for tests."""
    _ARMS.pop(name, None)


def all_arms() -> tuple[Arm, ...]:
    """Every arm, in the order in which they were registered."""
    return tuple(_ARMS.values())


def arm_names() -> tuple[str, ...]:
    """The names of all arms, in order."""
    return tuple(_ARMS)


def get_arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        ValueError: if there is none.
    """
    require_choice("arm", name, arm_names())
    return _ARMS[name]


def in_order(names: Sequence[str]) -> list[Arm]:
    """The arms of these names, in the order of all arms."""
    return [arm for arm in all_arms() if arm.name in set(names)]


def require_arms(name: str, given: Any) -> tuple[str, ...]:
    """Names of arms as a tuple, from a list of different names or names joined by "+".

    Raises:
        ValueError: if they are anything else; `name` is the parameter's.
    """
    arms = given.split("+") if isinstance(given, str) else given
    names = isinstance(arms, list | tuple) and all(isinstance(arm, str) for arm in arms)
    if not names or not arms or len(set(arms)) < len(arms):
        raise ValueError(
            f"{name} must be a list of different names from {', '.join(arm_names())}, got {given!r}"
        )
    for arm in arms:
        require_choice(name, arm, arm_names())
    return tuple(arms)


# Colours: Okabe & Ito (2008), and for what is more than eight Tol (2021), muted.
SUPERVISED = register(Arm("supervised", "supervised only", "#999999", pool="none"))
FIXMATCH = register(Arm("fixmatch", "FixMatch", "#0072B2", rival=True))
MATCHED = register(
    Arm(
        "fixmatch_matched",
        "FixMatch, learned arm's compute",
        "#56B4E9",
        compute="matched",
        rival=True,
        control="FixMatch with the learned arm's total compute",
    )
)
register(
    Arm(
        "fixmatch_converged",
        "FixMatch, twice that compute",
        "#000000",
        compute="doubled",
        rival=True,
    )
)
register(
    Arm(
        "fixmatch_realigned",
        "FixMatch, the other alignment",
        "#661100",
        compute="matched",
        alignment="opposite",
        rival=True,
        control="FixMatch with that compute and the other choice of alignment",
    )
)
register(
    Arm(
        "fixmatch_rounds",
        "FixMatch restarted",
        "#44AA99",
        compute="matched",
        schedules=("rounds",),
        rival=True,
        control="FixMatch with that compute and as many restarts, which ranks nothing",
    )
)
register(
    Arm(
        "max_prob",
        "weights = confidence",
        "#E69F00",
        weighting="max_probability",
        schedules=("online", "two_stages", "rounds"),
    )
)
register(
    Arm(
        "softmatch",
        "SoftMatch",
        "#DDCC77",
        weighting="softmatch",
        schedules=("online", "two_stages"),
    )
)
register(
    Arm(
        "energy",
        "weights by energy",
        "#999933",
        weighting="energy",
        schedules=("online", "two_stages"),
    )
)
register(
    Arm(
        "pu",
        "weights = labelled-vs-pool classifier",
        "#CC79A7",
        weighting="positive_unlabelled",
        schedules=("online", "two_stages", "rounds"),
        judge="test",
        reads=("weighting", "ranking"),
        rival=True,
        control="weights from a classifier of labelled against pool images, which need no "
        "hypergradient",
    )
)
register(
    Arm(
        "inlier",
        "inlier filter (one-vs-all heads)",
        "#332288",
        weighting="inlier",
        schedules=("online", "two_stages"),
    )
)
register(
    Arm(
        "ds3l",
        "one-step weights on the softmax vector",
        "#AA4499",
        weighting="softmax",
        schedules=("online", "two_stages"),
        reads=("weighting", "influence"),
    )
)
register(
    Arm(
        "free",
        "a free weight an image",
        "#882255",
        weighting="free",
        schedules=("online", "two_stages"),
        reads=("weighting", "influence"),
        inductive=False,
    )
)
register(
    Arm(
        "gate_prior",
        "learned weights without hypergradient",
        "#88CCEE",
        weighting="positive_unlabelled",
        schedules=("rounds",),
        judge="prior",
        reads=("ranking",),
        rival=True,
        control="the same ranking and the same decision without the hypergradient",
    )
)
LEARNED = register(
    Arm(
        "learned",
        "learned weights",
        "#D55E00",
        weighting="learned",
        schedules=("online", "two_stages", "rounds"),
        judge="hypergradient",
        reads=("weighting", "influence", "ranking"),
    )
)
register(
    Arm(
        "gate_told",
        "learned weights, told the share",
        "#117733",
        weighting="positive_unlabelled",
        pool="told",
        schedules=("rounds",),
        judge="truth",
        reads=("ranking",),
    )
)
ORACLE = register(Arm("oracle", "oracle (OOD removed)", "#009E73", pool="clean"))


@dataclass(frozen=True)
class Comparison:
    """What a job is about: an arm that is held against another, and the words for the outcome.

    Attributes:
        arm: the arm.
        against: what it is held against.
        rival: what sentences call that.
        question: what is asked.
        better: the answer where the arm is better.
        worse: the answer where it is worse.
        unknown: the answer where neither is shown.
    """

    arm: Arm
    against: Arm
    rival: str
    question: str
    better: str
    worse: str
    unknown: str

    def names(self) -> dict[str, str]:
        """The names of both arms, for a manifest."""
        return {"arm": self.arm.name, "against": self.against.name}


# The comparison that a job is about is one of these, declared before anything runs; the manifest
# repeats it. Every other one is secondary.
WEIGHTS_PAY = Comparison(
    LEARNED,
    MATCHED,
    rival="FixMatch with the same compute",
    question="Does it pay to weigh the unlabelled images?",
    better="Weighing the unlabelled images pays",
    worse="Weighing the unlabelled images does harm",
    unknown="Weighing the unlabelled images is not shown to pay",
)
POOL_HELPS = Comparison(
    LEARNED,
    SUPERVISED,
    rival="the labelled images alone",
    question="Did the pile of unlabelled images help?",
    better="The pile helped",
    worse="The pile did harm",
    unknown="Whether the pile helped cannot be told yet",
)


def declare(contaminated: bool) -> Comparison:
    """The comparison that a job is about: OOD is mixed into the pool, or the pool is as found."""
    return WEIGHTS_PAY if contaminated else POOL_HELPS


def get_comparison(against: str) -> Comparison:
    """The declared comparison with the arm of that name.

    Raises:
        ValueError: if there is none.
    """
    declared = {known.against.name: known for known in (WEIGHTS_PAY, POOL_HELPS)}
    require_choice("the arm of the declared comparison", against, tuple(declared))
    return declared[against]
