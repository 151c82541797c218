"""The OpenMP threads of torch on a CPU."""

import ctypes

import torch

_openmp = ctypes.CDLL(torch._C.__file__)  # finds the symbols of the OpenMP library that torch uses


def use_threads(number: int) -> None:
    """Lets torch's operators use so many threads in the calling thread. Other threads keep their number."""
    torch.get_num_threads()  # torch's first use in a thread sets the number
    _openmp.omp_set_num_threads(number)
