"""How good a model still is: perplexity, KL divergence, top-1 agreement; under a stated protocol."""
