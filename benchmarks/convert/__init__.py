"""Files of the original implementations, read into ours."""
