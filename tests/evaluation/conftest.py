"""What all tests of the evaluation share."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For tensors this small, torch's threads cost more in waiting for each other than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
