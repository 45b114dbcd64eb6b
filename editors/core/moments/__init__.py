"""Second moments of a model's keys: collected in one pass, named by what decides them, cached."""
