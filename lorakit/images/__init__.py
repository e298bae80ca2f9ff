"""Adapters of picture models: trained on diffusers pipelines, and pictures made with them.

::

    base = load_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")
    spec = LoRASpec(targets=picture_targets(base, "attention"))
    plan = PicturesPlan(PicturesSpec("photos", trigger="sks style"))
    trainer = picture_trainer(base, plan, spec, TrainSettings(steps=500), "runs/style")
    (result,) = train_pictures([trainer])

    handle = attach(base.model, load_adapter(result.adapter), "style")
    pictures = draw(base, handle, [Cell("sks style, a house", seed=1, mix={"style": 0.7})])

Read in this order: ``families`` (what differs between models), ``base`` (a pipeline as a frozen
base), ``pictures`` and ``buckets`` (what is trained on, at which size), ``cache`` (latents and
embeddings on the disk), ``noise`` (what is learnt), ``data`` and ``task`` (examples and their
losses, for the loop of ``lorakit.train``), ``training`` (a run), ``drawing`` (pictures) and
``sheets``.
"""
