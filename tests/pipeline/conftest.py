"""What all tests of the pipeline share."""

import pytest
import torch
from hypothesis import settings

# the same examples in every run, and no limit of time for each: the machine may be busy
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tensors this small, torch's threads cost more in waiting for each other than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
