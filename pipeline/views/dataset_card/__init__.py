"""The dataset card of a pool: README, licences, statistics and Croissant metadata."""
