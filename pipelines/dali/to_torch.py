"""Hands batches over to torch."""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Release = Callable[[], None]

MOST_HELD = 4  # DALI batches to hold; each takes memory


class HandOver:
    """Gives the batches of an `ImagePipeline` to torch; on a GPU in the order of torch's current stream.

    The host waits only if it is more than `MOST_HELD` batches ahead of the device.

    On a CPU they are in torch's memory already. A batch on a GPU is DALI's, and torch's kernels read it some time after they
    were queued. DALI refills a buffer as soon as nobody in Python holds it, in the order of its own stream
    (neither `PopOutputs` in its exec2.cc nor `GetSharedDLTensor` in its dltensor.h sets another). So the batch is copied into
    torch's memory, which torch's allocator reuses only after the stream has finished with it. DALI's buffer is held until the
    copy is done. An H100 copies at 3 TB/s of reads and writes: 256 images of 224 pixels in half precision take 0.05 ms.

    Args:
        device: Device of the batches.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._held = deque[tuple[Tensor, Release, torch.cuda.Event]]()

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The stream that uses the batch; None on a CPU."""
        return torch.cuda.current_stream(self._device) if self._is_cuda else None

    def __call__(self, batch: Tensor, release: Release = lambda: None) -> Tensor:
        """Returns a batch that the caller may keep.

        Args:
            batch: The batch; on a GPU in DALI's buffer.
            release: Called once DALI no longer needs the input of the batch.
        """
        if not self._is_cuda:
            release()
            return batch
        owned = batch.clone()
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._held.append((batch, release, copied))
        self._release_copied()
        return owned

    def _release_copied(self) -> None:
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
