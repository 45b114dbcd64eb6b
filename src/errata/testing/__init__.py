"""For authors of methods: the laws that every method is held to, and tiny models to hold them on."""
