"""A model of each family, for all modules of this folder."""

import pytest
import torch
from family_cases import family_case
from models import VLM_CASES


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny matrices gain nothing from threads, and waiting ones cost much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=VLM_CASES)
def family(request):
    """A stock model of the family with inputs: two prompts, one padded, one with several images."""
    return family_case(request.param)
