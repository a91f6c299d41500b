"""Every recipe parses, builds its model, and runs end to end on small real data."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crate_kernels import cli
from crate_kernels.training import classifier, config, dino, mae, recipes, text
from crate_kernels.training.command import add_arguments

TRAINERS = {
    trainer.command: trainer for trainer in (classifier.Trainer, mae.MAETrainer, dino.DINOTrainer, text.TextTrainer)
}
RECIPES = pytest.mark.parametrize("name", recipes.names())


def settings(command, *arguments):
    """The settings that the command line's parser and the trainer read from the arguments."""
    trainer = TRAINERS[command]
    parser = argparse.ArgumentParser()
    add_arguments(parser, trainer)
    args = parser.parse_args(list(arguments), argparse.Namespace(command=command))
    return trainer.resolve(config.given(args, trainer.options))


def full_model(command, chosen, classes):
    """The full-size model as the trainer builds it, without the data and without memory."""
    images = SimpleNamespace(channels=3, classes=range(classes), image_size=None)
    trainer = SimpleNamespace(settings=chosen, data=images, size=(224, 224), device="meta")
    with torch.device("meta"):
        if command == "train":
            return classifier.build_model(chosen, images)
        if command == "train-text":
            # GPT-2's 50,257 tokens and one mask token, rounded up to a multiple of 64.
            return text.TASKS[chosen.model].build_model(
                SimpleNamespace(settings=chosen, corpus=SimpleNamespace(vocab_size=50304))
            )
        return TRAINERS[command].build(trainer)


@RECIPES
def test_the_full_size_builds_with_the_parameters_that_the_file_says(name):
    recipe = recipes.read(name)
    source = "--text" if recipe.command == "train-text" else "--data"
    chosen = settings(recipe.command, "--recipe", name, source, "somewhere")
    model = full_model(recipe.command, chosen, classes=19167 if "21k" in name else 1000)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == recipe.parameters
    assert chosen.output == f"runs/{name}"
    guide = Path(__file__).parents[2].joinpath("docs", "recipes.md").read_text()
    row = next(line for line in guide.splitlines() if line.startswith(f"| `{name}` | `{recipe.command}` |"))
    length = f"{chosen.steps:,} steps" if recipe.command == "train-text" else f"{chosen.epochs} epochs"
    assert row.endswith(f"| {length} | {chosen.batch_size} | {recipe.source} |")
    assert f"| {recipe.parameters:,} |" in row


def smoke_forms():
    """One recipe for each smoke run. Recipes for several sizes of a model have the same smoke run."""
    forms = {}
    for name in recipes.names():
        command = recipes.read(name).command
        options = recipes.options(name, command, TRAINERS[command].options, smoke=True)
        forms.setdefault((command, repr(sorted(options.items()))), name)
    return list(forms.values())


@pytest.mark.parametrize("name", smoke_forms())
def test_the_smoke_form_learns_on_real_data(name, tmp_path):
    recipe = recipes.read(name)
    command = [recipe.command, "--recipe", name, "--smoke", "--output", str(tmp_path), "--workers", "0"]
    assert cli.main(command[:-2] if recipe.command == "train-text" else command) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) > 3
    assert losses[-1] < 0.98 * losses[0]
    ran = json.loads((tmp_path / "summary.json").read_text())["config"]
    assert {key: ran[key] for key in recipe.training | recipe.smoke} == recipe.training | recipe.smoke


def test_the_command_line_goes_before_the_file():
    chosen = settings("train", "--recipe", "crate_base_imagenet1k", "--data", "somewhere", "--epochs", "3")
    assert (chosen.epochs, chosen.optimizer, chosen.data) == (3, "lion", "somewhere")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    content = Path(recipes.__file__).with_name("mae_base_imagenet1k.toml").read_text()
    path.write_text(content.replace("epochs = 800 ", "epochs = 801 "))
    chosen = settings("train-mae", "--recipe", str(path), "--data", "somewhere")
    assert (chosen.epochs, chosen.output) == (801, "runs/mine")


def test_the_second_moment_of_a_recipe_reaches_the_optimizer(tmp_path):
    chosen = settings("train", "--recipe", "crate_alpha_base_imagenet21k", "--smoke")
    trainer = classifier.Trainer(chosen, tmp_path, torch.device("cpu"))
    assert trainer.make_optimizer().param_groups[0]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("epochs = 150", "epoch = 150"), "epoch is not an option of crate-kernels train"),
        (("epochs = 150", "epochs = 1.5"), "epochs must be of type int, got 1.5"),
        (("epochs = 150", "epochs = true"), "epochs must be of type int, got True"),
        (("flip = 0.5", "flip = 'half'"), "flip must be of type float, got 'half'"),
        (('model = "crate_base', 'model = "crate_basis'), "model must be one of .*crate_base_patch16_224"),
        (("[smoke]", "[smock]"), "must have the keys .* and no others; see smock, smoke"),
        (("parameters = ", "parameters = '1' #"), "parameters must be of type int, got '1'"),
        (("[model]", "[model"), "is not a TOML file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, sentence):
    path = tmp_path / "mine.toml"
    content = Path(recipes.__file__).with_name("crate_base_imagenet1k.toml").read_text()
    assert change[0] in content
    path.write_text(content.replace(*change))
    with pytest.raises(ValueError, match=sentence):
        settings("train", "--recipe", str(path), "--data", "somewhere")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "--recipe", "mae_base_imagenet1k", "--smoke"), "a recipe of crate-kernels train-mae, not of train"),
        (("train", "--recipe", "crate_base_imagenet1k"), r"trains on ImageNet-1K, .*: say where with --data"),
        (("train-text", "--recipe", "gpt2_base_openwebtext"), "trains on OpenWebText .*: say where with --text"),
        (("train", "--recipe", "crate_basis"), "no such file, nor one of bert_base, .*crate_base_imagenet1k"),
        (("train", "--smoke"), "--smoke applies only with --recipe: it makes a recipe small"),
    ],
)
def test_a_command_that_does_not_fit_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(*arguments)
