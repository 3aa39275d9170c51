"""The queue: each job is a process of its own, and what is known of it is in its folder."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
from page_folders import ended, until

from gsoft_diffusion.adapters.file import read_adapter
from gsoft_diffusion.app import job as job_module
from gsoft_diffusion.app import jobs as jobs_module
from gsoft_diffusion.app.job import END, LOG, PROCESS
from gsoft_diffusion.app.jobs import Jobs
from gsoft_diffusion.app.workspace import read_json, write_json
from gsoft_diffusion.foundation.errors import UserError


def running(jobs, number):
    """The job once its process has said that it is there."""
    return until(lambda: "asleep" in jobs.job(number).lines() and jobs.job(number), "process")


def test_one_at_a_time_the_others_say_their_place(jobs, sleeping):
    first, second, third = (jobs.add("train" if at < 2 else "draw", f"run-{at}", {}) for at in range(3))
    assert [job.state for job in jobs.all()] == ["running", "waiting", "waiting"]
    assert [job.place for job in jobs.all()] == [0, 1, 2]
    jobs.stop(third)
    assert jobs.job(third.number).state == "withdrawn"
    running(jobs, first.number)
    jobs.stop(first)
    assert ended(jobs, first).state == "stopped"
    running(jobs, second.number)


def test_the_order_stays_when_numbers_have_more_digits(workspace, jobs):
    for number in ("9998", "9999"):
        (workspace.jobs / number).mkdir()
        write_json(workspace.jobs / number / "job.json", {"kind": "train", "run": number})
    jobs.advance = lambda: None
    jobs.add("train", "last", {})
    assert [(job.number, job.place) for job in jobs.all()] == [("9998", 0), ("9999", 1), ("10000", 2)]


def test_exports_do_not_wait_for_the_device(jobs, sleeping):
    jobs.add("train", "dog", {})
    assert jobs.add("export", "dog", {}).state == "running"
    assert jobs.add("export", "dog", {}).place == 1


def test_no_gpu_is_shown_to_a_job_that_did_not_wait_for_it(jobs, monkeypatch):
    started = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(jobs_module.subprocess, "Popen", lambda command, **options: started.append(options["env"]))
    for kind in ("export", "train"):
        with pytest.raises(AttributeError):  # there is no process
            jobs.add(kind, "a", {})
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in started] == ["", None]


def test_the_queue_survives_the_page(workspace, jobs, sleeping):
    first, second = jobs.add("train", "dog", {}), jobs.add("train", "cat", {})
    running(jobs, first.number)
    again = Jobs(workspace)
    assert [(job.run, job.state) for job in again.all()] == [("dog", "running"), ("cat", "waiting")]
    again.advance()
    assert again.job(second.number).state == "waiting"  # no second one beside the first
    again.stop(first)
    jobs._children[first.number].wait()
    again.advance()
    assert [job.state for job in again.all()] == ["stopped", "running"]
    running(again, second.number)
    again._children[second.number].kill()


def test_a_process_that_was_killed_is_lost_and_the_next_begins(jobs, sleeping):
    first, second = jobs.add("train", "dog", {}), jobs.add("train", "cat", {})
    os.kill(running(jobs, first.number).pid, signal.SIGKILL)
    assert ended(jobs, first).state == "lost"
    assert jobs.job(first.number).error() == (
        "its process ended without a word, as when memory runs out or the machine is switched off; "
        "the last it said: asleep"
    )
    assert jobs.job(second.number).state == "running"


def test_a_job_that_cannot_listen_is_killed_after_a_while_and_counts_as_stopped(jobs, monkeypatch):
    """Stuck in native code, no handler of Python's runs."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('asleep', flush=True);"
    code += "time.sleep(60)"
    real = subprocess.Popen
    monkeypatch.setattr(
        jobs_module.subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", code], **options)
    )
    job = jobs.add("train", "dog", {})
    assert not running(jobs, job.number).stopping
    jobs.stop(job)
    jobs.advance()
    assert jobs.job(job.number).stopping
    jobs.stop(job, at_once=True)
    jobs.advance()
    assert jobs.job(job.number).state == "running"  # it has a while to end by itself
    monkeypatch.setattr(jobs_module, "GRACE", 0.0)
    jobs.stop(job, at_once=True)
    assert ended(jobs, job).state == "stopped"


def test_a_job_that_was_stopped_before_it_listened_was_not_lost(jobs, sleeping):
    job = jobs.add("train", "dog", {})
    jobs.stop(job)
    os.kill(jobs.job(job.number).pid, signal.SIGKILL)
    assert ended(jobs, job).state == "stopped"


def test_a_process_number_that_went_to_another_is_not_taken_for_the_job(workspace, jobs):
    folder = workspace.jobs / "0001"
    folder.mkdir()
    write_json(folder / "job.json", {"kind": "train", "run": "dog"})
    write_json(folder / PROCESS, {"pid": os.getpid(), "created": psutil.Process().create_time() - 100})
    job = jobs.job("0001")
    assert job.state == "lost"
    jobs.stop(job)  # would end this test


def test_a_page_that_starts_anew_knows_of_a_process_that_has_said_nothing_yet(workspace, jobs, sleeping):
    number = jobs.add("train", "dog", {}).number
    again = Jobs(workspace)
    again.advance()  # would start it once more
    assert (again.job(number).state, again.job(number).pid) == ("running", jobs.job(number).pid)


def test_a_process_that_nobody_could_find_again_is_ended(jobs, sleeping, monkeypatch):
    """On a full disk; the job waits until there is room."""
    started, real = [], subprocess.Popen
    monkeypatch.setattr(
        jobs_module.subprocess, "Popen", lambda *given, **by: started.append(real(*given, **by)) or started[-1]
    )
    monkeypatch.setattr(jobs_module, "write_json", full_for(PROCESS))
    with pytest.raises(UserError, match="No space left on device"):
        jobs.add("train", "dog", {})
    assert [child.returncode for child in started] == [-signal.SIGKILL]
    assert [job.state for job in jobs.all()] == ["waiting"]


def full_for(name):
    """What writes a job's files, but for the one of that name."""

    def write(path, values):
        if path.name == name:
            raise UserError(f"cannot write {path}: No space left on device")
        write_json(path, values)

    return write


@pytest.mark.parametrize("facts", ["", "{", "[]", "{}", '{"kind": "train"}', '{"kind": "dance", "run": "dog"}'])
def test_a_job_whose_file_says_nothing_stops_no_other(workspace, jobs, sleeping, facts):
    (workspace.jobs / "0001").mkdir()
    (workspace.jobs / "0001" / "job.json").write_text(facts)
    assert jobs.add("train", "dog", {}).number == "0002"
    assert [(job.number, job.state) for job in jobs.all()] == [("0002", "running")]


def test_an_error_that_nobody_foresaw_is_said_once_and_the_queue_goes_on(jobs, monkeypatch, capsys):
    looks = []

    def advance():
        looks.append(1)
        if len(looks) < 4:
            raise KeyError("kind")

    monkeypatch.setattr(jobs_module, "EVERY", 0.01)
    monkeypatch.setattr(jobs, "advance", advance)
    jobs.start()
    until(lambda: len(looks) > 5, "look at the queue after the error")
    assert capsys.readouterr().err == "note: the queue cannot start what waits ('kind'); it tries again\n"


def test_a_job_whose_end_cannot_be_read_is_lost(workspace, jobs):
    folder = workspace.jobs / "0001"
    folder.mkdir()
    write_json(folder / "job.json", {"kind": "train", "run": "dog"})
    write_json(folder / PROCESS, {"pid": os.getpid(), "created": 0.0})
    (folder / END).write_text("{")
    assert jobs.job("0001").state == "lost"


def test_a_wish_to_see_pictures_reaches_the_process(jobs, sleeping):
    job = running(jobs, jobs.add("train", "dog", {}).number)
    jobs.draw_now(job)
    until(lambda: "asked to draw" in job.lines(), "word of the wish")


def test_the_page_starts_what_waits_by_itself(jobs, sleeping, monkeypatch):
    monkeypatch.setattr(jobs_module, "EVERY", 0.05)
    first, second = jobs.add("train", "dog", {}), jobs.add("train", "cat", {})
    jobs.start()
    os.kill(running(jobs, first.number).pid, signal.SIGKILL)
    running(jobs, second.number)


def test_the_log_is_shown_as_a_terminal_would(jobs, sleeping):
    job = jobs.add("train", "dog", {})
    lines = "a note\n 1/3\r 2/3\r 3/3\r\n\n" + "error: one\nerror: two\n"
    (job.folder / LOG).write_text(lines)
    assert job.lines() == ["a note", "3/3", "error: one", "error: two"]
    (job.folder / LOG).write_text("first\n" + "x" * 100 * 1000 + "\nlast\n")
    assert (job.lines()[0], job.lines()[-1]) == ("first", "last")


@pytest.mark.parametrize(
    ("status", "log", "error"),
    [
        (2, "error: no photos\n", "no photos"),
        (1, "Traceback\nValueError: x\n", "it ended unexpectedly; the last it said: ValueError: x"),
        (0, "error: this was long ago\n", ""),
        (130, "stopped\n", ""),
    ],
)
def test_what_went_wrong_is_said_in_a_line(jobs, sleeping, status, log, error):
    job = running(jobs, jobs.add("train", "dog", {}).number)  # so that its process says nothing afterwards
    (job.folder / LOG).write_text(log)
    write_json(job.folder / END, {"status": status})
    assert ended(jobs, job).error() == error


def test_silence_is_measured_from_the_last_word(jobs, sleeping, tmp_path):
    job = running(jobs, jobs.add("train", "dog", {}).number)
    now = time.time()
    for path, age in ((job.folder / LOG, 500), (job.folder / "job.json", 900), (tmp_path / "progress", 300)):
        path.touch()
        os.utime(path, (now - age, now - age))
    assert 290 < job.silent_for(tmp_path / "progress") < 320
    assert 490 < job.silent_for() < 520


def test_a_full_disk_is_said_when_a_job_is_added(jobs, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs_module.Path, "mkdir", full)
    with pytest.raises(UserError, match="No space left on device"):
        jobs.add("train", "dog", {})


# With real commands


@pytest.mark.slow
def test_a_training_is_the_command_with_its_settings(jobs, run_settings, workspace):
    job = ended(jobs, jobs.add("train", "dog", run_settings))
    assert job.state == "done", job.lines()
    assert read_adapter(workspace.root / "dog").training["step"] == 4
    bad = ended(jobs, jobs.add("train", "dog", run_settings))
    assert (bad.state, "holds another run's result" in bad.error()) == ("failed", True)


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_a_line(jobs, run_settings, monkeypatch):
    real = subprocess.Popen

    def limited(command, **options):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))

        return real(command, preexec_fn=limit, **options)

    monkeypatch.setattr(jobs_module.subprocess, "Popen", limited)
    job = ended(jobs, jobs.add("train", "dog", run_settings))
    assert job.state == "failed"
    assert "cannot" in job.error()
    assert "File too large" in job.error()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (lambda: sys.exit(2), 2),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 130),
        (lambda: (os.kill(os.getpid(), signal.SIGUSR1), sys.exit(0)), 0),
        (lambda: 1 / 0, 1),
    ],
)
def test_a_job_says_how_it_ended(tmp_path, monkeypatch, command, status):
    """A signal before the run listens for it ends the job with a word; a wish to see pictures then ends nothing."""
    write_json(tmp_path / "job.json", {"kind": "train", "run": "dog"})
    monkeypatch.setitem(job_module.COMMANDS, "train", command)
    monkeypatch.setattr(sys, "argv", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        assert job_module.main(tmp_path) == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert read_json(tmp_path / END)["status"] == status


def test_what_an_open_job_needs_is_not_deleted(workspace, jobs, sleeping):
    run, photos = workspace.root / "dog", workspace.subjects / "rex" / "photos"
    other = workspace.subjects / "rex-2"
    for folder in (run, photos, other):
        folder.mkdir(parents=True)
    job = jobs.add("train", "dog", {"output_dir": str(run), "concepts": [{"instance_data_dir": str(photos)}]})
    for folder in (run, photos.parent):
        with pytest.raises(UserError, match=rf"{folder.name}: is needed by dog, which runs or waits \(train\)"):
            jobs.delete(folder)
    jobs.delete(other)
    assert (run.is_dir(), photos.is_dir(), other.exists()) == (True, True, False)
    running(jobs, job.number)
    jobs.stop(job)
    ended(jobs, job)
    jobs.delete(photos.parent)
    assert not photos.exists()
    assert jobs.job(job.number).state == "stopped"  # it was about the run, which is still there


def test_no_run_gets_the_name_of_one_that_was_deleted(workspace, jobs, sleeping):
    (workspace.root / "dog").mkdir()
    job = jobs.add("train", "dog", {})
    running(jobs, job.number)
    (job.folder / END).write_text('{"status": 2}')
    assert jobs.job(job.number).error()
    jobs.delete(workspace.root / "dog")
    assert not jobs.job(job.number).error()
    assert workspace.new_run("dog").name == "dog-2"
    assert not list(workspace.deleted.iterdir())


@pytest.mark.parametrize("path", ["outputs/cat/merged", "link/merged", "{root}/cat/../cat/merged"])
def test_a_job_may_name_what_it_needs_in_any_way(workspace, jobs, sleeping, monkeypatch, path):
    (workspace.root / "cat" / "merged").mkdir(parents=True)
    (workspace.root.parent / "link").symlink_to(workspace.root / "cat")
    monkeypatch.chdir(workspace.root.parent)
    named = path.format(root=workspace.root)
    jobs.add("train", "dog", {"pretrained_model_name_or_path": named, "prompts": ["a cat"]})
    with pytest.raises(UserError, match="cat: is needed by dog"):
        jobs.delete(workspace.root / "cat")


def test_a_prompt_that_looks_like_a_home_folder_is_no_path(workspace, jobs, sleeping):
    (workspace.root / "cat").mkdir()
    jobs.add("draw", "dog", {"prompts": ["~ a dog", "a\0b"]})
    jobs.delete(workspace.root / "cat")
    assert not (workspace.root / "cat").exists()


def test_what_was_left_half_deleted_is_gone_when_the_page_starts(workspace, jobs):
    (workspace.deleted / "abc" / "photos").mkdir(parents=True)
    jobs.start()
    assert not list(workspace.deleted.iterdir())


def test_a_run_that_a_command_writes_to_is_not_deleted(workspace, jobs):
    run = workspace.root / "dog"
    run.mkdir()
    code = "import sys; from pathlib import Path; from gsoft_diffusion.foundation.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"dog: process {other.pid} on .* is writing to it; wait"):
            jobs.delete(run)
        other.stdin.close()
    jobs.delete(run)
    assert not run.exists()
