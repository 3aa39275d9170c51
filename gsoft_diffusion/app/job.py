"""The process of one job: a command with the settings in the job's folder, and at its end how it ended.

python -m gsoft_diffusion.app.job outputs/app/jobs/0001
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from pathlib import Path

from gsoft_diffusion import commands
from gsoft_diffusion.app.workspace import read_json, write_json

JOB, PROCESS, END, SETTINGS, LOG = "job.json", "process.json", "end.json", "settings.yaml", "log.txt"
COMMANDS = {"train": commands.train, "draw": commands.draw, "export": commands.export}


def main(folder: Path) -> int:
    """Run the job in the folder. Returns the command's exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also before the run listens, it ends with a word
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a wish to see pictures ends no run that cannot draw yet
    kind = str(read_json(folder / JOB).get("kind"))
    sys.argv = [f"gsoft-{kind}", "--config", str(folder / SETTINGS)]
    status = 1
    try:
        COMMANDS[kind]()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        status = 130
    except Exception:
        traceback.print_exc()
    finally:
        write_json(folder / END, {"status": status, "time": time.time()})
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
