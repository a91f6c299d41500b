"""Train a CRATE image classifier on a folder of your own images, with a plain PyTorch loop.

The folder contains one folder per class: ``FOLDER/cat/1.jpg``, ``FOLDER/dog/7.png``, ... Run it with

    python examples/train_your_own_images.py FOLDER

``crate-kernels train --data FOLDER`` does the same with augmentation, checkpoints and a report.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, random_split
from torchvision import transforms
from torchvision.datasets import ImageFolder

from crate_kernels.models import CRATE, load_model


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64, help="pixels per side that the model sees")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("my_model.safetensors"))
    args = parser.parse_args(arguments)
    torch.manual_seed(0)

    to_input = transforms.Compose(
        [transforms.Resize((args.size, args.size)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.25] * 3)]
    )
    images = ImageFolder(args.folder, to_input)
    training, test = random_split(images, [0.8, 0.2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The kernels are chosen automatically. No option is needed.
    sizes = dict(dim=96, depth=4, heads=4, dim_head=24, pool="mean")
    model = CRATE(image_size=args.size, patch_size=8, num_classes=len(images.classes), **sizes).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(args.epochs):
        for x, labels in DataLoader(training, batch_size=32, shuffle=True):
            loss = torch.nn.functional.cross_entropy(model(x.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")

    model.save(args.output, classes=images.classes)
    model = load_model(args.output).to(device).prepare_for_inference()
    with torch.no_grad():
        right = sum((model(x.to(device)).argmax(-1).cpu() == labels).sum() for x, labels in DataLoader(test, 32))
    print(f"test accuracy {right / len(test):.2f} on {len(test)} images; model in {args.output}")
    return float(right / len(test))


if __name__ == "__main__":
    main()
