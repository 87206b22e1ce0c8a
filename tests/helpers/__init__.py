"""What tests share: real commands (commands) and weight files (weights)."""
