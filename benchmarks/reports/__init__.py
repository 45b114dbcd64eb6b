"""What is shown of finished runs: tables, charts, and the page; a report never runs a model."""
