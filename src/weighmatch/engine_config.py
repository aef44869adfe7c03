"""Where many jobs are done: parameters that the groups `runs` and `rank` share."""

from dataclasses import dataclass

from weighmatch.checks import require_choice, require_number
from weighmatch.extras import require_ray

ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where jobs are done, and what each of them takes of a cluster.

    Attributes:
        engine: "local": processes of this machine; "ray": tasks of a cluster of Ray, which needs
            the extra `ray`.
        num_cpus: CPUs that Ray keeps free for each job; a job computes on one thread.
        num_gpus: GPUs that Ray keeps free for each job, such as 0.25; None: one where
            `training.device` is a GPU of this machine, and none elsewhere.
    """

    engine: str = "local"
    num_cpus: float = 1
    num_gpus: float | None = None

    def check_engine(self, group: str, processes: int = 1) -> None:
        """Raise a ValueError unless the engine of this group of parameters can be had.

        Args:
            group: the name of the group.
            processes: how many do a job together, which only those of one machine can.
        """
        require_choice(f"{group}.engine", self.engine, ENGINES)
        require_number(f"{group}.num_cpus", self.num_cpus, 0, 1024, above=True)
        if self.num_gpus is not None:
            require_number(f"{group}.num_gpus", self.num_gpus, 0, 64)
        if self.engine == "ray":
            require_ray(f"{group}.engine")
            if processes > 1:
                raise ValueError(
                    f"{group}.processes {processes} are of one machine, but {group}.engine is "
                    f"{self.engine}; leave one of the two out"
                )
