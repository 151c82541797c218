"""Complete sets of settings by name: `--recipe NAME`. docs/recipes.md gives the reasons."""

from pathlib import Path

from model.config import ModelConfig, OptimConfig
from pipelines.augment import ColorJitter, HorizontalFlip, RandomResizedCrop
from pipelines.config import DataConfig
from tools.run.config import Config

DEMO_DATA = Path(__file__).parents[2] / "data" / "demo"

RECIPES = {
    "demo": Config(
        recipe="demo",
        data=DataConfig(train=str(DEMO_DATA), valid=str(DEMO_DATA), crop=RandomResizedCrop(scale=(0.5, 1.0))),
        model=ModelConfig(ema_decay=0.98),
        optim=OptimConfig(lr=0.02, reference_batch_size=16),
        epochs=4,
        batch_size=16,  # such a small data set needs many steps rather than large ones
        image_size=48,
    ),
    "paper": Config(
        recipe="paper",
        data=DataConfig(augment=(HorizontalFlip(), ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4))),
        model=ModelConfig(dropout=0.4, label_smoothing=0.0, ema_decay=0.99999),
        optim=OptimConfig(lr=0.01, reference_batch_size=32, weight_decay=2e-4, warmup_epochs=0),
        epochs=60,
        batch_size=32,
    ),
    "imagenet": Config(
        recipe="imagenet",
        data=DataConfig(size_schedule=("1:160", "72:192")),
        model=ModelConfig(ema_decay=0.9998),
        optim=OptimConfig(lr=0.125, reference_batch_size=256, weight_decay=5e-5, warmup_epochs=5),
        epochs=90,
        batch_size=128,  # on eight GPUs: 1,024 images per step
    ),
    "resnet50": Config(
        recipe="resnet50",
        model=ModelConfig(arch="torchvision.models:resnet50", ema_decay=0.9998),
        optim=OptimConfig(lr=0.1, reference_batch_size=256, weight_decay=1e-4, warmup_epochs=5),
        epochs=90,
        batch_size=128,  # on eight GPUs: 1,024 images per step
    ),
    "finetune": Config(
        recipe="finetune",
        data=DataConfig(crop=RandomResizedCrop(scale=(0.35, 1.0))),
        model=ModelConfig(aux_logits=False, ema_decay=0.99),
        optim=OptimConfig(lr=0.02, reference_batch_size=256, weight_decay=5e-5),
        epochs=30,  # batch and warm-up follow the size of the data set, which is often small
    ),
}
