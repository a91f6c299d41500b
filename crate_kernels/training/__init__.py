"""Training of CRATE models: ``crate-kernels train``, ``train-mae``, ``train-dino``, ``train-text``.

``engine`` is the training loop, on one rank or several. ``classifier``, ``mae`` and ``dino`` (both on ``pretrain``) and
``text`` define the data and the loss. ``config`` holds the options that all commands share and those of ``train``.
``speed`` compares the speed of a model with the reference backend.
"""
