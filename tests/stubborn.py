"""A stage whose shards can crash their worker, as configured by a test; workers import it by name."""

import hashlib
import os
import signal
import time
from pathlib import Path

from lsmix.data.errors import DeviceMemoryError
from lsmix.pipeline.engine.shards import ShardJob


class Processor:
    """Writes one file per shard; ``config`` sets which shards crash the process, always or once, and the delay."""

    def __init__(self, job, folder, inputs, device):
        self._folder, self._config = folder, job.config

    def load(self, shard):
        time.sleep(self._config.get("seconds", 0))
        return shard

    def compute(self, shard, advance):
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
        return {f"{shard}.bin": hashlib.sha256(content).hexdigest()}, {"shards": 1}

    def close(self):
        pass


def stubborn_job(folder, **config):
    """Create a folder and return the job of this stage for it."""
    folder.mkdir(parents=True, exist_ok=True)
    return ShardJob(
        processor="stubborn:Processor",
        stage="stage",
        name="name",
        config=config,
        inputs={},
        device="cpu",
        folder=str(folder),
    )
