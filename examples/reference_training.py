"""A plain training loop in which this project's loader replaces torchvision's ImageFolder and torch's DataLoader.

    shards demo shards/demo
    python examples/reference_training.py shards/demo

The replaced lines stand in comments that begin with `was:`. All other lines are those of any PyTorch training script.
"""

import argparse
import dataclasses

import torch
from torch import nn

from model.googlenet import GoogLeNet
from pipelines.build import LoaderSpec, build_loader
from pipelines.config import DataConfig
from pipelines.loader import Loader


def train_one_epoch(model: nn.Module, loader: Loader, optimizer: torch.optim.Optimizer) -> float:
    """Returns the mean loss of the epoch."""
    model.train()
    total = torch.zeros(())
    for batch in loader:  # was: for image, target in loader:
        image, target = batch["image"], batch["target"]  # was: image.to(device), target.to(device)
        loss = nn.functional.cross_entropy(model(image), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = total.to(loss.device) + loss.detach()
    return float(total) / len(loader)


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Loader) -> float:
    """Returns the accuracy, from 0 to 1."""
    model.eval()
    correct = count = 0
    for batch in loader:  # was: for image, target in loader:
        image, target = batch["image"], batch["target"]  # was: image.to(device), target.to(device)
        correct += int((model(image).argmax(1) == target).sum())
        count += len(target)
    return correct / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder of shards with the splits train and valid")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # was: normalize = [ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    # was: train_set = ImageFolder("photos/train", Compose([RandomResizedCrop(64), RandomHorizontalFlip(), *normalize]))
    # was: valid_set = ImageFolder("photos/valid", Compose([Resize(73), CenterCrop(64), *normalize]))
    # was: train_loader = DataLoader(train_set, 32, shuffle=True, drop_last=True, num_workers=8, pin_memory=True)
    # was: valid_loader = DataLoader(valid_set, 32, num_workers=8, pin_memory=True)
    # was: classes = train_set.classes
    data = DataConfig(train=options.shards, valid=options.shards)
    train = LoaderSpec(split="train", batch_size=options.batch_size, image_size=options.image_size, device=device)
    train_loader = build_loader(data, train)
    valid_loader = build_loader(data, dataclasses.replace(train, split="valid"))
    classes = data.open_shards("train").classes or ()

    # torchvision.models.googlenet or any other network will do.
    model = GoogLeNet(len(classes), aux_logits=False).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for epoch in range(options.epochs):
        loss = train_one_epoch(model, train_loader, optimizer)
        accuracy = evaluate(model, valid_loader)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, validation accuracy {100 * accuracy:.1f} %", flush=True)


if __name__ == "__main__":
    main()
