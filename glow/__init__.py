"""The Glow flow: layers, latent order, training, checkpoints, and mixing in latent space."""
