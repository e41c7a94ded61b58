"""All image sources, one module each."""

from .base import Source
from .folder import folder_source
from .imagenet import imagenet_sources
from .pixels import cifar_sources, stl10_sources
from .textures import textures_source
from .webdataset import webdataset_source

__all__ = [
    "Source",
    "cifar_sources",
    "folder_source",
    "imagenet_sources",
    "stl10_sources",
    "textures_source",
    "webdataset_source",
]
