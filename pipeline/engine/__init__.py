"""Running stages: cache keys, shards, executors, progress and status."""
