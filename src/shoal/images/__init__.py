"""Images: references, archives in, layers kept by content.

The door of this room. `ImageStore` is the whole of it for the server; `LayerStore` is what it needs
from below.
"""

from __future__ import annotations

from shoal.images.formats import FORMATS
from shoal.images.layers import LayerStore, UnpackedLayer
from shoal.images.reference import Reference
from shoal.images.store import ImageStore, Limits

__all__ = ["FORMATS", "ImageStore", "LayerStore", "Limits", "Reference", "UnpackedLayer"]
