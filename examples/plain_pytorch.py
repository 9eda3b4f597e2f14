"""Train a small network on a pool with only PyTorch; run it again to resume, even in the middle of an epoch.

python plain_pytorch.py POOL --test TEST.npz --epochs 30; TEST.npz contains images, uint8 (N, H, W, C), and labels (N,).
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, pad

import lsmix

parser = argparse.ArgumentParser()
parser.add_argument("pool", help="folder or URL")
parser.add_argument("--test", type=Path)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--state", type=Path, default=Path("state.pt"), help="checkpoint to write and to resume from")
parser.add_argument("--stop-after", type=int, help="end this session after this number of batches")
args = parser.parse_args()
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pool = lsmix.open_pool(args.pool)
loader = lsmix.PoolLoader(pool, args.batch_size, labels="soft", copies="cycle")  # another copy in each epoch
layers, sizes = [], (pool.image_shape[2], 64, 128, 256)
for inputs, outputs in itertools.pairwise(sizes):
    layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, len(pool.class_names))).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
parts = {"model": model, "optimizer": optimizer, "loader": loader}
if args.state.exists():
    states = torch.load(args.state, weights_only=True)
    torch.set_rng_state(states.pop("random"))
    for name, state in states.items():
        parts[name].load_state_dict(state)
for epoch in range(loader.epoch, args.epochs)[: 1 if args.stop_after else None]:
    loader.set_epoch(epoch)
    losses, started = [], time.perf_counter()
    for images, target in itertools.islice(loader, args.stop_after):  # uint8 (B, C, H, W), float32 (B, classes)
        (top, left), (height, width) = torch.randint(5, (2,)).tolist(), images.shape[2:]
        x = pad(images.to(device) / 255, (2, 2, 2, 2))[:, :, top : top + height, left : left + width]
        x = torch.where((torch.rand(len(x), 1, 1, 1) < 0.5).to(device), x.flip(3), x)  # not for digits
        loss = cross_entropy(model.train()(x), target.to(device))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    rate = len(losses) * args.batch_size / (time.perf_counter() - started)
    print(f"epoch {epoch + 1}:", f"loss {np.mean(losses):.4f}, {rate:,.0f} images/s" if losses else "done")
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"random": torch.get_rng_state(), **states}, args.state)
if args.test:
    test, guesses = np.load(args.test), []
    for batch in torch.from_numpy(test["images"]).permute(0, 3, 1, 2).split(1000):
        guesses += model.eval()(batch.to(device) / 255).argmax(1).tolist()
    print(f"test error {100 * np.mean(guesses != test['labels']):.2f} %")
