"""Second moments of a model's keys: collected in one pass over texts, and cached under all that they depend on."""
