"""Many runs at once: each starts as soon as the runs that it reads are finished.

A model of half a million weights cannot keep two cores busy: on two cores, two runs side by side with one thread each take
0.7 of the time that they take one after the other with two threads each.
"""

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch

from nanorlhf.files import read_json, write_json


class Job(NamedTuple):
    name: str                        # unique
    needs: tuple                     # names of the jobs that must be finished before it starts
    log: str                         # file for what it prints, unless jobs run one at a time
    function: Callable               # defined at the top of a module, so that another process can import it
    arguments: tuple


def run_jobs(jobs, processes=0):
    """Calls function(*arguments) of every job, at most `processes` at a time; 0 means one per core, and one on a GPU. Jobs start
    in order, each once those that it needs are finished; a name that is not among the jobs counts as finished.

    The first error of a job, or Ctrl-C, stops the others and is raised here: a run of a script ends its step and saves, and other
    functions are interrupted. A second Ctrl-C kills them, so every function must survive that.
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
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, begin_worker, (stop,))
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
    except BaseException:
        stop.set()
        print(f"stopping {', '.join(job.name for job in running.values())}: each ends its step and saves", flush=True)
        raise
    finally:
        try:
            pool.shutdown(cancel_futures=True)
        except BaseException:
            for process in multiprocessing.active_children():
                process.kill()
            raise


def next_ready(waiting, running=()):
    """Returns the index of the first waiting job that needs no other waiting or running one, or None."""
    unfinished = {job.name for job in [*waiting, *running]}
    return next((i for i, job in enumerate(waiting) if not unfinished & set(job.needs)), None)


STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)
stopping = None                      # in a worker: the event that ends its job


def begin_worker(stop):
    """Ctrl-C in the terminal reaches the workers too, but the parent decides: it sets the event `stop`. The end of the parent is
    the worker's end at once."""
    global stopping
    stopping = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(STOP, lambda number, frame: None)                # between jobs
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    threading.Thread(target=lambda: (stop.wait(), interrupt_worker()), daemon=True).start()


def interrupt_worker():
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, STOP)       # the main thread may be waiting for something
    else:                                                          # Windows
        os._exit(1)


def call(job, threads):
    """Runs a job in a worker. The event `stop` interrupts it; a run of a script handles that itself while it takes steps."""
    before = signal.signal(STOP, signal.default_int_handler)                           # raises KeyboardInterrupt
    try:
        if stopping.is_set():
            raise KeyboardInterrupt
        torch.set_num_threads(threads)
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            job.function(*job.arguments)
    finally:
        signal.signal(STOP, before)


# ---- Runs of scripts as jobs ----------------------------------------------------------------------------------------


def run_stage(script, options, out):
    """Runs or resumes one run of a script in the folder `out`, and notes its seconds there. script: the module's name."""
    script, started = importlib.import_module(script), time.monotonic()
    resume = (Path(out) / "run.json").exists()
    start = script.sample if hasattr(script, "sample") else script.train
    start(script.Config(**options, out=out, resume=resume))
    write_json(Path(out) / "seconds.json", {"seconds": round(time.monotonic() - started, 1), "resumed": resume})


def is_finished(folder):
    """True if the folder holds a finished run of a script."""
    file = Path(folder) / "run.json"
    return file.exists() and bool(read_json(file).get("finished"))


def stages_needed(stages, root):
    """Returns {name: names of the stages whose folders below `root` its options name}. stages: (name, script, options)."""
    pattern = re.compile(rf"{re.escape(str(root))}/([^/,]+)")
    named = {name: set(pattern.findall(",".join(map(str, options.values())))) for name, _, options in stages}
    return {name: tuple(n for n in named if n in found) for name, found in named.items()}


def stage_jobs(root, stages, prefix=""):
    """Returns the stages (name, script module, options) as Jobs called prefix + name. Their folders lie in `root`; what they
    print goes to FOLDER.log if several run at a time."""
    needs = stages_needed(stages, root)
    return [Job(prefix + name, tuple(prefix + n for n in needs[name]), f"{root}/{name}.log", run_stage,
                (script.__name__, options, f"{root}/{name}")) for name, script, options in stages]
