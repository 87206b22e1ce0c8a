"""What a person sees of an evaluation: pictures, figures, pages, tables, W&B; it computes no numbers."""
