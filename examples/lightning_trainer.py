"""Train a CRATE classifier with Lightning on 5,000 digits that come with a dependency.

    python examples/lightning_trainer.py --epochs 5

It needs ``pip install '.[train]' lightning``. Lightning's strategies and checkpoints work as usual.
"""

import argparse

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from crate_kernels.data.images import ImageSource, load
from crate_kernels.models import CRATE


class Classifier(lightning.LightningModule):
    def __init__(self, learning_rate=3e-3, **sizes):
        super().__init__()
        self.save_hyperparameters()
        self.model = CRATE(**sizes)

    def training_step(self, batch, number):
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, number):
        self.log("accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", default="runs/lightning")
    args = parser.parse_args(arguments)
    lightning.seed_everything(0)

    data, loaders = load(ImageSource("mnist5k")), []
    for split in (data.train, data.test):
        images = (torch.from_numpy(split.images).unsqueeze(1) / 255 - data.mean[0]) / data.std[0]
        labels = torch.from_numpy(split.labels)
        loaders.append(DataLoader(TensorDataset(images, labels), batch_size=100, shuffle=split is data.train))
    sizes = dict(dim=48, depth=2, heads=2, dim_head=24)
    classifier = Classifier(image_size=28, patch_size=7, channels=1, num_classes=10, pool="mean", **sizes)
    trainer = lightning.Trainer(max_epochs=args.epochs, default_root_dir=args.output, logger=False)
    trainer.fit(classifier, *loaders)
    accuracy = trainer.callback_metrics["accuracy"].item()
    return accuracy


if __name__ == "__main__":
    print(f"{100 * main():.1f} % of the test digits")
