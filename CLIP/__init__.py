"""The frozen backbone (`clip.create_model`), its tokenizer, and the adapters."""
