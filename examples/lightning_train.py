"""Train a small network on a pool with Lightning, on all available GPUs: python lightning_train.py POOL --epochs 30.

The loader gives each rank its own part of every epoch, so Lightning must not add a distributed sampler.
"""

import argparse
import time

import lightning
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lsmix

parser = argparse.ArgumentParser()
parser.add_argument("pool", help="folder or URL")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=128)
args = parser.parse_args()


class Classifier(lightning.LightningModule):
    def __init__(self, channels, classes):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(channels, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes)),
        )

    def train_dataloader(self):  # called in each rank; the loader selects the part of that rank
        self.loader = lsmix.PoolLoader(args.pool, args.batch_size, copies="cycle", epoch=self.current_epoch)
        return self.loader

    def on_train_epoch_start(self):
        self.loader.set_epoch(self.current_epoch)
        self.started, self.losses = time.perf_counter(), []

    def training_step(self, batch):
        x = batch.images / 255  # (B, C, H, W)
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)  # not for digits
        logits = self.layers(x)
        first, second = (cross_entropy(logits, label, reduction="none") for label in (batch.label_a, batch.label_b))
        loss = torch.lerp(first, second, batch.share_b).mean()  # each label by its share
        self.losses.append(loss.item())
        return loss

    def on_train_epoch_end(self):
        rate = len(self.losses) * args.batch_size * self.trainer.world_size / (time.perf_counter() - self.started)
        loss = sum(self.losses) / len(self.losses)
        self.print(f"epoch {self.current_epoch + 1}: loss {loss:.4f}, {rate:,.0f} images/s")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05)


pool = lsmix.open_pool(args.pool)
trainer = lightning.Trainer(max_epochs=args.epochs, use_distributed_sampler=False)
trainer.fit(Classifier(pool.image_shape[2], len(pool.class_names)))
