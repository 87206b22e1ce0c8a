"""The frozen backbone and what is attached to it: `clip.create_model`, the tokenizer, the adapters."""
