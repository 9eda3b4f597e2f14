"""A stage whose shards kill their worker as told, for the tests of executors; workers import it by name."""

import hashlib
import os
import signal
import time
from pathlib import Path

from lsmix.data.errors import DeviceMemoryError


class Worker:
    """Writes one file a shard; ``config`` says which shards kill the process, always or once, and how long one takes."""

    def __init__(self, folder, config):
        self._folder, self._config = folder, config

    def load(self, shard):
        time.sleep(self._config.get("seconds", 0))
        return shard

    def compute(self, shard):
        once = self._folder / f"killed-{shard}"
        if shard in self._config.get("once", ()) and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if shard in self._config.get("always", ()):
            os.kill(os.getpid(), signal.SIGKILL)
        if shard == self._config.get("out_of_memory"):
            raise DeviceMemoryError("card 0 is full.")
        if shard in self._config.get("raises", ()):
            raise OSError(28, "No space left on device")
        return shard

    def store(self, shard, computed):
        content = f"shard {computed}".encode()
        Path(self._folder, f"{shard}.bin").write_bytes(content)
        return {f"{shard}.bin": hashlib.sha256(content).hexdigest()}, {"shards": 1, "threads": _threads()}

    def close(self):
        pass


def _threads():
    import torch

    return [torch.get_num_threads()]


def open_worker(folder, config, inputs, device):
    return Worker(folder, config)
