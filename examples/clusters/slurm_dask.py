"""Run a recipe with encode and mix on Dask workers that are SLURM jobs (``pip install dask-jobqueue``).

Run it in a job of its own with a GPU, or where such programs may run for hours: flow and classifiers are trained here.
"""

import argparse

from dask_jobqueue import SLURMCluster

import lsmix

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("recipe")
parser.add_argument("--workspace", default="runs", help="a folder that all machines see under this path, or a URL")
parser.add_argument("--jobs", type=int, default=4, help="SLURM jobs, a worker each")
parser.add_argument("--cores", type=int, default=8, help="of a job")
parser.add_argument("--memory", default="16GiB", help="of a job")
parser.add_argument("--walltime", default="04:00:00", help="of a job; a worker goes in time, and its shards are kept")
parser.add_argument("--lifetime", default="230m", help="of a worker, below the wall time")
parser.add_argument("--interface", help="network interface that all machines share, such as ib0")
parser.add_argument("--sbatch", action="append", default=[], help="another option of sbatch, such as --gres=gpu:1")


def main() -> None:
    options = parser.parse_args()
    lsmix.run(
        options.recipe, stage="train-glow", workspace=options.workspace
    )  # before there are workers to wait for it
    with SLURMCluster(
        cores=1,  # a worker computes one shard at a time …
        processes=1,
        job_cpu=options.cores,  # … with the threads of all its cores
        job_script_prologue=[f"export OMP_NUM_THREADS={options.cores}"],
        memory=options.memory,
        walltime=options.walltime,
        worker_extra_args=["--lifetime", options.lifetime, "--lifetime-stagger", "5m", "--no-dashboard"],
        job_extra_directives=options.sbatch,
        interface=options.interface,
        scheduler_options={"dashboard_address": "127.0.0.1:8787"},  # it asks nobody for a password
    ) as cluster:
        cluster.scale(jobs=options.jobs)
        lsmix.run(options.recipe, stage="mix", workspace=options.workspace, scheduler=cluster.scheduler_address)
    result = lsmix.run(options.recipe, workspace=options.workspace)  # the rest, without workers that wait for it
    print(f"report: {result.report}")


if __name__ == "__main__":
    main()
