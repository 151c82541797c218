"""A turn of `tools.bench.shared` in a process of its own: `python -m tools.bench.steps TASK BUSY`.

TASK is a JSON list: images per step, image side, threads of torch, seconds. BUSY is the number of busy processes beside this
one. The last line of output is a JSON object.
"""

import itertools
import json
import shlex
import subprocess
import sys
import time

import torch

from model.distributed import alone
from tools.considerate import LOOK_SECONDS, considerate_threads
from tools.run.config import Config
from tools.throughput.loops import make_trainer


def main() -> None:
    batch_size, image_size, torch_threads, seconds = json.loads(sys.argv[1])
    _start_busy(int(sys.argv[2]))
    torch.set_num_threads(torch_threads)
    config = Config(epochs=1000, batch_size=batch_size, image_size=image_size)
    device = torch.device("cpu")
    run = make_trainer(config, alone(device), None, 1)
    run()
    with considerate_threads(device, is_fixed=False) as threads:
        settled = time.perf_counter() + 3 * LOOK_SECONDS
        while time.perf_counter() < settled or threads.is_trying:
            threads.adapt()
            run()
        started, cpu = time.perf_counter(), time.process_time()
        for steps in itertools.count(1):  # noqa: B007  (used below)
            threads.adapt()
            run()
            if (passed := time.perf_counter() - started) >= seconds:
                break
    images = steps * batch_size
    used = time.process_time() - cpu
    print(json.dumps({"images_per_second": images / passed, "cpu_milliseconds": 1000 * used / images}))


def _start_busy(number: int) -> None:
    """Starts processes that compute until the group of this process is killed, or for ten minutes.

    They are no descendants of this process, as other programs are not. But they belong to its session: Linux shares the cores
    between sessions first (autogroups, man 7 sched), so several in a session of their own would count as one.
    """
    busy = shlex.join([sys.executable, "-c", "while True: pass"])
    subprocess.run(["sh", "-c", "ulimit -t 600;" + f"{busy} > /dev/null 2>&1 &" * number], check=True)


if __name__ == "__main__":
    main()
