"""Training of CRATE classifiers: ``crate-kernels train``.

``config`` holds every option and each data set's defaults, ``data`` reads images, ``loop`` trains, ``checkpoints``
keeps the state on disk, ``speed`` times a model against the reference backend, ``command`` puts them together.
``text`` trains the language models: ``crate-kernels train-text``.
"""
