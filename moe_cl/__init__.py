"""Contrastive and self-distillation pretraining of vision encoders with sparse experts."""

__version__ = "0.1.0"
