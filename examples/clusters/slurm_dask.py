"""Run a recipe with encode and mix on Dask workers that are SLURM jobs (``pip install dask-jobqueue``).

This process trains the flow and the classifiers, so run it in a separate GPU job, or on a machine that allows long
runs.
"""

import argparse

from dask_jobqueue import SLURMCluster

import lsmix

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("recipe")
parser.add_argument("--workspace", default="runs", help="folder with the same path on all machines, or a URL")
parser.add_argument("--jobs", type=int, default=4, help="number of SLURM jobs, each with one worker")
parser.add_argument("--cores", type=int, default=8, help="cores per job")
parser.add_argument("--memory", default="16GiB", help="memory per job")
parser.add_argument("--walltime", default="04:00:00", help="time limit of a job")
parser.add_argument("--lifetime", default="230m", help="lifetime of a worker, below --walltime; its shards are kept")
parser.add_argument("--interface", help="network interface that connects all machines, such as ib0")
parser.add_argument("--sbatch", action="append", default=[], help="additional sbatch option, such as --gres=gpu:1")


def main() -> None:
    options = parser.parse_args()
    # Train first, so that no workers wait idle.
    lsmix.run(options.recipe, stage="train-glow", workspace=options.workspace)
    with SLURMCluster(
        cores=1,  # each worker computes one shard at a time …
        processes=1,
        job_cpu=options.cores,  # … with threads on all its cores
        job_script_prologue=[f"export OMP_NUM_THREADS={options.cores}"],
        memory=options.memory,
        walltime=options.walltime,
        worker_extra_args=["--lifetime", options.lifetime, "--lifetime-stagger", "5m", "--no-dashboard"],
        job_extra_directives=options.sbatch,
        interface=options.interface,
        scheduler_options={"dashboard_address": "127.0.0.1:8787"},  # local only: the dashboard has no password
    ) as cluster:
        cluster.scale(jobs=options.jobs)
        lsmix.run(options.recipe, stage="mix", workspace=options.workspace, scheduler=cluster.scheduler_address)
    result = lsmix.run(options.recipe, workspace=options.workspace)  # the remaining stages, without idle workers
    print(f"report: {result.report}")


if __name__ == "__main__":
    main()
