"""Two models trained at once in two threads of a process: each as if it were alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from fedlora.model.client_rows import ClientRows
from fedlora.model.packed_attention import (
    PackingError,
    attending,
    recomputing,
    running_samples,
)
from fedlora.model.sample_groups import samples_of
from fedlora.model.wide import computing_in


def test_what_is_computed_in_a_wide_dtype_in_one_thread_is_not_in_another() -> None:
    begun, seen = threading.Event(), threading.Event()
    dtypes = list[torch.dtype]()

    def other() -> None:
        begun.wait()
        dtypes.extend([torch.get_default_dtype(), torch.ones(1).dtype, (torch.arange(2) / 3).dtype])
        seen.set()

    thread = threading.Thread(target=other)
    thread.start()
    with computing_in([], torch.float64):
        begun.set()
        seen.wait()
        for made in (
            *(torch.ones(1), torch.zeros(2), torch.tensor([[1.5]]), torch.full((1,), -1e308)),
            *(torch.arange(2) / 3, torch.arange(0.0, 1.0, 0.5), torch.ones(1) * 2),
        ):
            assert made.dtype == torch.float64
            assert made.isfinite().all()
        assert torch.tensor([1, 2]).dtype == torch.arange(3).dtype == torch.int64
    thread.join()
    assert dtypes == [torch.float32] * 3


def test_what_is_known_of_a_model_is_forgotten_with_it(tmp_path: Path) -> None:
    import gc
    import weakref

    from fedlora.model.per_model import PerModel

    made = list[int]()
    known: PerModel[int] = PerModel(lambda model: made.append(0) or len(made))
    model = torch.nn.Linear(1, 1)
    assert known(model) == known(model) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert known(torch.nn.Linear(1, 1)) == 2


def test_a_layer_computed_again_in_another_thread_attends_to_what_it_attended_to() -> None:
    client_rows, samples = ClientRows(), samples_of([3, 4], [0, 0])
    with attending(samples, client_rows):
        _, again = recomputing(client_rows)
    seen = list[object]()

    def backward() -> None:
        with again:
            seen.append(running_samples())
        with pytest.raises(PackingError, match="no packed pass is running"):
            running_samples()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert seen == [samples]
