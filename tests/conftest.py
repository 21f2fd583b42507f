"""Set-up shared by all tests: Triton's interpreter where there is no GPU, one thread, a seeded global random state."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state for every test."""
    torch.manual_seed(0)
