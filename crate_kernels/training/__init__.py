"""Training of CRATE models: ``crate-kernels train``, ``train-mae``, ``train-dino``, ``train-text``.

``engine`` is the loop, on one rank or several; ``classifier``, ``pretrain`` with ``mae`` and ``dino``, and ``text`` say
what is trained on and what the loss is. ``config`` holds what their options have in common and those of ``train``,
``data`` reads images, ``checkpoints`` keeps the state on disk, ``speed`` times a model against the reference backend.
"""
