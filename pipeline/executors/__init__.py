"""Where shards are made: in this process, on Dask, or as one part of a job array. Same bytes out of each."""
