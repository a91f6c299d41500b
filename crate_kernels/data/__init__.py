"""Images and text from files that already exist. Nothing is downloaded.

``images`` reads sets of labeled images, and ``batches`` makes repeatable batches of them. ``text`` cuts texts into
tokens. ``prepare_text`` writes the documents of ``text_files`` as shards of tokens, and ``text_shards`` reads these
shards. ``prepare_images`` and ``image_shards`` do the same for images. ``order`` gives the order of the samples.
``parts`` divides the work of both preparations.
"""
