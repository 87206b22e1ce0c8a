"""What a person sees of an evaluation: pictures, figures, the report page, W&B. Nothing in engine itself imports it."""
