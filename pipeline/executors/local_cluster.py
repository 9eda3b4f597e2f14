"""A Dask cluster of our own on this machine: the scheduler in this process, each worker a process, all on loopback.

Each worker gets a graphics card of its own through CUDA_VISIBLE_DEVICES where there are any, and its share of the
processor's threads.
"""

import os
from typing import Any

__all__ = ["start_cluster", "worker_environment"]

_LOOPBACK = "127.0.0.1"


def start_cluster(workers: int, device: str) -> Any:
    """Return a running cluster of ``workers`` processes with a thread each; close it when done.

    Args:
        workers: number of processes, at least 1.
        device: where they compute, resolved: "cpu", "cuda" or "cuda:N".
    """
    from distributed import Nanny, Scheduler, SpecCluster

    # Workers share one machine's memory whose size says nothing of what others use; a shard's memory is bounded anyway.
    options = {"nthreads": 1, "host": _LOOPBACK, "dashboard": False, "memory_limit": 0, "silence_logs": 50}
    return SpecCluster(
        workers={
            worker: {"cls": Nanny, "options": {**options, "env": worker_environment(worker, workers, device)}}
            for worker in range(workers)
        },
        # Loopback only: neither the scheduler nor its dashboard asks anybody for a password.
        scheduler={
            "cls": Scheduler,
            "options": {"host": _LOOPBACK, "port": 0, "dashboard": True, "dashboard_address": f"{_LOOPBACK}:0"},
        },
        silence_logs=50,  # what fails is told once, at the end, and without a traceback
    )


def worker_environment(worker: int, workers: int, device: str) -> dict[str, str]:
    """Return what the environment of one of ``workers`` processes says: its threads, and its graphics card.

    Cards are dealt out in turn, those that CUDA_VISIBLE_DEVICES names if it is set; "cuda:N" gives all workers card N.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = str(max(1, cores // workers))
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    if device.startswith("cuda"):
        cards = _cards()
        _, _, index = device.partition(":")
        wanted["CUDA_VISIBLE_DEVICES"] = cards[int(index) if index else worker % len(cards)]
    return wanted


def _cards() -> list[str]:
    """Return the names of the graphics cards that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return visible.split(",")
    import torch

    return [str(card) for card in range(torch.cuda.device_count())]
