"""Recipes are complete, flags override them, and the documents list them."""

import dataclasses
from pathlib import Path

import pytest

from tools.run.cli import parse
from tools.run.config import Config
from tools.run.recipes import RECIPES

DATA = ["--data.train", "a.tar", "--data.valid", "b.tar"]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RECIPES)
def test_every_flag_overrides_and_all_else_is_the_recipes(name: str) -> None:
    recipe = RECIPES[name]
    init = ["--init-from", "weights.pth"] if name == "finetune" else []
    config = parse(["--recipe", name, *DATA, *init, "--optim.lr", "0.5", "--data.crop.scale", "0.1", "0.2"])
    assert config.recipe == name
    assert config.optim == dataclasses.replace(recipe.optim, lr=0.5)
    assert config.data.crop.scale == (0.1, 0.2)
    for field in dataclasses.fields(Config):
        if field.name not in ("optim", "data", "init_from"):
            assert getattr(config, field.name) == getattr(recipe, field.name)
    assert config.data.size_schedule == recipe.data.size_schedule
    assert config.data.augment == recipe.data.augment


def test_without_data_the_demo_runs() -> None:
    assert parse([]) == RECIPES["demo"]
    assert parse(["--epochs", "2"]) == dataclasses.replace(RECIPES["demo"], epochs=2)
    assert parse(["--recipe=demo"]) == RECIPES["demo"]
    assert parse(DATA).recipe is None


@pytest.mark.parametrize("name", RECIPES)
def test_each_has_its_place_in_the_documents(name: str) -> None:
    assert f"| `{name}` |" in (ROOT / "README.md").read_text()
    assert f"| `{name}` |" in (ROOT / "docs" / "recipes.md").read_text()
