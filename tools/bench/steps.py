"""A turn of `tools.bench.shared` in a process of its own: `python -m tools.bench.steps TASK`.

TASK is a JSON list: images per step, image side, threads of torch, seconds. The last line of output is a JSON object.
"""

import itertools
import json
import sys
import time

import torch

from model.distributed import alone
from tools.considerate import LOOK_SECONDS, TRIAL_SECONDS, considerate_threads
from tools.run.config import Config
from tools.throughput.loops import make_trainer


def main() -> None:
    batch_size, image_size, torch_threads, seconds = json.loads(sys.argv[1])
    torch.set_num_threads(torch_threads)
    config = Config(epochs=1000, batch_size=batch_size, image_size=image_size)
    device = torch.device("cpu")
    run = make_trainer(config, alone(device), None, 1)
    run()
    with considerate_threads(device, is_fixed=False) as adapt_threads:
        settled = time.perf_counter() + 3 * LOOK_SECONDS + 2 * TRIAL_SECONDS
        while time.perf_counter() < settled:
            adapt_threads()
            run()
        started, cpu = time.perf_counter(), time.process_time()
        for steps in itertools.count(1):  # noqa: B007  (used below)
            adapt_threads()
            run()
            if (passed := time.perf_counter() - started) >= seconds:
                break
    images = steps * batch_size
    used = time.process_time() - cpu
    print(json.dumps({"images_per_second": images / passed, "cpu_milliseconds": 1000 * used / images}))


if __name__ == "__main__":
    main()
