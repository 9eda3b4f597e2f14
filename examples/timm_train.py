"""Train any timm model on a pool: python timm_train.py POOL --model resnet18 --epochs 30.

The images in the pool are already mixed, so timm's own MixUp and CutMix stay off; the loss uses the pool's soft labels.
"""

import argparse
import time

import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import interpolate

import lsmix

parser = argparse.ArgumentParser()
parser.add_argument("pool", help="folder or URL")
parser.add_argument("--model", default="resnet18")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--size", type=int, default=64, help="height and width of the model's input in pixels")
parser.add_argument("--weights", default="model.pt", help="file for the trained weights")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pool = lsmix.open_pool(args.pool)
loader = lsmix.PoolLoader(pool, args.batch_size, labels="soft", copies="cycle")  # another copy in each epoch
model = timm.create_model(args.model, num_classes=len(pool.class_names), in_chans=pool.image_shape[2]).to(device)
optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs, lr_min=1e-5)
criterion = SoftTargetCrossEntropy()

model.train()
for epoch in range(args.epochs):
    loader.set_epoch(epoch)
    losses, started = [], time.perf_counter()
    for images, target in loader:  # uint8 (B, C, H, W), float32 (B, classes)
        x = (images.to(device) / 255 - 0.5) / 0.25
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x.flip(3), x)  # not for digits
        loss = criterion(model(interpolate(x, args.size, mode="bilinear")), target.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    scheduler.step(epoch + 1)
    rate = len(losses) * args.batch_size / (time.perf_counter() - started)
    print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}, {rate:,.0f} images/s")
torch.save(model.state_dict(), args.weights)
