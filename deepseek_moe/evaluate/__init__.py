"""What a model scores: log-likelihoods, and lm-evaluation-harness on them."""
