"""Every recipe in export/recipes exports, passes parity, and stands in the table."""

from pathlib import Path

import pytest

from bca_deploy.bundle.read import Bundle
from bca_deploy.exporter import pipeline
from bca_deploy.exporter.plan import layer_source, load_checkpoint, make_plan
from bca_deploy.exporter.recipe import read_recipe
from bca_deploy.progress import Silent
from bca_deploy.spec import layer_signature

RECIPES = sorted((Path(__file__).parents[2] / "export" / "recipes").glob("*.toml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_exports_and_passes_parity(path: Path, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    checkpoint = load_checkpoint(recipe, None, None)
    verdicts = pipeline.run(make_plan(recipe, lambda: layer_source(recipe, checkpoint), tmp_path / "m"), Silent())
    assert [verdict.model for verdict in verdicts if "." not in verdict.model] == list(recipe.precision)
    with Bundle.open(tmp_path / "m") as bundle:
        assert all(model.parity.passed and model.parity.cases >= 40 for model in bundle.manifest.models)
        assert bundle.manifest.signature == layer_signature(checkpoint.spec, recipe.interface, recipe.ranges)


def test_there_are_at_least_five_recipes_and_each_says_what_it_is_for() -> None:
    assert len(RECIPES) >= 5
    assert all(len(read_recipe(path).description) > 20 for path in RECIPES)


def test_every_recipe_has_its_measured_row(repository: Path) -> None:
    measured = (repository / "export" / "README.md").read_text(encoding="utf-8").split("<!-- measured -->")[1]
    assert all(f"| {path.stem} |" in measured for path in RECIPES)
