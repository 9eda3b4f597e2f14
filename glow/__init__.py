"""The Glow flow: squeeze and latent order, layers, training, checkpoints, mixing in latent space. Knows nothing of files of a data set, of stages and of Dask."""
