"""Readers of published data sets; the data-set, latent and pool stores; the streamer. Knows nothing of flows and stages."""
