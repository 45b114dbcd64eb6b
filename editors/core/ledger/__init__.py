"""The ordered sum of patches on one model: what is in it, how it is added up, and how it is taken back bit for bit."""
