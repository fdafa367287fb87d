"""Programs beside the product: they import ``opensora``, never the reverse."""
