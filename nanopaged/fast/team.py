"""How is work spread over cores that other programs want too? In pieces, each taken by the thread that is free.

torch cuts an operation into one part for each thread, and waits for the last. If another program has taken the core of one
thread, all others wait until it is back: some milliseconds, hundreds of times in a step. Here the work is cut into more
pieces than there are threads. A thread that was put to sleep keeps one piece, and the others take the rest meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import count

import torch

MOST_THREADS = 8  # Python hands out the pieces one at a time; with many cores one that is taken matters less


class Job:
    """Calls to be made, each once, by whoever comes."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = calls
        self.next = count()  # its `__next__` is atomic
        self.left = len(calls)
        self.lock, self.done = threading.Lock(), threading.Event()
        self.error: BaseException | None = None

    def help(self) -> None:
        """Makes calls until none is left to be begun."""
        while (i := next(self.next)) < len(self.calls):
            try:
                self.calls[i]()
            except BaseException as error:
                self.error = error
            with self.lock:
                self.left -= 1
                if self.left == 0:
                    self.done.set()


class Team:
    """The calling thread and `num_threads - 1` others, which sleep while there is nothing to do."""

    def __init__(self, num_threads: int) -> None:
        self.wakers = [threading.Semaphore(0) for _ in range(num_threads - 1)]
        self.job: Job | None = None
        self.busy = threading.Lock()
        ready = threading.Barrier(num_threads)
        for waker in self.wakers:
            threading.Thread(target=self._work, args=(waker, ready), daemon=True, name="nanopaged-team").start()
        ready.wait()

    def __len__(self) -> int:
        return 1 + len(self.wakers)

    def run(self, calls: Sequence[Callable[[], object]]) -> None:
        """Makes all calls, in any order, on any thread, each with one thread of torch. Raises what one of them raised.

        If the team works for somebody else, this thread makes them alone.
        """
        if not calls:
            return
        job, threads = Job(calls), torch.get_num_threads()
        torch.set_num_threads(1)
        helped = self.busy.acquire(blocking=False)
        try:
            if helped:
                self.job = job
                for waker in self.wakers:
                    waker.release()
            job.help()
            job.done.wait()
        finally:
            if helped:
                self.job = None  # its calls hold tensors
                self.busy.release()
            torch.set_num_threads(threads)
        if job.error is not None:
            raise job.error

    @torch.inference_mode()  # belongs to a thread, and so must be said in each
    def _work(self, waker: threading.Semaphore, ready: threading.Barrier) -> None:
        torch.set_num_threads(1)
        ready.wait()
        while True:
            waker.acquire()
            if (job := self.job) is not None:  # else it was done before this thread woke up
                job.help()


_team: Team | None = None


def team() -> Team | None:
    """This process's, made when it is first wanted; None where torch has one thread, or more than a team is for."""
    global _team
    threads = torch.get_num_threads()
    if _team is None and 1 < threads <= MOST_THREADS:
        _team = Team(threads)
        torch.set_num_threads(threads)  # the number that new threads begin with is that of the last call
    return _team


def _forget() -> None:
    global _team
    _team = None  # in a fork there is only the thread that forked


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
