"""Many runs at once: each starts as soon as the runs that it reads are finished.

A model of half a million weights cannot keep two cores busy: on two cores, two runs side by side with one thread each take
0.7 of the time that they take one after the other with two threads each.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Callable, NamedTuple

import torch


class Job(NamedTuple):
    name: str                        # unique
    needs: tuple                     # names of the jobs that must be finished before it starts
    log: str                         # file for what it prints, unless jobs run one at a time
    function: Callable               # defined at the top of a module, so that another process can import it
    arguments: tuple


def run_jobs(jobs, processes=0):
    """Calls function(*arguments) of every job, at most `processes` at a time; 0 means one per core, and one on a GPU. Jobs start in
    order, each once those that it needs are finished; a name that is not among the jobs counts as finished.

    The first error of a job stops the others and is raised here. Every function must therefore survive being killed.
    """
    cores = torch.get_num_threads()
    processes = processes or (1 if torch.cuda.is_available() else cores)
    waiting, running, names, started = list(jobs), {}, {job.name for job in jobs}, time.monotonic()

    def say(job, text=""):
        print(f"[{len(names) - len(waiting)}/{len(names)}] {job.name}{text}", flush=True)

    if processes == 1:
        while waiting:
            say(job := waiting.pop(next_ready(waiting)))
            job.function(*job.arguments)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), begin_worker)
    try:
        while waiting or running:
            while len(running) < processes and (i := next_ready(waiting, running.values())) is not None:
                job = waiting.pop(i)
                alone = not running and next_ready(waiting, [job]) is None
                threads = cores if alone else max(1, cores // processes)
                running[pool.submit(call, job, threads)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                job = running.pop(future)
                say(job, f": finished, {time.monotonic() - started:.0f} s after the start; {len(running)} running")
    finally:
        for process in multiprocessing.active_children():                              # none is busy unless a job failed
            process.terminate()
        pool.shutdown(cancel_futures=True)


def next_ready(waiting, running=()):
    """Returns the index of the first waiting job that needs no other waiting or running one, or None."""
    unfinished = {job.name for job in [*waiting, *running]}
    return next((i for i, job in enumerate(waiting) if not unfinished & set(job.needs)), None)


def begin_worker():
    """Lets Ctrl-C, and the end of the process that started this one, end it at once and silently."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def call(job, threads):
    torch.set_num_threads(threads)
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        job.function(*job.arguments)
