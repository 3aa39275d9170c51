from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from page_folders import until

ROOT = Path(__file__).resolve().parents[2]

DRIVER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from gsoft_diffusion.foundation.processes import end_with_parent

def work():
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context(sys.argv[1]), end_with_parent) as pool:
        pool.submit(work).result()
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_worker_ends_when_the_process_that_started_it_is_killed(tmp_path, method):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), method]
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path) as driver:
        worker = psutil.Process(int(driver.stdout.readline()))
        driver.send_signal(signal.SIGKILL)
        until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "end of the worker")
