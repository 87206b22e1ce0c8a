"""What tests share: real commands (commands), a trained run of each kind (trained), small models and data."""
