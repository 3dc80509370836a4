"""Batches on their way from a worker to the main process.

A worker packs each batch by itself. The DataLoader would do so in a thread that only prints its
errors, such as a full /dev/shm, and the main process would wait for the batch without end. A packed
batch is a message that a pipe takes as a whole or not at all: a worker that is killed while it
sends one leaves no part of it, for whose rest the main process would wait.
"""

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data.datasets import SampleDataset
from data.worker_limits import exhausted
from util.dist import UserError


class PackedBatch:
    """A batch in shared memory: `message` opens it, once, while its worker lives."""

    def __init__(self, batch: dict):
        """Move the batch to shared memory. Raises RuntimeError and OSError if that fails.

        Numbers per sample travel with the description of the batch: each tensor in shared memory
        costs a connection to the worker.
        """
        described = {}
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.dim() == 1:
                value = value.numpy()
            described[key] = value
        description = torch.frombuffer(ForkingPickler.dumps(described), dtype=torch.uint8)
        self.message = bytes(ForkingPickler.dumps(description))

    def unpack(self) -> dict:
        """Return the batch. Raises OSError or EOFError if its worker is dead."""
        description: Tensor = ForkingPickler.loads(self.message)
        batch = ForkingPickler.loads(description.numpy().data)
        for key, value in batch.items():
            if isinstance(value, np.ndarray):
                batch[key] = torch.from_numpy(value)
        return batch

    def pin_memory(self) -> dict:
        """Return the batch in pinned memory. A DataLoader calls this in its thread for that."""
        batch = self.unpack()
        for key, value in batch.items():
            if isinstance(value, Tensor):
                batch[key] = value.pin_memory()
        return batch


class WorkerError:
    """What a worker returns in place of a batch: why the run must end, in one line."""

    def __init__(self, message: str):
        self.message = message


class BatchReader(Dataset):
    """Reads whole batches: `reader[keys]` reads the samples of a batch and collates them."""

    def __init__(self, dataset: SampleDataset, collate_fn: Callable[[list[dict]], dict]):
        self.dataset = dataset
        self.collate_fn = collate_fn

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict | PackedBatch | WorkerError:
        """Return the batch of samples (epoch, index), packed if this process is a worker."""
        if get_worker_info() is None:
            return self._read(keys)
        try:
            return PackedBatch(self._read(keys))
        except UserError as error:
            return WorkerError(str(error))
        except (MemoryError, OSError, RuntimeError) as error:
            reason = exhausted(error)
            if not reason:
                raise
            return WorkerError(reason)

    def _read(self, keys: list[tuple[int, int]]) -> dict:
        return self.collate_fn([self.dataset[key] for key in keys])
