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

    def demand(self, device_type: str) -> dict[str, float]:
        """The CPUs and GPUs of a job on a device of that type, by the names of the attributes."""
        gpus = float(device_type == "cuda") if self.num_gpus is None else self.num_gpus
        return {"num_cpus": self.num_cpus, "num_gpus": gpus}

    def check_engine(self, group: str) -> None:
        """Raise a ValueError unless the engine of this group of parameters can be had."""
        require_choice(f"{group}.engine", self.engine, ENGINES)
        require_number(f"{group}.num_cpus", self.num_cpus, 0, 1024, above=True)
        if self.num_gpus is not None:
            require_number(f"{group}.num_gpus", self.num_gpus, 0, 64)
        if self.engine == "ray":
            require_ray(f"{group}.engine")
