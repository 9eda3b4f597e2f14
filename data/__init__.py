"""Readers of published data sets, stores for data sets, latents and pools, and loaders. Must not import flows or stages."""
