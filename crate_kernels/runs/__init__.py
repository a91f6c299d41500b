"""The folder of a training run: its checkpoints, its logs, and the model in it.

Training writes these folders; analysis reads them, and training reads them again to resume or to fine-tune.
"""
