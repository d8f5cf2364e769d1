"""Problems, prompts, tokenizers and judges."""
