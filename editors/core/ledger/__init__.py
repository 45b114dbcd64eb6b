"""The ordered sum of patches on one model: its entries, how it is added up, and how an entry is undone bit for bit."""
