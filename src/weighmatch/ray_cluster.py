"""The cluster of Ray that this process is connected to, or starts.

Nothing is imported of Ray until somebody connects.
"""

import atexit
import functools
import logging
import os
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import weighmatch
from weighmatch.workers import WorkerError, default_workers

# Bytes of the object store of a cluster that is started here; what is more goes to disk.
STORE = 2**30
# Where Ray leaves the address of its latest cluster, in a folder that one of these may name, and
# seconds in which that has to answer.
LATEST, FOLDERS, CONNECT_WAIT = Path("ray", "ray_current_cluster"), ("RAY_TMPDIR", "TMPDIR"), 10
# Read by Ray when it is imported: workers keep the environment that the driver has, nothing is
# reported to anybody, a task without a GPU sees none, and none has a lower priority than others.
ENVIRONMENT = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_worker_niceness": "0",
}
# What a cluster that is started here leaves out, as nobody asks it: statistics of Ray's own
# processes and the history of tasks. Both would take a part of the cores.
UNASKED = {
    "enable_metrics_collection": False,
    "event_stats": False,
    "task_events_report_interval_ms": 0,
}
# Seconds in which a cluster has to be joined or started; Ray itself would wait for ever.
JOIN_WAIT = 120


def connect() -> Any:
    """The module `ray`, connected to a cluster.

    It is the cluster of `RAY_ADDRESS`, or else the one that `ray start` began on this machine, or
    else one that is started here and ends with this process.

    Raises:
        WorkerError: if no cluster answers at `RAY_ADDRESS`, or none can be joined or started.
    """
    try:
        return _start().result(JOIN_WAIT)
    except TimeoutError as error:
        given = os.environ.get("RAY_ADDRESS")
        cure = f"see whether RAY_ADDRESS {given} is that of one" if given else "call `ray stop`"
        raise WorkerError(
            f"no cluster of Ray could be joined or started within {JOIN_WAIT} seconds; {cure}, and "
            "start again"
        ) from error


def begin_to_connect() -> None:
    """Connect while this process does something else; `connect` waits for it.

    Raises:
        WorkerError: if no cluster answers at `RAY_ADDRESS`.
    """
    _find_address()
    _start()


def _start() -> Future[Any]:
    future: Future[Any] = Future()
    _requests().put(future)
    return future


@functools.cache
def _requests() -> SimpleQueue[Future[Any]]:
    """What asks the one thread that connects.

    Ray's own processes end with the thread that started them, so that it goes on. It is a daemon,
    as it may wait for ever for what answers at an address and is no cluster.
    """
    requests: SimpleQueue[Future[Any]] = SimpleQueue()

    def serve() -> None:
        while True:
            future = requests.get()
            try:
                future.set_result(_connect())
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=serve, name="ray", daemon=True).start()
    return requests


def _connect() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return ray
    # Workers that end are told of here; Ray has no switch for its own words about them.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    address = _find_address()
    own: Any = {
        "num_cpus": default_workers(),
        "object_store_memory": STORE,
        "include_dashboard": False,
        "_system_config": UNASKED,
    }
    quiet: Any = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(address, **quiet, **(own if address == "local" else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise WorkerError(
            f"Ray does not connect to the cluster {address} ({words[0]}); set RAY_AUTH_MODE=token "
            "if it asks for a token, install the same versions on every machine, or unset "
            "RAY_ADDRESS and call `ray stop`, so that one is started on this machine"
        ) from error
    # Sooner than Ray's own end, which waits for its words to be printed.
    atexit.register(ray.shutdown)
    return ray


def _find_address() -> str:
    """The address of a cluster that answers; "local" where one has to be started here.

    Ray itself would wait for minutes where nobody answers.
    """
    given = os.environ.get("RAY_ADDRESS", "")
    if given and not _answers(given):
        raise WorkerError(
            f"no cluster of Ray answers at RAY_ADDRESS {given}; start one with `ray start --head`, "
            "or unset RAY_ADDRESS, so that one is started on this machine"
        )
    folder = next((os.environ[name] for name in FOLDERS if name in os.environ), "/tmp")
    latest = Path(folder, LATEST)
    left = latest.read_text("utf-8").strip() if latest.exists() else ""
    # Ray finds the same address, and sends its token if the cluster may ask for it.
    return given or ("auto" if left and _answers(left) else "local")


def _answers(address: str) -> bool:
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon:
        return True  # a word, such as "auto"
    try:
        with socket.create_connection((host, int(port)), CONNECT_WAIT):
            return True
    except (OSError, ValueError):
        return False


def count_workers(num_cpus: float = 1, num_gpus: float = 0) -> int:
    """How many jobs the cluster can do at a time, each with these CPUs and GPUs.

    Raises:
        WorkerError: if no machine has as much.
    """
    wanted = {name: n for name, n in (("CPU", num_cpus), ("GPU", num_gpus)) if n}
    nodes = [node["Resources"] for node in connect().nodes() if node["Alive"]]
    found = sum(
        # The tenth part of a millionth: 1 / 0.1 is ten. A machine has room for one that takes none.
        min((int(node.get(name, 0) / n + 1e-7) for name, n in wanted.items()), default=1)
        for node in nodes
    )
    if not found:
        raise WorkerError(
            f"no machine of the cluster has {num_cpus:g} CPUs and {num_gpus:g} GPUs for a job; "
            "ask for less, or add a machine, and start again: what is finished is kept"
        )
    return found


def versions() -> dict[str, str]:
    """The versions of the software here, on which results depend."""
    return {"WeighMatch": weighmatch.__version__, "torch": version("torch")}


def require_versions(wanted: Mapping[str, str]) -> None:
    """Raise a WorkerError unless this machine has these versions of the software."""
    for name, here in versions().items():
        if here != wanted[name]:
            raise WorkerError(
                f"the machine {socket.gethostname()} has {name} {here}, and that of the command "
                f"has {wanted[name]}; install the same version on every machine"
            )
