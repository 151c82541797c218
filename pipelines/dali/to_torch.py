"""How DALI's batches become torch's."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Release = Callable[[], None]

MOST_HELD = 4  # batches of DALI's, each of which takes memory


class HandOver:
    """Gives DALI's batches to torch; on a GPU in the order of torch's current stream.

    The host waits only where it is more than `MOST_HELD` batches ahead of the device.

    On a CPU the tensor takes over DALI's buffer. On a GPU that would not be safe: torch's kernels read the batch some time
    after they were queued, and a buffer goes back to DALI, which fills it again, as soon as nobody in Python holds it. DALI
    knows nothing of torch's stream then: it frees in the order of its own (`PopOutputs` in its exec2.cc sets no other, nor
    does `GetSharedDLTensor` in its dltensor.h). So the batch is copied into torch's memory, which torch's allocator gives to
    nobody else before the stream is through with it, and DALI's buffer is held until the copy is done. At the rate at which
    an H100 copies its memory, 3 TB/s of reads and writes, 256 images of 224 pixels in half precision take 0.05 ms.

    Args:
        device: Where the batches lie.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._held = deque[tuple[Tensor, Release, torch.cuda.Event]]()

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream in which the batch is wanted; None on a CPU."""
        return torch.cuda.current_stream(self._device) if self._is_cuda else None

    def __call__(self, batch: Any, release: Release = lambda: None) -> Tensor:
        """A batch of DALI's, one dense tensor, as torch's.

        Args:
            batch: DALI's.
            release: Called once DALI is through with what it made the batch of.
        """
        shared = from_dlpack(batch)
        if not self._is_cuda:
            release()
            return shared
        owned = shared.clone()
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._held.append((shared, release, copied))
        self._let_go()
        return owned

    def _let_go(self) -> None:
        while self._held:
            _, release, copied = self._held[0]
            if len(self._held) > MOST_HELD:
                copied.synchronize()
            elif not copied.query():
                return
            self._held.popleft()
            release()

    def close(self) -> None:
        """Waits for the copies under way."""
        for _, _, copied in self._held:
            copied.synchronize()
        self._held.clear()
