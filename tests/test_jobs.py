"""Tests of jobs.py: order, errors, and processes that do not outlive the one that started them."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from nanorlhf.errors import UserError
from nanorlhf.jobs import Job, next_ready, run_jobs


def note(folder, name, needs):
    assert all((folder / n).exists() for n in needs), f"{name} started before {needs}"
    (folder / name).write_text(str(torch.get_num_threads()))
    print(f"this is {name}")


def fail(folder):
    raise UserError("the file is bad")


def sleep(folder):
    (folder / "sleeping").write_text(str(os.getpid()))
    time.sleep(60)


def jobs_of(folder, needs_of, function=note):
    return [Job(name, needs, str(folder / "logs" / f"{name}.txt"), function, (folder, name, needs))
            for name, needs in needs_of.items()]


NEEDS = {"d": ("b", "c"), "b": ("a",), "c": ("a",), "a": ()}


def test_jobs_one_at_a_time_run_in_this_process(tmp_path, capsys):
    run_jobs(jobs_of(tmp_path, NEEDS), 1)
    said = capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == set("abcd") and "[4/4] d" in said and "this is d" in said


def test_side_by_side_a_job_starts_after_those_that_it_needs_and_alone_it_has_all_threads(tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run_jobs(jobs_of(tmp_path, NEEDS), 2)
    finally:
        torch.set_num_threads(before)
    assert {name: (tmp_path / name).read_text() for name in "abcd"} == {"a": "2", "b": "1", "c": "1", "d": "2"}
    said = capsys.readouterr().out
    assert "[4/4] d: finished" in said and "this is d" not in said
    assert (tmp_path / "logs" / "d.txt").read_text() == "this is d\n"


def test_a_need_that_is_no_job_counts_as_finished_and_a_circle_is_seen():
    job = Job("b", ("gone",), "", None, ())
    assert next_ready([job]) == 0 and next_ready([job._replace(needs=("b2",)), job._replace(name="b2", needs=("b",))]) is None


def test_an_error_stops_the_others_and_is_raised(tmp_path):
    jobs = [Job("slow", (), str(tmp_path / "slow.txt"), sleep, (tmp_path,)),
            Job("bad", (), str(tmp_path / "bad.txt"), fail, (tmp_path,))]
    start = time.monotonic()
    with pytest.raises(UserError, match="the file is bad"):
        run_jobs(jobs, 2)
    assert time.monotonic() - start < 40


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, how):
    program = ("import sys; sys.path.insert(0, 'tests'); from pathlib import Path; import test_jobs as t; "
               f"folder = Path({str(tmp_path)!r})\n"
               "if __name__ == '__main__':\n    t.run_jobs([t.Job('s', (), str(folder / 's.txt'), t.sleep, (folder,))], 2)")
    (tmp_path / "main.py").write_text(program)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "main.py")], cwd=ROOT, stderr=subprocess.DEVNULL,
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                              env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    file = tmp_path / "sleeping"
    wait_until(lambda: file.exists() and file.read_text())
    parent.send_signal(how)
    parent.wait(30)
    wait_until(lambda: not alive(int(file.read_text())))


def wait_until(condition, seconds=50):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
