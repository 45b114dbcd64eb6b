"""Where a model keeps a fact: causal tracing, by what a state, an MLP or an attention gives at one token."""
