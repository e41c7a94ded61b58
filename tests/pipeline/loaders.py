"""Loaders with options of `LoaderConfig` and of the loader itself side by side."""

from dataclasses import fields

from pipeline.loader import LoaderConfig, ViewLoader, center_crop_batches

NAMES = {field.name for field in fields(LoaderConfig)}


def split(options):
    """(configuration, remaining options); one thread unless `workers` says otherwise."""
    config = LoaderConfig(**{"workers": 1} | {name: value for name, value in options.items() if name in NAMES})
    return config, {name: value for name, value in options.items() if name not in NAMES}


def view_loader(shards, augment, **options):
    config, others = split(options)
    return ViewLoader(shards, augment, config, **others)


def center_crops(shards, augment, samples, **options):
    config, others = split(options)
    return center_crop_batches(shards, augment, samples, config, **others)
