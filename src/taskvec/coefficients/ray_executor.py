"""The executor on a Ray cluster: every worker holds the loaded target and scores candidates.

Without an address, a cluster is started on this machine for as long as the search lasts. It listens
to nobody but this machine, has no dashboard and reports to nobody. Workers of other machines must
see the members and the data under the same paths.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Self

from taskvec.coefficients.scoring import Ask, CandidateOutcome, Executor, Local, SearchJob
from taskvec.coefficients.splits import Split, split
from taskvec.coefficients.study import members_of
from taskvec.errors import TaskvecError, UsageError
from taskvec.evaluation.evaluate import Asked
from taskvec.extras import require
from taskvec.streaming import silent

TRIES = 2  # workers that may end over one candidate
# Read when Ray is imported, or by the processes that it starts.
AT_HOME = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or it listens on all addresses of the machine
}


class Worker:
    """What runs in a worker of the cluster.

    Attributes:
        about: What must be the same everywhere: members and samples.
        where: Machine and process, for messages.
    """

    def __init__(
        self, job: SearchJob, asked: list[Asked], local: Callable[[SearchJob], Executor]
    ) -> None:
        parts = split(asked, job.options, job.splitting)
        self._executor = local(replace(job, split=parts))
        self.about = {"members": members_of(job), "samples": parts.to_json()}
        self.where = f"process {os.getpid()} on {socket.gethostname()}"

    def facts(self) -> tuple[Mapping[str, Any], str]:
        """`about` and `where`."""
        return self.about, self.where

    def score(self, ask: Ask) -> CandidateOutcome:
        """One outcome, without the replies, which nobody needs any more."""
        self._executor.submit(ask)
        outcome = self._executor.next()
        slim = [replace(result, samples=(), replies=()) for result in outcome.results]
        return replace(outcome, results=slim)


class RayExecutor:
    """Scores candidates on the workers of a cluster; see `Executor`.

    A candidate whose worker ends is tried once more, on another one.
    """

    def __init__(
        self,
        job: SearchJob,
        *,
        address: str | None = None,
        workers: int = 2,
        local: Callable[[SearchJob], Executor] = Local,
    ) -> None:
        """Keep what workers are made from; they are started by `with`.

        Args:
            job: What is searched.
            address: Of a cluster that runs; None: one is started on this machine.
            workers: How many candidates are scored at once.
            local: The executor inside a worker.

        Raises:
            UsageError: there are fewer than one.
        """
        if workers < 1:
            raise UsageError(f"ray workers must be 1 or more; got {workers}")
        self.workers = workers
        self._job, self._address, self._local = job, address, local
        self._idle: list[Any] = []
        self._waiting: deque[tuple[Ask, int]] = deque()
        self._running: dict[Any, tuple[Any, Ask, int]] = {}  # by what Ray will give
        self._started = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._address is None:
            _stay_at_home()
        self._ray = require("ray", "ray")
        # Ray tells of workers that ended on standard output, which is for results.
        self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            self._connect()
            self._idle = [self._new_worker() for _ in range(self.workers)]
            for worker in self._idle:
                self._check(worker)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in [*self._idle, *(worker for worker, _, _ in self._running.values())]:
            self._ray.kill(worker)
        self._idle, self._running = [], {}
        if self._started:
            self._ray.shutdown()
        self._stack.close()

    def _connect(self) -> None:
        ray = self._ray
        if ray.is_initialized():
            return
        self._started = True
        quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Ray says of its own future
                if self._address is not None:
                    ray.init(address=self._address, **quiet)
                else:
                    ray.init(num_cpus=self.workers, include_dashboard=False, **quiet)
        except Exception as error:  # Ray raises many kinds, of its own and plain ones
            what = "started" if self._address is None else f"reached at {self._address}"
            text = str(error).strip().split("\n")[0]
            raise TaskvecError(f"no Ray cluster can be {what}: {text}") from error

    def _new_worker(self) -> Any:
        """A worker, with an accelerator of its own where the cluster has some."""
        there = self._ray.cluster_resources()
        needs = {"CPU": 1.0}
        if there.get("GPU") and self._job.options.device != "cpu":
            needs["GPU"] = 1.0
        for kind in needs:
            if there.get(kind, 0) < self.workers:
                raise UsageError(
                    f"the cluster has {there.get(kind, 0):g} {kind} for {self.workers} workers, "
                    "which take one each; ask for fewer"
                )
        options = replace(self._job.options, progress=silent)
        job = replace(self._job, options=options, split=Split((), ()))
        names = [each.task.name for each in self._job.split.select]
        asked = [self._job.own.get(name, name) for name in names]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = self._ray.remote(Worker).options(num_cpus=1, num_gpus=needs.get("GPU", 0.0))
            return made.remote(job, asked, self._local)

    def _check(self, worker: Any) -> None:
        """Refuse a worker that sees other files than we do."""
        mine = {"members": members_of(self._job), "samples": self._job.split.to_json()}
        try:
            theirs, where = self._ray.get(worker.facts.remote())
        except self._ray.exceptions.RayActorError as error:
            raise TaskvecError(f"a Ray worker does not start: {_one_line(error)}") from error
        for key, one in mine.items():
            for name, value in one.items():
                if theirs[key].get(name) != value:
                    raise TaskvecError(
                        f"{where} sees other {key} than this process: {name} differs; give all "
                        "machines the same files under the same paths"
                    )

    def submit(self, ask: Ask) -> None:
        """See `Executor`."""
        self._waiting.append((ask, 1))
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and self._idle:
            (ask, tries), worker = self._waiting.popleft(), self._idle.pop(0)
            self._running[worker.score.remote(ask)] = worker, ask, tries

    def next(self) -> CandidateOutcome:
        """See `Executor`."""
        while True:
            (done, *_), _ = self._ray.wait(list(self._running), num_returns=1)
            worker, ask, tries = self._running.pop(done)
            try:
                outcome: CandidateOutcome = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                self._idle.append(self._new_worker())
                if tries == TRIES:
                    self._hand_out()
                    return CandidateOutcome(
                        ask.number, error=f"{TRIES} workers ended over it: {_one_line(error)}"
                    )
                self._waiting.append((ask, tries + 1))
                self._hand_out()
                continue
            self._idle.append(worker)
            self._hand_out()
            return outcome


def _stay_at_home() -> None:
    """Set what makes a cluster of our own report and listen to nobody.

    Raises:
        TaskvecError: Ray was imported before, and would not see it.
    """
    ray = sys.modules.get("ray")
    if ray is None:
        os.environ.update(AT_HOME)
    elif not ray.is_initialized() and AT_HOME.items() - os.environ.items():
        record = " ".join(f"{name}={value}" for name, value in AT_HOME.items())
        raise TaskvecError(
            "Ray was imported before the search, and would listen on all addresses of this "
            f"machine; set {record} before that, or start a cluster yourself with ray.init()"
        )


def _one_line(error: Exception) -> str:
    """What Ray says, in one line."""
    return " ".join(str(error).split())[:300]
