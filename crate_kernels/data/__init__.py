"""Images and text, from files that are already there; nothing is downloaded.

``images`` reads sets of labeled images, ``batches`` makes repeatable batches of them, ``text`` cuts texts into tokens.
``prepare_text`` writes the documents of ``text_files`` as shards of tokens, ``text_shards`` reads those, ``order`` says
which sample comes when. ``prepare_images`` and ``image_shards`` do the same for images. ``parts`` cuts such work up.
"""
