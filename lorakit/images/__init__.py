"""Adapters of picture models: trained on diffusers pipelines, and pictures made with them.

::

    base = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")
    result = train_pictures(base, PictureRun(data="photos", out="runs/style"))
    cells = [Cell("a house", seed=1, mix={"style": 0.7})]
    pictures = draw(base, handle, cells)

Read in this order: ``families`` (what differs between models), ``base`` (a pipeline as a frozen
base), ``pictures`` and ``buckets`` (what is trained on, at which size), ``cache`` (latents and
embeddings on the disk), ``noise`` (what is learnt), ``data`` and ``task`` (examples and their
losses, for the loop of ``lorakit.train``), ``training`` (a run), ``drawing`` (pictures) and
``sheets``.
"""
