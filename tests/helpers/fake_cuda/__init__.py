"""The training step on a fake CUDA device: torch's fake tensors have shapes, strides, and devices, but no data.

They show the operations of a step, and so where the host would wait for the device. They show neither values nor times. Waits
inside an operation are found only if `watch.py` lists the operation. Waits of the driver are not found: it may wait for a
non-blocking copy from memory that is not pinned.

This changes torch for the whole process, so it runs in its own: `python -m tests.helpers.fake_cuda GUARD REPORT`.
"""
