"""Files on disk: atomic writes, JSON lines with digests, a cache of tensors, files of matrices."""
