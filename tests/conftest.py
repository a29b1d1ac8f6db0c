"""What several test files share."""

import random

import pytest
import torch


@pytest.fixture(scope="session")
def tiny():
    """A small tokenizer that depends on nothing else."""
    from nanorlhf import data
    words = "the cat sat on the mat and the dog sat too ; isn't it 12 34 nice , we've seen it all".split()
    rng = random.Random(0)
    return data.train_bpe([" ".join(rng.choices(words, k=200)) for _ in range(20)], 320)


@pytest.fixture(scope="module")
def one_thread():
    """Bits must not depend on how many cores were free; and tiny matrices are faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
