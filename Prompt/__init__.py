"""Prompts: learnable contexts (CoOp), and the choice between them and fixed sentences (promptChooser)."""
