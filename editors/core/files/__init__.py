"""What lies on the disk: whole or not at all, line by line, as tensors, as one matrix."""
