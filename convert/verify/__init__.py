"""An artifact opened again and checked: bytes, tensors, settings, errors against the source."""
