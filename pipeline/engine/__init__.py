"""The engine that runs stages: resolver, runner, shards, executors, progress and status."""
