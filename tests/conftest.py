"""Models that several tests share; they are built once per session and nobody may change their weights."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    """Every test begins with the same random numbers, whichever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Torch computes on one thread, as in the processes that a test starts: sums come out to the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny():
    """(model, tokenizer): Llama-style, 2 layers of width 32 in fp32, characters, with a chat template."""
    from guerdon.language.models import load_model

    return load_model("tiny:layers=2,width=32,heads=4,context=512")


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer): SmolLM2-135M-Instruct in fp32; converted the first time on a machine, which takes longer."""
    from guerdon.language.models import load_model

    return load_model("smollm2-135m")
