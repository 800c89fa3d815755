"""VTA: quantisation of models for it (more parts beside this file)."""
