"""Images and text, from files that are already there; nothing is downloaded.

``images`` reads sets of labelled images, ``batches`` makes repeatable batches of them, ``text`` cuts texts into tokens.
"""
