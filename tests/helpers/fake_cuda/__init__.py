"""The training step on a CUDA device that is not there: torch's fake tensors have shapes, strides and devices, but no data.

They show which operations a step is made of, and so where the host would wait for the device. They show no values and no times.
They show nothing of what happens inside an operation, so a wait there is found only if `watch.py` knows the operation for it,
and nothing of the driver, which may wait where a copy from memory that is not pinned was asked not to.

All of this changes torch for the whole process, so it runs in its own: `python -m tests.helpers.fake_cuda GUARD REPORT`.
"""
