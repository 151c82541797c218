"""Complete sets of settings by name: `--recipe NAME`. docs/recipes.md says why each is as it is."""

from pathlib import Path

from model.optim import OptimConfig
from pipelines import DataConfig
from pipelines.augment import RandomResizedCrop
from training.config import Config, ModelConfig

DEMO_DATA = Path(__file__).parent.parent / "data" / "demo"

RECIPES = {
    "demo": Config(
        recipe="demo",
        data=DataConfig(train=str(DEMO_DATA), valid=str(DEMO_DATA), crop=RandomResizedCrop(scale=(0.5, 1.0))),
        model=ModelConfig(ema_decay=0.98),
        optim=OptimConfig(lr=0.02, reference_batch_size=16),
        epochs=4,
        batch_size=16,  # so small a set needs many steps more than it needs large ones
        image_size=48,
    ),
}
